"""The command line in processes of its own: without optional packages, and read by who goes away."""

import json
import os
import subprocess
import sys

import pytest
from test_cli import BLOCKED, BLOCKER, COMMANDS, ROOT

pytestmark = [pytest.mark.full, pytest.mark.ci]


def test_torch_alone_is_enough(tmp_path):
    asked = [["info"], ["explain", "dit", "--device", "cuda:sm90"],
             ["validate", "--op", "gate_residual", "--dtype", "float32", "--jsonl", str(tmp_path / "report.jsonl")],
             ["--help"], *([command, "--help"] for command in COMMANDS),
             ["train-vae", "--data", str(tmp_path)], ["train-vae", "--config", "x.yaml"], ["demo", "--out", str(tmp_path)],
             ["train-vae", "--out", str(tmp_path), "--resume"]]
    done = subprocess.run([sys.executable, "-c", BLOCKER, BLOCKED, json.dumps(asked)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)})
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert [line.split()[-1] for line in codes] == ["0"] * (4 + len(COMMANDS)) + ["2"] * 4, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "safetensors: not installed" in done.stdout and "numpy: not installed" in done.stdout
    sentences = done.stderr.splitlines()
    assert len(sentences) == 4 and all(line.startswith("sora-fast: ") for line in sentences), sentences
    assert "pyyaml" in sentences[1] and "pip install" in sentences[1] and "pip install" in sentences[2]


def test_a_reader_that_goes_away_is_no_bug():
    done = subprocess.run(f"{sys.executable} -m sora_fast.cli info | {sys.executable} -c 'import sys; sys.stdin.close()'",
                          shell=True, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
