"""Triton kernels for tests/test_aot.py: one the proof must pass, and one for each fault that it must refuse.

They are compiled and never run, so they compute nothing of use.
"""

import triton
import triton.language as tl


@triton.jit
def good(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x + y: wide loads and stores, nothing else."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x + y).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def one_key(x_ptr, y_ptr, out_ptr, n: tl.int64, BLOCK: tl.constexpr):
    """The same sum with its size kept out of the cache key."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x + y).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def trapping(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """An assumption that cannot hold: all that follows is undefined, and LLVM leaves a trap in its place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.assume(n < n)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0))


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, k_size, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_K: tl.constexpr):
    """One tile of a (M, K) times b (K, N), by pointers; sizes are multiples of the blocks."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_MK = a_ptr + m[:, None] * k_size + k[None, :]
    b_KN = b_ptr + k[:, None] * BLOCK_N + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, k_size, BLOCK_K):
        acc = tl.dot(tl.load(a_MK), tl.load(b_KN), acc, input_precision=PRECISION)
        a_MK += BLOCK_K
        b_KN += BLOCK_K * BLOCK_N
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def chained(a_ptr, b_ptr, out_ptr, k_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """K = 64 + 32 in one iteration: two products into one accumulator, and the matrix unit is drained in each iteration."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k64, k32 = tl.arange(0, 64), 64 + tl.arange(0, 32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, k_size, 96):
        a = tl.load(a_ptr + m[:, None] * k_size + at + k64[None, :])
        b = tl.load(b_ptr + (at + k64[:, None]) * BLOCK_N + n[None, :])
        acc = tl.dot(a, b, acc)
        a = tl.load(a_ptr + m[:, None] * k_size + at + k32[None, :])
        b = tl.load(b_ptr + (at + k32[:, None]) * BLOCK_N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def doubled(a_ptr, b_ptr, out_ptr, k_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """2 a times b: the first factor of the product is in registers, not where it was loaded to."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, k_size, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * k_size + at + k[None, :])
        acc = tl.dot(a + a, tl.load(b_ptr + (at + k[:, None]) * BLOCK_N + n[None, :]), acc)
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def scalar_products(a_ptr, b_ptr, out_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A 16-bit product written as a sum of products: no matrix instruction."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_MK = tl.load(a_ptr + m[:, None] * BLOCK_K + k[None, :]).to(tl.float32)
    b_NK = tl.load(b_ptr + n[:, None] * BLOCK_K + k[None, :]).to(tl.float32)
    out_MN = tl.sum(a_MK[:, None, :] * b_NK[None, :, :], axis=2)
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], out_MN.to(out_ptr.dtype.element_ty))
