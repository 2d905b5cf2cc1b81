"""docs/ and README: code runs, commands exist, pages build without a warning, and what they list is documented."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("module", re.findall(r"^reference/(\w+)$", (ROOT / "docs/index.md").read_text(), flags=re.M))
def test_public_names_are_documented(module):
    """Functions, classes and their public methods say what they are."""
    package = importlib.import_module("sora_fast" if module == "sora_fast" else f"sora_fast.{module}")
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            methods = [each for key, each in vars(value).items() if inspect.isfunction(each) and key[0] != "_"
                       ] if inspect.isclass(value) else []
            blank = [each.__qualname__ for each in (value, *methods) if not inspect.getdoc(each)]
            assert not blank, f"{module}.{name}: no docstring of {', '.join(blank)}"


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
