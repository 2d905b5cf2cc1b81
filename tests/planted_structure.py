"""A user's Triton kernels with one fault of structure each, and functions that launch them on tensors without memory."""

import torch
import triton
import triton.language as tl
from aot_kernels import matmul


@triton.jit
def dividing_kernel(a_ptr, b_ptr, out_ptr, k_size, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):
    """A product that finds its place by a division in every turn."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, k_size, BLOCK_K):
        row = at // width * width
        a = tl.load(a_ptr + m[:, None] * k_size + row + k[None, :])
        acc = tl.dot(a, tl.load(b_ptr + (row + k[:, None]) * BLOCK_N + n[None, :]), acc)
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], acc.to(out_ptr.dtype.element_ty))


def _meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _matmul(m, n, k, warps, stages):
    matmul[(1,)](_meta(m, 1024), _meta(1024, n), _meta(m, n), 1024, "ieee", m, n, k, num_warps=warps, num_stages=stages)


def division():
    dividing_kernel[(1,)](_meta(128, 1024), _meta(1024, 64), _meta(128, 64), 1024, 77, 128, 64, 32, num_warps=8,
                          num_stages=3)


def prefetch():
    _matmul(128, 64, 32, warps=8, stages=2)


def local_memory():
    _matmul(128, 256, 32, warps=4, stages=3)


def occupancy():
    _matmul(128, 128, 64, warps=4, stages=4)
