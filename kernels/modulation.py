"""adaLN in one pass: a gated residual, a norm and its modulation, forward and backward.

N tokens, D width, R modulation rows. A program holds whole rows of D elements in registers, so that each element is loaded
and stored once: 16 elements per thread, 32 in the backward of 4097 to 8192 columns, the widest supported. No known model is
wider than 6144; wider rows would have to be loaded twice. All arithmetic is in float32.

The three ops share one forward and one backward kernel: without ``gate`` there is no residual, without ``NORM`` no norm.

The gradient of a modulation row is a sum over its tokens. A program of the backward loops over a run of consecutive tokens
and accumulates the sums of the current row in registers. Row indices do not decrease over tokens, so only the first and the
last row of a run can extend into another program. The gradients of all others are stored at once; partial sums of these two
go to two slots of a workspace, which a reduction kernel adds in token order. There are no atomics: results are
bitwise deterministic. Tokens of no sample (tails, padding) have the row index -1.
"""

import torch
import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2
from .launch import contiguous, num_sms, on, registers, rows_dense
from .modulation_config import BackwardConfig, ForwardConfig, backward_tile, tile
from .rows import (
    add_rows,
    centred,
    columns_of,
    load_f32,
    load_row,
    mean_of,
    multiply_rows,
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
    """The modulation row of each token: from ``rows``, or row 0 if ONE_ROW, else its own; -1 where ``mask`` is False."""
    if rows is not None:
        return tl.load(rows + token, mask=mask, other=-1).to(tl.int64)
    else:
        return tl.where(mask, token * 0 if ONE_ROW else token, -1)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(x, y, gate, shift, scale, rows, weight, bias, x_new, h, stats, tokens: tl.int64, gate_stride,
                   shift_stride, scale_stride, eps, D: tl.constexpr, NORM: tl.constexpr, ONE_ROW: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """``x_new = x + gate * y`` if there is a gate; ``h``, its modulated norm, if there is a NORM.

    ``stats`` (1 or 2, N) float32 or None: rstd and, for layer norm, mean.
    """
    token = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    in_bounds = token < tokens
    row = _row_of(token, rows, ONE_ROW, in_bounds)
    offset = token * D
    valid = in_bounds & (row >= 0)  # tokens outside every sample are not loaded

    x_ND = load_row(x + offset, valid, D, BLOCK_D, PIECES)
    if gate is not None:
        gated_ND = multiply_rows(load_row(gate + row * gate_stride, valid, D, BLOCK_D, PIECES),
                                 load_row(y + offset, valid, D, BLOCK_D, PIECES), PIECES)
    if gate is not None:
        # rounded first: the norm must see the x_new that the next layer loads
        x_ND = round_row(add_rows(x_ND, gated_ND, PIECES), x_new.dtype.element_ty, PIECES)
        store_row(x_new + offset, x_ND, in_bounds, D, BLOCK_D, PIECES)
    if NORM is not None:
        if NORM == "layer":
            mean = mean_of(sum_row(x_ND, PIECES), D)
            x_ND = centred(x_ND, mean, D, BLOCK_D, PIECES)
        rstd = rstd_of(sum_of_products(x_ND, x_ND, PIECES) * (1.0 / D), eps)
        if stats is not None:
            tl.store(stats + token, rstd, mask=in_bounds)
            if NORM == "layer":
                tl.store(stats + tokens + token, mean, mask=in_bounds)
        rstd = tl.where(valid, rstd, 0.0)  # inf for a token outside every sample, if eps is 0
        if weight is not None:
            weight_D = load_row(weight, True, D, BLOCK_D, PIECES)
        if bias is not None:
            bias_D = load_row(bias, True, D, BLOCK_D, PIECES)
        if scale is not None:
            scale_ND = load_row(scale + row * scale_stride, valid, D, BLOCK_D, PIECES)
        if shift is not None:
            shift_ND = load_row(shift + row * shift_stride, valid, D, BLOCK_D, PIECES)
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
                h_ND = tl.where(valid, h_ND, 0.0)
            column = columns_of(piece, BLOCK_D)
            tl.store(h + offset + column, h_ND, mask=in_bounds & (column < D))


@triton.jit
def _store_gradients(row, columns, D: tl.constexpr, sum_dh, sum_dhx, sum_dxy, weight, bias, d_shift, d_scale, d_gate):
    """The gradients of modulation row ``row``, from the sums over its tokens of dh, dh * x_hat and dx * y."""
    offset, mask = row * D + columns, columns < D
    if d_shift is not None:
        tl.store(d_shift + offset, sum_dh, mask=mask)
    if d_scale is not None:
        if weight is not None:
            sum_dhx *= load_f32(weight + columns, mask)
        if bias is not None:
            sum_dhx += sum_dh * load_f32(bias + columns, mask)
        tl.store(d_scale + offset, sum_dhx, mask=mask)
    if d_gate is not None:
        tl.store(d_gate + offset, sum_dxy, mask=mask)


@triton.jit
def _add_affine(program, row, D: tl.constexpr, sum_dh, sum_dhx, scale, scale_stride, bias_sums, weight_sums,
                BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """Accumulate the contributions of the tokens of ``row`` to dbias and dweight in this program's workspace row.

    In global memory, because two more accumulators in registers would spill from width 5120 on.
    """
    if bias_sums is not None or weight_sums is not None:
        for piece in tl.static_range(PIECES):
            columns = columns_of(piece, BLOCK_D)
            offset, mask = program * D + columns, columns < D
            factor = 1.0
            if scale is not None:
                factor += load_f32(scale + row * scale_stride + columns, mask)
            if bias_sums is not None:
                tl.store(bias_sums + offset, load_f32(bias_sums + offset, mask) + sum_dh[piece] * factor, mask=mask)
            if weight_sums is not None:
                tl.store(weight_sums + offset, load_f32(weight_sums + offset, mask) + sum_dhx[piece] * factor, mask=mask)
        tl.debug_barrier()  # other threads load these elements for the next row


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
    """Program p: dx and dy of the ``run`` tokens from p * run, and the gradients of the modulation rows inside its run.

    x is the norm's input; arguments are None if absent or not requested. Slots 2p and 2p + 1 of the workspace hold partial
    sums of the program's first and last modulation row, whose indices are in ``slot_rows`` (-1: none). Row p of
    ``bias_sums`` and ``weight_sums``, zero-initialised, accumulates what all its tokens contribute to dbias and dweight.
    """
    SUM_DH: tl.constexpr = dh_sums is not None or bias_sums is not None
    SUM_DHX: tl.constexpr = dhx_sums is not None or weight_sums is not None
    program = tl.program_id(0).to(tl.int64)
    zeros = zero_row(1, BLOCK_D, PIECES)
    sum_dh, sum_dhx, sum_dxy = zeros, zeros, zeros
    first_row = tl.full([], -1, tl.int64)  # the first modulation row of the run
    current = tl.full([], -1, tl.int64)

    first = program * run
    for token in range(first, tl.minimum(first + run, tokens)):
        row = _row_of(token, rows, ONE_ROW, token < tokens)
        if row >= 0 and row != current:
            if current >= 0:
                _add_affine(program, current, D, sum_dh, sum_dhx, scale, scale_stride, bias_sums, weight_sums, BLOCK_D,
                            PIECES)
                if current == first_row:
                    _store_sums(2 * program, D, sum_dh, sum_dhx, sum_dxy, dh_sums, dhx_sums, dxy_sums, BLOCK_D, PIECES)
                else:
                    for piece in tl.static_range(PIECES):
                        _store_gradients(current, columns_of(piece, BLOCK_D), D, sum_dh[piece], sum_dhx[piece],
                                         sum_dxy[piece], weight, bias, d_shift, d_scale, d_gate)
                sum_dh, sum_dhx, sum_dxy = zeros, zeros, zeros
            else:
                first_row = row
            current = row

        # a token outside every sample is not loaded: it contributes 0, and its gradients are 0
        valid = tl.zeros([1, 1], tl.int64) + row >= 0
        offset = token * D
        dx_D = zeros
        if NORM is not None:
            rstd = load_f32(stats + token, row >= 0)
            x_D = load_row(x + offset, valid, D, BLOCK_D, PIECES)
            dh_D = load_row(dh + offset, valid, D, BLOCK_D, PIECES)
            if NORM == "layer":
                x_D = centred(x_D, load_f32(stats + tokens + token, row >= 0), D, BLOCK_D, PIECES)
            x_D = scale_row(x_D, rstd, PIECES)
            if SUM_DH:
                sum_dh = add_rows(sum_dh, dh_D, PIECES)
            if SUM_DHX:
                sum_dhx = add_rows(sum_dhx, multiply_rows(dh_D, x_D, PIECES), PIECES)
            if scale is not None:
                scale_D = load_row(scale + row * scale_stride, valid, D, BLOCK_D, PIECES)
                dh_D = add_rows(dh_D, multiply_rows(dh_D, scale_D, PIECES), PIECES)
            if weight is not None:
                dh_D = multiply_rows(dh_D, load_row(weight, True, D, BLOCK_D, PIECES), PIECES)
            mean_dhx = sum_of_products(dh_D, x_D, PIECES) * (1.0 / D)
            mean_dh = sum_row(dh_D, PIECES) * (1.0 / D) if NORM == "layer" else 0.0
            dx_D = ()
            for piece in tl.static_range(PIECES):
                dx_D = dx_D + ((dh_D[piece] - x_D[piece] * mean_dhx - mean_dh) * rstd,)
        if dx_new is not None:
            dx_D = add_rows(dx_D, load_row(dx_new + offset, valid, D, BLOCK_D, PIECES), PIECES)
        if dxy_sums is not None:
            sum_dxy = add_rows(sum_dxy, multiply_rows(dx_D, load_row(y + offset, valid, D, BLOCK_D, PIECES), PIECES), PIECES)
        if dx is not None:
            store_row(dx + offset, dx_D, True, D, BLOCK_D, PIECES)
        if dy is not None:
            gate_D = load_row(gate + row * gate_stride, valid, D, BLOCK_D, PIECES)
            store_row(dy + offset, multiply_rows(dx_D, gate_D, PIECES), True, D, BLOCK_D, PIECES)

    if current >= 0:
        _add_affine(program, current, D, sum_dh, sum_dhx, scale, scale_stride, bias_sums, weight_sums, BLOCK_D, PIECES)
        slot = 2 * program + (current != first_row).to(tl.int64)
        _store_sums(slot, D, sum_dh, sum_dhx, sum_dxy, dh_sums, dhx_sums, dxy_sums, BLOCK_D, PIECES)
    if slot_rows is not None:
        tl.store(slot_rows + 2 * program, first_row)
        tl.store(slot_rows + 2 * program + 1, tl.where(current == first_row, -1, current))


@triton.jit
def _sum_matching(sums, mine, slot, columns, D: tl.constexpr):
    if sums is not None:
        return load_f32(sums + slot[:, None] * D + columns[None, :], mine[:, None] & (columns < D)[None, :])
    else:
        return tl.zeros([slot.shape[0], columns.shape[0]], tl.float32)


@triton.jit(do_not_specialize=["slots"])
def reduce_slots_kernel(dh_sums, dhx_sums, dxy_sums, slot_rows, weight, bias, d_gate, d_shift, d_scale, slots,
                        D: tl.constexpr, SPAN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Reduce the slots to gradients. A program reduces the modulation rows whose first slot is among its SPAN slots."""
    first = tl.program_id(0) * SPAN
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    # the modulation row of the last used slot before these
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
                sum_dh += _sum_matching(dh_sums, found == row, slot, columns, D)
                sum_dhx += _sum_matching(dhx_sums, found == row, slot, columns, D)
                sum_dxy += _sum_matching(dxy_sums, found == row, slot, columns, D)
                place += BLOCK_S
                more = (place < slots) & (tl.max(found, 0) <= row)
            _store_gradients(row.to(tl.int64), columns, D, tl.sum(sum_dh, 0), tl.sum(sum_dhx, 0), tl.sum(sum_dxy, 0),
                             weight, bias, d_shift, d_scale, d_gate)
            before = row


# ----------------------------------------------------------------------------------------------------------- launches
def _dense(tensor):
    """``tensor`` (R, D) with contiguous rows (copied if they are not), and its row stride."""
    if tensor is None:
        return None, 0
    tensor = rows_dense(tensor)
    return tensor, tensor.stride(0)


def _one_row(rows, *tables) -> bool:
    """Whether all tokens share one modulation row (or there is no modulation)."""
    return rows is None and all(table is None or table.shape[0] == 1 for table in tables)


def forward(x, y, gate, shift, scale, rows, weight, bias, *, norm, eps, save, dtype, config: ForwardConfig):
    """``(x_new, h, stats)``: x_new is None without gate, h without norm, stats without norm or if ``save`` is False.

    x, y (N, D); gate, shift, scale (R, D) or None, any stride between rows; rows (N,) int32 or int64 or None; weight,
    bias (D,) or None; norm "layer", "rms" or None. x and y are copied if they are not contiguous. x_new has x's dtype, h has
    ``dtype``; stats (1 or 2, N) float32: rstd, and mean for layer norm.
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
            forward_kernel[(cdiv(tokens, config.tokens),)](
                x, y, gate, shift, scale, rows, weight, bias, x_new, h, stats, tokens, gate_stride, shift_stride,
                scale_stride, eps, D=width, NORM=norm, ONE_ROW=_one_row(rows, gate, shift, scale), BLOCK_N=config.tokens,
                BLOCK_D=block, PIECES=count, num_warps=config.warps)
    return x_new, h, stats


def backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, *, norm, wanted,
             config: BackwardConfig):
    """Gradients of (x, y, gate, shift, scale, weight, bias); None where ``wanted``, seven bools, is False.

    dx_new, dh: gradients of forward's outputs, None for an output that does not exist; expanded tensors are copied. x: the
    norm's input (x_new if there is a gate); not loaded without norm.

    Workspace, float32, for P programs, at most SMs x config.programs: (2P, D) for each of up to three sums, (P, D) for
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
    # a modulation row without tokens keeps its initial 0
    table = lambda tensor, want: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if want else None
    dx, dy = dense(like, want_x), dense(y, want_y)
    d_gate, d_shift, d_scale = table(gate, want_gate), table(shift, want_shift), table(scale, want_scale)

    run = max(cdiv(tokens, num_sms(device) * config.programs), config.tokens)
    programs = cdiv(tokens, run)
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
                span, block = 8, min(128, next_power_of_2(width))
                reduce_slots_kernel[(cdiv(2 * programs, span), cdiv(width, block))](
                    dh_sums, dhx_sums, dxy_sums, slot_rows, weight, bias, d_gate, d_shift, d_scale, 2 * programs, D=width,
                    SPAN=span, BLOCK_S=16, BLOCK_D=block, num_warps=4)
    d_weight = weight_sums.sum(dim=0).to(weight.dtype) if want_weight else None
    d_bias = bias_sums.sum(dim=0).to(bias.dtype) if want_bias else None
    return dx, dy, d_gate, d_shift, d_scale, d_weight, d_bias
