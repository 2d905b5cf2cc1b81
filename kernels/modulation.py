"""adaLN in one pass: a gated residual, a norm and its modulation, forward and backward.

N tokens, D width, R modulation rows. A program has a whole row of D numbers in registers, so that each is read and written
once: 16 numbers a thread, 32 in the backward of 4097 to 8192 columns, which are the most taken. No model is wider than 6144,
and a row in pieces would be read twice. Everything is computed in float32.

The three ops are one forward and one backward kernel: without ``gate`` there is no residual, without ``NORM`` no norm.

Sums over the tokens of a modulation row. A program of the backward walks over a run of tokens and keeps the sums of the
row at hand in registers. Rows never fall, so a row that begins and ends within the run is nobody else's and its gradient is
written at once; the sums of the run's first and last row go to two slots of a workspace, which a second kernel adds up in
the order of the tokens. No atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from .launch import contiguous, multiprocessors, on, registers, rows_dense
from .modulation_config import BackwardConfig, ForwardConfig, backward_tile, tile
from .rows import (
    add_rows,
    centred,
    columns_of,
    load_row,
    mean_of,
    multiply_rows,
    numbers,
    round_row,
    rstd_of,
    scale_row,
    store_row,
    sum_of_products,
    sum_row,
    zero_row,
)


# ------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _row_of(token, rows, ONE_ROW: tl.constexpr, mask):
    """The modulation row of tokens: as ``rows`` says, the one there is, or each its own; -1 where ``mask`` is off."""
    if rows is not None:
        return tl.load(rows + token, mask=mask, other=-1).to(tl.int64)
    else:
        return tl.where(mask, token * 0 if ONE_ROW else token, -1)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(x, y, gate, shift, scale, rows, weight, bias, x_new, h, stats, tokens: tl.int64, gate_stride,
                   shift_stride, scale_stride, eps, D: tl.constexpr, NORM: tl.constexpr, ONE_ROW: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """``x_new = x + gate * y`` where there is a gate; ``h`` its modulated norm where there is a NORM.

    ``stats`` (1 or 2, N) float32 or None: rstd and, of layer norm, mean.
    """
    token = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    inside = token < tokens
    row = _row_of(token, rows, ONE_ROW, inside)
    at = token * D
    used = inside & (row >= 0)  # of a token of no sample nothing is read

    x_ND = load_row(x + at, used, D, BLOCK_D, PIECES)
    if gate is not None:
        gated_ND = multiply_rows(load_row(gate + row * gate_stride, used, D, BLOCK_D, PIECES),
                                 load_row(y + at, used, D, BLOCK_D, PIECES), PIECES)
    if gate is not None:
        # the norm sees what the next layer will see
        x_ND = round_row(add_rows(x_ND, gated_ND, PIECES), x_new.dtype.element_ty, PIECES)
        store_row(x_new + at, x_ND, inside, D, BLOCK_D, PIECES)
    if NORM is not None:
        if NORM == "layer":
            mean = mean_of(sum_row(x_ND, PIECES), D)
            x_ND = centred(x_ND, mean, D, BLOCK_D, PIECES)
        rstd = rstd_of(sum_of_products(x_ND, x_ND, PIECES) * (1.0 / D), eps)
        if stats is not None:
            tl.store(stats + token, rstd, mask=inside)
            if NORM == "layer":
                tl.store(stats + tokens + token, mean, mask=inside)
        rstd = tl.where(used, rstd, 0.0)  # infinite of a token of no sample, if eps is 0
        if weight is not None:
            weight_D = load_row(weight, True, D, BLOCK_D, PIECES)
        if bias is not None:
            bias_D = load_row(bias, True, D, BLOCK_D, PIECES)
        if scale is not None:
            scale_ND = load_row(scale + row * scale_stride, used, D, BLOCK_D, PIECES)
        if shift is not None:
            shift_ND = load_row(shift + row * shift_stride, used, D, BLOCK_D, PIECES)
        for piece in tl.static_range(PIECES):
            h_ND = x_ND[piece] * rstd
            if weight is not None:
                h_ND *= weight_D[piece]
            if bias is not None:
                h_ND += bias_D[piece]
            if scale is not None:
                h_ND *= 1 + scale_ND[piece]
            if shift is not None:
                h_ND += shift_ND[piece]
            if weight is not None or bias is not None:
                h_ND = tl.where(used, h_ND, 0.0)
            column = columns_of(piece, BLOCK_D)
            tl.store(h + at + column, h_ND, mask=inside & (column < D))


@triton.jit
def _store_gradients(row, columns, D: tl.constexpr, sum_dh, sum_dhx, sum_dxy, weight, bias, d_shift, d_scale, d_gate):
    """The gradients of modulation row ``row`` from the sums over its tokens: of dh, of dh times normed x, of dx times y."""
    at, mask = row * D + columns, columns < D
    if d_shift is not None:
        tl.store(d_shift + at, sum_dh, mask=mask)
    if d_scale is not None:
        if weight is not None:
            sum_dhx *= numbers(weight + columns, mask)
        if bias is not None:
            sum_dhx += sum_dh * numbers(bias + columns, mask)
        tl.store(d_scale + at, sum_dhx, mask=mask)
    if d_gate is not None:
        tl.store(d_gate + at, sum_dxy, mask=mask)


@triton.jit
def _add_affine(program, row, D: tl.constexpr, sum_dh, sum_dhx, scale, scale_stride, bias_sums, weight_sums,
                BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """Add what the tokens of ``row`` give the gradients of bias and weight to the program's own row of their sums.

    In memory, because two more sums in registers would spill from width 5120 on.
    """
    if bias_sums is not None or weight_sums is not None:
        for piece in tl.static_range(PIECES):
            columns = columns_of(piece, BLOCK_D)
            at, mask = program * D + columns, columns < D
            factor = 1.0
            if scale is not None:
                factor += numbers(scale + row * scale_stride + columns, mask)
            if bias_sums is not None:
                tl.store(bias_sums + at, numbers(bias_sums + at, mask) + sum_dh[piece] * factor, mask=mask)
            if weight_sums is not None:
                tl.store(weight_sums + at, numbers(weight_sums + at, mask) + sum_dhx[piece] * factor, mask=mask)
        tl.debug_barrier()  # the next row's threads read what these wrote


@triton.jit
def _store_sums(slot, D: tl.constexpr, sum_dh, sum_dhx, sum_dxy, dh_sums, dhx_sums, dxy_sums, BLOCK_D: tl.constexpr,
                PIECES: tl.constexpr):
    if dh_sums is not None:
        store_row(dh_sums + slot * D, sum_dh, True, D, BLOCK_D, PIECES)
    if dhx_sums is not None:
        store_row(dhx_sums + slot * D, sum_dhx, True, D, BLOCK_D, PIECES)
    if dxy_sums is not None:
        store_row(dxy_sums + slot * D, sum_dxy, True, D, BLOCK_D, PIECES)


@triton.jit(do_not_specialize=["tokens", "run"])
def backward_kernel(x, y, gate, scale, rows, weight, bias, stats, dx_new, dh, dx, dy, d_gate, d_shift, d_scale, dh_sums,
                    dhx_sums, dxy_sums, slot_rows, bias_sums, weight_sums, tokens: tl.int64, run: tl.int64, gate_stride,
                    scale_stride, D: tl.constexpr, NORM: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK_D: tl.constexpr,
                    PIECES: tl.constexpr):
    """Program p: dx and dy of tokens p * run .., gradients of the modulation rows that are its own, sums of the others.

    x is what the norm was taken of; what is None is not there or not wanted. Slots 2p and 2p + 1 of the sums hold those of
    the first and the last modulation row, whose numbers are in ``slot_rows`` (-1: none); row p of ``bias_sums`` and
    ``weight_sums``, 0 before, what all its tokens add to the gradients of bias and weight.
    """
    SUM_DH: tl.constexpr = dh_sums is not None or bias_sums is not None
    SUM_DHX: tl.constexpr = dhx_sums is not None or weight_sums is not None
    program = tl.program_id(0).to(tl.int64)
    zeros = zero_row(1, BLOCK_D, PIECES)
    sum_dh, sum_dhx, sum_dxy = zeros, zeros, zeros
    head = tl.full([], -1, tl.int64)  # the first modulation row met
    current = tl.full([], -1, tl.int64)

    first = program * run
    for token in range(first, tl.minimum(first + run, tokens)):
        row = _row_of(token, rows, ONE_ROW, token < tokens)
        if row >= 0 and row != current:
            if current >= 0:
                _add_affine(program, current, D, sum_dh, sum_dhx, scale, scale_stride, bias_sums, weight_sums, BLOCK_D,
                            PIECES)
                if current == head:
                    _store_sums(2 * program, D, sum_dh, sum_dhx, sum_dxy, dh_sums, dhx_sums, dxy_sums, BLOCK_D, PIECES)
                else:
                    for piece in tl.static_range(PIECES):
                        _store_gradients(current, columns_of(piece, BLOCK_D), D, sum_dh[piece], sum_dhx[piece],
                                         sum_dxy[piece], weight, bias, d_shift, d_scale, d_gate)
                sum_dh, sum_dhx, sum_dxy = zeros, zeros, zeros
            else:
                head = row
            current = row

        # a token of no sample is not read: it adds 0, and its gradients are 0
        used = tl.zeros([1, 1], tl.int64) + row >= 0
        at = token * D
        dx_D = zeros
        if NORM is not None:
            rstd = numbers(stats + token, row >= 0)
            x_D = load_row(x + at, used, D, BLOCK_D, PIECES)
            dh_D = load_row(dh + at, used, D, BLOCK_D, PIECES)
            if NORM == "layer":
                x_D = centred(x_D, numbers(stats + tokens + token, row >= 0), D, BLOCK_D, PIECES)
            x_D = scale_row(x_D, rstd, PIECES)
            if SUM_DH:
                sum_dh = add_rows(sum_dh, dh_D, PIECES)
            if SUM_DHX:
                sum_dhx = add_rows(sum_dhx, multiply_rows(dh_D, x_D, PIECES), PIECES)
            if scale is not None:
                scale_D = load_row(scale + row * scale_stride, used, D, BLOCK_D, PIECES)
                dh_D = add_rows(dh_D, multiply_rows(dh_D, scale_D, PIECES), PIECES)
            if weight is not None:
                dh_D = multiply_rows(dh_D, load_row(weight, True, D, BLOCK_D, PIECES), PIECES)
            along = sum_of_products(dh_D, x_D, PIECES) * (1.0 / D)
            mean = sum_row(dh_D, PIECES) * (1.0 / D) if NORM == "layer" else 0.0
            dx_D = ()
            for piece in tl.static_range(PIECES):
                dx_D = dx_D + ((dh_D[piece] - x_D[piece] * along - mean) * rstd,)
        if dx_new is not None:
            dx_D = add_rows(dx_D, load_row(dx_new + at, used, D, BLOCK_D, PIECES), PIECES)
        if dxy_sums is not None:
            sum_dxy = add_rows(sum_dxy, multiply_rows(dx_D, load_row(y + at, used, D, BLOCK_D, PIECES), PIECES), PIECES)
        if dx is not None:
            store_row(dx + at, dx_D, True, D, BLOCK_D, PIECES)
        if dy is not None:
            gate_D = load_row(gate + row * gate_stride, used, D, BLOCK_D, PIECES)
            store_row(dy + at, multiply_rows(dx_D, gate_D, PIECES), True, D, BLOCK_D, PIECES)

    if current >= 0:
        _add_affine(program, current, D, sum_dh, sum_dhx, scale, scale_stride, bias_sums, weight_sums, BLOCK_D, PIECES)
        slot = 2 * program + (current != head).to(tl.int64)
        _store_sums(slot, D, sum_dh, sum_dhx, sum_dxy, dh_sums, dhx_sums, dxy_sums, BLOCK_D, PIECES)
    if slot_rows is not None:
        tl.store(slot_rows + 2 * program, head)
        tl.store(slot_rows + 2 * program + 1, tl.where(current == head, -1, current))


@triton.jit
def _sum_of_row(sums, mine, slot, columns, D: tl.constexpr):
    if sums is not None:
        return numbers(sums + slot[:, None] * D + columns[None, :], mine[:, None] & (columns < D)[None, :])
    else:
        return tl.zeros([slot.shape[0], columns.shape[0]], tl.float32)


@triton.jit(do_not_specialize=["slots"])
def join_kernel(dh_sums, dhx_sums, dxy_sums, slot_rows, weight, bias, d_gate, d_shift, d_scale, slots, D: tl.constexpr,
                SPAN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients of the modulation rows that have slots: SPAN slots a program, each row added up where its first slot is."""
    first = tl.program_id(0) * SPAN
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    # the modulation row of the last slot in use before these
    before = tl.full([], -1, tl.int32)
    place = first
    while (place > 0) & (before < 0):
        slot = place - 1 - tl.arange(0, BLOCK_S)
        before = tl.max(tl.load(slot_rows + slot, mask=slot >= 0, other=-1), 0)
        place -= BLOCK_S

    for leader in range(first, tl.minimum(first + SPAN, slots)):
        row = tl.load(slot_rows + leader)
        if (row >= 0) & (row != before):
            sum_dh = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            sum_dhx = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            sum_dxy = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            place = leader
            more = True
            while more:
                slot = place + tl.arange(0, BLOCK_S)
                found = tl.load(slot_rows + slot, mask=slot < slots, other=-1)
                sum_dh += _sum_of_row(dh_sums, found == row, slot, columns, D)
                sum_dhx += _sum_of_row(dhx_sums, found == row, slot, columns, D)
                sum_dxy += _sum_of_row(dxy_sums, found == row, slot, columns, D)
                place += BLOCK_S
                more = (place < slots) & (tl.max(found, 0) <= row)
            _store_gradients(row.to(tl.int64), columns, D, tl.sum(sum_dh, 0), tl.sum(sum_dhx, 0), tl.sum(sum_dxy, 0),
                             weight, bias, d_shift, d_scale, d_gate)
            before = row


