"""What the row kernels share: a row in registers, cut into pieces, and its statistics.

A tile's lengths are powers of two, and few rows are: 1152 columns in one tile of 2048 leave 44 % of the lanes idle. So a row
is ``count`` pieces of ``block`` columns, 3 of 64 for 192: a tuple of tiles, each step a loop over them that is unrolled.
"""

import functools

import triton
import triton.language as tl

MOST_PIECES = 8  # each is code of its own
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as @triton.jit has it; there is no PTX then


@functools.cache
def pieces(size: int, near: int, least: int = 8) -> tuple[int, int]:
    """(block, count) with the least padding; among equals the block nearest to ``near``, both powers of two.

    A block has ``least`` columns or more, a power of two too; 8 of 16-bit numbers are 16 bytes.
    """
    least = min(least, triton.next_power_of_2(max(size, 8)))
    blocks = [least << power for power in range(size.bit_length()) if triton.cdiv(size, least << power) <= MOST_PIECES]
    block = min(blocks, key=lambda block: (triton.cdiv(size, block) * block, max(block / near, near / block)))
    return block, triton.cdiv(size, block)


@triton.jit
def numbers(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def columns_of(piece: tl.constexpr, BLOCK: tl.constexpr):
    """Of a piece, (1, BLOCK)."""
    return piece * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_row(pointer, mask, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """The pieces of rows that begin at ``pointer`` (N, 1), in float32; 0 where ``mask`` is off."""
    found = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK)
        found = found + (numbers(pointer + column, mask & (column < D)),)
    return found


@triton.jit
def store_row(pointer, x, mask, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK)
        tl.store(pointer + column, x[piece], mask=mask & (column < D))


@triton.jit
def zero_row(ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    found = ()
    for _ in tl.static_range(PIECES):
        found = found + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return found


@triton.jit
def add_rows(a, b, PIECES: tl.constexpr):
    found = ()
    for piece in tl.static_range(PIECES):
        found = found + (a[piece] + b[piece],)
    return found


@triton.jit
def multiply_rows(a, b, PIECES: tl.constexpr):
    found = ()
    for piece in tl.static_range(PIECES):
        found = found + (a[piece] * b[piece],)
    return found


@triton.jit
def scale_row(a, factor, PIECES: tl.constexpr):
    """a * factor (N, 1)."""
    found = ()
    for piece in tl.static_range(PIECES):
        found = found + (a[piece] * factor,)
    return found


@triton.jit
def round_row(x, DTYPE: tl.constexpr, PIECES: tl.constexpr):
    found = ()
    for piece in tl.static_range(PIECES):
        found = found + (x[piece].to(DTYPE).to(tl.float32),)
    return found


@triton.jit
def centred(x, mean, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """x - mean (N, 1), and 0 beyond D."""
    found = ()
    for piece in tl.static_range(PIECES):
        away = x[piece] - mean
        if (piece + 1) * BLOCK > D:
            away = tl.where(columns_of(piece, BLOCK) < D, away, 0.0)
        found = found + (away,)
    return found


@triton.jit
def sum_row(x, PIECES: tl.constexpr):
    """Of each row, (N, 1)."""
    found = x[0]
    for piece in tl.static_range(1, PIECES):
        found += x[piece]
    return tl.sum(found, 1, keep_dims=True)


@triton.jit
def sum_of_products(a, b, PIECES: tl.constexpr):
    return sum_row(multiply_rows(a, b, PIECES), PIECES)


@triton.jit
def mean_of(total, SIZE: tl.constexpr):
    """total / SIZE, rounded as a division is, but by a reciprocal and a Newton step."""
    rough = total * (1.0 / SIZE)
    return rough + tl.fma(-rough, SIZE * 1.0, total) * (1.0 / SIZE)


@triton.jit
def rstd_of(mean_square, eps):
    """1 / sqrt(mean_square + eps), rounded but for the last bit.

    The approximate root errs by all that the error rule allows, on every number; a Newton step mends it in a fifth of the
    instructions of an exact root and division. Of infinity the root is 0, and there is nothing to mend.
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
    """1 / x of a normal number, rounded but for the last bit, without a division's slow path."""
    rough = _rcp(x)
    return rough + rough * tl.fma(-rough, x, 1.0)


@triton.jit
def sigmoid(z):
    """By the hardware's power of 2 and reciprocal, each good to a bit or two of float32. exp(-z) may be infinite: then 0."""
    return _rcp(1.0 + tl.exp2(z * -1.4426950408889634))
