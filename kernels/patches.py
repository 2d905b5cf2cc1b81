"""Patch embedding as one gathered matrix product over samples of any sizes, its gradients, and the way back to clips.

N tokens, S samples, C channels, D width; a patch is pt x ph x pw pixels. A sample (C, t * pt, h * ph, w * pw) stands in the
flat buffer with its t x h x w tokens in this order, after the samples before it; ``cu_seqlens`` (S + 1,) counts the tokens
before each. The K = C * pt * ph * pw elements of a patch are rows (C, pt, ph) of pw elements, one after the other in the
buffer; a token finds its sample by binary search, and where its patch lies is four integers (``_places``).

What is coalesced. The elements of a row of a patch are pw * 2 to pw * 4 bytes in a row, and the next token's follow them at
once. So the buffer is read and written in tiles (row of the patch, token, place in the row), whose last two axes run through
memory: the lanes of a warp run along the tokens, each with the pw elements of its own. Tokens and weights are (N, D) and
(D, K): 16 bytes a lane.

The embedding of a token is D / K times larger than its patch (24 times with K = 64, D = 1536), so a program gathers a tile
of patches once and walks over the columns of the weight, which it finds in L2.

Tokens past the last sample (the tail) are patches of 1 x 1 x 1 that nothing is read of: 0 in every output. No atomics: two
runs give the same bits. MMAs of 16-bit operands accumulate in float32; those of float32 are tf32x3, three products of
TF32 whose error is float32's own, unless torch.backends.cuda.matmul allows plain TF32.
"""

from math import prod

import torch
import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2
from .launch import MAXNREG, TF32X3, contiguous, num_sms, on, registers
from .patches_config import GemmConfig, PermuteConfig


