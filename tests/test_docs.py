"""docs/ and README: code runs, commands exist, pages build without a warning, and what they list is documented."""

import dataclasses
import doctest
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from sora_fast import ops
from sora_fast.cli.__main__ import COMMANDS, parser
from sora_fast.testing import cases

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=lambda page: page.stem)
def test_commands_and_flags_exist(page):
    commands = parser()._subparsers._group_actions[0].choices
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "sora_fast.cli" in words:
            words = words[words.index("sora_fast.cli"):]
        elif not words or not words[0].endswith("sora-fast"):
            continue
        name = " ".join(words[1:3]) if " ".join(words[1:3]) in COMMANDS else words[1]
        assert name in COMMANDS, f"{page.name}: {line}"
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= set(commands[name]._option_string_actions), f"{page.name}: {line}"


MODULES = re.findall(r"^reference/(\w+)$", (ROOT / "docs/index.md").read_text(), flags=re.M)
TYPED = r"\([A-Za-z3<=]|\b(ints?|floats?|float32|str|bool|torch\.dtype|Pack|host data)\b"


def public(module: str) -> dict[str, object]:
    package = importlib.import_module("sora_fast" if module == "sora_fast" else f"sora_fast.{module}")
    named = {name: getattr(package, name) for name in package.__all__}
    return {name: value for name, value in named.items() if inspect.isclass(value) or inspect.isfunction(value)}


def undocumented(value) -> list[str]:
    """What the docstring of a public function or class leaves out: an argument, a tensor's shape, what is raised."""
    doc, methods, parameters = inspect.getdoc(value) or "", [], []
    if inspect.isclass(value):
        methods = [each for key, each in vars(value).items() if inspect.isfunction(each) and key[0] != "_"]
        generated = dataclasses.is_dataclass(value) or issubclass(value, (tuple, Exception))
        own = "__post_init__" in vars(value) or "__init__" in vars(value) and not generated
        if getattr(value, "_is_protocol", False) or not own:  # nobody makes one, or only this package does
            return [f"docstring of {each.__qualname__}" for each in (value, *methods) if not inspect.getdoc(each)]
    if not re.search(r"arguments as in ``", doc, flags=re.I):
        parameters = [each for each in inspect.signature(value).parameters.values() if each.name[0] != "_"]
    found = [each.name for each in parameters if not re.search(rf"\b{each.name}\b", doc)]
    found += [f"shape of {each.name}" for each in parameters if "Tensor" in str(each.annotation) and not re.search(
        rf"\b{each.name}\b[^\n]*(\n[^\n]*)?(\([A-Z0-9.<]|any shape)", doc)]
    found += ["Raises"] if "Raises" not in doc else []
    return found + [f"docstring of {each.__qualname__}" for each in (value, *methods) if not inspect.getdoc(each)]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    """Every argument of every public function and class, with the shapes of tensors, and what is raised."""
    assert {name: left for name, value in public(module).items() if (left := undocumented(value))} == {}


@pytest.mark.parametrize("op", ops.__all__)
def test_an_op_lists_an_argument_per_line_with_its_shape_or_type(op):
    doc = inspect.getdoc(getattr(ops, op))
    listed = {name: text for names, text in re.findall(r"^    ([a-z_0-9, ]+): (.*)", doc, flags=re.M)
              for name in names.split(", ")}
    parameters = inspect.signature(getattr(ops, op)).parameters
    assert [name for name in parameters if not re.search(TYPED, listed.get(name, ""))] == []


def test_what_leaves_something_out_is_found():
    def function(x: torch.Tensor, rows, scale):
        """``x`` times scale."""

    assert undocumented(function) == ["rows", "shape of x", "Raises"]


def run_examples(module: str) -> set[str]:
    """Runs the examples in the docstrings of a module's public names, all of which they may use; the names that have one.

    One that needs weights or a compiler says so and is parsed alone.
    """
    names = {name: value for each in MODULES for name, value in public(each).items()} | dict(torch=torch, ops=ops)
    ran = set()
    for name, value in public(module).items():
        for test in doctest.DocTestFinder(recurse=False).find(value, name, globs=dict(names)):
            if test.examples and "# needs: " not in test.docstring:
                ran.add(name)
                assert doctest.DocTestRunner(verbose=False).run(test).failed == 0, name
    return ran


def test_every_op_and_the_residual_stream_have_an_example():
    assert run_examples("ops") == set(ops.__all__) and "Residual" in run_examples("nn")


def test_a_race_of_a_users_kernel_is_reported_as_printed(cli, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    page = ROOT / "docs/guide/emulator.md"
    (code,) = blocks(page, "py")
    (shown,) = [block for block in blocks(page, "text") if "emulated:sm90" in block]
    command, *lines = shown.splitlines()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sora_fast.testing.validation.cases", lambda *call: list(cases(*call))[:1])
    for written, expected in ((code, 1), (code.replace(" // 2", "").replace("(2 * len(x),)", "(len(x),)"), 0)):
        Path("my_kernels.py").write_text(written, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
        importlib.invalidate_caches()
        _, out, _ = cli(*command.split()[2:])
        assert all(line in out.splitlines() for line in lines) == bool(expected)
        assert ("forward     2.29e-02" in out and " ok" in out) != bool(expected)


def test_every_public_op_is_in_the_table():
    table = (ROOT / "docs/how/kernels.md").read_text(encoding="utf-8")
    assert [name for name in ops.__all__ if f"`{name}`" not in table] == []
