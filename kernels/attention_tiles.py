"""What the attention kernels share: the tile schedule of a packed batch, and loads, stores, masks and MMAs of tiles.

The rows of each sample are cut into tiles of BLOCK rows. The schedule holds the sample of every tile, in order of decreasing
work, so that the last programs to start are short. ``schedule_kernel`` fills it on the device, because the host knows no
sequence length; the grid has room for the most tiles there can be, ``capacity(rows, samples, block)``.

Rows past the end of cu_seqlens form an extra sample S, which has no keys: its outputs and gradients are 0 and its lse is
-inf, as in every row without keys.
"""

import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)  # softmax uses exp2, which the hardware has (MUFU.EX2)


def capacity(rows: int, samples: int, block: int) -> int:
    """The most tiles of ``block`` rows that ``samples`` and the tail can have: the last tile of each may be partial."""
    return cdiv(rows, block) + samples


def chunks(head_dim: int, split: bool) -> tuple[int, int]:
    """The powers of two that a head dim is loaded in: (64, 16) for 72, (128, 0) for 128. An MMA needs K of at least 16."""
    if not split:
        return next_power_of_2(head_dim), 0
    one = 1 << head_dim.bit_length() - 1
    two = max(next_power_of_2(head_dim - one), 16) if head_dim > one else 0
    return (2 * one, 0) if two == one else (one, two)


@triton.jit
def _length(cu, sample, samples, rows):
    """Sequence length of ``sample``; for the tail the rows that are left, past it 0."""
    start = tl.load(cu + sample, mask=sample <= samples, other=0)
    end = tl.load(cu + sample + 1, mask=sample < samples, other=0)
    return tl.maximum(tl.where(sample < samples, end, tl.where(sample == samples, rows.to(tl.int32), start)) - start, 0)


@triton.jit
def _work(cu_other, sample, samples):
    """Sort key of the schedule: the sample's length on the other side, -1 for the tail, below for padding."""
    start = tl.load(cu_other + sample, mask=sample < samples, other=0)
    end = tl.load(cu_other + sample + 1, mask=sample < samples, other=0)
    return tl.where(sample < samples, end - start, samples - 1 - sample)


@triton.jit
def _tiles(length, log2_block):
    return length + (1 << log2_block) - 1 >> log2_block


@triton.jit(do_not_specialize=["samples", "rows", "tiles", "log2_block"])
def schedule_kernel(cu, cu_other, schedule, first_tile, samples: tl.int64, rows: tl.int64, tiles: tl.int64, log2_block,
                    SPAN: tl.constexpr):
    """Program s writes s into ``schedule`` once per tile of 2^log2_block rows of sample s, from ``first_tile[s]`` on.

    Program S does the same for the tail. Program S + 1 fills the unused entries of the ``tiles`` in ``schedule`` with -1.
    """
    sample = tl.program_id(0).to(tl.int64)
    work = _work(cu_other, sample, samples)
    place = tl.zeros([], tl.int64)
    for start in range(0, samples + 1, SPAN):
        other = start + tl.arange(0, SPAN)
        others_work = _work(cu_other, other, samples)
        before = (other <= samples) & ((others_work > work) | ((others_work == work) & (other < sample)))
        count = _tiles(_length(cu, other, samples, rows), log2_block)
        place += tl.sum(tl.where(before, count, 0), 0)
    end = tl.minimum(place + _tiles(_length(cu, sample, samples, rows), log2_block), tiles)
    value = sample.to(tl.int32)
    if sample <= samples:
        tl.store(first_tile + sample, place.to(tl.int32))
    else:
        end = tiles
        value = tl.full([], -1, tl.int32)
    for slot0 in range(place, end, SPAN):
        slot = slot0 + tl.arange(0, SPAN)
        tl.store(schedule + slot, tl.zeros([SPAN], tl.int32) + value, mask=slot < end)