# ------------------------------------------------------------------------------------------------------------- places
@triton.jit
def _places(token, grids, cu_seqlens, samples, steps, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
            PW: tl.constexpr, AHEAD: tl.constexpr = True):
    """Of each token: whether a sample has it, where its patch begins, and the strides of ph, pt and C there.

    ``steps``: halvings that leave one of ``samples`` + 1 places. Tokens of samples are counted in 32 bits, elements in 64.
    """
    belongs = token < tl.load(cu_seqlens + samples)
    if AHEAD:  # the search does not wait for ``belongs``
        inside = tl.minimum(token, 2147483647).to(tl.int32)
    else:  # fewer instructions
        inside = tl.where(belongs, token, 0).to(tl.int32)
    low = tl.zeros_like(inside)  # the last sample that begins at or before the token: empty ones before it are passed over
    high = low + samples.to(tl.int32)
    for _ in range(steps):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens + middle) <= inside
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    t = tl.load(grids + 3 * low, mask=belongs, other=1)
    h = tl.load(grids + 3 * low + 1, mask=belongs, other=1)
    w = tl.load(grids + 3 * low + 2, mask=belongs, other=1)
    first = tl.load(cu_seqlens + low)
    inner = tl.where(belongs, inside - first, 0)
    row = w.to(tl.int64) * PW
    plane = row * (h * PH)
    corner = (inner // (h * w)) * (PT * plane) + (inner // w % h) * (PH * row) + (inner % w).to(tl.int64) * PW
    corner += tl.where(belongs, first.to(tl.int64), token) * (C * PT * PH * PW)
    return belongs, corner, row, plane, plane * (t * PT)


@triton.jit
def _rows_at(first_row, corner, row, plane, volume, PT: tl.constexpr, PH: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where rows ``first_row`` .. of the patches begin, (BLOCK_R, tokens)."""
    r = (first_row + tl.arange(0, BLOCK_R))[:, None]
    return corner[None, :] + r // (PT * PH) * volume[None, :] + r // PH % PT * plane[None, :] + r % PH * row[None, :]


@triton.jit
def _row_mask(first_row, belongs, ROWS: tl.constexpr, PW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Which elements of a tile (row, token, place in the row) are there; ``belongs`` of the tokens."""
    mask = (first_row + tl.arange(0, BLOCK_R) < ROWS)[:, None, None] & belongs[None, :, None]
    if BLOCK_W == PW:
        return tl.broadcast_to(mask, [BLOCK_R, belongs.shape[0], BLOCK_W])
    else:
        return mask & (tl.arange(0, BLOCK_W) < PW)[None, None, :]


@triton.jit
def _elements_of(first_row, ROWS: tl.constexpr, PW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Place in a row of the weight of each element that ``_patches`` gathers, and which are there."""
    element = tl.arange(0, BLOCK_R * BLOCK_W)
    if BLOCK_W == PW:
        return first_row * PW + element, first_row * PW + element < ROWS * PW
    else:
        row, place = first_row + element // BLOCK_W, element % BLOCK_W
        return row * PW + place, (row < ROWS) & (place < PW)


@triton.jit
def _patches(latents, first_row, belongs, corner, row, plane, volume, ROWS: tl.constexpr, PT: tl.constexpr,
             PH: tl.constexpr, PW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows ``first_row`` .. of the patches, (BLOCK_R * BLOCK_W, tokens); 0 where nothing is."""
    at = _rows_at(first_row, corner, row, plane, volume, PT, PH, BLOCK_R)[:, :, None] + tl.arange(0, BLOCK_W)[None, None, :]
    mask = _row_mask(first_row, belongs, ROWS, PW, BLOCK_R, BLOCK_W)
    x_RNW = tl.load(latents + at, mask=mask, other=0.0)
    return tl.reshape(tl.permute(x_RNW, (0, 2, 1)), [BLOCK_R * BLOCK_W, belongs.shape[0]])


@triton.jit
def _weights(weight, columns, first_row, D: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, BLOCK_R: tl.constexpr,
             BLOCK_W: tl.constexpr):
    """Of ``columns`` and the elements that ``_patches`` gathers, (columns, BLOCK_R * BLOCK_W); 0 where nothing is."""
    element, valid = _elements_of(first_row, ROWS, PW, BLOCK_R, BLOCK_W)
    return tl.load(weight + columns[:, None] * (ROWS * PW) + element[None, :],
                   mask=(columns < D)[:, None] & valid[None, :], other=0.0)


# ------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _bias_of(bias, columns, D: tl.constexpr):
    if bias is None:
        return tl.zeros([columns.shape[0]], tl.float32)
    else:
        return tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _store_columns(out, acc_DN, token, columns, mask, D: tl.constexpr):
    x_ND = tl.trans(acc_DN.to(out.dtype.element_ty))
    tl.store(out + token[:, None] * D + columns[None, :], x_ND, mask=mask[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["tokens", "samples", "steps", "blocks"],
            do_not_specialize_on_alignment=["grids", "cu_seqlens"])
def embed_kernel(latents, weight, bias, grids, cu_seqlens, out, tokens: tl.int64, samples: tl.int64, steps: tl.int64,
                 blocks: tl.int64, D: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_W: tl.constexpr, REST_R: tl.constexpr):
    """``out`` (N, D) = patches times weight^T plus bias: a tile of tokens and ``blocks`` blocks of columns a program.

    A patch of BLOCK_R rows, or of REST_R (a power of two) more, is gathered once. The weight is the first operand: its tiles
    and the patches', along which tokens are contiguous, go from shared memory to the Tensor Cores as they are.
    """
    ROWS: tl.constexpr = C * PT * PH
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program, walk = tl.program_id(0), blocks.to(tl.int32)
    parts = (COLUMNS + walk - 1) // walk
    first_block = program % parts * walk
    end = tl.minimum(first_block + walk, COLUMNS)
    first = (program // parts).to(tl.int64) * BLOCK_N
    token = first + tl.arange(0, BLOCK_N)
    belongs, corner, row, plane, volume = _places(token, grids, cu_seqlens, samples, steps, C, PT, PH, PW)

    if ROWS <= BLOCK_R + REST_R:
        b_KN = _patches(latents, 0, belongs, corner, row, plane, volume, ROWS, PT, PH, PW, BLOCK_R, BLOCK_W)
        if REST_R > 0:
            rest_KN = _patches(latents, BLOCK_R, belongs, corner, row, plane, volume, ROWS, PT, PH, PW, REST_R, BLOCK_W)
        bias_D = _bias_of(bias, first_block * BLOCK_D + tl.arange(0, BLOCK_D), D)
        for block in range(first_block, end):
            columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
            next_bias_D = _bias_of(bias, columns + BLOCK_D, D)  # a turn ahead, or each would wait for it
            a_DK = _weights(weight, columns, 0, D, ROWS, PW, BLOCK_R, BLOCK_W)
            acc_DN = tl.dot(a_DK, b_KN, input_precision=PRECISION)
            if REST_R > 0:
                rest_DK = _weights(weight, columns, BLOCK_R, D, ROWS, PW, REST_R, BLOCK_W)
                acc_DN = tl.dot(rest_DK, rest_KN, acc_DN, input_precision=PRECISION)
            _store_columns(out, acc_DN + bias_D[:, None], token, columns, belongs, D)
            bias_D = next_bias_D
    else:
        for block in range(first_block, end):
            columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
            acc_DN = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
            for first_row in range(0, ROWS, BLOCK_R):
                b_KN = _patches(latents, first_row, belongs, corner, row, plane, volume, ROWS, PT, PH, PW, BLOCK_R, BLOCK_W)
                a_DK = _weights(weight, columns, first_row, D, ROWS, PW, BLOCK_R, BLOCK_W)
                acc_DN = tl.dot(a_DK, b_KN, acc_DN, input_precision=PRECISION)
            _store_columns(out, acc_DN + _bias_of(bias, columns, D)[:, None], token, columns, belongs, D)

    if first + BLOCK_N > tl.load(cu_seqlens + samples):  # tokens of no sample
        for block in range(first_block, end):
            columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
            _store_columns(out, tl.zeros([BLOCK_D, BLOCK_N], tl.float32), token, columns, (token < tokens) & ~belongs, D)


@triton.jit(do_not_specialize=["tokens", "samples", "steps"], do_not_specialize_on_alignment=["grids", "cu_seqlens"])
def latents_kernel(d_out, weight, grids, cu_seqlens, d_latents, tokens: tl.int64, samples: tl.int64, steps: tl.int64,
                   D: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_W: tl.constexpr):
    """``d_latents`` = d_out times weight, each patch stored where it lies: every element of the buffer is of one patch."""
    ROWS: tl.constexpr = C * PT * PH
    K: tl.constexpr = ROWS * PW
    PARTS: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0).to(tl.int64)
    first_row = (program % PARTS).to(tl.int32) * BLOCK_R
    token = program // PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    belongs, corner, row, plane, volume = _places(token, grids, cu_seqlens, samples, steps, C, PT, PH, PW,
                                                  AHEAD=False)

    element, valid = _elements_of(first_row, ROWS, PW, BLOCK_R, BLOCK_W)
    acc = tl.zeros([BLOCK_N, BLOCK_R * BLOCK_W], tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        a_ND = tl.load(d_out + token[:, None] * D + columns[None, :], mask=belongs[:, None] & (columns < D)[None, :],
                       other=0.0)
        b_DK = tl.load(weight + columns[:, None] * K + element[None, :], mask=(columns < D)[:, None] & valid[None, :],
                       other=0.0)
        acc = tl.dot(a_ND, b_DK, acc, input_precision=PRECISION)
    d_RNW = tl.permute(tl.reshape(acc.to(d_latents.dtype.element_ty), [BLOCK_N, BLOCK_R, BLOCK_W]), (1, 0, 2))
    d_RNW = tl.where(belongs[None, :, None], d_RNW, 0.0)
    at = _rows_at(first_row, corner, row, plane, volume, PT, PH, BLOCK_R)[:, :, None] + tl.arange(0, BLOCK_W)[None, None, :]
    tl.store(d_latents + at, d_RNW, mask=_row_mask(first_row, token < tokens, ROWS, PW, BLOCK_R, BLOCK_W))


@triton.jit(do_not_specialize=["samples", "steps", "length"], do_not_specialize_on_alignment=["grids", "cu_seqlens"])
def weight_kernel(d_out, latents, grids, cu_seqlens, weight_sums, bias_sums, samples: tl.int64, steps: tl.int64,
                  length: tl.int64, D: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_W: tl.constexpr):
    """Sums over ``length`` tokens of d_out^T times patches and of d_out, one tile (D, K) of one share a program."""
    ROWS: tl.constexpr = C * PT * PH
    K: tl.constexpr = ROWS * PW
    PARTS: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R if weight_sums is not None else 1
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    first_row = (program % PARTS).to(tl.int32) * BLOCK_R
    columns = (program // PARTS % COLUMNS).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    share = program // PARTS // COLUMNS

    acc = tl.zeros([BLOCK_D, BLOCK_R * BLOCK_W], tl.float32)
    bias_acc = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum((share + 1) * length, tl.load(cu_seqlens + samples).to(tl.int64))
    for first in range(share * length, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        a_ND = tl.load(d_out + token[:, None] * D + columns[None, :], mask=(token < end)[:, None] & (columns < D)[None, :],
                       other=0.0)
        if bias_sums is not None:
            bias_acc += tl.sum(a_ND.to(tl.float32), 0)
        if weight_sums is not None:
            belongs, corner, row, plane, volume = _places(token, grids, cu_seqlens, samples, steps, C, PT, PH, PW)
            b_KN = _patches(latents, first_row, belongs & (token < end), corner, row, plane, volume, ROWS, PT, PH, PW,
                            BLOCK_R, BLOCK_W)
            acc = tl.dot(tl.trans(a_ND), tl.trans(b_KN), acc, input_precision=PRECISION)

    if bias_sums is not None:
        tl.store(bias_sums + share * D + columns, bias_acc, mask=columns < tl.where(first_row == 0, D, 0))
    if weight_sums is not None:
        element, valid = _elements_of(first_row, ROWS, PW, BLOCK_R, BLOCK_W)
        at = (share * D + columns)[:, None] * K + element[None, :]
        tl.store(weight_sums + at, acc, mask=(columns < D)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["tokens", "samples", "steps"], do_not_specialize_on_alignment=["grids", "cu_seqlens"])
def permute_kernel(source, grids, cu_seqlens, out, tokens: tl.int64, samples: tl.int64, steps: tl.int64,
                   TO_TOKENS: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):
    """Tokens (N, pt * ph * pw * C) to the flat buffer, or TO_TOKENS: elements are moved, not computed with.

    On the tokens' side a lane has 16 bytes along C, on the buffer's pw elements, and lanes run along the tokens; between the
    two the tile goes through shared memory.
    """
    ROWS: tl.constexpr = PT * PH
    ROW_PARTS: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    PARTS: tl.constexpr = ROW_PARTS * ((C + BLOCK_C - 1) // BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    part = (program % PARTS).to(tl.int32)
    token = program // PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    belongs, corner, row, plane, volume = _places(token, grids, cu_seqlens, samples, steps, C, PT, PH, PW)

    r = part % ROW_PARTS * BLOCK_R + tl.arange(0, BLOCK_R)
    c = part // ROW_PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.arange(0, BLOCK_W)
    at_RN = corner[None, :] + (r // PH)[:, None] * plane[None, :] + (r % PH)[:, None] * row[None, :]
    at_RCN = at_RN[:, None, :] + c[None, :, None] * volume[None, None, :]
    at_RCNW = at_RCN[:, :, :, None] + place[None, None, None, :]
    at_RWC = (r[:, None, None] * PW + place[None, :, None]) * C + c[None, None, :]
    at_NRWC = token[:, None, None, None] * (ROWS * PW * C) + at_RWC[None, :, :, :]
    mask_RCW = ((r < ROWS)[:, None] & (c < C)[None, :])[:, :, None] & (place < PW)[None, None, :]
    mask_RWC = ((r < ROWS)[:, None] & (place < PW)[None, :])[:, :, None] & (c < C)[None, None, :]
    if TO_TOKENS:
        x_RCNW = tl.load(source + at_RCNW, mask=mask_RCW[:, :, None, :] & belongs[None, None, :, None], other=0.0)
        tl.store(out + at_NRWC, tl.permute(x_RCNW, (2, 0, 3, 1)),
                 mask=mask_RWC[None, :, :, :] & (token < tokens)[:, None, None, None])
    else:
        x_NRWC = tl.load(source + at_NRWC, mask=mask_RWC[None, :, :, :] & belongs[:, None, None, None], other=0.0)
        tl.store(out + at_RCNW, tl.permute(x_NRWC, (1, 3, 0, 2)),
                 mask=mask_RCW[:, :, None, :] & (token < tokens)[None, None, :, None])


# ----------------------------------------------------------------------------------------------------------- launches
def _precision(dtype: torch.dtype) -> str:
    # fp32_precision is what allow_tf32 sets; reading allow_tf32 itself fails where the newer setting was used
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else TF32X3


def _steps(grids) -> int:
    """Halvings that find one of S samples."""
    return max(grids.shape[0] - 1, 0).bit_length()


def _constants(weight, config: GemmConfig) -> dict:
    """What the kernels of a product know when they are compiled."""
    width, channels, pt, ph, pw = weight.shape
    run = next_power_of_2(pw)
    if config.block_k % run:
        raise ValueError(f"patches: expected block_k to be a multiple of {run}, got {config.block_k}; choose another Config")
    return dict(D=width, C=channels, PT=pt, PH=ph, PW=pw, PRECISION=_precision(weight.dtype), BLOCK_N=config.block_n,
                BLOCK_D=config.block_d, BLOCK_R=config.block_k // run, BLOCK_W=run, num_warps=config.warps,
                num_stages=config.stages, maxnreg=MAXNREG)


def embed(latents, weight, bias, grids, cu_seqlens, *, config: GemmConfig):
    """Tokens (N, D) in latents' dtype.

    latents (N * K,), weight (D, C, pt, ph, pw), bias (D,) or None, of one dtype; copied where they are not contiguous.
    grids (S, 3) and cu_seqlens (S + 1,) int32 on their device; N may exceed cu_seqlens[-1].
    """
    width, *patch = weight.shape
    tokens = latents.shape[0] // prod(patch)
    latents, weight, bias = contiguous(latents, weight, bias)
    out = torch.empty((tokens, width), dtype=latents.dtype, device=latents.device)
    if tokens and width:
        constants = _constants(weight, config)
        tiles, columns = cdiv(tokens, config.block_n), cdiv(width, config.block_d)
        # all columns of a tile of tokens, but for few tokens, which would leave SMs idle, and large patches,
        # which each block of columns reads again
        blocks = -(columns // (-4 * num_sms(latents.device) // tiles))
        rest = prod(patch[:-1]) - constants["BLOCK_R"]
        rest = next_power_of_2(rest) if rest > 0 else 0
        if rest > constants["BLOCK_R"]:
            blocks, rest = 1, 0
        if weight.dtype.itemsize == 2 and width % 8 == 0 and config.warps == 4:  # three blocks on an SM; others would spill
            constants["maxnreg"] = registers(config.warps, 3)
        with on(latents.device):
            embed_kernel[(tiles * cdiv(columns, blocks),)](
                latents, weight, bias, grids, cu_seqlens, out, tokens, grids.shape[0], _steps(grids), blocks, REST_R=rest,
                **constants)
    return out


def embed_latents_gradient(d_out, weight, grids, cu_seqlens, *, config: GemmConfig):
    """Gradient (N * K,) of the latents; d_out (N, D), the rest as in ``embed``. Contents of d_out's tail are not read."""
    tokens, width = d_out.shape
    rows = prod(weight.shape[1:4])
    d_out, weight = d_out.contiguous(), weight.contiguous()
    d_latents = torch.empty(tokens * rows * weight.shape[4], dtype=d_out.dtype, device=d_out.device)
    if tokens:
        constants = _constants(weight, config)
        with on(d_out.device):
            latents_kernel[(cdiv(tokens, config.block_n) * cdiv(rows, constants["BLOCK_R"]),)](
                d_out, weight, grids, cu_seqlens, d_latents, tokens, grids.shape[0], _steps(grids), **constants)
    return d_latents


def embed_weight_gradient(d_out, latents, weight, grids, cu_seqlens, *, want_weight, want_bias, config: GemmConfig):
    """Gradients of weight and bias in their dtype, None where not wanted; of ``weight`` only shape and dtype are used.

    Workspace, float32: P shares of the tokens, each (D, K) for the weight and (D,) for the bias; P is such that there are
    no more than 4 programs for each SM, or one.
    """
    tokens, width = d_out.shape
    rows, elements = prod(weight.shape[1:4]), prod(weight.shape[1:])
    d_out, latents = d_out.contiguous(), latents.contiguous()
    constants = _constants(weight, config)
    tiles = cdiv(width, config.block_d) * (cdiv(rows, constants["BLOCK_R"]) if want_weight else 1)
    shares = max(4 * num_sms(d_out.device) // max(tiles, 1), 1)
    length = max(cdiv(cdiv(tokens, shares), config.block_n), 1) * config.block_n
    shares = cdiv(tokens, length)
    sums = lambda *shape: torch.empty((shares, *shape), dtype=torch.float32, device=d_out.device)
    weight_sums = sums(width, elements) if want_weight else None
    bias_sums = sums(width) if want_bias else None
    if tokens and width:
        with on(d_out.device):
            weight_kernel[(tiles * shares,)](
                d_out, latents, grids, cu_seqlens, weight_sums, bias_sums, grids.shape[0], _steps(grids), length,
                **constants)
    d_weight = weight_sums.sum(dim=0).to(weight.dtype).view(weight.shape) if want_weight else None
    d_bias = bias_sums.sum(dim=0).to(weight.dtype) if want_bias else None
    return d_weight, d_bias


def permute(source, grids, cu_seqlens, patch, channels, *, to_tokens, config: PermuteConfig):
    """Tokens (N, pt * ph * pw * C) to the flat buffer (N * pt * ph * pw * C,), tail 0, or ``to_tokens`` the reverse."""
    elements = channels * prod(patch)
    tokens = source.numel() // elements
    source = source.contiguous()
    out = torch.empty((tokens, elements) if to_tokens else tokens * elements, dtype=source.dtype, device=source.device)
    if tokens:
        pt, ph, pw = patch
        parts = cdiv(pt * ph, config.block_r) * cdiv(channels, config.block_c)
        with on(source.device):
            permute_kernel[(cdiv(tokens, config.block_n) * parts,)](
                source, grids, cu_seqlens, out, tokens, grids.shape[0], _steps(grids), TO_TOKENS=to_tokens, C=channels,
                PT=pt, PH=ph, PW=pw, BLOCK_N=config.block_n, BLOCK_R=config.block_r, BLOCK_C=config.block_c,
                BLOCK_W=next_power_of_2(pw), num_warps=config.warps, maxnreg=128)  # ptxas' own 56 would spill
    return out
