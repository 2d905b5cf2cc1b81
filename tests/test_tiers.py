"""The tiers of the tests themselves: marks on whole modules, a limit that fails, faults that still fit the source."""

import ast
from pathlib import Path
from types import SimpleNamespace

import mutations
import pytest
import tiers

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.glob("test_*.py"))


def marks(text: str) -> tuple[set[str], set[str]]:
    """Tier marks of a module: those of its pytestmark, and those that stand elsewhere in it."""
    tree = ast.parse(text)
    whole = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    named = lambda nodes: [node for each in nodes for node in ast.walk(each)
                           if isinstance(node, ast.Attribute) and node.attr in ("full", "ci")
                           and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"]
    own = named(whole)
    return {node.attr for node in own}, {node.attr for node in named([tree]) if node not in own}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_tiers_are_marks_on_whole_modules(path):
    own, elsewhere = marks(path.read_text("utf-8"))
    assert own in (set(), {"full"}, {"full", "ci"})
    assert not elsewhere


def test_a_mark_on_one_test_is_found():
    assert marks("@pytest.mark.full\ndef test():\n    pass\n") == (set(), {"full"})
    assert marks("pytestmark = [pytest.mark.full, pytest.mark.ci]\n") == ({"full", "ci"}, set())


@pytest.mark.parametrize("took, change, fails", [
    (599, {}, False), (601, {}, True), (601, dict(source="ARGS"), False), (601, dict(marks=""), False),
    (601, dict(keyword="pack"), False)])
def test_default_tests_that_take_too_long_fail(took, change, fails):
    given = dict(source="TESTPATHS", marks="not full", keyword="") | change
    config = SimpleNamespace(args_source=SimpleNamespace(name=given["source"]),
                             option=SimpleNamespace(markexpr=given["marks"], keyword=given["keyword"]))
    assert bool(tiers.too_long(config, took)) == fails


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: fault.what)
def test_a_fault_fits_the_source(fault):
    """What mutations.py would plant stands where it says, once, and so does the file of its guard."""
    assert (mutations.ROOT / fault.file).read_text("utf-8").count(fault.old) == 1
    guards = [word for word in fault.guard.split() if word.startswith("tests/")]
    assert guards and all((mutations.ROOT / guard).exists() for guard in guards)
