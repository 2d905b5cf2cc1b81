"""The kernels of varlen_attention where no kernel runs: what takes them, how they would be launched, what they compile to.

tests/interpreted runs them, tests/test_aot.py compiles them for every architecture.
"""

import re
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops.attention import OPS, AttentionProblem

pytest.importorskip("triton")

import aot  # noqa: E402
import sass  # noqa: E402
import triton  # noqa: E402

from sora_fast.kernels import attention as kernels  # noqa: E402

KERNEL_OPS = [op for op in OPS if "triton" in op.backends]
GPUS = ("sm80-A100", "sm86", "sm89-L4", "sm90-H200", "sm100", "sm103", "sm120")
HEAD_DIMS = range(16, 257, 8)


def _problem(device, dtype, **change):
    facts = dict(heads=12, key_heads=12, head_dim=128, causal=False, window=(-1, -1), return_lse=True, deterministic=True)
    return AttentionProblem(device, dtype, True, **(facts | change))


# ---------------------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize("op", KERNEL_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("device, dtype, sentence", [
    ("cpu", torch.float32, "TRITON_INTERPRET=1"),
    ("mps", torch.float32, "on mps"),
    ("cuda:sm75", torch.float16, "sm75"),
    ("cuda:sm90", torch.float64, "float64"),
    ("cuda:sm90", torch.float8_e4m3fn, "float8_e4m3fn"),
])
def test_what_it_cannot_run(op, device, dtype, sentence):
    unsupported = op.backends["triton"].unsupported
    (reason,) = unsupported(_problem(device, dtype))
    assert sentence in reason and reason.endswith(".")
    for change in ({}, dict(key_heads=3), dict(head_dim=72, causal=True), dict(window=(3, 0), return_lse=False)):
        assert unsupported(_problem("cuda:sm90", torch.bfloat16, **change)) == []


def test_all_but_merging_has_a_kernel():
    assert [op.name for op in KERNEL_OPS] == ["varlen_attention", "varlen_attention_forward", "varlen_attention_backward"]


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    unsupported = KERNEL_OPS[0].backends["triton"].unsupported
    assert unsupported(_problem("cpu", torch.float32)) == []
    (reason,) = unsupported(_problem("cuda:sm90", torch.float32))
    assert "CPU tensors and no others" in reason


def test_a_call_that_cannot_run_raises_its_reasons():
    q, cu = torch.randn(3, 1, 16), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="varlen_attention.*TRITON_INTERPRET=1"):
        ops.varlen_attention(q, q, q, cu, cu, backend="triton")
    with pytest.raises(NotImplementedError, match="varlen_attention_forward.*float64"):
        ops.varlen_attention_forward(*[q.double()] * 3, cu, cu, backend="triton")


def test_explain_shows_kernel_and_config():
    lines = explain("attention", device="cuda:sm90", assume_validated=True).splitlines()
    taken = [line for line in lines if " * " in line and " triton " in line]
    assert len(taken) == len(KERNEL_OPS)
    assert all("block_m=128" in line and "the heuristic" in line for line in taken)


def test_triton_loads_with_the_first_launch():
    code = "import sys, sora_fast.ops, sora_fast.ops.attention; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --------------------------------------------------------------------------------------------------------- configs
