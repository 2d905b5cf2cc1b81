"""The examples run as their first lines say and print equal losses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_with_equal_losses(path):
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    assert len(path.read_text().splitlines()) < 80
    done = subprocess.run([sys.executable, str(path), "--steps", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"step +(\d+): loss ([\d.]+) plain, ([\d.]+) with sora_fast", done.stdout)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4] and done.stdout.rstrip().endswith("equal losses")
    assert all(float(a) == pytest.approx(float(b), rel=1e-4) for _, a, b in rows) and rows[0][1] != rows[1][1]


def test_there_are_two_examples():
    assert len(EXAMPLES) == 2
