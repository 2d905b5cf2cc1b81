"""Tiles of heads as the rotary kernels hold them: pairs, their norm and their angles.

N tokens, H heads, E head dim, P rotated pairs of a head. A tile (BLOCK_N, BLOCK_H, E) is held as two, the first and the
second element of each pair: pairs (2i, 2i + 1) are loaded side by side and parted in registers, pairs (i, i + P) are two
loads. What is not rotated is paired likewise, with angle 0. All heads of a token are pieces of BLOCK_H heads, 3 of 8 for 24,
and a head's pairs are parts of BLOCK_P, 3 of 16 for the 36 of a head of 72: a tuple by piece of tuples by part of tiles.

Angles are coords times frequencies in float32, as in the reference. Fixed frequencies are a table (3, P) that is 0 for the
axes that are not the pair's own: learned ones have the same form, (3, P) or (3, H, P).
"""

import triton
import triton.language as tl

from .rows import add_rows, mean_of, multiply_rows, rstd_of, scale_row


@triton.constexpr_function
def parts_of(E, BLOCK_P):
    return ((E + 1) // 2 + BLOCK_P - 1) // BLOCK_P


@triton.jit
def pairs(part: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of a part, (1, 1, BLOCK_P)."""
    return part * BLOCK_P + tl.arange(0, BLOCK_P)[None, None, :]


@triton.jit
def columns(part: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where the first and the second element of each pair stand in a head (1, 1, BLOCK_P), and whether they are there."""
    pair = pairs(part, BLOCK_P)
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
def load_pairs(pointer, mask, part: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr,
               BLOCK_P: tl.constexpr):
    """A part of the pairs of the heads at ``pointer`` (N, H, 1), in float32; 0 where ``mask`` is off and beyond E."""
    if PAIRING == "interleaved":
        # 16 bytes a thread, where two loads would have strides
        column = pairs(part, 2 * BLOCK_P)
        x_NHE = tl.load(pointer + column, mask=mask & (column < E), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x_NHE, (x_NHE.shape[0], x_NHE.shape[1], BLOCK_P, 2)))
    else:
        first, second, has_first, has_second = columns(part, E, P, PAIRING, BLOCK_P)
        a = tl.load(pointer + first, mask=mask & has_first, other=0.0).to(tl.float32)
        return a, tl.load(pointer + second, mask=mask & has_second, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(pointer, a, b, mask, part: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr,
                BLOCK_P: tl.constexpr):
    if PAIRING == "interleaved":
        column = pairs(part, 2 * BLOCK_P)
        x_NHE = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * BLOCK_P))
        tl.store(pointer + column, x_NHE, mask=mask & (column < E))
    else:
        first, second, has_first, has_second = columns(part, E, P, PAIRING, BLOCK_P)
        tl.store(pointer + first, a, mask=mask & has_first)
        tl.store(pointer + second, b, mask=mask & has_second)


