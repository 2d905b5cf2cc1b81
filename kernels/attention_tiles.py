"""What the attention kernels share: which program does which tile of a ragged pack, and how a tile is read.

Queries and keys of a sample are cut into tiles of BLOCK rows. A table holds the sample of every tile, samples with the most
work first, so that the last programs to start are short. It is made on the device by ``schedule_kernel``: no length is known
on the host, and the launch has as many programs as tiles there can be at most, ``capacity(rows, samples, block)``.

Rows past the end of cu_seqlens are one sample more, number S, which sees nothing: its outputs and gradients are the 0 and
-inf of every row without keys.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # softmax in powers of 2, which the hardware has


def capacity(rows: int, samples: int, block: int) -> int:
    """The most tiles of ``block`` rows that ``samples`` and a tail can have: each may end in one that is not full."""
    return triton.cdiv(rows, block) + samples


def chunks(head_dim: int, split: bool) -> tuple[int, int]:
    """Powers of two that a head is read in: 64 and 16 for 72, 128 and 0 for 128. A product is over 16 numbers at least."""
    if not split:
        return triton.next_power_of_2(head_dim), 0
    one = 1 << head_dim.bit_length() - 1
    two = max(triton.next_power_of_2(head_dim - one), 16) if head_dim > one else 0
    return (2 * one, 0) if two == one else (one, two)


@triton.jit
def _length(cu, sample, samples, rows):
    """Rows of ``sample``; of the tail those that are left, and 0 of what is no sample."""
    start = tl.load(cu + sample, mask=sample <= samples, other=0)
    end = tl.load(cu + sample + 1, mask=sample < samples, other=0)
    return tl.maximum(tl.where(sample < samples, end, tl.where(sample == samples, rows.to(tl.int32), start)) - start, 0)


@triton.jit
def _work(cu_other, sample, samples):
    """What samples are sorted by: rows on the other side, -1 for the tail, -2 for what is no sample."""
    start = tl.load(cu_other + sample, mask=sample < samples, other=0)
    end = tl.load(cu_other + sample + 1, mask=sample < samples, other=0)
    return tl.where(sample < samples, end - start, samples - 1 - sample)


@triton.jit
def _tiles(length, power):
    return length + (1 << power) - 1 >> power


@triton.jit(do_not_specialize=["samples", "rows", "tiles", "power"])
def schedule_kernel(cu, cu_other, table, first, samples: tl.int64, rows: tl.int64, tiles: tl.int64, power,
                    SPAN: tl.constexpr):
    """Program s writes sample s's tiles of 2^power rows: ``first[s]`` is the place of its first one in ``table``, which
    holds s.

    Program S does so for the tail; program S + 1 fills what is left of the table's ``tiles`` places with -1.
    """
    mine = tl.program_id(0).to(tl.int64)
    work = _work(cu_other, mine, samples)
    place = tl.zeros([], tl.int64)
    for start in range(0, samples + 1, SPAN):
        other = start + tl.arange(0, SPAN)
        others_work = _work(cu_other, other, samples)
        before = (other <= samples) & ((others_work > work) | ((others_work == work) & (other < mine)))
        count = _tiles(_length(cu, other, samples, rows), power)
        place += tl.sum(tl.where(before, count, 0), 0)
    end = tl.minimum(place + _tiles(_length(cu, mine, samples, rows), power), tiles)
    value = mine.to(tl.int32)
    if mine <= samples:
        tl.store(first + mine, place.to(tl.int32))
    else:
        end = tiles
        value = tl.full([], -1, tl.int32)
    for slot0 in range(place, end, SPAN):
        slot = slot0 + tl.arange(0, SPAN)
        tl.store(table + slot, tl.zeros([SPAN], tl.int32) + value, mask=slot < end)


@triton.jit
def tile_of(program, table, first, cu, samples, rows, heads, BLOCK: tl.constexpr):
    """(sample or -1, its first row, its rows, head, first row within the sample) of a program's tile.

    A sample's heads follow one another, each with all its tiles, the last first: they read the same keys out of the cache,
    and under a causal mask the last have the most work.
    """
    sample = tl.load(table + program // heads)
    known = tl.maximum(sample, 0)
    length = _length(cu, known, samples, rows)
    tiles = tl.maximum(tl.cdiv(length, BLOCK), 1)
    local = program - tl.load(first + known) * heads
    return sample, tl.load(cu + known).to(tl.int64), length, local // tiles, (tiles - 1 - local % tiles) * BLOCK


@triton.jit
def segment(cu, sample, samples):
    """(first row, rows) of a sample on the other side of its tile: the tail has none there."""
    start = tl.load(cu + sample)
    end = tl.load(cu + sample + 1, mask=sample < samples, other=0)
    length = tl.where(sample < samples, end - start, 0)
    # a descriptor needs an address that exists, though nothing is read
    return tl.where(length > 0, start, 0).to(tl.int64), length


@triton.jit
def view(pointer, stride, length, head_stride, heads, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
         BLOCK: tl.constexpr, TMA: tl.constexpr):
    """What ``rows`` reads tiles of BLOCK rows from: ``length`` rows of E numbers, of each of ``heads`` heads.

    A row is one chunk of E0 numbers, or two, of E0 and E1: powers of two of which the last may reach past E.
    """
    if TMA:
        known = tl.maximum(length, 1)
        one = tl.make_tensor_descriptor(pointer, [heads, known, E], [head_stride, stride, 1], [1, BLOCK, E0])
        if E1:
            return one, tl.make_tensor_descriptor(pointer, [heads, known, E], [head_stride, stride, 1], [1, BLOCK, E1])
        else:
            return one, one
    else:
        at = pointer + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride
        if E1:
            return at + tl.arange(0, E0)[None, :], at + (E0 + tl.arange(0, E1))[None, :]
        else:
            return at + tl.arange(0, E0)[None, :], at


@triton.jit
def _chunk(source, row, stride, length, head, head_stride, E: tl.constexpr, COLUMN: tl.constexpr, BLOCK: tl.constexpr,
           WIDTH: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return source.load([head, row, COLUMN]).reshape(BLOCK, WIDTH)
    else:
        inside = (tl.arange(0, BLOCK) < length - row)[:, None]
        if COLUMN + WIDTH > E:
            inside = inside & (COLUMN + tl.arange(0, WIDTH) < E)[None, :]
        return tl.load(source + (head * head_stride + row * stride), mask=inside, other=0.0)


@triton.jit
def rows(source, row, stride, length, head, head_stride, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
         BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Both chunks of BLOCK rows from ``row`` of a ``view``; 0 past its rows and its columns, whatever lies there."""
    one = _chunk(source[0], row, stride, length, head, head_stride, E, 0, BLOCK, E0, TMA)
    if E1:
        return one, _chunk(source[1], row, stride, length, head, head_stride, E, E0, BLOCK, E1, TMA)
    else:
        return one, one