def _launches():
    return [kernels.Launch(head_dim, dtype, 1, band) for head_dim in HEAD_DIMS for dtype in
            (torch.bfloat16, torch.float16, torch.float32) for band in (False, True)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", kernels.HEURISTICS)
def test_heuristics_fit_every_head(kernel, gpu):
    """Powers of two that the workspace of the backward can hold, TMA only where there is one."""
    for launch in _launches():
        config = kernels.HEURISTICS[kernel](launch, gpu)
        for number in (config.block_m, config.block_n, config.warps):
            assert number & (number - 1) == 0
        assert 16 <= config.block_n <= 128 and kernels.PAD % config.block_m == 0 and config.stages >= 1
        assert not config.tma or int(re.match(r"sm(\d+)", gpu)[1]) >= 90


@pytest.mark.parametrize("split", (True, False))
def test_chunks_hold_a_head(split):
    for head_dim in HEAD_DIMS:
        one, two = kernels.chunks(head_dim, split)
        assert one >= 16 and one & (one - 1) == 0 and (two == 0 or two >= 16 and two & (two - 1) == 0)
        assert head_dim <= one + two and (not split or two < one)
        assert not split or head_dim > one - 8 or two == 0
    assert [kernels.chunks(e, True) for e in (40, 64, 72, 80, 96, 128)] == [
        (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0)]


@pytest.mark.parametrize("gpu", GPUS)
def test_candidates(gpu):
    """The heuristic's first, none twice, all within the workspace of the backward."""
    for kernel, heuristic in kernels.HEURISTICS.items():
        launch = kernels.Launch(128, torch.bfloat16, 1, False)
        found = list(kernels.candidates(kernel, launch, gpu))
        assert found[0] == heuristic(launch, gpu) and len(found) == len(set(found)) > 5
        assert all(kernels.PAD % config.block_m == 0 for config in found)
    assert len(list(kernels.candidates("forward", launch, "cpu"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="cuobjdump comes with Triton's wheels for Linux only")
@pytest.mark.parametrize("cc", (86, 90))
@pytest.mark.parametrize("kernel", kernels.HEURISTICS)
def test_the_largest_candidate_fits(kernel, cc):
    """As it is compiled, within the shared memory of a program."""
    launch = kernels.Launch(128, torch.bfloat16, 1, False)
    largest = max(kernels.candidates(kernel, launch, f"sm{cc}"), key=lambda c: (c.block_m + c.block_n) * (1 + c.stages))
    with mock.patch.dict(kernels.HEURISTICS, {kernel: lambda launch, gpu: largest}):
        compiled = dict(_compiled(128, cc=cc, only=kernel))[f"{kernel}_kernel"]
    assert 0 < compiled.shared <= aot.SHARED[cc], largest


# -------------------------------------------------------------------------------------------------------- launches
def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(queries, keys, samples, heads=2, key_heads=2, head_dim=16, pitch=None, gpu="sm90", **mask):
    """Forward and backward on tensors without memory; ``pitch``: numbers from one token to the next."""
    pitch = pitch or heads * head_dim
    cut = lambda rows, count: torch.empty_strided((rows, count, head_dim), (pitch, head_dim, 1), dtype=torch.bfloat16,
                                                  device="meta")
    q, k, cu = cut(queries, heads), cut(keys, key_heads), _meta(samples + 1, dtype=torch.int32)
    launch = kernels.Launch(head_dim, q.dtype, heads // key_heads, bool(mask))
    options = dict(scale=0.1, causal=False, window=(-1, -1), tf32=False) | mask
    config, dq_config, dkdv_config = (kernels.HEURISTICS[kernel](launch, gpu) for kernel in ("forward", "dq", "dkdv"))
    out, lse, parts = kernels.forward(q, k, k, cu, cu, config=config, **options)
    kernels.backward(out, lse, q, k, k, out, lse, parts, cu, cu, dq_config=dq_config, dkdv_config=dkdv_config, **options)


SIZES = [(1, 15, 1), (15, 1, 2), (16, 16, 64), (17, 2**31 + 1, 1), (2**31 + 1, 48, 2), (480, 17, 16)]


def test_sizes_are_no_compile_keys():
    assert aot.cache_violations([partial(_call, *size) for size in SIZES]) == []
    assert aot.cache_violations([partial(_call, *size, causal=True) for size in SIZES]) == []
    windows = [partial(_call, 300, 300, 2, window=(left, right)) for left, right in ((0, 1), (15, 16), (1, 2**31 + 1))]
    assert aot.cache_violations(windows) == []
    # strides and head counts neither, as long as rows start at multiples of 16 bytes
    layouts = [partial(_call, 300, 300, 2, heads, heads, pitch=pitch) for heads, pitch in ((1, 16), (3, 144), (16, 2**32))]
    assert aot.cache_violations(layouts) == []


@pytest.mark.parametrize("samples", (0, 1, 2, 64))
def test_grids(samples):
    """One axis, as many programs as tiles there can be: no more than a tile a sample beyond those that are full."""
    found = {}
    for launch in aot.launches(partial(_call, 1000, 777, samples, 4, 2)):
        assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31
        found.setdefault(launch.fn.__name__, []).append((launch.grid[0], launch.kwargs))
    assert [grid for grid, _ in found["schedule_kernel"]] == [samples + 2] * 3
    for name, rows, block, heads in (("forward_kernel", 1000, "BLOCK_M", 4), ("dq_kernel", 1000, "BLOCK_M", 4),
                                     ("dkdv_kernel", 777, "BLOCK_N", 2)):
        ((grid, options),) = found[name]
        assert grid == heads * (triton.cdiv(rows, options[block]) + samples)


def test_the_capacity_is_enough_and_no_more():
    """Against every way to cut few rows: the tiles of samples and tail never exceed it, and some cut meets it."""
    for rows, samples, block in ((7, 2, 3), (9, 3, 4), (5, 1, 1), (0, 2, 4)):
        most = 0
        cuts = [[]]
        for _ in range(samples):
            cuts = [[*cut, end] for cut in cuts for end in range(cut[-1] if cut else 0, rows + 1)]
        for cut in cuts:
            ends = [0, *cut, rows]
            most = max(most, sum(-(-(b - a) // block) for a, b in zip(ends, ends[1:], strict=False)))
        assert most <= kernels.capacity(rows, samples, block) <= most + samples


class _Allocations:
    """torch, with every allocation noted."""

    def __init__(self):
        self.made = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, **options):
        self.made.append(torch.empty(shape, **options))
        return self.made[-1]


def test_workspace(monkeypatch):
    """Outputs, tables of tiles, and two float32 a query and head: nothing grows with samples times their length."""
    queries, keys, samples, heads = 100_000, 90_000, 64, 8
    noted = _Allocations()
    monkeypatch.setattr(kernels, "torch", noted)
    assert aot.launches(lambda: _call(queries, keys, samples, heads, 2, 72))
    tables = lambda rows: [4 * (triton.cdiv(rows, 128) + samples), 4 * (samples + 1)]
    padded = kernels.PAD * (triton.cdiv(queries, kernels.PAD) + samples + 1)
    forward = [2 * queries * heads * 72, 4 * queries * heads, *tables(queries)]  # out, lse
    backward = [2 * queries * heads * 72, 2 * keys * 2 * 72, 2 * keys * 2 * 72, 2 * 4 * heads * padded, *tables(queries),
                *tables(keys)]  # dq, dk, dv, rows of lse and delta
    assert [t.numel() * t.element_size() for t in noted.made] == forward + backward
    longest = queries - samples  # one sample may have nearly all rows
    outputs = {0, 1, 4, 5, 6}
    assert all(t.numel() < samples * longest for place, t in enumerate(noted.made) if place not in outputs)


def test_tma_is_used_where_rows_are_aligned():
    def flags(**options):
        return {launch.kwargs["TMA"] for launch in aot.launches(partial(_call, 64, 64, 1, head_dim=128, **options))
                if launch.fn.__name__ == "dkdv_kernel"}

    assert flags() == {True} and flags(pitch=260) == {False} and flags(gpu="sm80") == {False}


# ---------------------------------------------------------------------------------------------------- machine code
def _compiled(head_dim, cc=90, only="", **mask):
    """(name, what it compiles to) of the kernels of a forward and backward, of all three or only one."""
    if triton.knobs.runtime.interpret:
        pytest.skip("this process interprets kernels")
    for launch in aot.launches(partial(_call, 300, 300, 2, 4, 4, head_dim, gpu=f"sm{cc}", **mask)):
        name = launch.fn.__name__
        if name != "schedule_kernel" and name.startswith(only):
            case = launch.case(name)
            yield name, aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, cc, **case.options)


def _events(loop):
    """An iteration as letters: G a product, e exp2 (MUFU.EX2), W a wait for all products."""
    return "".join("G" if i.base == "HGMMA" else "e" if i.opcode.startswith("MUFU.EX2") else
                   "W" if i.body.startswith(sass.DRAIN) else "" for i in loop)


def interleaved(events: str) -> int:
    """How many exp2 stand behind a product that nothing has waited for yet, and so run beside it.

    The loop is a ring: the products at its end are in flight at its start.
    """
    count, flying = 0, False
    for place, event in enumerate(events * 2):
        flying = event == "G" or flying and event != "W"
        count += place >= len(events) and event == "e" and flying
    return count


def test_interleaving_is_counted():
    assert interleaved("GGWeeee") == 0 and interleaved("eeeeGGW") == 0
    assert interleaved("GeeGeW") == 3 and interleaved("eeWGG") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="cuobjdump comes with Triton's wheels for Linux only")
@pytest.mark.parametrize("head_dim, mask", [(64, {}), (72, {}), (96, {}), (128, {}), (128, dict(causal=True))], ids=str)
def test_products_and_powers_run_beside_each_other(head_dim, mask):
    """On sm_90: most exp2 while a product is in flight, no spill in a main loop, P never out of registers."""
    for name, compiled in _compiled(head_dim, **mask):
        (loop,) = [loop for code in compiled.functions for loop in sass.main_loops(code)]
        events = _events(loop)
        assert interleaved(events) >= events.count("e") / 2, f"{name}: {events}"
        assert not any(i.base in ("LDL", "STL") for i in loop), name
        if name == "forward_kernel":
            assert not any(i.base.startswith("STS") for i in loop), "P goes through shared memory"
            products = [i.text for i in loop if i.base == "HGMMA"]
            assert sum("gdesc" in text.split(",")[1] for text in products) < len(products), "no product has P in registers"
