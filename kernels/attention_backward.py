"""The backward of attention: one kernel for dq, which each of its programs sums over keys, and one for dk and dv, over
queries and the heads of a group. Five products would do in one kernel, but then dq is summed by atomics in float32: another
buffer of four bytes a number, another order of the sum in every run. Here are seven, without atomics: two runs give the
same bits.

With P = exp(scores - lse): dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, delta = rowsum(dO * O) - dlse.

The dq kernel leaves the lse and -delta of every row to the other one, each sample's rows from a place of its own that is a
multiple of PAD, with lse = inf (P = 0) behind them: read in blocks of 16 bytes and without a mask.
"""

import triton
import triton.language as tl

from .attention_tiles import LOG2E, keys_of, masked, power, queries_of, read, rows, scores, segment, tile_of, view, write

PAD = 128  # rows; every BLOCK_M divides it


def pad_count(queries: int, samples: int) -> int:
    """How many times PAD rows the workspace of lse and delta has for a head.

    Row i of sample s, which starts at row a, is at (ceil(a / PAD) + s) * PAD + i: the next sample's are behind it.
    """
    return triton.cdiv(queries, PAD) + samples + 1


@triton.jit
def _probabilities(s, lse, share, scale, EXACT: tl.constexpr):
    """exp(s * scale - lse), ``lse`` in powers of 2; where EXACT times ``share``, and of lse the largest score is enough."""
    scale = tl.maximum(scale, 1e-30)  # times -inf, a scale of 0 would make NaN
    if EXACT:
        return power(s * scale - lse, EXACT) * share
    else:
        return power(s * (scale * LOG2E) - lse, EXACT)


