"""Triton kernels of a user's, right ones and wrong ones, for tests of emulated_gpu and of sora-fast validate."""

import torch
import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@triton.jit
def unmasked_load_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)  # no mask
    tl.store(y + at, value, mask=at < n)


@triton.jit
def unmasked_store_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(y + at, value)  # no mask


@triton.jit
def racing_sum_kernel(x, y, BLOCK: tl.constexpr):
    value = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    tl.store(y, tl.load(y) + value)  # all programs add here, not atomically


@triton.jit
def atomic_sum_kernel(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def tuned_kernel(x, y, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(y + at, tl.load(x + at) + BLOCK)
    else:
        tl.store(y + at, tl.load(x + at, mask=at < n) + BLOCK, mask=at < n)


@triton.jit
def gate_kernel(x, y, gate, rows, out, gate_stride, D: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row = tl.load(rows + token)
    inside = (column < D) & ((row >= 0) | TAIL)  # TAIL: a token of no sample is read too
    a = tl.load(x + token * D + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y + token * D + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + tl.maximum(row, 0) * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, a + g * b, mask=column < D)


def gate_residual(x, y, gate, rows, tail=False):
    """sora_fast.ops.gate_residual by gate_kernel, forward only."""
    out, x, y = torch.empty_like(x), x.contiguous(), y.contiguous()
    if rows is None:
        count = gate.shape[0]
        rows = torch.arange(len(x), dtype=torch.int32) if count == len(x) else torch.zeros(len(x), dtype=torch.int32)
    if len(x):
        gate = gate if gate.stride(1) == 1 else gate.contiguous()
        gate_kernel[(len(x),)](x, y, gate, rows, out, gate.stride(0), x.shape[1], triton.next_power_of_2(x.shape[1]), tail)
    return out


def gate_residual_of_all(x, y, gate, rows):
    """The same, which reads tokens of no sample."""
    return gate_residual(x, y, gate, rows, tail=True)
