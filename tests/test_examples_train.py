"""The examples that train a plain and an accelerated model have equal losses."""

import re
import subprocess
import sys

import pytest
from test_examples import EQUAL_LOSSES, FOLDER

pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", EQUAL_LOSSES)
def test_an_example_trains_with_equal_losses(name):
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    path = FOLDER / f"{name}.py"
    done = subprocess.run([sys.executable, str(path), "--steps", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"step +(\d+): loss ([\d.]+) plain, ([\d.]+) with sora_fast", done.stdout)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4] and done.stdout.rstrip().endswith("equal losses")
    assert all(float(a) == pytest.approx(float(b), rel=1e-4) for _, a, b in rows) and rows[0][1] != rows[1][1]
