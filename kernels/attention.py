"""Variable-length attention over a packed batch: the forward kernel, and the launches of forward and backward.

Nq query rows, Nk key rows, H heads, Hk key heads (Hk divides H), E head dim, S samples. The online softmax is
FlashAttention-2's (arXiv 2307.08691); m_i and l_i are its running row maximum and row sum. The tile schedule is in
attention_tiles.py, the backward kernels are in attention_backward.py.

With LOOKAHEAD the QK^T of the next tile of keys is issued before the softmax of this one, which keeps the Tensor Cores busy
during exp2. Without it one tile of scores fewer is live in registers, two CTAs fit on an SM, and each uses the Tensor Cores
while the other computes its softmax.
"""

import contextvars

import torch
import triton
import triton.language as tl

from .attention_backward import PAD, dkdv_kernel, dq_kernel, pad_count
from .attention_config import Config
from .attention_tiles import (
    LOG2E,
    apply_mask,
    capacity,
    chunks,
    dot_nt,
    key_range,
    load_once,
    load_tile,
    make_view,
    schedule_kernel,
    segment,
    softmax_exp,
    store_tile,
    tile_coords,
)
from .launch import contiguous, on, precision, rows_dense


# ------------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["samples", "heads", "queries", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head",
                               "left", "right"])
