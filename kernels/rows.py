"""What the row kernels share: a row held in registers as pieces of a power of two, and its reductions.

Triton's tile shapes are powers of two, and few row lengths are: 1152 columns in a tile of 2048 leave 44 % of the lanes idle.
So a row is a tuple of ``count`` tiles of ``block`` columns, 3 of 64 for 192, and every operation an unrolled loop over them.
"""

import functools

import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2

MAX_PIECES = 8  # loops over pieces are unrolled
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as @triton.jit reads it; inline PTX is not available


@functools.cache
def split_row(size: int, target: int, min_block: int = 8) -> tuple[int, int]:
    """(block, count) with the least padding; ties go to the block closest to ``target``.

    ``target``, ``min_block`` and block are powers of two; 8 16-bit elements are a 16-byte access.
    """
    min_block = min(min_block, next_power_of_2(max(size, 8)))
    blocks = [min_block << i for i in range(size.bit_length()) if cdiv(size, min_block << i) <= MAX_PIECES]
    block = min(blocks, key=lambda block: (cdiv(size, block) * block, max(block / target, target / block)))
    return block, cdiv(size, block)


@triton.jit
def load_f32(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def columns_of(piece: tl.constexpr, BLOCK: tl.constexpr):
    """Column indices of a piece, (1, BLOCK)."""
    return piece * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_row(pointer, mask, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """Rows that start at ``pointer`` (N, 1), in float32; 0 where ``mask`` is False."""
    out = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK)
        out = out + (load_f32(pointer + column, mask & (column < D)),)
    return out


@triton.jit
def store_row(pointer, x, mask, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK)
        tl.store(pointer + column, x[piece], mask=mask & (column < D))


@triton.jit
def zero_row(ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    out = ()
    for _ in tl.static_range(PIECES):
        out = out + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return out


@triton.jit
def add_rows(a, b, PIECES: tl.constexpr):
    out = ()
    for piece in tl.static_range(PIECES):
        out = out + (a[piece] + b[piece],)
    return out


@triton.jit
def multiply_rows(a, b, PIECES: tl.constexpr):
    out = ()
    for piece in tl.static_range(PIECES):
        out = out + (a[piece] * b[piece],)
    return out


@triton.jit
def scale_row(a, factor, PIECES: tl.constexpr):
    """a * factor (N, 1)."""
    out = ()
    for piece in tl.static_range(PIECES):
        out = out + (a[piece] * factor,)
    return out


@triton.jit
def round_row(x, DTYPE: tl.constexpr, PIECES: tl.constexpr):
    out = ()
    for piece in tl.static_range(PIECES):
        out = out + (x[piece].to(DTYPE).to(tl.float32),)
    return out


@triton.jit
def centred(x, mean, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """x - mean (N, 1); 0 past column D."""
    out = ()
    for piece in tl.static_range(PIECES):
        diff = x[piece] - mean
        if (piece + 1) * BLOCK > D:
            diff = tl.where(columns_of(piece, BLOCK) < D, diff, 0.0)
        out = out + (diff,)
    return out


@triton.jit
def sum_row(x, PIECES: tl.constexpr):
    """The sum of each row, (N, 1)."""
    out = x[0]
    for piece in tl.static_range(1, PIECES):
        out += x[piece]
    return tl.sum(out, 1, keep_dims=True)


@triton.jit
def sum_of_products(a, b, PIECES: tl.constexpr):
    return sum_row(multiply_rows(a, b, PIECES), PIECES)


@triton.jit
def mean_of(total, SIZE: tl.constexpr):
    """total / SIZE, correctly rounded, by a reciprocal multiplication and one Newton step."""
    approx = total * (1.0 / SIZE)
    return approx + tl.fma(-approx, SIZE * 1.0, total) * (1.0 / SIZE)


@triton.jit
def rstd_of(mean_square, eps):
    """1 / sqrt(mean_square + eps) within 1 ulp.

    rsqrt.approx alone uses up the error that the rule allows. One Newton step refines it in a fifth of the instructions of
    an exact square root and division. rsqrt(inf) is 0, which the step would turn into NaN.
    """
    square = mean_square + eps
    root = tl.rsqrt(square)
    return tl.where(square < float("inf"), root + 0.5 * root * tl.fma(-square * root, root, 1.0), root)


@triton.jit
def _rcp(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x of a normal float within 1 ulp, without the slow path of a division."""
    approx = _rcp(x)
    return approx + approx * tl.fma(-approx, x, 1.0)


@triton.jit
def sigmoid(z):
    """By ex2.approx and rcp.approx, each within 2 ulp. exp(-z) may overflow to inf, which gives 0."""
    return _rcp(1.0 + tl.exp2(z * -1.4426950408889634))