@triton.jit
def tile_coords(program, schedule, first_tile, cu, samples, rows, heads, BLOCK: tl.constexpr):
    """(sample or -1, its first row, its length, head, first row of the tile within the sample) of a program's tile.

    Tiles of one head are adjacent and share its keys in L2. They run last to first: under a causal mask the last tile has
    the most work.
    """
    sample = tl.load(schedule + program // heads)
    known = tl.maximum(sample, 0)
    length = _length(cu, known, samples, rows)
    tiles = tl.maximum(tl.cdiv(length, BLOCK), 1)
    local = program - tl.load(first_tile + known) * heads
    return sample, tl.load(cu + known).to(tl.int64), length, local // tiles, (tiles - 1 - local % tiles) * BLOCK


@triton.jit
def segment(cu, sample, samples):
    """(first row, length) of a sample on the other side; the tail has length 0 there."""
    start = tl.load(cu + sample)
    end = tl.load(cu + sample + 1, mask=sample < samples, other=0)
    length = tl.where(sample < samples, end - start, 0)
    # a tensor descriptor needs a valid address even where nothing is loaded
    return tl.where(length > 0, start, 0).to(tl.int64), length


@triton.jit
def make_view(pointer, stride, length, head_stride, heads, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
         BLOCK: tl.constexpr, TMA: tl.constexpr):
    """TMA descriptors, or pointers, of tiles of BLOCK rows: ``length`` rows of E elements in each of ``heads`` heads.

    A row is one chunk of E0 elements, or two of E0 and E1: powers of two, of which the last may extend past E.
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
        in_bounds = (tl.arange(0, BLOCK) < length - row)[:, None]
        if COLUMN + WIDTH > E:
            in_bounds = in_bounds & (COLUMN + tl.arange(0, WIDTH) < E)[None, :]
        return tl.load(source + (head * head_stride + row * stride), mask=in_bounds, other=0.0)


@triton.jit
def load_tile(source, row, stride, length, head, head_stride, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
         BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Both chunks of BLOCK rows from ``row`` of a view; out-of-bounds rows and columns are filled with 0."""
    one = _chunk(source[0], row, stride, length, head, head_stride, E, 0, BLOCK, E0, TMA)
    if E1:
        return one, _chunk(source[1], row, stride, length, head, head_stride, E, E0, BLOCK, E1, TMA)
    else:
        return one, one


@triton.jit
def load_once(pointer, stride, length, row, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, BLOCK: tl.constexpr):
    """``load_tile`` outside the main loop: by pointers, since building a descriptor costs more than one load saves."""
    view = make_view(pointer, stride, length, 0, 1, E, E0, E1, BLOCK, False)
    return load_tile(view, row, stride, length, 0, 0, E, E0, E1, BLOCK, False)


@triton.jit
def store_tile(pointer, stride, length, row, one, two, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
               BLOCK: tl.constexpr):
    """Store both chunks of BLOCK rows from ``row``, masked to the rows and columns in bounds."""
    at = pointer + (row + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * stride
    in_bounds = (tl.arange(0, BLOCK) < length - row)[:, None]
    column = tl.arange(0, E0)[None, :]
    tl.store(at + column, one.to(pointer.dtype.element_ty), mask=in_bounds & (column < E))
    if E1:
        column = E0 + tl.arange(0, E1)[None, :]
        tl.store(at + column, two.to(pointer.dtype.element_ty), mask=in_bounds & (column < E))


@triton.jit
def softmax_exp(x, FP32: tl.constexpr):
    """exp(x) if FP32, else exp2(x) of scores prescaled by LOG2E: one instruction less, one rounding more."""
    return tl.exp2(x * LOG2E) if FP32 else tl.exp2(x)


@triton.jit
def dot_nt(a, b, acc, E1: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b.T`` over both chunks, accumulated onto ``acc`` (None: 0)."""
    if acc is None:
        found = tl.dot(a[0], b[0].T, input_precision=PRECISION)
    else:
        found = tl.dot(a[0], b[0].T, acc, input_precision=PRECISION)
    if E1:
        found = tl.dot(a[1], b[1].T, found, input_precision=PRECISION)
    return found


@triton.jit
def key_range(m0, q_len, k_len, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """[lo, hi): the keys that at least one query of the tile attends to; lo is a multiple of BLOCK_N."""
    lo = tl.zeros([], tl.int32)
    hi = k_len
    if RIGHT:
        hi = tl.minimum(hi, tl.minimum(m0 + BLOCK_M, q_len) + k_len - q_len + right)
    if LEFT:
        lo = tl.maximum(m0 + k_len - q_len - left, 0) // BLOCK_N * BLOCK_N
    return lo, hi


@triton.jit
def query_range(n0, q_len, k_len, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):
    """[lo, hi): the queries that attend to at least one key of the tile; lo is a multiple of BLOCK_M."""
    lo = tl.zeros([], tl.int32)
    hi = q_len
    if RIGHT:
        lo = tl.maximum(n0 - (k_len - q_len) - right, 0) // BLOCK_M * BLOCK_M
    if LEFT:
        hi = tl.minimum(hi, tl.minimum(n0 + BLOCK_N, k_len) - (k_len - q_len) + left)
    return lo, hi


@triton.jit
def apply_mask(s, m0, n0, q_len, k_len, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr):
    """Scores (BLOCK_M, BLOCK_N) with -inf where a query must not attend to a key.

    Under a branch: few tiles need a mask, and a compare and a select per score are a tenth of the loop.
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
        visible = key < k_len
        if RIGHT:
            visible = visible & (key <= row + right)
        if LEFT:
            visible = visible & (key >= row - left)
        s = tl.where(visible, s, -float("inf"))
    return s