def forward_kernel(q, k, v, out, lse, stats, cu_q, cu_k, schedule, first_tile, samples, heads, queries: tl.int64,
                   q_token: tl.int64, q_head: tl.int64, k_token: tl.int64, k_head: tl.int64, v_token: tl.int64,
                   v_head: tl.int64, scale, left, right, GROUP: tl.constexpr, E: tl.constexpr, E0: tl.constexpr,
                   E1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                   TMA: tl.constexpr, LOOKAHEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out, lse and, for float32 inputs, the softmax ``stats`` (m_i and l_i) of one tile of queries and one head.

    q_token, q_head, ...: strides in units of UNIT elements. LEFT, RIGHT: whether that side of the mask is bounded.
    """
    FP32: tl.constexpr = q.dtype.element_ty == tl.float32
    q_token, q_head = q_token * UNIT, q_head * UNIT
    k_token, k_head, v_token, v_head = k_token * UNIT, k_head * UNIT, v_token * UNIT, v_head * UNIT
    scale = tl.maximum(scale, 1e-30)  # 0 * -inf would be NaN
    if not FP32:
        scale *= LOG2E
    sample, q_start, q_len, head, m0 = tile_coords(tl.program_id(0), schedule, first_tile, cu_q, samples, queries, heads,
                                                   BLOCK_M)
    if sample < 0:
        return
    k_start, k_len = segment(cu_k, sample, samples)
    q_valid = tl.where(k_len > 0, q_len, 0)  # queries of a sample without keys are not loaded
    q_tile = load_once(q + (q_start * q_token + head * q_head), q_token, q_valid, m0, E, E0, E1, BLOCK_M)
    k_view = make_view(k + (k_start * k_token + head // GROUP * k_head), k_token, k_len, k_head, 1, E, E0, E1, BLOCK_N, TMA)
    v_view = make_view(v + (k_start * v_token + head // GROUP * v_head), v_token, k_len, v_head, 1, E, E0, E1, BLOCK_N, TMA)

    lo, hi = key_range(m0, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, E0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, E1 if E1 else 16], tl.float32)
    if LOOKAHEAD:
        s = dot_nt(q_tile, load_tile(k_view, lo, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA), None, E1, PRECISION)
    for n in range(lo, hi, BLOCK_N):
        if not LOOKAHEAD:
            k_tile = load_tile(k_view, n, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
            s = dot_nt(q_tile, k_tile, None, E1, PRECISION)
        s = apply_mask(s, m0, n, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        if LOOKAHEAD:
            k_tile = load_tile(k_view, n + BLOCK_N, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
            s_next = dot_nt(q_tile, k_tile, None, E1, PRECISION)  # in flight during exp2
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        if LEFT or RIGHT:  # all scores of a row so far may be masked
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        else:
            m_safe = m_new
        p = softmax_exp(s * scale - m_safe[:, None], FP32)
        alpha = softmax_exp(m_i - m_safe, FP32)
        l_i = l_i * alpha + tl.sum(p, 1)
        p_low = p.to(v.dtype.element_ty)
        v_tile = load_tile(v_view, n, v_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
        acc0 = tl.dot(p_low, v_tile[0], acc0 * alpha[:, None], input_precision=PRECISION)
        if E1:
            acc1 = tl.dot(p_low, v_tile[1], acc1 * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
        if LOOKAHEAD:
            s = s_next

    l_i = tl.where(l_i == 0, 1.0, l_i)
    inv_l = 1 / l_i[:, None]
    store_tile(out + (q_start * heads + head) * E, heads * E, q_len, m0, acc0 * inv_l, acc1 * inv_l, E, E0, E1, BLOCK_M)
    row = m0 + tl.arange(0, BLOCK_M)
    row_offset = head.to(tl.int64) * queries + q_start + row
    if FP32:
        tl.store(lse + row_offset, m_i + tl.log(l_i), mask=row < q_len)
        tl.store(stats + row_offset, m_i, mask=row < q_len)
        tl.store(stats + queries * heads + row_offset, l_i, mask=row < q_len)
    else:
        tl.store(lse + row_offset, (m_i + tl.log2(l_i)) / LOG2E, mask=row < q_len)


# ----------------------------------------------------------------------------------------------------------- launches
def _strides(*tensors):
    """(UNIT, token and head stride of each in UNITs): with 8, every row starts at a multiple of 16 bytes.

    Triton specialises strides on divisibility by 16 only. A stride of 72 is divisible by 8, and without UNIT its loads would
    not be vectorised.
    """
    found = [t.stride(axis) if t.shape[axis] > 1 else t.shape[2] for t in tensors for axis in (0, 1)]
    unit = 1 if any(stride % 8 for stride in found) else 8
    return unit, [stride // unit for stride in found]


def _tma(config, unit, *tensors):
    return config.tma and unit == 8 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _mask_bounds(causal, window, queries, keys):
    """The sliding window (left, right), and whether each side is bounded. Bounds are clamped to the longest sequence."""
    left, right = window[0], 0 if causal else window[1]
    furthest = min(max(queries, keys), 2**30)
    return [min(max(left, 0), furthest), min(max(right, 0), furthest)], dict(LEFT=left >= 0, RIGHT=right >= 0)


def _tile_schedule(cu, cu_other, total, block):
    """(schedule, first_tile) from ``schedule_kernel``: the tiles of the ``total`` rows that ``cu`` splits into samples."""
    samples = cu.shape[0] - 1
    tiles = capacity(total, samples, block)
    schedule, first_tile = (torch.empty(count, dtype=torch.int32, device=cu.device) for count in (tiles, samples + 1))
    schedule_kernel[(samples + 2,)](cu, cu_other, schedule, first_tile, samples, total, tiles, block.bit_length() - 1,
                                    SPAN=256, num_warps=4)
    return schedule, first_tile


def _launch(device, launch):
    """Call ``launch`` on ``device`` with an allocator for TMA descriptors, leaving the caller's own allocator in place."""
    def run():
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        with on(device):
            launch()

    contextvars.copy_context().run(run)


def _shared_args(q, k, config, tf32, unit, bounded, *tensors):
    """Keyword arguments that the three kernels share; ``tensors`` are those loaded by TMA if they are aligned."""
    one, two = chunks(q.shape[2], config.split)
    return dict(GROUP=q.shape[1] // k.shape[1], E=q.shape[2], E0=one, E1=two, UNIT=unit, PRECISION=precision(q.dtype, tf32),
                TMA=_tma(config, unit, *tensors), BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps,
                num_stages=config.stages, maxnreg=config.maxnreg, **bounded)


def forward(q, k, v, cu_q, cu_k, *, scale, causal, window, tf32, config: Config):
    """``(out, lse, stats)``: out (Nq, H, E) in q's dtype, lse (H, Nq) float32, natural logarithm.

    stats (2, H, Nq) float32 for a float32 q, else None: the row maximum m and the row sum l of exp(score - m). The backward
    recomputes P from them, because lse = m + log(l), rounded to float32, would triple its error.

    q (Nq, H, E), k, v (Nk, Hk, E), any stride between tokens and heads. q, k and v are copied if a head is not contiguous, q
    also if ``scale`` is negative. cu_q, cu_k (S + 1,) int32. tf32: whether float32 MMAs may round operands to TF32.

    Workspace: int32, ``capacity(Nq, S, block_m) + S + 1`` elements; with TMA 128 bytes for each of up to 4 descriptors per
    program.
    """
    queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    stats = torch.empty((2, heads, queries), dtype=torch.float32, device=q.device) if q.dtype == torch.float32 else None
    if queries == 0 or k.shape[0] == 0:
        return out.zero_(), lse.fill_(-torch.inf), stats
    if scale < 0:
        q, scale = -q, -scale
    (q, k, v), (cu_q, cu_k) = map(rows_dense, (q, k, v)), contiguous(cu_q, cu_k)
    unit, strides = _strides(q, k, v)
    bounds, bounded = _mask_bounds(causal, window, queries, k.shape[0])

    def launch():
        schedule, first_tile = _tile_schedule(cu_q, cu_k, queries, config.block_m)
        forward_kernel[(schedule.shape[0] * heads,)](
            q, k, v, out, lse, stats, cu_q, cu_k, schedule, first_tile, cu_q.shape[0] - 1, heads, queries, *strides, scale,
            *bounds, LOOKAHEAD=config.lookahead, **_shared_args(q, k, config, tf32, unit, bounded, k, v))

    _launch(q.device, launch)
    return out, lse, stats


def backward(dout, dlse, q, k, v, out, lse, stats, cu_q, cu_k, *, scale, causal, window, tf32, dq_config, dkdv_config):
    """``(dq, dk, dv)`` in the dtypes of q, k and v. Deterministic.

    dout (Nq, H, E) in q's dtype, strides as for q in ``forward``; dlse (H, Nq) or None. out and lse are of this attention,
    or of attention over a superset of these keys, and then ``stats`` is None. The others are as in ``forward``.

    Workspace: float32, 2 x H x PAD x ``pad_count(Nq, S)`` elements, 3 x for a float32 q; int32, the tile schedules of
    queries and of keys as in ``forward``.
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
    bounds, bounded = _mask_bounds(causal, window, queries, keys)
    samples = cu_q.shape[0] - 1
    pads = pad_count(queries, samples)
    fp32 = q.dtype == torch.float32
    workspace = torch.empty((3 if fp32 else 2, heads, pads * PAD), dtype=torch.float32, device=q.device)
    lse_rows, neg_delta_rows, inv_l_rows = (*workspace, None)[:3]

    def launch():
        schedule, first_tile = _tile_schedule(cu_q, cu_k, queries, dq_config.block_m)
        dq_kernel[(schedule.shape[0] * heads,)](
            dout, dlse, q, k, v, out, lse, stats, dq, lse_rows, neg_delta_rows, inv_l_rows, cu_q, cu_k, schedule, first_tile,
            samples, heads, queries, pads, *strides, scale, *bounds, PAD=PAD,
            **_shared_args(q, k, dq_config, tf32, unit, bounded, k, v))
        schedule, first_tile = _tile_schedule(cu_k, cu_q, keys, dkdv_config.block_n)
        dkdv_kernel[(schedule.shape[0] * key_heads,)](
            dout, q, k, v, lse_rows, neg_delta_rows, inv_l_rows, dk, dv, cu_q, cu_k, schedule, first_tile, samples,
            key_heads, keys, pads, *strides, scale, *bounds, PAD=PAD,
            **_shared_args(q, k, dkdv_config, tf32, unit, bounded, q, dout))

    _launch(q.device, launch)
    return (-dq if negative else dq), dk, dv
