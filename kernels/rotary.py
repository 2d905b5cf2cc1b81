"""Norm of queries and keys and their rotation in one pass, forward and backward.

N tokens, H heads of q and HK of k, E head dim, P rotated pairs of a head. A program has all heads of a token (or of a few
narrow ones) in registers, so that each element is read and written once, and the forward takes k after q with the
same cosines and sines. Everything is computed in float32.

The backward takes q and k as they are and computes the norm's statistics anew, which costs no bytes.
Gradients of weights, biases and frequencies: a program walks over a run of tokens and keeps its sums in registers; they go
to its own row of a workspace, whose rows are then added up. No atomics: two runs give the same bits.
"""

import functools
import math
from functools import partial

import torch
import triton
import triton.language as tl

from .integers import cdiv
from .launch import contiguous, num_sms, on, registers, rows_dense
from .rotary_config import BackwardConfig, ForwardConfig, head_block, pair_block
from .rotary_tiles import (
    add_at,
    affine_heads,
    coordinates,
    heads,
    is_valid,
    load_affine,
    load_heads,
    normalise,
    pairs,
    parts_of,
    rotation,
    store_pairs,
    store_parts,
    sum_of_all,
    sum_of_row,
    sum_parts,
    sum_products,
    through_norm,
    turn,
    turn_back,
    zero_heads,
)
from .rows import add_rows, multiply_rows, scale_row


# ------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _epilogue(firsts, seconds, out, weight, bias, cos, sin, token, valid, tokens, eps, H: tl.constexpr, E: tl.constexpr,
            P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
            BLOCK_P: tl.constexpr):
    """Norm and rotation of the pairs that were loaded, and their store."""
    PIECES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    PARTS: tl.constexpr = parts_of(E, BLOCK_P)
    AFFINE: tl.constexpr = PIECES if NORM == "rms_all" else 1  # pieces of weight and bias
    TURNS: tl.constexpr = PIECES if PER_HEAD else 1  # pieces of the angles
    # 0 for a token of no sample, whose output is 0 then: a masked load costs less than to mask the output
    if weight is not None:
        weight_a, weight_b = affine_heads(weight, valid, H, NORM, E, P, PAIRING, BLOCK_H, BLOCK_P)
    if bias is not None:
        bias_a, bias_b = affine_heads(bias, valid, H, NORM, E, P, PAIRING, BLOCK_H, BLOCK_P)
    squares = 0.0
    if NORM == "rms_all":
        squares = sum_of_all(firsts, seconds, firsts, seconds, PIECES, PARTS)
    for piece in tl.static_range(PIECES):
        a, b, head = firsts[piece], seconds[piece], heads(piece, BLOCK_H)
        if NORM is not None:
            a, b, _ = normalise(a, b, squares, valid & (head < H), eps, H, E, P, NORM, PAIRING, BLOCK_P)
        if weight is not None:
            a, b = multiply_rows(a, weight_a[piece % AFFINE], PARTS), multiply_rows(b, weight_b[piece % AFFINE], PARTS)
        if bias is not None:
            a, b = add_rows(a, bias_a[piece % AFFINE], PARTS), add_rows(b, bias_b[piece % AFFINE], PARTS)
        if P > 0:
            a, b = turn(a, b, cos[piece % TURNS], sin[piece % TURNS], PARTS)
        store_parts(out + (token * H + head) * E, a, b, (token < tokens) & (head < H), E, P, PAIRING, BLOCK_P)


