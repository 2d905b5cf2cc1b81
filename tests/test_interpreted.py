"""Kernels in Triton's interpreter, in processes of their own: TRITON_INTERPRET counts when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SMOKE = """
import torch
from sora_fast import ops
from sora_fast.testing import assert_matches, cases
label, inputs = next(cases("gate_residual", torch.float32))
assert_matches("gate_residual", lambda **given: ops.gate_residual(**given, backend="triton"), inputs)
print("right")
"""


def interpreted(*command: str, seconds: int = 600) -> str:
    """What Python prints there; it must not fail."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(command)} in the interpreter:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_kernel_is_right_in_the_interpreter():
    pytest.importorskip("triton")
    assert interpreted("-c", SMOKE) == "right\n"
