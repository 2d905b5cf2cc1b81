"""The kernels of norm_modulate, gate_residual and gate_residual_norm_modulate where no kernel runs.

What takes them, and how they would be launched; tests/interpreted runs them, tests/test_aot.py compiles them.
"""

import subprocess
import sys
from functools import partial

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops.modulation import OPS

pytest.importorskip("triton")

import aot  # noqa: E402
import triton  # noqa: E402

from sora_fast.kernels import modulation as kernels  # noqa: E402

TRITON = [op.backends["triton"] for op in OPS]


@pytest.mark.parametrize("backend", TRITON, ids=[op.name for op in OPS])
@pytest.mark.parametrize("device, dtype, change, sentence", [
    ("cpu", torch.float32, {}, "TRITON_INTERPRET=1"),
    ("mps", torch.float32, {}, "on mps"),
    ("cuda:sm75", torch.float16, {}, "sm75"),
    ("cuda:sm90", torch.float64, {}, "float64"),
    ("cuda:sm90", torch.float8_e4m3fn, {}, "float8_e4m3fn"),
    ("cuda:sm90", torch.bfloat16, dict(wide=torch.float64), "float64"),
    ("cuda:sm90", torch.bfloat16, dict(width=8193), "8,193 columns"),
])
def test_what_it_cannot_run(backend, device, dtype, change, sentence):
    problem = _problem(device, dtype, **change)
    reasons = backend.unsupported(problem)
    assert len(reasons) == 1 and sentence in reasons[0] and reasons[0].endswith(".")
    good = _problem("cuda:sm90", torch.bfloat16)
    assert backend.unsupported(good) == []


def _problem(device, dtype, **change):
    from sora_fast.ops.modulation import ModulationProblem

    facts = dict(width=1536, norm="layer", affine=False,
                 wide=torch.float64 if dtype == torch.float64 else torch.float32) | change
    return ModulationProblem(device, dtype, True, **facts)


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON[0].unsupported(_problem("cpu", torch.float32)) == []
    (reason,) = TRITON[0].unsupported(_problem("cuda:sm90", torch.float32))
    assert "CPU tensors and no others" in reason


def test_a_call_that_cannot_run_raises_its_reasons():
    with pytest.raises(NotImplementedError, match="norm_modulate.*TRITON_INTERPRET=1"):
        ops.norm_modulate(torch.randn(2, 8), None, None, backend="triton")
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="gate_residual.*float64"):
        ops.gate_residual(x, x, torch.randn(1, 8, dtype=torch.float64), backend="triton")


def test_explain_shows_kernel_and_config():
    lines = explain("modulation", device="cuda:sm90", assume_validated=True).splitlines()
    taken = [line for line in lines if " * " in line]
    assert len(taken) == len(OPS)
    assert all(" triton " in line and "warps=4" in line and "the heuristic" in line for line in taken)


def test_triton_loads_with_the_first_launch():
    code = "import sys, sora_fast.ops, sora_fast.ops.modulation; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_heuristics_fit_every_width():
    """Powers of two, no more than 32 numbers a thread, and a backward that the registers of a multiprocessor can hold."""
    for width in (1, 8, 16, 37, 384, 768, 1024, 1152, 1536, 1920, 3072, 5120, 6144, 8192):
        block = triton.next_power_of_2(width)
        for x, y in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
            launch = kernels.Launch(width, 1024, x, y, "layer", False)
            forward, backward = kernels.forward_heuristic(launch, "sm90"), kernels.backward_heuristic(launch, "sm80")
            for number in (forward.warps, forward.tokens, backward.warps):
                assert number >= 1 and number & (number - 1) == 0
            assert forward.tokens * block <= 16 * 32 * forward.warps and block <= 32 * 32 * backward.warps
            assert 1 <= backward.programs * backward.warps <= 16 and backward.tokens >= 1


def _call(tokens, count, rows=True):
    """Forward and backward of the fused op on tensors without memory."""
    make = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    x, tables = make(tokens, 16), make(count, 6 * 16).chunk(6, dim=-1)[:3]
    at = torch.empty(tokens, dtype=torch.int32, device="meta") if rows else None
    launch = kernels.Launch(16, 1024, x.dtype, x.dtype, "layer", False)
    x_new, h, stats = kernels.forward(x, x, *tables, at, None, None, norm="layer", eps=1e-6, save=True, dtype=x.dtype,
                                      config=kernels.forward_heuristic(launch, "sm90"))
    kernels.backward(x_new, h, x_new, x, *tables, at, None, None, stats, norm="layer", wanted=[True] * 5 + [False] * 2,
                     config=kernels.backward_heuristic(launch, "sm90"))


def test_sizes_are_no_compile_keys():
    sizes = [(1, 1), (15, 2), (16, 64), (17, 1), (48, 3), (2**27 + 1, 16), (2**31 + 1, 2)]
    assert aot.cache_violations([partial(_call, *size) for size in sizes]) == []
    assert aot.cache_violations([partial(_call, tokens, 1, rows=False) for tokens in (1, 15, 16, 2**31 + 1)]) == []


def test_no_grid_is_too_large():
    """Only the first axis of a grid may have more than 65,535 programs."""
    for launch in aot.launches(partial(_call, 2**31 + 1, 2)):
        assert launch.grid[0] < 2**31 and all(size <= 65535 for size in launch.grid[1:])
