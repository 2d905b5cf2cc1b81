"""Tiles of heads as the rotary kernels hold them: pairs, their norm and their angles.

N tokens, H heads, E head dim, P rotated pairs of a head. A tile (BLOCK_N, BLOCK_H, E) is held as two, the first and the
second element of each pair: pairs (2i, 2i + 1) are loaded side by side and parted in registers, pairs (i, i + P) are two
loads. What is not rotated is paired likewise, with angle 0. All heads of a token are pieces of BLOCK_H heads, 3 of 8 for 24:
a tuple of tiles, as rows are in rows.py.

Angles are coords times frequencies in float32, as in the reference. Fixed frequencies are a table (3, P) that is 0 for the
axes that are not the pair's own: learned ones have the same form, (3, P) or (3, H, P).
"""

import triton
import triton.language as tl

from .rows import mean_of, rstd_of


@triton.jit
def columns(E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where the first and the second element of each pair stand in a head (1, 1, BLOCK_P), and whether they are there."""
    pair = tl.arange(0, BLOCK_P)[None, None, :]
    if PAIRING == "interleaved":
        first, second = 2 * pair, 2 * pair + 1
        return first, second, first < E, second < E
    elif 2 * P == E:
        return pair, pair + P, pair < P, pair < P
    else:
        REST: tl.constexpr = (E - 2 * P + 1) // 2  # pairs of what is not rotated, its halves again side by side
        second = tl.where(pair < P, pair + P, pair + P + REST)
        return tl.where(pair < P, pair, pair + P), second, pair < P + REST, second < E


@triton.jit
def load_pairs(pointer, mask, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """The pairs of the heads that ``pointer`` (N, H, 1) points to, in float32; 0 where ``mask`` is off and beyond E."""
    if PAIRING == "interleaved":
        # 16 bytes a thread, where two loads would have strides
        column = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        x_NHE = tl.load(pointer + column, mask=mask & (column < E), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x_NHE, (x_NHE.shape[0], x_NHE.shape[1], BLOCK_P, 2)))
    else:
        first, second, has_first, has_second = columns(E, P, PAIRING, BLOCK_P)
        a = tl.load(pointer + first, mask=mask & has_first, other=0.0).to(tl.float32)
        return a, tl.load(pointer + second, mask=mask & has_second, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(pointer, a, b, mask, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    if PAIRING == "interleaved":
        column = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        x_NHE = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * BLOCK_P))
        tl.store(pointer + column, x_NHE, mask=mask & (column < E))
    else:
        first, second, has_first, has_second = columns(E, P, PAIRING, BLOCK_P)
        tl.store(pointer + first, a, mask=mask & has_first)
        tl.store(pointer + second, b, mask=mask & has_second)


@triton.jit
def load_affine(vector, head, H: tl.constexpr, NORM: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr,
                 BLOCK_P: tl.constexpr):
    """The pairs of a weight or bias: of each head, or one head's for all."""
    if NORM == "rms_all":
        return load_pairs(vector + head * E, head < H, E, P, PAIRING, BLOCK_P)
    else:
        return load_pairs(vector + head * 0, head >= 0, E, P, PAIRING, BLOCK_P)


@triton.jit
def cos_sin(angle):
    """Cosine and sine to float32's rounding, for any angle whose own rounding leaves them a meaning.

    The angle is brought to [-pi/4, pi/4] by pi/2 in three parts (Cody and Waite). The first two have 8 and 11 bits: up to
    12,000 rad their products are exact, with a fused multiply-add and, as in the interpreter, without. tl.sin would be the
    fast sin.approx or, exact, keep a table of 2/pi's digits in local memory.
    """
    whole = tl.floor(angle * 0.636619772 + 0.5)
    r = angle - whole * 1.5703125 - whole * 0.0004837512969970703 - whole * 7.549790126404332e-08
    r = tl.where(tl.abs(r) <= 1.6, r, r * 0)  # from 2**24 on angles are further apart than this; NaN stays NaN
    z = r * r
    # Taylor series, whose next terms are below 2e-9
    c = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    s = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    quarter = whole - 4 * tl.floor(whole * 0.25)  # 0 to 3, as a float, which a NaN may be too
    odd = (quarter == 1) | (quarter == 3)
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def is_valid(rows, token, tokens):
    """Whether tokens belong to a sample."""
    in_bounds = token < tokens
    if rows is not None:
        return in_bounds & (tl.load(rows + token, mask=in_bounds, other=-1) >= 0)
    else:
        return in_bounds


@triton.jit
def frequencies(freqs, axis: tl.constexpr, head, H: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr,
                 BLOCK_P: tl.constexpr):
    """Frequencies of ``axis``, (1, H, P) or (1, 1, P); 0 for pairs that are not rotated."""
    pair = tl.arange(0, BLOCK_P)[None, None, :]
    if PER_HEAD:
        return tl.load(freqs + (axis * H + head) * P + pair, mask=(head < H) & (pair < P), other=0.0).to(tl.float32)
    else:
        return tl.load(freqs + axis * P + pair, mask=pair < P, other=0.0).to(tl.float32)


@triton.jit
def coordinates(coords, token, valid):
    """t, h and w of tokens (N, 1, 1); 0 for tokens of no sample."""
    t = tl.load(coords + 3 * token, mask=valid, other=0).to(tl.float32)
    h = tl.load(coords + 3 * token + 1, mask=valid, other=0).to(tl.float32)
    return t, h, tl.load(coords + 3 * token + 2, mask=valid, other=0).to(tl.float32)


@triton.jit
def rotation(t, h, w, freqs, head, H: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_P: tl.constexpr):
    """Cosines and sines (N, H, P), or (N, 1, P) for all heads."""
    angle = t * frequencies(freqs, 0, head, H, P, PER_HEAD, BLOCK_P)
    angle += h * frequencies(freqs, 1, head, H, P, PER_HEAD, BLOCK_P)
    angle += w * frequencies(freqs, 2, head, H, P, PER_HEAD, BLOCK_P)
    return cos_sin(angle)


@triton.jit
def sum_of_row(x_NHP, NORM: tl.constexpr):
    """Sums over what is normalised together, (N, H, 1) or (N, 1, 1)."""
    sums = tl.sum(x_NHP, 2, keep_dims=True)
    if NORM == "rms_all":
        sums = tl.sum(sums, 1, keep_dims=True)
    return sums


@triton.jit
def normalise(a, b, squares, mask, eps, H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
               PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """Normed pairs, and rstd; 0 where ``mask`` is off, even if eps is 0. ``squares``: of ``squares_of_all``."""
    if NORM == "layer_head":
        mean = mean_of(sum_of_row(a + b, NORM), E)
        _, _, has_first, has_second = columns(E, P, PAIRING, BLOCK_P)
        a, b = tl.where(mask & has_first, a - mean, 0.0), tl.where(mask & has_second, b - mean, 0.0)
    WIDTH: tl.constexpr = H * E if NORM == "rms_all" else E
    if NORM != "rms_all":
        squares = sum_of_row(a * a + b * b, NORM)
    rstd = tl.where(mask, rstd_of(squares * (1.0 / WIDTH), eps), 0.0)
    return a * rstd, b * rstd, rstd


@triton.jit
def heads(piece: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a piece, (1, BLOCK_H, 1)."""
    return piece * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]


@triton.jit
def load_heads(pointer, head_stride, valid, H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr,
                BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """The pairs of all heads of the tokens that ``pointer`` (N, 1, 1) points to: a tuple of their first elements by piece
    of BLOCK_H heads, and one of their second.
    """
    firsts, seconds = (), ()
    for piece in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
        head = heads(piece, BLOCK_H)
        a, b = load_pairs(pointer + head * head_stride, valid & (head < H), E, P, PAIRING, BLOCK_P)
        firsts, seconds = firsts + (a,), seconds + (b,)
    return firsts, seconds


@triton.jit
def squares_of_all(a, b, NORM: tl.constexpr, PIECES: tl.constexpr):
    """Sums of squares over what is normalised together, if that is all heads; else 0: each piece has its own."""
    if NORM == "rms_all":
        total = sum_of_row(a[0] * a[0] + b[0] * b[0], NORM)
        for piece in tl.static_range(1, PIECES):
            total += sum_of_row(a[piece] * a[piece] + b[piece] * b[piece], NORM)
        return total
    else:
        return 0.0


@triton.jit
def zero_heads(PIECES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    found = ()
    for _ in tl.static_range(PIECES):
        found = found + (tl.zeros([BLOCK_N, BLOCK_H, BLOCK_P], tl.float32),)
    return found


@triton.jit
def add_at(sums, amount, place: tl.constexpr, PIECES: tl.constexpr):
    """``sums`` with ``amount`` added to the one at ``place``."""
    found = ()
    for piece in tl.static_range(PIECES):
        found = found + (sums[piece] + amount if piece == place else sums[piece],)
    return found


@triton.jit
def affine_heads(vector, H: tl.constexpr, NORM: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr,
                  BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """A weight or bias as ``load_heads`` gives pairs; one piece where it is one head's for all."""
    firsts, seconds = (), ()
    for piece in tl.static_range((H + BLOCK_H - 1) // BLOCK_H if NORM == "rms_all" else 1):
        a, b = load_affine(vector, heads(piece, BLOCK_H), H, NORM, E, P, PAIRING, BLOCK_P)
        firsts, seconds = firsts + (a,), seconds + (b,)
    return firsts, seconds
