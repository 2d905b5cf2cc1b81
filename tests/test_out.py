"""--out of every command: what cannot be a folder of results is told before any work, and nothing is made."""

import argparse
import os

import pytest
from cli_checks import refused

from sora_fast import files
from sora_fast.cli.__main__ import parser
from sora_fast.training import loop
from sora_fast.training.config import LoopConfig

# What each command needs besides, to come as far as its --out: no model, media or GPU is there.
COMMANDS = {
    "demo": [],
    "train-vae": ["--data", "."],
    "train": ["--data", "."],
    "generate": ["nowhere", "--prompt", "a", "--size", "1x8x8"],
    "eval": ["nowhere"],
    "bench": ["latents", "--quick", "--device", "cpu"],
    "bench report": ["nowhere.jsonl"],
    "predict": ["rotary", "--case", "nowhere"],
}
WRONG = {
    "a file": (lambda folder: (folder / "x").write_text("kept"), "x", "the file"),
    "under a file": (lambda folder: (folder / "x").write_text("kept"), "x/y/z", "the file"),
    "a broken link": (lambda folder: (folder / "x").symlink_to(folder / "gone"), "x", "a link to nothing"),
    "a link to itself": (lambda folder: (folder / "x").symlink_to(folder / "x"), "x", "a link to nothing"),
}


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_command_with_an_out_is_here():
    (commands,) = [each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)]
    flags = {name: [flag for each in sub._actions for flag in each.option_strings] for name, sub in commands.choices.items()}
    assert {name for name in flags if "--out" in flags[name]} == {*COMMANDS, "tune"}  # whose --out is a file


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_out_that_is_no_folder_is_told_at_once(cli, tmp_path, monkeypatch, command, wrong):
    monkeypatch.chdir(tmp_path)
    make, out, words = WRONG[wrong]
    make(tmp_path)
    before = listing(tmp_path)
    first, *second = command.split()
    refused(cli(first, *second, *COMMANDS[command], "--out", out), "--out: expected a folder", words, "pass another --out")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_out_that_may_not_be_written_is_told_at_once(cli, tmp_path, monkeypatch, command):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != str(tmp_path))
    first, *second = command.split()
    refused(cli(first, *second, *COMMANDS[command], "--out", tmp_path / "new" / "x"), "--out: expected a folder that can be",
            str(tmp_path))
    assert listing(tmp_path) == ["mine"]


def test_an_out_that_is_a_file_of_rows(cli, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "x").write_text("kept")
    for flag, command in (("--out", ["tune", "modulation", "--device", "cpu", "--quick"]),
                          ("--jsonl", ["validate", "--op", "gate_residual", "--dtype", "float32"])):
        refused(cli(*command, flag, tmp_path), f"{flag}: expected a file, got the folder")
        refused(cli(*command, flag, tmp_path / "x" / "rows.jsonl"), f"{flag}: expected a folder", "the file")
    assert listing(tmp_path) == ["x"]


def test_what_is_a_folder_or_can_become_one_is_taken(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    for name in ("", "real", "link", "link/new", "a folder/of spaces", "ein Überzug/雪", "real/../other"):
        files.check_folder("--out", tmp_path / name)
        files.check_folder("--out", name)
        loop.check_start(LoopConfig(out=name))
    for name in ("link/rows.jsonl", "new/rows.jsonl", "rows.jsonl"):
        files.check_file("--jsonl", name)
    assert listing(tmp_path) == ["link", "real"]