@triton.jit
def load_parts(pointer, mask, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """All pairs of the heads at ``pointer``: their first elements by part, and their second."""
    firsts, seconds = (), ()
    for part in tl.static_range(parts_of(E, BLOCK_P)):
        a, b = load_pairs(pointer, mask, part, E, P, PAIRING, BLOCK_P)
        firsts, seconds = firsts + (a,), seconds + (b,)
    return firsts, seconds


@triton.jit
def store_parts(pointer, a, b, mask, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    for part in tl.static_range(parts_of(E, BLOCK_P)):
        store_pairs(pointer, a[part], b[part], mask, part, E, P, PAIRING, BLOCK_P)


@triton.jit
def load_affine(vector, valid, head, H: tl.constexpr, NORM: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
                PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """The pairs of a weight or bias: of each head, or one head's for all; 0 where ``valid``, if given, is False."""
    if NORM == "rms_all":
        at, mask = vector + head * E, head < H
    else:
        at, mask = vector + head * 0, head >= 0
    if valid is not None:
        mask = valid & mask
    return load_parts(at, mask, E, P, PAIRING, BLOCK_P)


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
def frequencies(freqs, axis: tl.constexpr, head, pair, H: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr):
    """Frequencies of ``axis``, (1, H, P) or (1, 1, P); 0 for pairs that are not rotated."""
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
def quarters(x):
    """Elements 0, 4, .. of (N, H, 4 * BLOCK_P), then 1, 5, .., and 2, 6, .."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 4, 2, 2)))
    first, third = tl.split(even)
    second, _ = tl.split(odd)
    return first, second, third


@triton.jit
def rotation(t, h, w, valid, freqs, head, E: tl.constexpr, H: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr,
             BLOCK_P: tl.constexpr):
    """Cosines and sines (N, H, P), or (N, 1, P) for all heads, by part; of angle 0 where ``valid``, if given, is False."""
    PARTS: tl.constexpr = parts_of(E, BLOCK_P)
    if PARTS == 1:
        pair = pairs(0, BLOCK_P)
    else:
        # of all parts at once: as there are enough of them, each thread computes its own
        place = tl.arange(0, 4 * BLOCK_P)[None, None, :]
        pair = place % 4 * BLOCK_P + place // 4
    angle = t * frequencies(freqs, 0, head, pair, H, P, PER_HEAD)
    angle += h * frequencies(freqs, 1, head, pair, H, P, PER_HEAD)
    angle += w * frequencies(freqs, 2, head, pair, H, P, PER_HEAD)
    if valid is not None:
        angle = tl.where(valid, angle, 0.0)  # frequencies may not be finite
    cos, sin = cos_sin(angle)
    if PARTS == 1:
        return (cos,), (sin,)
    else:
        return quarters(cos), quarters(sin)


@triton.jit
def sum_of_row(x_NHP, NORM: tl.constexpr):
    """Sums over what is normalised together, (N, H, 1) or (N, 1, 1)."""
    sums = tl.sum(x_NHP, 2, keep_dims=True)
    if NORM == "rms_all":
        sums = tl.sum(sums, 1, keep_dims=True)
    return sums


@triton.jit
def sum_parts(a, b, PARTS: tl.constexpr):
    """Of both elements of the pairs of a piece, (N, H, BLOCK_P)."""
    sums = a[0] + b[0]
    for part in tl.static_range(1, PARTS):
        sums += a[part] + b[part]
    return sums


@triton.jit
def sum_products(a, b, c, d, PARTS: tl.constexpr):
    """a * c + b * d of the pairs of a piece, (N, H, BLOCK_P)."""
    return sum_parts(multiply_rows(a, c, PARTS), multiply_rows(b, d, PARTS), PARTS)


@triton.jit
def normalise(a, b, squares, mask, eps, H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
              PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """Normed pairs of a piece, and rstd; 0 where ``mask`` is off, even if eps is 0. ``squares``: of ``sum_of_all``."""
    PARTS: tl.constexpr = parts_of(E, BLOCK_P)
    if NORM == "layer_head":
        mean = mean_of(sum_of_row(sum_parts(a, b, PARTS), NORM), E)
        centred_a, centred_b = (), ()
        for part in tl.static_range(PARTS):
            _, _, has_first, has_second = columns(part, E, P, PAIRING, BLOCK_P)
            # the mean is masked, not the elements: a thread's columns share it
            centred_a = centred_a + (a[part] - tl.where(has_first, mean, 0.0),)
            centred_b = centred_b + (b[part] - tl.where(has_second, mean, 0.0),)
        a, b = centred_a, centred_b
    WIDTH: tl.constexpr = H * E if NORM == "rms_all" else E
    if NORM != "rms_all":
        squares = sum_of_row(sum_products(a, b, a, b, PARTS), NORM)
    rstd = tl.where(mask, rstd_of(squares * (1.0 / WIDTH), eps), 0.0)
    return scale_row(a, rstd, PARTS), scale_row(b, rstd, PARTS), rstd


@triton.jit
def through_norm(g, x, along, mean, rstd, PARTS: tl.constexpr):
    """The gradient before the norm of ``g`` after it, where x are normed: (g - x * along - mean) * rstd."""
    found = ()
    for part in tl.static_range(PARTS):
        found = found + ((g[part] - x[part] * along - mean) * rstd,)
    return found


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
        a, b = load_parts(pointer + head * head_stride, valid & (head < H), E, P, PAIRING, BLOCK_P)
        firsts, seconds = firsts + (a,), seconds + (b,)
    return firsts, seconds


@triton.jit
def sum_of_all(a, b, c, d, PIECES: tl.constexpr, PARTS: tl.constexpr):
    """a * c + b * d over all heads, (N, 1, 1)."""
    total = sum_of_row(sum_products(a[0], b[0], c[0], d[0], PARTS), "rms_all")
    for piece in tl.static_range(1, PIECES):
        total += sum_of_row(sum_products(a[piece], b[piece], c[piece], d[piece], PARTS), "rms_all")
    return total


@triton.jit
def zero_heads(PIECES: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
               BLOCK_P: tl.constexpr):
    piece = ()
    for _ in tl.static_range(PARTS):
        piece = piece + (tl.zeros([BLOCK_N, BLOCK_H, BLOCK_P], tl.float32),)
    found = ()
    for _ in tl.static_range(PIECES):
        found = found + (piece,)
    return found


@triton.jit
def add_at(sums, amounts, place: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr):
    """``sums`` with the parts ``amounts`` added to the piece at ``place``."""
    found = ()
    for piece in tl.static_range(PIECES):
        found = found + (add_rows(sums[piece], amounts, PARTS) if piece == place else sums[piece],)
    return found


@triton.jit
def affine_heads(vector, valid, H: tl.constexpr, NORM: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
                 PAIRING: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """A weight or bias as ``load_heads`` gives pairs; one piece where it is one head's for all."""
    firsts, seconds = (), ()
    for piece in tl.static_range((H + BLOCK_H - 1) // BLOCK_H if NORM == "rms_all" else 1):
        a, b = load_affine(vector, valid, heads(piece, BLOCK_H), H, NORM, E, P, PAIRING, BLOCK_P)
        firsts, seconds = firsts + (a,), seconds + (b,)
    return firsts, seconds


@triton.jit
def turn(a, b, cos, sin, PARTS: tl.constexpr):
    """The pairs of a piece, rotated."""
    firsts, seconds = (), ()
    for part in tl.static_range(PARTS):
        firsts = firsts + (a[part] * cos[part] - b[part] * sin[part],)
        seconds = seconds + (a[part] * sin[part] + b[part] * cos[part],)
    return firsts, seconds


@triton.jit
def turn_back(a, b, cos, sin, PARTS: tl.constexpr):
    firsts, seconds = (), ()
    for part in tl.static_range(PARTS):
        firsts = firsts + (a[part] * cos[part] + b[part] * sin[part],)
        seconds = seconds + (b[part] * cos[part] - a[part] * sin[part],)
    return firsts, seconds