@triton.jit
def read(pointer, stride, length, row, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, BLOCK: tl.constexpr):
    """``rows`` that are read once: by pointers, as a descriptor costs more than it saves."""
    return rows(view(pointer, stride, length, 0, 1, E, E0, E1, BLOCK, False), row, stride, length, 0, 0, E, E0, E1, BLOCK,
                False)


@triton.jit
def write(pointer, stride, length, row, one, two, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, BLOCK: tl.constexpr):
    """Store both chunks of BLOCK rows from ``row``, as far as there are rows and columns."""
    at = pointer + (row + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * stride
    inside = (tl.arange(0, BLOCK) < length - row)[:, None]
    column = tl.arange(0, E0)[None, :]
    tl.store(at + column, one.to(pointer.dtype.element_ty), mask=inside & (column < E))
    if E1:
        column = E0 + tl.arange(0, E1)[None, :]
        tl.store(at + column, two.to(pointer.dtype.element_ty), mask=inside & (column < E))


@triton.jit
def power(x, EXACT: tl.constexpr):
    """exp(x) where EXACT, else 2^x, for which scores were scaled by LOG2E: an instruction less, and a rounding more."""
    return tl.exp2(x * LOG2E) if EXACT else tl.exp2(x)


@triton.jit
def scores(one, two, start, E1: tl.constexpr, PRECISION: tl.constexpr):
    """``one @ two.T`` over both chunks, added to ``start`` (None: to 0)."""
    if start is None:
        found = tl.dot(one[0], two[0].T, input_precision=PRECISION)
    else:
        found = tl.dot(one[0], two[0].T, start, input_precision=PRECISION)
    if E1:
        found = tl.dot(one[1], two[1].T, found, input_precision=PRECISION)
    return found


@triton.jit
def keys_of(m0, q_len, k_len, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """[lo, hi): the keys that any row of a tile of queries sees, lo a multiple of BLOCK_N."""
    lo = tl.zeros([], tl.int32)
    hi = k_len
    if RIGHT:
        hi = tl.minimum(hi, tl.minimum(m0 + BLOCK_M, q_len) + k_len - q_len + right)
    if LEFT:
        lo = tl.maximum(m0 + k_len - q_len - left, 0) // BLOCK_N * BLOCK_N
    return lo, hi


@triton.jit
def queries_of(n0, q_len, k_len, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):
    """[lo, hi): the queries that see any row of a tile of keys, lo a multiple of BLOCK_M."""
    lo = tl.zeros([], tl.int32)
    hi = q_len
    if RIGHT:
        lo = tl.maximum(n0 - (k_len - q_len) - right, 0) // BLOCK_M * BLOCK_M
    if LEFT:
        hi = tl.minimum(hi, tl.minimum(n0 + BLOCK_N, k_len) - (k_len - q_len) + left)
    return lo, hi


@triton.jit
def masked(s, m0, n0, q_len, k_len, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr):
    """Scores (BLOCK_M, BLOCK_N) with -inf where a query does not see a key.

    Behind a branch: few tiles are at an edge, and a comparison and a selection for every score are a tenth of the loop.
    """
    shift = k_len - q_len
    edge = n0 + BLOCK_N > k_len
    if RIGHT:
        edge |= n0 + BLOCK_N - 1 > m0 + shift + right
    if LEFT:
        edge |= n0 < m0 + BLOCK_M - 1 + shift - left
    if edge:
        key = n0 + tl.arange(0, BLOCK_N)[None, :]
        row = m0 + shift + tl.arange(0, BLOCK_M)[:, None]
        seen = key < k_len
        if RIGHT:
            seen = seen & (key <= row + right)
        if LEFT:
            seen = seen & (key >= row - left)
        s = tl.where(seen, s, -float("inf"))
    return s