# ----------------------------------------------------------------------------------------------------------- launches
def _dense(tensor):
    """``tensor`` (R, D) with the numbers of a row side by side (a copy where they are not), and the stride of its rows."""
    if tensor is None:
        return None, 0
    tensor = rows_dense(tensor)
    return tensor, tensor.stride(0)


def _one_row(rows, *tables) -> bool:
    """Whether, as there are no ``rows``, one modulation row is all tokens' (or there is no modulation)."""
    return rows is None and all(table is None or table.shape[0] == 1 for table in tables)


def forward(x, y, gate, shift, scale, rows, weight, bias, *, norm, eps, save, dtype, config: ForwardConfig):
    """``(x_new, h, stats)``; None for x_new without gate, h without norm, stats where ``save`` is False or no norm.

    x, y (N, D); gate, shift, scale (R, D) or None, any stride between rows; rows (N,) int32 or int64 or None; weight,
    bias (D,) or None; norm "layer", "rms" or None. x and y are copied where they are not contiguous. x_new has x's dtype,
    h ``dtype``; stats (1 or 2, N) float32: rstd, and mean of layer norm.
    """
    tokens, width = x.shape
    x, y, rows, weight, bias = contiguous(x, y, rows, weight, bias)
    (gate, gate_stride), (shift, shift_stride), (scale, scale_stride) = map(_dense, (gate, shift, scale))
    x_new = None if gate is None else torch.empty_like(x)
    h = None if norm is None else torch.empty_like(x, dtype=dtype)
    stats = None
    if norm is not None and save:
        stats = torch.empty((2 if norm == "layer" else 1, tokens), dtype=torch.float32, device=x.device)
    if tokens and width:
        block, count = tile(width)
        with on(x.device):
            forward_kernel[(triton.cdiv(tokens, config.tokens),)](
                x, y, gate, shift, scale, rows, weight, bias, x_new, h, stats, tokens, gate_stride, shift_stride,
                scale_stride, eps, D=width, NORM=norm, ONE_ROW=_one_row(rows, gate, shift, scale), BLOCK_N=config.tokens,
                BLOCK_D=block, PIECES=count, num_warps=config.warps)
    return x_new, h, stats


def backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, *, norm, wanted,
             config: BackwardConfig):
    """Gradients of (x, y, gate, shift, scale, weight, bias), None for those that ``wanted``, seven bools, leaves out.

    dx_new, dh: gradients of forward's outputs, None where there is no such output; strides of 0 are copied out. x: what
    the norm was taken of (x_new where there is a gate); not read without norm.

    Workspace, float32, P = multiprocessors x config.programs at most: (2P, D) for each of up to three sums, (P, D) for
    weight and for bias.
    """
    want_x, want_y, want_gate, want_shift, want_scale, want_weight, want_bias = wanted
    like = x if dx_new is None else dx_new
    tokens, width = like.shape
    device = like.device
    dx_new, dh, x, y, rows, weight, bias = contiguous(dx_new, dh, x, y, rows, weight, bias)
    one_row = _one_row(rows, gate, shift, scale)
    (gate, gate_stride), (scale, scale_stride) = map(_dense, (gate, scale))
    dense = lambda tensor, want: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if want else None
    # a modulation row without tokens gets the 0 it starts with
    table = lambda tensor, want: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if want else None
    dx, dy = dense(like, want_x), dense(y, want_y)
    d_gate, d_shift, d_scale = table(gate, want_gate), table(shift, want_shift), table(scale, want_scale)

    run = max(triton.cdiv(tokens, multiprocessors(device) * config.programs), config.tokens)
    programs = triton.cdiv(tokens, run)
    sums = lambda want: torch.empty((2 * programs, width), dtype=torch.float32, device=device) if want else None
    total = lambda want: torch.zeros((programs, width), dtype=torch.float32, device=device) if want else None
    dh_sums = sums(want_shift or want_scale and bias is not None)
    dhx_sums, dxy_sums = sums(want_scale), sums(want_gate)
    bias_sums, weight_sums = total(want_bias), total(want_weight)
    join = want_gate or want_shift or want_scale
    slot_rows = torch.empty(2 * programs, dtype=torch.int32, device=device) if join else None
    if tokens and width:
        block, count = backward_tile(width)
        with on(device):
            backward_kernel[(programs,)](
                x, y, gate, scale, rows, weight, bias, stats, dx_new, dh, dx, dy, d_gate, d_shift, d_scale, dh_sums,
                dhx_sums, dxy_sums, slot_rows, bias_sums, weight_sums, tokens, run, gate_stride, scale_stride, D=width,
                NORM=norm, ONE_ROW=one_row, BLOCK_D=block, PIECES=count, num_warps=config.warps,
                maxnreg=registers(config.warps, config.programs, 8))
            if join:
                span, block = 8, min(128, triton.next_power_of_2(width))
                join_kernel[(triton.cdiv(2 * programs, span), triton.cdiv(width, block))](
                    dh_sums, dhx_sums, dxy_sums, slot_rows, weight, bias, d_gate, d_shift, d_scale, 2 * programs, D=width,
                    SPAN=span, BLOCK_S=16, BLOCK_D=block, num_warps=4)
    d_weight = weight_sums.sum(dim=0).to(weight.dtype) if want_weight else None
    d_bias = bias_sums.sum(dim=0).to(bias.dtype) if want_bias else None
    return dx, dy, d_gate, d_shift, d_scale, d_weight, d_bias
