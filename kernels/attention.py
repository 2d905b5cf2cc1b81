"""Attention within each sample of a pack, forward and backward: the forward kernel, and how all of them are launched.

Nq query rows, Nk key rows, H heads, Hk key heads (Hk divides H), E head dim, S samples. FlashAttention-2's online softmax
(arXiv 2307.08691) over tiles of a ragged pack (attention_tiles.py); the backward's kernels are in attention_backward.py.

With LOOKAHEAD the scores of the next tile of keys are asked for before the softmax of this one, so that the matrix unit has
work while the others compute powers of 2. Without, the scores of one tile less are in registers, and two programs share a
multiprocessor: each has the matrix unit while the other computes.
"""

import contextvars

import torch
import triton
import triton.language as tl

from .attention_backward import PAD, dkdv_kernel, dq_kernel, pad_count
from .attention_config import Config
from .attention_tiles import (
    LOG2E,
    capacity,
    chunks,
    keys_of,
    masked,
    power,
    read,
    rows,
    schedule_kernel,
    scores,
    segment,
    tile_of,
    view,
    write,
)
from .launch import contiguous, on, precision, rows_dense


# ------------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["samples", "heads", "queries", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head",
                               "left", "right"])
def forward_kernel(q, k, v, out, lse, parts, cu_q, cu_k, table, first, samples, heads, queries: tl.int64, q_token: tl.int64,
                   q_head: tl.int64, k_token: tl.int64, k_head: tl.int64, v_token: tl.int64, v_head: tl.int64, scale, left,
                   right, GROUP: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, LEFT: tl.constexpr,
                   RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
                   LOOKAHEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out, lse and, where float32 numbers are EXACT, ``parts`` of one tile of queries and one head."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    q_token, q_head = q_token * UNIT, q_head * UNIT
    k_token, k_head, v_token, v_head = k_token * UNIT, k_head * UNIT, v_token * UNIT, v_head * UNIT
    scale = tl.maximum(scale, 1e-30)  # times -inf, a scale of 0 would make NaN
    if not EXACT:
        scale *= LOG2E
    sample, q_start, q_len, head, m0 = tile_of(tl.program_id(0), table, first, cu_q, samples, queries, heads, BLOCK_M)
    if sample < 0:
        return
    k_start, k_len = segment(cu_k, sample, samples)
    used = tl.where(k_len > 0, q_len, 0)  # rows of a sample without keys are not read
    q_tile = read(q + (q_start * q_token + head * q_head), q_token, used, m0, E, E0, E1, BLOCK_M)
    k_view = view(k + (k_start * k_token + head // GROUP * k_head), k_token, k_len, k_head, 1, E, E0, E1, BLOCK_N, TMA)
    v_view = view(v + (k_start * v_token + head // GROUP * v_head), v_token, k_len, v_head, 1, E, E0, E1, BLOCK_N, TMA)

    lo, hi = keys_of(m0, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, E0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, E1 if E1 else 16], tl.float32)
    if LOOKAHEAD:
        s = scores(q_tile, rows(k_view, lo, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA), None, E1, PRECISION)
    for n in range(lo, hi, BLOCK_N):
        if not LOOKAHEAD:
            k_tile = rows(k_view, n, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
            s = scores(q_tile, k_tile, None, E1, PRECISION)
        s = masked(s, m0, n, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        if LOOKAHEAD:
            k_tile = rows(k_view, n + BLOCK_N, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
            s_next = scores(q_tile, k_tile, None, E1, PRECISION)  # in flight during exp2
        top_new = tl.maximum(top, tl.max(s, 1) * scale)
        if LEFT or RIGHT:  # a row may have seen nothing yet
            base = tl.where(top_new == -float("inf"), 0.0, top_new)
        else:
            base = top_new
        p = power(s * scale - base[:, None], EXACT)
        alpha = power(top - base, EXACT)
        total = total * alpha + tl.sum(p, 1)
        p_low = p.to(v.dtype.element_ty)
        v_tile = rows(v_view, n, v_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
        acc0 = tl.dot(p_low, v_tile[0], acc0 * alpha[:, None], input_precision=PRECISION)
        if E1:
            acc1 = tl.dot(p_low, v_tile[1], acc1 * alpha[:, None], input_precision=PRECISION)
        top = top_new
        if LOOKAHEAD:
            s = s_next

    total = tl.where(total == 0, 1.0, total)
    share = 1 / total[:, None]
    write(out + (q_start * heads + head) * E, heads * E, q_len, m0, acc0 * share, acc1 * share, E, E0, E1, BLOCK_M)
    row = m0 + tl.arange(0, BLOCK_M)
    row_at = head.to(tl.int64) * queries + q_start + row
    if EXACT:
        tl.store(lse + row_at, top + tl.log(total), mask=row < q_len)
        tl.store(parts + row_at, top, mask=row < q_len)
        tl.store(parts + queries * heads + row_at, total, mask=row < q_len)
    else:
        tl.store(lse + row_at, (top + tl.log2(total)) / LOG2E, mask=row < q_len)


# ----------------------------------------------------------------------------------------------------------- launches
def _strides(*tensors):
    """(UNIT, token and head stride of each in UNITs): with 8, every row starts at a multiple of 16 bytes.

    Triton knows a stride to be a multiple of 16 or of nothing; 72 is one of 8, and loads would shrink to single numbers.
    """
    found = [t.stride(axis) if t.shape[axis] > 1 else t.shape[2] for t in tensors for axis in (0, 1)]
    unit = 1 if any(stride % 8 for stride in found) else 8
    return unit, [stride // unit for stride in found]


def _tma(config, unit, *tensors):
    return config.tma and unit == 8 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _band(causal, window, queries, keys):
    """(left, right) and whether each is closed; further than the longest pack is as good as open."""
    left, right = window[0], 0 if causal else window[1]
    furthest = min(max(queries, keys), 2**30)
    return [min(max(left, 0), furthest), min(max(right, 0), furthest)], dict(LEFT=left >= 0, RIGHT=right >= 0)


def _schedule(cu, cu_other, total, block):
    """(table, first) of ``schedule_kernel``: the tiles of the ``total`` rows that ``cu`` cuts into samples."""
    samples = cu.shape[0] - 1
    tiles = capacity(total, samples, block)
    table, first = (torch.empty(count, dtype=torch.int32, device=cu.device) for count in (tiles, samples + 1))
    schedule_kernel[(samples + 2,)](cu, cu_other, table, first, samples, total, tiles, block.bit_length() - 1, SPAN=256,
                                    num_warps=4)
    return table, first


def _launching(device, launch):
    """Call ``launch`` where kernels run on ``device``, with memory for descriptors that nobody else's allocator gives."""
    def run():
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        with on(device):
            launch()

    contextvars.copy_context().run(run)


def _common(q, k, config, tf32, unit, bounds, *tensors):
    """Arguments by keyword that the three kernels share; ``tensors`` are read by TMA where it can."""
    one, two = chunks(q.shape[2], config.split)
    return dict(GROUP=q.shape[1] // k.shape[1], E=q.shape[2], E0=one, E1=two, UNIT=unit, PRECISION=precision(q.dtype, tf32),
                TMA=_tma(config, unit, *tensors), BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps,
                num_stages=config.stages, maxnreg=config.maxnreg, **bounds)


def forward(q, k, v, cu_q, cu_k, *, scale, causal, window, tf32, config: Config):
    """``(out, lse, parts)``: out (Nq, H, E) in q's dtype, lse (H, Nq) float32, natural logarithm.

    parts (2, H, Nq) float32, the largest score and the sum of exp(score - largest), for a float32 q, else None: from their
    sum lse, which is rounded at 1e-7 of its size, the backward's probabilities would have three times the error.

    q (Nq, H, E), k, v (Nk, Hk, E), any stride between tokens and heads; copied where the numbers of a head are not side by
    side, or ``scale`` is negative. cu_q, cu_k (S + 1,) int32. tf32: may float32 products drop 13 bits of their factors.

    Workspace: int32, ``capacity(Nq, S, block_m) + S + 1`` numbers; with TMA 128 bytes for each of up to 4 descriptors of a
    program.
    """
    queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    parts = torch.empty((2, heads, queries), dtype=torch.float32, device=q.device) if q.dtype == torch.float32 else None
    if queries == 0 or k.shape[0] == 0:
        return out.zero_(), lse.fill_(-torch.inf), parts
    if scale < 0:
        q, scale = -q, -scale
    (q, k, v), (cu_q, cu_k) = map(rows_dense, (q, k, v)), contiguous(cu_q, cu_k)
    unit, strides = _strides(q, k, v)
    band, bounds = _band(causal, window, queries, k.shape[0])

    def launch():
        table, first = _schedule(cu_q, cu_k, queries, config.block_m)
        forward_kernel[(table.shape[0] * heads,)](
            q, k, v, out, lse, parts, cu_q, cu_k, table, first, cu_q.shape[0] - 1, heads, queries, *strides, scale, *band,
            LOOKAHEAD=config.lookahead, **_common(q, k, config, tf32, unit, bounds, k, v))

    _launching(q.device, launch)
    return out, lse, parts


def backward(dout, dlse, q, k, v, out, lse, parts, cu_q, cu_k, *, scale, causal, window, tf32, dq_config, dkdv_config):
    """``(dq, dk, dv)`` in their tensors' dtypes, the same bits every time.

    dout (Nq, H, E) of q's dtype and strided like q in ``forward``; dlse (H, Nq) or None; out and lse of this attention, or
    of the whole that these keys are a part of, and then ``parts`` is None. The others as in ``forward``.

    Workspace: float32, 2 x H x PAD x ``pad_count(Nq, S)``, of a float32 q 3 x; int32, the tiles of queries and of keys as
    in ``forward``.
    """
    queries, heads, _ = q.shape
    keys, key_heads, _ = k.shape
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if queries == 0 or keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    negative = scale < 0
    if negative:
        q, scale = -q, -scale
    q, k, v, dout = map(rows_dense, (q, k, v, dout))
    out, lse, dlse, cu_q, cu_k = contiguous(out, lse, dlse, cu_q, cu_k)
    unit, strides = _strides(q, k, v, dout)
    band, bounds = _band(causal, window, queries, keys)
    samples = cu_q.shape[0] - 1
    pads = pad_count(queries, samples)
    exact = q.dtype == torch.float32
    workspace = torch.empty((3 if exact else 2, heads, pads * PAD), dtype=torch.float32, device=q.device)
    lse_rows, minus_delta_rows, share_rows = (*workspace, None)[:3]

    def launch():
        table, first = _schedule(cu_q, cu_k, queries, dq_config.block_m)
        dq_kernel[(table.shape[0] * heads,)](
            dout, dlse, q, k, v, out, lse, parts, dq, lse_rows, minus_delta_rows, share_rows, cu_q, cu_k, table, first,
            samples, heads, queries, pads, *strides, scale, *band, PAD=PAD,
            **_common(q, k, dq_config, tf32, unit, bounds, k, v))
        table, first = _schedule(cu_k, cu_q, keys, dkdv_config.block_n)
        dkdv_kernel[(table.shape[0] * key_heads,)](
            dout, q, k, v, lse_rows, minus_delta_rows, share_rows, dk, dv, cu_q, cu_k, table, first, samples, key_heads,
            keys, pads, *strides, scale, *band, PAD=PAD, **_common(q, k, dkdv_config, tf32, unit, bounds, q, dout))

    _launching(q.device, launch)
    return (-dq if negative else dq), dk, dv