@triton.jit
def _transposed(rows, columns, E1: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """(rows @ columns.T).T: columns @ rows.T, or, where EXACT, the very roundings that the other kernels' product has.

    P is divided by a sum, and delta centred by a sum, of their numbers.
    """
    if EXACT:
        return scores(rows, columns, None, E1, PRECISION).T
    else:
        return scores(columns, rows, None, E1, PRECISION)


@triton.jit(do_not_specialize=["samples", "heads", "queries", "pads", "q_token", "q_head", "k_token", "k_head", "v_token",
                               "v_head", "do_token", "do_head", "left", "right"])
def dq_kernel(dout, dlse, q, k, v, out, lse, parts, dq, lse_rows, minus_delta_rows, share_rows, cu_q, cu_k, table, first,
              samples, heads, queries: tl.int64, pads: tl.int64, q_token: tl.int64, q_head: tl.int64, k_token: tl.int64,
              k_head: tl.int64, v_token: tl.int64, v_head: tl.int64, do_token: tl.int64, do_head: tl.int64, scale, left,
              right, GROUP: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, LEFT: tl.constexpr,
              RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PAD: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq of one tile of queries and one head, and lse (as ``_probabilities`` wants it) and -delta of its rows."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    q_token, q_head, do_token, do_head = q_token * UNIT, q_head * UNIT, do_token * UNIT, do_head * UNIT
    k_token, k_head, v_token, v_head = k_token * UNIT, k_head * UNIT, v_token * UNIT, v_head * UNIT
    sample, q_start, q_len, head, m0 = tile_of(tl.program_id(0), table, first, cu_q, samples, queries, heads, BLOCK_M)
    if sample < 0:
        return
    k_start, k_len = segment(cu_k, sample, samples)
    used = tl.where(k_len > 0, q_len, 0)  # rows of a sample without keys are not read
    q_tile = read(q + (q_start * q_token + head * q_head), q_token, used, m0, E, E0, E1, BLOCK_M)
    do_tile = read(dout + (q_start * do_token + head * do_head), do_token, used, m0, E, E0, E1, BLOCK_M)

    at = (q_start * heads + head) * E
    out_tile = read(out + at, heads * E, used, m0, E, E0, E1, BLOCK_M)
    delta = tl.sum(do_tile[0].to(tl.float32) * out_tile[0].to(tl.float32), 1)
    if E1:
        delta += tl.sum(do_tile[1].to(tl.float32) * out_tile[1].to(tl.float32), 1)
    row = m0 + tl.arange(0, BLOCK_M)
    row_at = head.to(tl.int64) * queries + q_start + row
    lse_M = tl.load(lse + row_at, mask=row < used, other=-float("inf"))
    sees = lse_M > -float("inf")
    given = tl.zeros([BLOCK_M], tl.float32)
    if dlse is not None:
        given = tl.load(dlse + row_at, mask=(row < used) & sees, other=0.0)
    delta -= given
    share_M = 1.0
    if not EXACT:
        lse_M *= LOG2E
    elif parts is not None:
        lse_M = tl.load(parts + row_at, mask=sees, other=0.0)
        share_M = 1 / tl.load(parts + heads * queries + row_at, mask=sees, other=1.0)
    lse_M = tl.where(sees, lse_M, float("inf"))  # P is 0 in a row that sees nothing
    place = (head * pads + tl.cdiv(q_start, PAD) + sample) * PAD + row
    tl.store(lse_rows + place, lse_M)
    if EXACT:
        share_M = tl.where(sees, share_M, 1.0)
        tl.store(share_rows + place, share_M)
    if BLOCK_M < PAD:
        if m0 + BLOCK_M >= q_len:
            for more in range(BLOCK_M, tl.cdiv(q_len, PAD) * PAD - m0, BLOCK_M):
                tl.store(lse_rows + place + more, tl.full([BLOCK_M], float("inf"), tl.float32))
                tl.store(minus_delta_rows + place + more, tl.zeros([BLOCK_M], tl.float32))
                if EXACT:
                    tl.store(share_rows + place + more, tl.full([BLOCK_M], 1.0, tl.float32))

    lo, hi = keys_of(m0, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    k_view = view(k + (k_start * k_token + head // GROUP * k_head), k_token, k_len, k_head, 1, E, E0, E1, BLOCK_N, TMA)
    v_view = view(v + (k_start * v_token + head // GROUP * v_head), v_token, k_len, v_head, 1, E, E0, E1, BLOCK_N, TMA)
    dq0 = tl.zeros([BLOCK_M, E0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, E1 if E1 else 16], tl.float32)
    # A row of dS sums to its dlse. What it sums to instead is the error of delta, through the roundings of out; all keys
    # share it, and in float32 it would be most of the error of dq and dk.
    CENTRE: tl.constexpr = parts is not None
    rest = tl.zeros([BLOCK_M], tl.float32)
    mean0, mean1 = dq0, dq1
    for n in range(lo, hi, BLOCK_N):
        k_tile = rows(k_view, n, k_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
        v_tile = rows(v_view, n, v_token, k_len, 0, 0, E, E0, E1, BLOCK_N, TMA)
        s = scores(q_tile, k_tile, None, E1, PRECISION)
        s = masked(s, m0, n, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        dp = scores(do_tile, v_tile, None, E1, PRECISION)  # behind the branch: it is in flight during exp2
        p = _probabilities(s, lse_M[:, None], share_M[:, None] if EXACT else None, scale, EXACT)
        ds = p * (dp - delta[:, None])
        if CENTRE:
            rest += tl.sum(ds, 1)
            mean0 = tl.dot(p, k_tile[0], mean0, input_precision=PRECISION)
            if E1:
                mean1 = tl.dot(p, k_tile[1], mean1, input_precision=PRECISION)
        ds = ds.to(k.dtype.element_ty)
        dq0 = tl.dot(ds, k_tile[0], dq0, input_precision=PRECISION)
        if E1:
            dq1 = tl.dot(ds, k_tile[1], dq1, input_precision=PRECISION)
    if CENTRE:
        rest -= given
        delta += rest
        dq0 -= rest[:, None] * mean0
        dq1 -= rest[:, None] * mean1
    tl.store(minus_delta_rows + place, -delta)
    write(dq + at, heads * E, q_len, m0, dq0 * scale, dq1 * scale, E, E0, E1, BLOCK_M)


@triton.jit(do_not_specialize=["samples", "key_heads", "keys", "pads", "q_token", "q_head", "k_token", "k_head", "v_token",
                               "v_head", "do_token", "do_head", "left", "right"])
def dkdv_kernel(dout, q, k, v, lse_rows, minus_delta_rows, share_rows, dk, dv, cu_q, cu_k, table, first, samples, key_heads,
                keys: tl.int64, pads: tl.int64, q_token: tl.int64, q_head: tl.int64, k_token: tl.int64,
                k_head: tl.int64, v_token: tl.int64, v_head: tl.int64, do_token: tl.int64, do_head: tl.int64, scale, left,
                right, GROUP: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, LEFT: tl.constexpr,
                RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PAD: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of one tile of keys and one key head: the sum over the queries of all heads of its group.

    Scores are transposed, (BLOCK_N, BLOCK_M), so that P^T and dS^T go from registers into the products they are for.
    Queries past a sample's end have P = 0; keys past it get gradients that nobody stores.
    """
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    q_token, q_head, do_token, do_head = q_token * UNIT, q_head * UNIT, do_token * UNIT, do_head * UNIT
    k_token, k_head, v_token, v_head = k_token * UNIT, k_head * UNIT, v_token * UNIT, v_head * UNIT
    sample, k_start, k_len, key_head, n0 = tile_of(tl.program_id(0), table, first, cu_k, samples, keys, key_heads, BLOCK_N)
    if sample < 0:
        return
    q_start, q_len = segment(cu_q, sample, samples)
    used = tl.where(q_len > 0, k_len, 0)
    k_tile = read(k + (k_start * k_token + key_head * k_head), k_token, used, n0, E, E0, E1, BLOCK_N)
    v_tile = read(v + (k_start * v_token + key_head * v_head), v_token, used, n0, E, E0, E1, BLOCK_N)

    head0 = key_head.to(tl.int64) * GROUP
    lo, hi = queries_of(n0, q_len, k_len, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    q_view = view(q + (q_start * q_token + head0 * q_head), q_token, q_len, q_head, GROUP, E, E0, E1, BLOCK_M, TMA)
    do_view = view(dout + (q_start * do_token + head0 * do_head), do_token, q_len, do_head, GROUP, E, E0, E1, BLOCK_M, TMA)
    place = (head0 * pads + tl.cdiv(q_start, PAD) + sample) * PAD
    dk0 = tl.zeros([BLOCK_N, E0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, E0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, E1 if E1 else 16], tl.float32)
    dv1 = tl.zeros([BLOCK_N, E1 if E1 else 16], tl.float32)
    for head in range(0, GROUP):  # a loop of its own: no head is divided out of a step's number, and m is known ahead
        for m in range(lo, hi, BLOCK_M):
            q_tile = rows(q_view, m, q_token, q_len, head, q_head, E, E0, E1, BLOCK_M, TMA)
            do_tile = rows(do_view, m, do_token, q_len, head, do_head, E, E0, E1, BLOCK_M, TMA)
            row = place + head * pads * PAD + m + tl.arange(0, BLOCK_M)
            lse_M, minus_delta = tl.load(lse_rows + row), tl.load(minus_delta_rows + row)
            s = _transposed(q_tile, k_tile, E1, PRECISION, EXACT)
            s = masked(s, n0, m, k_len, q_len, right, left, RIGHT, LEFT, BLOCK_N, BLOCK_M)
            share_M = tl.load(share_rows + row) if EXACT else None
            p = _probabilities(s, lse_M[None, :], share_M[None, :] if EXACT else None, scale, EXACT)
            if EXACT:
                dp = _transposed(do_tile, v_tile, E1, PRECISION, EXACT) + minus_delta[None, :]
            else:
                dp = scores(v_tile, do_tile, tl.broadcast_to(minus_delta[None, :], [BLOCK_N, BLOCK_M]), E1, PRECISION)
            p_low = p.to(v.dtype.element_ty)
            dv0 = tl.dot(p_low, do_tile[0], dv0, input_precision=PRECISION)
            if E1:
                dv1 = tl.dot(p_low, do_tile[1], dv1, input_precision=PRECISION)
            ds = (p * dp).to(q.dtype.element_ty)
            dk0 = tl.dot(ds, q_tile[0], dk0, input_precision=PRECISION)
            if E1:
                dk1 = tl.dot(ds, q_tile[1], dk1, input_precision=PRECISION)
    at = (k_start * key_heads + key_head) * E
    write(dk + at, key_heads * E, k_len, n0, dk0 * scale, dk1 * scale, E, E0, E1, BLOCK_N)
    write(dv + at, key_heads * E, k_len, n0, dv0, dv1, E, E0, E1, BLOCK_N)
