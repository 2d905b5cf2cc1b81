"""The kernels of qk_norm_rope where no kernel runs.

What takes them, and how they would be launched; tests/interpreted runs them, tests/test_aot.py compiles them.
"""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops.rotary import OPS

pytest.importorskip("triton")

import aot  # noqa: E402

from sora_fast.kernels import rotary as kernels  # noqa: E402

(OP,) = OPS
TRITON = OP.backends["triton"]


@pytest.mark.parametrize("device, dtype, change, sentence", [
    ("cpu", torch.float32, {}, "TRITON_INTERPRET=1"),
    ("mps", torch.float32, {}, "on mps"),
    ("cuda:sm75", torch.float16, {}, "sm75"),
    ("cuda:sm90", torch.float64, {}, "float64"),
    ("cuda:sm90", torch.float8_e4m3fn, {}, "float8_e4m3fn"),
    ("cuda:sm90", torch.bfloat16, dict(wide=torch.float64), "float64"),
    ("cuda:sm90", torch.bfloat16, dict(moves=True), "coords.detach()"),
    ("cuda:sm90", torch.bfloat16, dict(heads=65), "65 heads of 128 are 16,384"),
    ("cuda:sm90", torch.bfloat16, dict(key_heads=40, head_dim=129), "40 heads of 129 are 16,384"),
])
def test_what_it_cannot_run(device, dtype, change, sentence):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    problem = replace(OP.example(device, torch.float16, True), **dict(dtype=dtype, wide=wide) | change)
    reasons = TRITON.unsupported(problem)
    assert len(reasons) == 1 and sentence in reasons[0] and reasons[0].endswith(".")
    good = OP.example("cuda:sm90", torch.bfloat16, True)
    assert all(TRITON.unsupported(each) == [] for each in (good, replace(good, heads=40, key_heads=0)))


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON.unsupported(OP.example("cpu", torch.float32, True)) == []
    (reason,) = TRITON.unsupported(OP.example("cuda:sm90", torch.float32, True))
    assert "CPU tensors and no others" in reason


def test_a_call_that_cannot_run_raises_its_reasons(monkeypatch):
    q, coords = torch.randn(2, 2, 8), torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="qk_norm_rope.*TRITON_INTERPRET=1"):
        ops.qk_norm_rope(q, q, None, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match=r"qk_norm_rope.*coords\.detach\(\)"):
        ops.qk_norm_rope(q, q, coords, axes=(2, 2, 4), backend="triton")
    for change in (dict(q_bias=torch.zeros(8).double()), dict(coords=torch.zeros(2, 3).double())):
        with pytest.raises(NotImplementedError, match="qk_norm_rope.*float64"):
            ops.qk_norm_rope(**dict(q=q, k=q, coords=coords.detach(), axes=(2, 2, 4)) | change, backend="triton")


def test_explain_shows_kernel_and_config():
    (taken,) = (line for line in explain("rotary", device="cuda:sm90", assume_validated=True).splitlines() if " * " in line)
    assert " triton " in taken and "warps=2" in taken and "the heuristic" in taken


def test_triton_loads_with_the_first_launch():
    code = "import sys, sora_fast.ops, sora_fast.ops.rotary; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_heuristics_fit_every_head():
    """Powers of two, no more than 32 numbers a thread, and a backward that a multiprocessor's registers can hold."""
    for heads, head_dim in ((1, 2), (3, 17), (6, 64), (12, 128), (16, 72), (24, 128), (30, 64), (40, 128), (64, 128)):
        for norm, freqs in (("rms_all", "fixed"), (None, "fixed"), (None, "learned"), ("layer_head", None)):
            launch = kernels.Launch(heads, heads, head_dim, 1024, torch.bfloat16, norm, norm is not None, freqs, "half")
            forward, backward = kernels.forward_heuristic(launch, "sm90"), kernels.backward_heuristic(launch, "sm80")
            for config, most in ((forward, 32), (backward, 16)):
                for number in (config.warps, config.tokens):
                    assert number >= 1 and number & (number - 1) == 0
                assert config.tokens * kernels.tile(heads, head_dim) <= most * 32 * config.warps and config.warps <= 16
            assert 1 <= backward.programs * backward.warps <= 32


