"""Runs tests/interpreted in a process that has Triton's interpreter: TRITON_INTERPRET counts when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def interpreted(*arguments: str, seconds: int = 600) -> None:
    """Run pytest with ``arguments`` there, and fail with what it prints."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], cwd=ROOT,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(arguments)} in the interpreter:\n{done.stdout}\n{done.stderr}"


def test_every_family_in_the_interpreter():
    """All that is not marked full, in one process."""
    pytest.importorskip("triton")
    interpreted("tests/interpreted")


def test_a_failure_there_is_a_failure_here(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("import os\n\ndef test_it():\n    assert os.environ['TRITON_INTERPRET'] != '1'\n")
    with pytest.raises(AssertionError, match="1 failed"):
        interpreted(str(wrong))