@triton.jit(do_not_specialize=["tokens", "q_token", "q_head", "k_token", "k_head"])
def forward_kernel(q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, coords, freqs, rows, tokens: tl.int64,
                   q_token: tl.int64, q_head: tl.int64, k_token: tl.int64, k_head: tl.int64, eps, H: tl.constexpr,
                   HK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr,
                   PER_HEAD: tl.constexpr, Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Program p: tokens p * BLOCK_N .. of q and, where there is one, of k. Strides of tokens and heads are in units."""
    token = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    valid = is_valid(rows, token, tokens)  # of a token of no sample nothing is read
    a, b = load_heads(q + token * q_token * Q_UNIT, q_head * Q_UNIT, valid, H, E, P, PAIRING, BLOCK_H, BLOCK_P)
    if k is not None:  # on its way while q is worked on
        c, d = load_heads(k + token * k_token * K_UNIT, k_head * K_UNIT, valid, HK, E, P, PAIRING, BLOCK_HK, BLOCK_P)
    cos, sin = (), ()
    if P > 0:
        at_t, at_h, at_w = coordinates(coords, token, valid)
        for piece in tl.static_range((H + BLOCK_H - 1) // BLOCK_H if PER_HEAD else 1):
            c_, s_ = rotation(at_t, at_h, at_w, valid, freqs, heads(piece, BLOCK_H), E, H, P, PER_HEAD, BLOCK_P)
            cos, sin = cos + (c_,), sin + (s_,)
    _epilogue(a, b, q_out, q_weight, q_bias, cos, sin, token, valid, tokens, eps, H, E, P, NORM, PAIRING, PER_HEAD, BLOCK_H,
            BLOCK_P)
    if k is not None:
        _epilogue(c, d, k_out, k_weight, k_bias, cos, sin, token, valid, tokens, eps, HK, E, P, NORM, PAIRING, PER_HEAD,
                BLOCK_HK, BLOCK_P)


@triton.jit
def _store_sums(sums, a, b, head, H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
                PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program's sums of a weight's or bias's gradient, of each head or of all."""
    for part in tl.static_range(parts_of(E, BLOCK_P)):
        of_a, of_b = tl.sum(a[part], 0, keep_dims=True), tl.sum(b[part], 0, keep_dims=True)
        if NORM == "rms_all":
            store_pairs(sums + head * E, of_a, of_b, head < H, part, E, P, PAIRING, BLOCK_P)
        else:
            of_a, of_b = tl.sum(of_a, 1, keep_dims=True), tl.sum(of_b, 1, keep_dims=True)
            one = tl.zeros([1, 1, 1], tl.int32)
            store_pairs(sums + one, of_a, of_b, one == 0, part, E, P, PAIRING, BLOCK_P)


@triton.jit
def _walk(d_out, x, dx, weight, bias, coords, freqs, rows, weight_sums, bias_sums, freq_sums, tokens, run, d_out_token,
          d_out_head, x_token, x_head, eps, SUMS: tl.constexpr, D_OUT_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
          H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr,
          PER_HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """dx of the program's run of tokens, and its sums of the gradients of weight, bias and freqs."""
    PIECES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    AFFINE: tl.constexpr = PIECES if NORM == "rms_all" else 1  # pieces of weight and bias
    TURNS: tl.constexpr = PIECES if PER_HEAD else 1  # pieces of the angles
    PARTS: tl.constexpr = parts_of(E, BLOCK_P)
    WIDTH: tl.constexpr = H * E if NORM == "rms_all" else E
    program = tl.program_id(0).to(tl.int64)
    zeros = zero_heads(AFFINE, PARTS, BLOCK_N, BLOCK_H, BLOCK_P)
    weight_a, weight_b, bias_a, bias_b = zeros, zeros, zeros, zeros
    angle_zeros = zero_heads(TURNS, PARTS, BLOCK_N, BLOCK_H if PER_HEAD else 1, BLOCK_P)
    sum_t, sum_h, sum_w = angle_zeros, angle_zeros, angle_zeros

    for first in range(program * run, tl.minimum((program + 1) * run, tokens), BLOCK_N):
        token = (first + tl.arange(0, BLOCK_N))[:, None, None]
        valid = is_valid(rows, token, tokens)
        ga, gb = load_heads(d_out + token * d_out_token * D_OUT_UNIT, d_out_head * D_OUT_UNIT, valid, H, E, P, PAIRING,
                            BLOCK_H, BLOCK_P)
        if x is not None:
            a, b = load_heads(x + token * x_token * X_UNIT, x_head * X_UNIT, valid, H, E, P, PAIRING, BLOCK_H, BLOCK_P)
            squares = 0.0
            if NORM == "rms_all":
                squares = sum_of_all(a, b, a, b, PIECES, PARTS)
        if P > 0:
            t, h, w = coordinates(coords, token, valid)
            if not PER_HEAD:
                cos, sin = rotation(t, h, w, None, freqs, token, E, H, P, PER_HEAD, BLOCK_P)
        if weight is not None:
            weights_a, weights_b = affine_heads(weight, None, H, NORM, E, P, PAIRING, BLOCK_H, BLOCK_P)
        normed_a, normed_b, grads_a, grads_b, rstds = (), (), (), (), ()
        for piece in tl.static_range(PIECES):
            head = heads(piece, BLOCK_H)
            g, f = ga[piece], gb[piece]
            if P > 0:
                if PER_HEAD:
                    cos, sin = rotation(t, h, w, None, freqs, head, E, H, P, PER_HEAD, BLOCK_P)
                g, f = turn_back(g, f, cos, sin, PARTS)
            if x is not None:
                c, d = a[piece], b[piece]
                if NORM is not None:
                    c, d, rstd = normalise(c, d, squares, valid & (head < H), eps, H, E, P, NORM, PAIRING, BLOCK_P)
                    rstds = rstds + (rstd,)
                normed_a, normed_b = normed_a + (c,), normed_b + (d,)
            if freq_sums is not None:
                turned_a, turned_b = c, d
                if weight is not None:
                    turned_a = multiply_rows(c, weights_a[piece % AFFINE], PARTS)
                    turned_b = multiply_rows(d, weights_b[piece % AFFINE], PARTS)
                if bias is not None:
                    biases_a, biases_b = load_affine(bias, None, head, H, NORM, E, P, PAIRING, BLOCK_P)
                    turned_a, turned_b = add_rows(turned_a, biases_a, PARTS), add_rows(turned_b, biases_b, PARTS)
                d_angles = ()
                for part in tl.static_range(PARTS):
                    d_angle = turned_a[part] * f[part] - turned_b[part] * g[part]  # the same before the turn as after it
                    if not PER_HEAD:
                        d_angle = tl.sum(d_angle, 1, keep_dims=True)
                    d_angles = d_angles + (d_angle,)
                sum_t = add_at(sum_t, scale_row(d_angles, t, PARTS), piece % TURNS, TURNS, PARTS)
                sum_h = add_at(sum_h, scale_row(d_angles, h, PARTS), piece % TURNS, TURNS, PARTS)
                sum_w = add_at(sum_w, scale_row(d_angles, w, PARTS), piece % TURNS, TURNS, PARTS)
            if weight_sums is not None:
                weight_a = add_at(weight_a, multiply_rows(g, c, PARTS), piece % AFFINE, AFFINE, PARTS)
                weight_b = add_at(weight_b, multiply_rows(f, d, PARTS), piece % AFFINE, AFFINE, PARTS)
            if bias_sums is not None:
                bias_a = add_at(bias_a, g, piece % AFFINE, AFFINE, PARTS)
                bias_b = add_at(bias_b, f, piece % AFFINE, AFFINE, PARTS)
            if weight is not None:
                g = multiply_rows(g, weights_a[piece % AFFINE], PARTS)
                f = multiply_rows(f, weights_b[piece % AFFINE], PARTS)
            grads_a, grads_b = grads_a + (g,), grads_b + (f,)
        if dx is not None:
            if NORM == "rms_all":
                along = sum_of_all(grads_a, grads_b, normed_a, normed_b, PIECES, PARTS)
            for piece in tl.static_range(PIECES):
                g, f, head = grads_a[piece], grads_b[piece], heads(piece, BLOCK_H)
                if NORM is not None:
                    c, d = normed_a[piece], normed_b[piece]
                    if NORM != "rms_all":
                        along = sum_of_row(sum_products(g, f, c, d, PARTS), NORM)
                    mean = 0.0
                    if NORM == "layer_head":
                        mean = sum_of_row(sum_parts(g, f, PARTS), NORM) * (1.0 / WIDTH)
                    g = through_norm(g, c, along * (1.0 / WIDTH), mean, rstds[piece], PARTS)
                    f = through_norm(f, d, along * (1.0 / WIDTH), mean, rstds[piece], PARTS)
                # of a token of no sample nothing was read, and its gradients are 0
                store_parts(dx + (token * H + head) * E, g, f, (token < tokens) & (head < H), E, P, PAIRING, BLOCK_P)

    for piece in tl.static_range(AFFINE):
        head = heads(piece, BLOCK_H)
        if weight_sums is not None:
            _store_sums(weight_sums + program * SUMS, weight_a[piece], weight_b[piece], head, H, E, P, NORM, PAIRING,
                        BLOCK_P)
        if bias_sums is not None:
            _store_sums(bias_sums + program * SUMS, bias_a[piece], bias_b[piece], head, H, E, P, NORM, PAIRING, BLOCK_P)
    if freq_sums is not None:
        HEADS: tl.constexpr = H if PER_HEAD else 1
        for piece in tl.static_range(TURNS):
            head = heads(piece, BLOCK_H)
            for part in tl.static_range(PARTS):
                pair = pairs(part, BLOCK_P)
                at = freq_sums + program * SUMS + (head * P if PER_HEAD else 0) + pair
                mask = (pair < P) & (head < H) if PER_HEAD else pair < P
                tl.store(at, tl.sum(sum_t[piece][part], 0, keep_dims=True), mask=mask)
                tl.store(at + HEADS * P, tl.sum(sum_h[piece][part], 0, keep_dims=True), mask=mask)
                tl.store(at + 2 * HEADS * P, tl.sum(sum_w[piece][part], 0, keep_dims=True), mask=mask)


@triton.jit(do_not_specialize=["tokens", "run", "d_q_out_token", "d_q_out_head", "d_k_out_token", "d_k_out_head", "q_token",
                               "q_head", "k_token", "k_head"])
def backward_kernel(d_q_out, d_k_out, q, k, d_q, d_k, q_weight, k_weight, q_bias, k_bias, coords, freqs, rows, q_weight_sums,
                    k_weight_sums, q_bias_sums, k_bias_sums, q_freq_sums, k_freq_sums, tokens: tl.int64, run: tl.int64,
                    d_q_out_token: tl.int64, d_q_out_head: tl.int64, d_k_out_token: tl.int64, d_k_out_head: tl.int64,
                    q_token: tl.int64, q_head: tl.int64, k_token: tl.int64, k_head: tl.int64, eps, SUMS: tl.constexpr,
                    D_Q_OUT_UNIT: tl.constexpr, D_K_OUT_UNIT: tl.constexpr, Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
                    H: tl.constexpr, HK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
                    PAIRING: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
                    BLOCK_HK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Programs (p, 0) of q and (p, 1) of k: gradients at tokens p * run .., and sums in row p, SUMS elements, of a buffer.

    What is None is not there or not wanted. One program for both would share cosines, and with twice the sums take 55 to
    75 registers more, which is half of the programs that an SM can hold.
    """
    if tl.program_id(1) == 0:
        _walk(d_q_out, q, d_q, q_weight, q_bias, coords, freqs, rows, q_weight_sums, q_bias_sums, q_freq_sums, tokens,
              run, d_q_out_token, d_q_out_head, q_token, q_head, eps, SUMS, D_Q_OUT_UNIT, Q_UNIT, H, E, P, NORM, PAIRING,
              PER_HEAD, BLOCK_N, BLOCK_H, BLOCK_P)
    else:
        if d_k_out is not None:
            _walk(d_k_out, k, d_k, k_weight, k_bias, coords, freqs, rows, k_weight_sums, k_bias_sums, k_freq_sums, tokens,
                  run, d_k_out_token, d_k_out_head, k_token, k_head, eps, SUMS, D_K_OUT_UNIT, K_UNIT, HK, E, P, NORM,
                  PAIRING, PER_HEAD, BLOCK_N, BLOCK_HK, BLOCK_P)


# ----------------------------------------------------------------------------------------------------------- launches
@functools.cache
def frequencies(axes: tuple[int, ...], theta: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Fixed frequencies (3, P) float32, rounded once; 0 for the axes that are not the pair's own.

    Made on the first call with these axes on a device, which waits for its copy; kept from then on.
    """
    blocks = [base ** (-2.0 * torch.arange(size // 2, dtype=torch.float64, device="cpu") / max(size, 1))[None]
              for size, base in zip(axes, theta, strict=True)]
    return torch.block_diag(*blocks).to(torch.float32).to(device)


def _strided(tensor):
    """``tensor`` (N, H, E), the strides of its tokens and heads, and their unit; a copy if a head has its elements apart.

    The unit tells the compiler what the strides are multiples of, and loads can be wide; the strides themselves, which may
    hold a length, are no constants.
    """
    if tensor is None:
        return None, 0, 0, 1
    tensor = rows_dense(tensor)
    (tokens, heads, head_dim), (token, head, _) = tensor.shape, tensor.stride()
    token, head = token if tokens != 1 else 0, head if heads != 1 else 0
    unit = math.gcd(token, head, head_dim, 16)
    return tensor, token // unit, head // unit, unit


@functools.cache
def _constants(heads, key_heads, head_dim, axes, norm, pairing, config):
    """``axes``: the shape of freqs; () where nothing is rotated."""
    pairing = pairing if axes else "interleaved"
    return dict(H=heads, HK=key_heads, E=head_dim, P=axes[-1] if axes else 0, NORM=norm, PAIRING=pairing,
                PER_HEAD=len(axes) == 3, BLOCK_N=config.tokens,
                BLOCK_H=head_block(heads, head_dim, pairing, config.warps),
                BLOCK_HK=head_block(key_heads, head_dim, pairing, config.warps), BLOCK_P=pair_block(head_dim),
                num_warps=config.warps)


def _together(*tensors) -> bool:
    """Whether one launch can take what is there: as many tokens in all, and none empty."""
    there = [tensor for tensor in tensors if tensor is not None]
    return len({tensor.shape[0] for tensor in there}) == 1 and all(tensor.numel() for tensor in there)


def forward(q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, *, norm, pairing, eps, config: ForwardConfig):
    """``(q_out, k_out)``, contiguous; k_out is None where k is.

    q (N, H, E), k (N, HK, E) or None, any strides between tokens and heads; coords (N, 3) or None, then k may have another
    length; freqs (3, P) or (3, H, P), also for fixed axes (``frequencies``); weights and biases (E,) or, for "rms_all",
    (H * E,); rows (N,) int32 or int64 or None; norm "rms_head", "rms_all", "layer_head" or None.
    """
    if k is not None and not _together(q, k):
        one = partial(forward, norm=norm, pairing=pairing, eps=eps, config=config)
        return (one(q, None, coords, q_weight, None, q_bias, None, freqs, rows)[0],
                one(k, None, coords, k_weight, None, k_bias, None, freqs, rows)[0])
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = None if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel():
        tokens, heads, head_dim = q.shape
        (q, *q_strides, q_unit), (k, *k_strides, k_unit) = map(_strided, (q, k))
        axes = () if coords is None else freqs.shape
        constants = _constants(heads, 0 if k is None else k.shape[1], head_dim, axes, norm, pairing, config)
        inputs = contiguous(q_weight, k_weight, q_bias, k_bias, coords, freqs, rows)
        with on(q.device):
            forward_kernel[(cdiv(tokens, config.tokens),)](
                q, k, q_out, k_out, *inputs, tokens, *q_strides, *k_strides, eps, Q_UNIT=q_unit, K_UNIT=k_unit, **constants)
    return q_out, k_out


def backward(d_q_out, d_k_out, q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, *, norm, pairing, eps, wanted,
             config: BackwardConfig):
    """Gradients of (q, k, q_weight, k_weight, q_bias, k_bias, freqs), None for those that ``wanted``, 7 bools, leaves out.

    d_q_out, d_k_out: gradients of forward's outputs, copied only if a head's elements are not side by side; None: all 0, and
    nothing is wanted for that output alone. q, k: forward's inputs; None where there is no norm and freqs want no gradient.

    Workspace, float32: (SMs x config.programs at most, and half of that for q with k; elements of the weights and
    biases that are wanted, and of freqs once for q and once for k).
    """
    want_q, want_k, want_q_weight, want_k_weight, want_q_bias, want_k_bias, want_freqs = wanted
    for_q = d_q_out is not None and any((want_q, want_q_weight, want_q_bias, want_freqs))
    for_k = d_k_out is not None and any((want_k, want_k_weight, want_k_bias, want_freqs))
    if for_k and not (for_q and _together(d_q_out, d_k_out)):
        one = partial(backward, norm=norm, pairing=pairing, eps=eps, config=config)
        of_k = one(d_k_out, None, k, None, coords, k_weight, None, k_bias, None, freqs, rows,
                   wanted=(want_k, False, want_k_weight, False, want_k_bias, False, want_freqs))
        of_q = [None] * 7
        if for_q:
            of_q = one(d_q_out, None, q, None, coords, q_weight, None, q_bias, None, freqs, rows,
                       wanted=(want_q, False, want_q_weight, False, want_q_bias, False, want_freqs))
        d_freqs = of_k[6] if of_q[6] is None else of_q[6] + of_k[6]  # a sum only where one of them is empty
        return of_q[0], of_k[0], of_q[2], of_k[2], of_q[4], of_k[4], d_freqs

    tokens, heads, head_dim = d_q_out.shape
    device, sides = d_q_out.device, 2 if for_k else 1
    empty = lambda like, want: torch.empty(like.shape, dtype=like.dtype, device=device) if want else None
    d_q, d_k = empty(d_q_out, want_q), empty(d_k_out, want_k)

    blocks = cdiv(tokens, config.tokens) if d_q_out.numel() else 0
    run = max(cdiv(sides * blocks, num_sms(device) * config.programs), 1) * config.tokens
    programs = cdiv(tokens, run) if blocks else 0
    summed = [tensor if want else None for tensor, want in zip(
        (q_weight, k_weight, q_bias, k_bias, freqs, freqs), (*wanted[2:], want_freqs and for_k), strict=True)]
    sizes = [0 if tensor is None else tensor.numel() for tensor in summed]
    sums = torch.empty((programs, sum(sizes)), dtype=torch.float32, device=device)

    if programs:
        axes = () if coords is None else freqs.shape
        constants = _constants(heads, d_k_out.shape[1] if for_k else 0, head_dim, axes, norm, pairing, config)
        reads_x = norm is not None or want_freqs
        (d_q_out, *d_q_out_strides, d_q_out_unit), (d_k_out, *d_k_out_strides, d_k_out_unit) = map(
            _strided, (d_q_out, d_k_out if for_k else None))
        (q, *q_strides, q_unit), (k, *k_strides, k_unit) = map(
            _strided, (q if reads_x else None, k if reads_x and for_k else None))
        inputs = contiguous(q_weight, k_weight, q_bias, k_bias, coords, freqs, rows)
        parts = [part if size else None for part, size in zip(sums.split(sizes, dim=1), sizes, strict=True)]
        with on(device):
            backward_kernel[(programs, sides)](
                d_q_out, d_k_out, q, k, d_q, d_k, *inputs, *parts, tokens, run, *d_q_out_strides, *d_k_out_strides,
                *q_strides, *k_strides, eps, SUMS=sum(sizes), D_Q_OUT_UNIT=d_q_out_unit, D_K_OUT_UNIT=d_k_out_unit,
                Q_UNIT=q_unit, K_UNIT=k_unit, maxnreg=registers(config.warps, config.programs), **constants)
    totals = sums.sum(dim=0).split(sizes) if sum(sizes) else [None] * 6
    if want_freqs and for_k:
        totals = (*totals[:4], totals[4] + totals[5], None)
    # copies: what an op returns may not share memory
    return d_q, d_k, *(None if tensor is None else total.view(tensor.shape).to(tensor.dtype, copy=True)
                       for tensor, total in zip(summed[:5], totals[:5], strict=True))
