"""Letters of all kinds, whatever encoding the system has: files are UTF-8, and names keep their bytes.

Under LC_ALL=C with PYTHONUTF8=0 Python's default is ASCII, and names of files and flags come with their bytes as surrogates.
"""

import ast
import io
import os
import sys
from pathlib import Path

import pytest

from sora_fast import files
from sora_fast.cli.__main__ import main, parser
from sora_fast.training.logs import Events, Table

ROOT = Path(__file__).parents[1]
NAME = os.fsencode("Überzug 雪").decode("ascii", "surrogateescape")  # as Python has it where the encoding is ASCII


def without_encoding(source: str) -> list[int]:
    """Lines that open or read text, or take a program's, in whatever encoding the system has."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        is_method, name = isinstance(call.func, ast.Attribute), getattr(call.func, "attr", getattr(call.func, "id", ""))
        modes = [each.value for each in (*call.args, given.get("mode")) if isinstance(each, ast.Constant)]
        modes = [mode for mode in modes if isinstance(mode, str) and mode and set(mode) <= set("rwxabt+")]
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if name == "open":  # Pillow's and the system's have no such mode, PyAV's is of no text
            is_text = not any("b" in mode for mode in modes) and (bool(modes) and owner != "av" or not is_method)
        elif name in ("read_text", "write_text"):
            encoding = call.args[name == "write_text":]
            is_text = is_method and not encoding and owner != "files"
        else:
            is_text = any(isinstance(given.get(flag), ast.Constant) and given[flag].value
                          for flag in ("text", "universal_newlines"))
        if is_text and "encoding" not in given:
            found.append(call.lineno)
    return found


def test_every_text_file_and_program_names_its_encoding():
    sources = [ROOT / "setup.py", *(path for room in ("sora_fast", "benchmarks", "kernels", "csrc", "examples")
                                    for path in (ROOT / room).rglob("*.py"))]
    assert len(sources) > 100
    wrong = {str(path.relative_to(ROOT)): lines for path in sources
             if (lines := without_encoding(path.read_text(encoding="utf-8")))}
    assert wrong == {}


@pytest.mark.parametrize("text, count", [
    ("open(path)", 1), ("open(path, 'w', newline='')", 1), ("Path(x).read_text()", 1), ("p.write_text('a')", 1),
    ("subprocess.run(command, text=True)", 1), ("subprocess.run(command, text=True, encoding='utf-8')", 0),
    ("open(path, 'rb')", 0), ("open(path, mode='ab+')", 0), ("os.open(path, os.O_RDONLY)", 0),
    ("path.open('a')", 1), ("Image.open(path)", 0), ("av.open(path, 'w')", 0),
    ("open(path, encoding='utf-8')", 0), ("p.read_text('utf-8')", 0), ("files.read_text(path)", 0),
])
def test_a_missing_encoding_is_found(text, count):
    assert len(without_encoding(text)) == count


def test_names_of_no_encoding_are_written_with_their_bytes(tmp_path):
    files.save_text(tmp_path / "report.html", f"sora-fast eval --out {NAME}\r\n")
    assert (tmp_path / "report.html").read_bytes() == "sora-fast eval --out Überzug 雪\r\n".encode()
    files.save_text(tmp_path / "report.html", "Überzug 雪")
    assert files.read_text(tmp_path / "report.html") == "Überzug 雪"
    table = Table(tmp_path / "samples.csv")
    for step, name in enumerate((NAME, "Überzug 雪", "\udcff"), start=1):
        table.append([dict(step=step, samples=name)])
    text = "step,samples\r\n1,Überzug 雪\r\n2,Überzug 雪\r\n3,".encode() + b"\xff\r\n"
    assert table.path.read_bytes() == text
    assert [row["samples"] for row in table.begin(3)] == ["Überzug 雪", "Überzug 雪", "\udcff"]
    assert table.path.read_bytes() == text


def test_events_do_without_a_folder_that_tensorboard_cannot_take(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="the train extra is not installed")
    events = Events(tmp_path / NAME, 0, wanted=True)
    assert "losses go to losses.csv only" in capsys.readouterr().out and not list(tmp_path.iterdir())
    events.add(1, dict(loss=1.0))
    events.close()


@pytest.mark.parametrize("command", [["generate", "run", "--size", "1x8x8"], ["eval", "run"]])
def test_prompts_are_what_was_typed(command):
    for given, wanted in ((NAME, "Überzug 雪"), ("Überzug 雪", "Überzug 雪"), ("a\udcff", "a\ufffd")):
        assert parser().parse_args([*command, "--prompt", given]).prompt == [wanted]


@pytest.mark.parametrize("encoding, errors, said", [
    ("ascii", "surrogateescape", b"\\xfc\\u96ea \xc3\xbc \\xfc"), ("ascii", "strict", b"\\xfc\\u96ea \xc3\xbc \\xfc"),
    ("cp1252", "strict", b"\xfc\\u96ea \xc3\xbc \xfc"), ("utf-8", "strict", "ü雪 ü ü".encode()),
])
def test_any_letter_can_be_printed(monkeypatch, encoding, errors, said):
    import sora_fast.explanation as module

    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, errors=errors))
    monkeypatch.setattr(module, "info", lambda: "ü雪 \udcc3\udcbc ü")
    with pytest.raises(SystemExit) as done:
        main(["info"])
    assert done.value.code == 0 and out.getvalue() == said + os.linesep.encode()
