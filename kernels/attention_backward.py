"""The attention backward: one kernel accumulates dq over keys, another dk and dv over queries and the heads of a group.

A single fused kernel needs five GEMMs, but accumulates dq with float32 atomics: an extra float32 buffer, and a summation
order that changes from run to run. Two kernels need seven GEMMs and no atomics, and are deterministic.

With P = exp(scores - lse): dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, delta = rowsum(dO * O) - dlse.

The dq kernel writes lse and -delta of every row for the dkdv kernel. Each sample's rows start at a multiple of PAD and are
padded with lse = inf (P = 0), so that loads are vectorised and need no mask.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    apply_mask,
    dot_nt,
    key_range,
    load_once,
    load_tile,
    make_view,
    query_range,
    segment,
    softmax_exp,
    store_tile,
    tile_coords,
)
from .integers import cdiv

PAD = 128  # rows; every BLOCK_M divides it


def pad_count(queries: int, samples: int) -> int:
    """The size of the workspace of lse and delta per head, in units of PAD rows.

    Row i of sample s, whose first row is a, is at (ceil(a / PAD) + s) * PAD + i, so samples do not overlap.
    """
    return cdiv(queries, PAD) + samples + 1


@triton.jit
def _recompute_p(s, lse, inv_l, scale, FP32: tl.constexpr):
    """P = exp(s * scale - lse), ``lse`` in base 2. If FP32 times ``inv_l``: then ``lse`` may be the row maximum m."""
    scale = tl.maximum(scale, 1e-30)  # 0 * -inf would be NaN
    if FP32:
        return softmax_exp(s * scale - lse, FP32) * inv_l
    else:
        return softmax_exp(s * (scale * LOG2E) - lse, FP32)


@triton.jit
def _transposed(rows, columns, E1: tl.constexpr, PRECISION: tl.constexpr, FP32: tl.constexpr):
    """(rows @ columns.T).T, computed as columns @ rows.T, or, if FP32, with bitwise the roundings of the other kernels.

    There P is normalised, and delta centred, by sums over the same values.
    """
    if FP32:
        return dot_nt(rows, columns, None, E1, PRECISION).T
    else:
        return dot_nt(columns, rows, None, E1, PRECISION)


@triton.jit(do_not_specialize=["samples", "heads", "queries", "pads", "q_token", "q_head", "k_token", "k_head", "v_token",
                               "v_head", "do_token", "do_head", "left", "right"])
def dq_kernel(dout, dlse, q, k, v, out, lse, stats, dq, lse_rows, neg_delta_rows, inv_l_rows, cu_q, cu_k, schedule,
              first_tile, samples, heads, queries: tl.int64, pads: tl.int64, q_token: tl.int64, q_head: tl.int64,
              k_token: tl.int64, k_head: tl.int64, v_token: tl.int64, v_head: tl.int64, do_token: tl.int64,
              do_head: tl.int64, scale, left, right, GROUP: tl.constexpr, E: tl.constexpr, E0: tl.constexpr,
              E1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
              TMA: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq of one tile of queries and one head, and the rows' lse (as ``_recompute_p`` takes it) and -delta."""
    FP32: tl.constexpr = q.dtype.element_ty == tl.float32
    q_token, q_head, do_token, do_head = q_token * UNIT, q_head * UNIT, do_token * UNIT, do_head * UNIT
    k_token, k_head, v_token, v_head = k_token * UNIT, k_head * UNIT, v_token * UNIT, v_head * UNIT
    sample, q_start, q_len, head, m0 = tile_coords(tl.program_id(0), schedule, first_tile, cu_q, samples, queries, heads,
                                                   BLOCK_M)
    if sample < 0:
        return
    k_start, k_len = segment(cu_k, sample, samples)
    q_valid = tl.where(k_len > 0, q_len, 0)  # queries of a sample without keys are not loaded
    q_tile = load_once(q + (q_start * q_token + head * q_head), q_token, q_valid, m0, E, E0, E1, BLOCK_M)
    do_tile = load_once(dout + (q_start * do_token + head * do_head), do_token, q_valid, m0, E, E0, E1, BLOCK_M)

    offset = (q_start * heads + head) * E
    out_tile = load_once(out + offset, heads * E, q_valid, m0, E, E0, E1, BLOCK_M)
    delta = tl.sum(do_tile[0].to(tl.float32) * out_tile[0].to(tl.float32), 1)
    if E1:
        delta += tl.sum(do_tile[1].to(tl.float32) * out_tile[1].to(tl.float32), 1)
    row = m0 + tl.arange(0, BLOCK_M)
    row_offset = head.to(tl.int64) * queries + q_start + row
    lse_M = tl.load(lse + row_offset, mask=row < q_valid, other=-float("inf"))
    has_keys = lse_M > -float("inf")
    dlse_M = tl.zeros([BLOCK_M], tl.float32)
    if dlse is not None:
        dlse_M = tl.load(dlse + row_offset, mask=(row < q_valid) & has_keys, other=0.0)
    delta -= dlse_M
    inv_l_M = 1.0
    if not FP32:
        lse_M *= LOG2E
    elif stats is not None:
        lse_M = tl.load(stats + row_offset, mask=has_keys, other=0.0)
        inv_l_M = 1 / tl.load(stats + heads * queries + row_offset, mask=has_keys, other=1.0)
    lse_M = tl.where(has_keys, lse_M, float("inf"))  # P is 0 in a row without keys
    stat_offset = (head * pads + tl.cdiv(q_start, PAD) + sample) * PAD + row
    tl.store(lse_rows + stat_offset, lse_M)
    if FP32:
        inv_l_M = tl.where(has_keys, inv_l_M, 1.0)
        tl.store(inv_l_rows + stat_offset, inv_l_M)
    if BLOCK_M < PAD:
        if m0 + BLOCK_M >= q_len:
            for tail in range(BLOCK_M, tl.cdiv(q_len, PAD) * PAD - m0, BLOCK_M):
                tl.store(lse_rows + stat_offset + tail, tl.full([BLOCK_M], float("inf"), tl.float32))
                tl.store(neg_delta_rows + stat_offset + tail, tl.zeros([BLOCK_M], tl.float32))
                if FP32:
                    tl.store(inv_l_rows + stat_offset + tail, tl.full([BLOCK_M], 1.0, tl.float32))

    lo, hi = key_range(m0, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    k_view = make_view(k + (k_start * k_token + head // GROUP * k_head), k_token, k_len, k_head, 1, E, E0, E1, BLOCK_N, TMA)
    v_view = make_view(v + (k_start * v_token + head // GROUP * v_head), v_token, k_len, v_head, 1, E, E0, E1, BLOCK_N, TMA)
    dq0 = tl.zeros([BLOCK_M, E0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, E1 if E1 else 16], tl.float32)
    # A row of dS sums to its dlse in exact arithmetic. The difference is the rounding error of delta, which is computed from
    # the rounded out. It is common to all keys, and uncorrected it would be most of the float32 error of dq and dk.
    CENTRE: tl.constexpr = stats is not None
    ds_sum = tl.zeros([BLOCK_M], tl.float32)
    pk0, pk1 = dq0, dq1
    for n in range(lo, hi, BLOCK_N):
        k_tile = load_tile(k_view, n, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
        v_tile = load_tile(v_view, n, v_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
        s = dot_nt(q_tile, k_tile, None, E1, PRECISION)
        s = apply_mask(s, m0, n, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        dp = dot_nt(do_tile, v_tile, None, E1, PRECISION)  # after the branch: in flight during exp2
        p = _recompute_p(s, lse_M[:, None], inv_l_M[:, None] if FP32 else None, scale, FP32)
        ds = p * (dp - delta[:, None])
        if CENTRE:
            ds_sum += tl.sum(ds, 1)
            pk0 = tl.dot(p, k_tile[0], pk0, input_precision=PRECISION)
            if E1:
                pk1 = tl.dot(p, k_tile[1], pk1, input_precision=PRECISION)
        ds = ds.to(k.dtype.element_ty)
        dq0 = tl.dot(ds, k_tile[0], dq0, input_precision=PRECISION)
        if E1:
            dq1 = tl.dot(ds, k_tile[1], dq1, input_precision=PRECISION)
    if CENTRE:
        ds_sum -= dlse_M
        delta += ds_sum
        dq0 -= ds_sum[:, None] * pk0
        dq1 -= ds_sum[:, None] * pk1
    tl.store(neg_delta_rows + stat_offset, -delta)
    store_tile(dq + offset, heads * E, q_len, m0, dq0 * scale, dq1 * scale, E, E0, E1, BLOCK_M)


@triton.jit(do_not_specialize=["samples", "key_heads", "keys", "pads", "q_token", "q_head", "k_token", "k_head", "v_token",
                               "v_head", "do_token", "do_head", "left", "right"])
def dkdv_kernel(dout, q, k, v, lse_rows, neg_delta_rows, inv_l_rows, dk, dv, cu_q, cu_k, schedule, first_tile, samples,
                key_heads, keys: tl.int64, pads: tl.int64, q_token: tl.int64, q_head: tl.int64, k_token: tl.int64,
                k_head: tl.int64, v_token: tl.int64, v_head: tl.int64, do_token: tl.int64, do_head: tl.int64, scale, left,
                right, GROUP: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, LEFT: tl.constexpr,
                RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PAD: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of one tile of keys and one key head, accumulated over the queries of all heads of its group.

    Scores are transposed, (BLOCK_N, BLOCK_M), so that P^T and dS^T are A operands in registers for dV and dK. Queries past a
    sample's end have P = 0; gradients of keys past it are not stored.
    """
    FP32: tl.constexpr = q.dtype.element_ty == tl.float32
    q_token, q_head, do_token, do_head = q_token * UNIT, q_head * UNIT, do_token * UNIT, do_head * UNIT
    k_token, k_head, v_token, v_head = k_token * UNIT, k_head * UNIT, v_token * UNIT, v_head * UNIT
    sample, k_start, k_len, key_head, n0 = tile_coords(tl.program_id(0), schedule, first_tile, cu_k, samples, keys,
                                                       key_heads, BLOCK_N)
    if sample < 0:
        return
    q_start, q_len = segment(cu_q, sample, samples)
    k_valid = tl.where(q_len > 0, k_len, 0)
    k_tile = load_once(k + (k_start * k_token + key_head * k_head), k_token, k_valid, n0, E, E0, E1, BLOCK_N)
    v_tile = load_once(v + (k_start * v_token + key_head * v_head), v_token, k_valid, n0, E, E0, E1, BLOCK_N)

    head0 = key_head.to(tl.int64) * GROUP
    lo, hi = query_range(n0, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    q_view = make_view(q + (q_start * q_token + head0 * q_head), q_token, q_len, q_head, GROUP, E, E0, E1, BLOCK_M, TMA)
    do_view = make_view(dout + (q_start * do_token + head0 * do_head), do_token, q_len, do_head, GROUP, E, E0, E1, BLOCK_M,
                        TMA)
    stat_offset = (head0 * pads + tl.cdiv(q_start, PAD) + sample) * PAD
    dk0 = tl.zeros([BLOCK_N, E0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, E0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, E1 if E1 else 16], tl.float32)
    dv1 = tl.zeros([BLOCK_N, E1 if E1 else 16], tl.float32)
    for head in range(0, GROUP):  # nested, not flattened: no division recovers the head, and m can be prefetched
        for m in range(lo, hi, BLOCK_M):
            q_tile = load_tile(q_view, m, q_token, q_len, head, q_head, E, E0, E1, BLOCK_M, TMA)
            do_tile = load_tile(do_view, m, do_token, q_len, head, do_head, E, E0, E1, BLOCK_M, TMA)
            row = stat_offset + head * pads * PAD + m + tl.arange(0, BLOCK_M)
            lse_M, neg_delta = tl.load(lse_rows + row), tl.load(neg_delta_rows + row)
            s = _transposed(q_tile, k_tile, E1, PRECISION, FP32)
            s = apply_mask(s, n0, m, k_len, q_len, right, left, RIGHT, LEFT, BLOCK_N, BLOCK_M)
            inv_l_M = tl.load(inv_l_rows + row) if FP32 else None
            p = _recompute_p(s, lse_M[None, :], inv_l_M[None, :] if FP32 else None, scale, FP32)
            if FP32:
                dp = _transposed(do_tile, v_tile, E1, PRECISION, FP32) + neg_delta[None, :]
            else:
                dp = dot_nt(v_tile, do_tile, tl.broadcast_to(neg_delta[None, :], [BLOCK_N, BLOCK_M]), E1, PRECISION)
            p_low = p.to(v.dtype.element_ty)
            dv0 = tl.dot(p_low, do_tile[0], dv0, input_precision=PRECISION)
            if E1:
                dv1 = tl.dot(p_low, do_tile[1], dv1, input_precision=PRECISION)
            ds = (p * dp).to(q.dtype.element_ty)
            dk0 = tl.dot(ds, q_tile[0], dk0, input_precision=PRECISION)
            if E1:
                dk1 = tl.dot(ds, q_tile[1], dk1, input_precision=PRECISION)
    offset = (k_start * key_heads + key_head) * E
    store_tile(dk + offset, key_heads * E, k_len, n0, dk0 * scale, dk1 * scale, E, E0, E1, BLOCK_N)
    store_tile(dv + offset, key_heads * E, k_len, n0, dv0, dv1, E, E0, E1, BLOCK_N)