def test_candidates():
    """What the tuner tries are distinct, powers of two, and among them the heuristic's kind of numbers."""
    launch = kernels.Launch(12, 12, 128, 32768, torch.bfloat16, "rms_all", True, "fixed", "interleaved")
    for kernel, heuristic in (("forward", kernels.forward_heuristic), ("backward", kernels.backward_heuristic)):
        found = list(kernels.candidates(kernel, launch, "sm90"))
        assert heuristic(launch, "sm90") in found and len(set(found)) == len(found) > 4
        for config in found:
            assert all(n >= 1 and n & (n - 1) == 0 for n in (config.warps, config.tokens)) and config.warps <= 16


def test_fixed_frequencies_are_rounded_once_and_kept():
    made = kernels.frequencies((4, 0, 6), (1e4, 3.0, 256.0), torch.device("cpu"))
    assert made.shape == (3, 5) and made.dtype == torch.float32
    want = [1, 1e4**-0.5, 1, 256 ** (-1 / 3), 256 ** (-2 / 3)]
    assert torch.equal(made.sum(0), torch.tensor(want, dtype=torch.float64).float())
    assert not made[0, 2:].any() and not made[1].any() and not made[2, :2].any()
    assert kernels.frequencies((4, 0, 6), (1e4, 3.0, 256.0), torch.device("cpu")) is made


def test_cosines_are_computed_in_full():
    """No sin.approx, whose error grows with the angle, and no table in local memory; forward and backward."""
    call = partial(kernels._both, 6, 6, 64, torch.bfloat16, "rms_head", "half", "fixed", ("weight",))
    for case in aot.cases_of("cosines", call, {}):
        compiled = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 90, **case.options)
        assert "FFMA" in compiled.sass and "MUFU.SIN" not in compiled.sass and "MUFU.COS" not in compiled.sass
        assert compiled.spills == 0


def _call(tokens, layout="product", learned=False, rows=True):
    """Forward and backward on tensors without memory."""
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")
    if layout == "product":
        q, k, _ = make(tokens, 3, 2, 24).unbind(1)
    else:
        q, k = make(2, tokens, 24).transpose(0, 1), make(2, tokens, 24).transpose(0, 1)
    coords, at = make(tokens, 3, dtype=torch.int32), make(tokens, dtype=torch.int32) if rows else None
    freqs = make(3, 2, 12, dtype=torch.float32) if learned else make(3, 12, dtype=torch.float32)
    launch = kernels.Launch(2, 2, 24, 1024, q.dtype, "rms_head", True, "learned" if learned else "fixed", "interleaved")
    rest = (coords, make(24), make(24), None, None, freqs, at)
    settings = dict(norm="rms_head", pairing="interleaved", eps=1e-6)
    outs = kernels.forward(q, k, *rest, **settings, config=kernels.forward_heuristic(launch, "sm90"))
    kernels.backward(*outs, q, k, *rest, **settings, wanted=[True] * 4 + [False] * 2 + [learned],
                     config=kernels.backward_heuristic(launch, "sm90"))


@pytest.mark.parametrize("layout", ("product", "heads first"))
def test_sizes_are_no_compile_keys(layout):
    sizes = (1, 15, 16, 17, 48, 2**27 + 1, 2**31 + 1)
    for learned, rows in ((False, True), (True, False)):
        assert aot.cache_violations([partial(_call, size, layout, learned, rows) for size in sizes]) == []


def test_no_grid_is_too_large():
    """Only the first axis of a grid may have more than 65,535 programs."""
    seen = aot.launches(partial(_call, 2**31 + 1))
    assert len(seen) == 2  # q and k together, forward and backward
    for launch in seen:
        assert launch.grid[0] < 2**31 and all(size <= 65535 for size in launch.grid[1:])


@pytest.mark.parametrize("shape, view, unit", [
    ((9, 3, 4, 128), lambda t: t[:, 1], 16),
    ((9, 4, 72), lambda t: t, 8),
    ((4, 9, 44), lambda t: t.transpose(0, 1), 4),
    ((9, 4, 129), lambda t: t[..., 1:], 1),
    ((1, 1, 24), lambda t: t, 8),
])
def test_the_unit_of_strides(shape, view, unit):
    """What strides are multiples of, up to 16; no copy but of heads whose numbers are apart."""
    given = view(torch.zeros(shape))
    taken, token, head, found = kernels._strided(given)
    assert found == unit and taken.data_ptr() == given.data_ptr()
    for axis, stride in enumerate((token, head)):
        assert stride * unit == (given.stride(axis) if given.shape[axis] > 1 else 0)
    apart = torch.zeros(*given.shape, 2)[..., 0]
    assert kernels._strided(apart)[0].is_contiguous()
