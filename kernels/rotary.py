"""Norm of queries and keys and their rotation in one pass, forward and backward.

N tokens, H heads of q and HK of k, E head dim, P rotated pairs of a head. A program has all heads of a token (or of a few
narrow ones) in registers, so that each number is read and written once, and the forward takes k after q with the
same cosines and sines. Everything is computed in float32.

A tile (BLOCK_N, BLOCK_H, E) is held as two, the first and the second number of each pair: pairs (2i, 2i + 1) are loaded side
by side and parted in registers, pairs (i, i + P) are two loads. What is not rotated is paired likewise, with angle 0.

Angles are coords times frequencies in float32, as in the reference. Fixed frequencies are a table (3, P) that is 0 for the
axes that are not the pair's own: learned ones have the same form, (3, P) or (3, H, P).

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

from .launch import contiguous, multiprocessors, on, registers, rows_dense
from .rotary_config import BackwardConfig, ForwardConfig


# ------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _columns(E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where the first and the second number of each pair stand in a head (1, 1, BLOCK_P), and whether they are there."""
    pair = tl.arange(0, BLOCK_P)[None, None, :]
    if PAIRING == "interleaved":
        first, second = 2 * pair, 2 * pair + 1
        return first, second, first < E, second < E
    elif 2 * P == E:
        return pair, pair + P, pair < P, pair < P
    else:
        REST: tl.constexpr = (E - 2 * P + 1) // 2  # pairs of what is not rotated, its halves again side by side
        second = tl.where(pair < P, pair + P, pair + P + REST)
        return tl.where(pair < P, pair, pair + P), second, pair < P + REST, second < E


@triton.jit
def _load_pairs(pointer, mask, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """The pairs of the heads that ``pointer`` (N, H, 1) points to, in float32; 0 where ``mask`` is off and beyond E."""
    if PAIRING == "interleaved":
        # 16 bytes a thread, where two loads would have strides
        column = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        x_NHE = tl.load(pointer + column, mask=mask & (column < E), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x_NHE, (x_NHE.shape[0], x_NHE.shape[1], BLOCK_P, 2)))
    else:
        first, second, has_first, has_second = _columns(E, P, PAIRING, BLOCK_P)
        a = tl.load(pointer + first, mask=mask & has_first, other=0.0).to(tl.float32)
        return a, tl.load(pointer + second, mask=mask & has_second, other=0.0).to(tl.float32)


@triton.jit
def _store_pairs(pointer, a, b, mask, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    if PAIRING == "interleaved":
        column = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        x_NHE = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * BLOCK_P))
        tl.store(pointer + column, x_NHE, mask=mask & (column < E))
    else:
        first, second, has_first, has_second = _columns(E, P, PAIRING, BLOCK_P)
        tl.store(pointer + first, a, mask=mask & has_first)
        tl.store(pointer + second, b, mask=mask & has_second)


@triton.jit
def _load_affine(vector, head, H: tl.constexpr, NORM: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PAIRING: tl.constexpr,
                 BLOCK_P: tl.constexpr):
    """The pairs of a weight or bias: of each head, or one head's for all."""
    if NORM == "rms_all":
        return _load_pairs(vector + head * E, head < H, E, P, PAIRING, BLOCK_P)
    else:
        return _load_pairs(vector + head * 0, head >= 0, E, P, PAIRING, BLOCK_P)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine to float32's rounding, for any angle whose own rounding leaves them a meaning.

    The angle is brought to [-pi/4, pi/4] by pi/2 in three parts (Cody and Waite). The first two have 8 and 11 bits: up to
    12,000 rad their products are exact, with a fused multiply-add and, as in the interpreter, without. tl.sin would be the
    fast sin.approx or, exact, keep a table of 2/pi's digits in local memory.
    """
    whole = tl.floor(angle * 0.636619772 + 0.5)
    r = angle - whole * 1.5703125 - whole * 0.0004837512969970703 - whole * 7.549790126404332e-08
    r = tl.where(tl.abs(r) <= 1.6, r, r * 0)  # from 2**24 on angles are further apart than this; NaN stays NaN
    z = r * r
    # Taylor series, whose next terms are below 2e-9
    c = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    s = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    quarter = whole - 4 * tl.floor(whole * 0.25)  # 0 to 3, as a float, which a NaN may be too
    odd = (quarter == 1) | (quarter == 3)
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _used(rows, token, tokens):
    """Whether tokens belong to a sample."""
    inside = token < tokens
    if rows is not None:
        return inside & (tl.load(rows + token, mask=inside, other=-1) >= 0)
    else:
        return inside


@triton.jit
def _frequencies(freqs, axis: tl.constexpr, head, H: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr,
                 BLOCK_P: tl.constexpr):
    """Frequencies of ``axis``, (1, H, P) or (1, 1, P); 0 for pairs that are not rotated."""
    pair = tl.arange(0, BLOCK_P)[None, None, :]
    if PER_HEAD:
        return tl.load(freqs + (axis * H + head) * P + pair, mask=(head < H) & (pair < P), other=0.0).to(tl.float32)
    else:
        return tl.load(freqs + axis * P + pair, mask=pair < P, other=0.0).to(tl.float32)


@triton.jit
def _coordinates(coords, token, used):
    """t, h and w of tokens (N, 1, 1); 0 for tokens of no sample."""
    t = tl.load(coords + 3 * token, mask=used, other=0).to(tl.float32)
    h = tl.load(coords + 3 * token + 1, mask=used, other=0).to(tl.float32)
    return t, h, tl.load(coords + 3 * token + 2, mask=used, other=0).to(tl.float32)


@triton.jit
def _rotation(t, h, w, freqs, head, H: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_P: tl.constexpr):
    """Cosines and sines (N, H, P), or (N, 1, P) for all heads."""
    angle = t * _frequencies(freqs, 0, head, H, P, PER_HEAD, BLOCK_P)
    angle += h * _frequencies(freqs, 1, head, H, P, PER_HEAD, BLOCK_P)
    angle += w * _frequencies(freqs, 2, head, H, P, PER_HEAD, BLOCK_P)
    return _cos_sin(angle)


@triton.jit
def _sum_of_row(x_NHP, NORM: tl.constexpr):
    """Sums over what is normalised together, (N, H, 1) or (N, 1, 1)."""
    sums = tl.sum(x_NHP, 2, keep_dims=True)
    if NORM == "rms_all":
        sums = tl.sum(sums, 1, keep_dims=True)
    return sums


@triton.jit
def _normalise(a, b, mask, eps, H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr,
               BLOCK_P: tl.constexpr):
    """Normed pairs, and rstd; 0 where ``mask`` is off, even if eps is 0."""
    if NORM == "layer_head":
        mean = tl.div_rn(_sum_of_row(a + b, NORM), E * 1.0)
        _, _, has_first, has_second = _columns(E, P, PAIRING, BLOCK_P)
        a, b = tl.where(mask & has_first, a - mean, 0.0), tl.where(mask & has_second, b - mean, 0.0)
    WIDTH: tl.constexpr = H * E if NORM == "rms_all" else E
    # exact root and division: the approximate ones would err by all that the error rule allows, on every number
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(_sum_of_row(a * a + b * b, NORM), WIDTH * 1.0) + eps))
    rstd = tl.where(mask, rstd, 0.0)
    return a * rstd, b * rstd, rstd


@triton.jit
def _finish(a, b, out, weight, bias, cos, sin, token, head, used, tokens, eps, H: tl.constexpr, E: tl.constexpr,
            P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """Norm and rotation of the pairs that were loaded, and their store."""
    if NORM is not None:
        a, b, _ = _normalise(a, b, used & (head < H), eps, H, E, P, NORM, PAIRING, BLOCK_P)
        if weight is not None:
            weight_a, weight_b = _load_affine(weight, head, H, NORM, E, P, PAIRING, BLOCK_P)
            a, b = a * weight_a, b * weight_b
        if bias is not None:
            bias_a, bias_b = _load_affine(bias, head, H, NORM, E, P, PAIRING, BLOCK_P)
            a, b = a + bias_a, b + bias_b
    if P > 0:
        a, b = a * cos - b * sin, a * sin + b * cos
    _store_pairs(out + (token * H + head) * E, tl.where(used, a, 0.0), tl.where(used, b, 0.0),
                 (token < tokens) & (head < H), E, P, PAIRING, BLOCK_P)


@triton.jit(do_not_specialize=["tokens", "q_token", "q_head", "k_token", "k_head"])
def forward_kernel(q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, coords, freqs, rows, tokens: tl.int64,
                   q_token: tl.int64, q_head: tl.int64, k_token: tl.int64, k_head: tl.int64, eps, H: tl.constexpr,
                   HK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr,
                   PER_HEAD: tl.constexpr, Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Program p: tokens p * BLOCK_N .. of q and, where there is one, of k. Strides of tokens and heads are in units."""
    token = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    used = _used(rows, token, tokens)  # of a token of no sample nothing is read
    head = tl.arange(0, BLOCK_H)[None, :, None]
    key_head = tl.arange(0, BLOCK_HK)[None, :, None]
    a, b = _load_pairs(q + (token * q_token + head * q_head) * Q_UNIT, used & (head < H), E, P, PAIRING, BLOCK_P)
    if k is not None:  # on its way while q is worked on
        c, d = _load_pairs(k + (token * k_token + key_head * k_head) * K_UNIT, used & (key_head < HK), E, P, PAIRING,
                           BLOCK_P)
    cos, sin = 1.0, 0.0
    if P > 0:
        at_t, at_h, at_w = _coordinates(coords, token, used)
        cos, sin = _rotation(at_t, at_h, at_w, freqs, head, H, P, PER_HEAD, BLOCK_P)
    _finish(a, b, q_out, q_weight, q_bias, cos, sin, token, head, used, tokens, eps, H, E, P, NORM, PAIRING, BLOCK_P)
    if k is not None:
        _finish(c, d, k_out, k_weight, k_bias, cos, sin, token, key_head, used, tokens, eps, HK, E, P, NORM, PAIRING,
                BLOCK_P)


@triton.jit
def _store_sums(sums, a, b, head, H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
                PAIRING: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program's sums of a weight's or bias's gradient, of each head or of all."""
    a, b = tl.sum(a, 0, keep_dims=True), tl.sum(b, 0, keep_dims=True)
    if NORM == "rms_all":
        _store_pairs(sums + head * E, a, b, head < H, E, P, PAIRING, BLOCK_P)
    else:
        a, b = tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True)
        one = tl.zeros([1, 1, 1], tl.int32)
        _store_pairs(sums + one, a, b, one == 0, E, P, PAIRING, BLOCK_P)


@triton.jit
def _walk(d_out, x, dx, weight, bias, coords, freqs, rows, weight_sums, bias_sums, freq_sums, tokens, run, d_out_token,
          d_out_head, x_token, x_head, eps, SUMS: tl.constexpr, D_OUT_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
          H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, PAIRING: tl.constexpr,
          PER_HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """dx of the program's run of tokens, and its sums of the gradients of weight, bias and freqs."""
    program = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[None, :, None]
    zeros = tl.zeros([BLOCK_N, BLOCK_H, BLOCK_P], tl.float32)
    weight_a, weight_b, bias_a, bias_b = zeros, zeros, zeros, zeros
    angle_zeros = tl.zeros([BLOCK_N, BLOCK_H if PER_HEAD else 1, BLOCK_P], tl.float32)
    sum_t, sum_h, sum_w = angle_zeros, angle_zeros, angle_zeros

    for first in range(program * run, tl.minimum((program + 1) * run, tokens), BLOCK_N):
        token = (first + tl.arange(0, BLOCK_N))[:, None, None]
        used = _used(rows, token, tokens)
        mask = used & (head < H)
        ga, gb = _load_pairs(d_out + (token * d_out_token + head * d_out_head) * D_OUT_UNIT, mask, E, P, PAIRING, BLOCK_P)
        if x is not None:
            a, b = _load_pairs(x + (token * x_token + head * x_head) * X_UNIT, mask, E, P, PAIRING, BLOCK_P)
        if P > 0:
            t, h, w = _coordinates(coords, token, used)
            cos, sin = _rotation(t, h, w, freqs, head, H, P, PER_HEAD, BLOCK_P)
            ga, gb = ga * cos + gb * sin, gb * cos - ga * sin
        if NORM is not None:
            a, b, rstd = _normalise(a, b, mask, eps, H, E, P, NORM, PAIRING, BLOCK_P)
        if weight is not None:
            weights_a, weights_b = _load_affine(weight, head, H, NORM, E, P, PAIRING, BLOCK_P)
        if freq_sums is not None:
            turned_a, turned_b = a, b
            if weight is not None:
                turned_a, turned_b = a * weights_a, b * weights_b
            if bias is not None:
                biases_a, biases_b = _load_affine(bias, head, H, NORM, E, P, PAIRING, BLOCK_P)
                turned_a, turned_b = turned_a + biases_a, turned_b + biases_b
            d_angle = turned_a * gb - turned_b * ga  # the same before the turn as after it
            if not PER_HEAD:
                d_angle = tl.sum(d_angle, 1, keep_dims=True)
            sum_t += t * d_angle
            sum_h += h * d_angle
            sum_w += w * d_angle
        if weight_sums is not None:
            weight_a += ga * a
            weight_b += gb * b
        if bias_sums is not None:
            bias_a += ga
            bias_b += gb
        if dx is not None:
            if weight is not None:
                ga, gb = ga * weights_a, gb * weights_b
            if NORM is not None:
                WIDTH: tl.constexpr = H * E if NORM == "rms_all" else E
                along = _sum_of_row(ga * a + gb * b, NORM) / WIDTH
                mean = _sum_of_row(ga + gb, NORM) / WIDTH if NORM == "layer_head" else 0.0
                ga, gb = (ga - a * along - mean) * rstd, (gb - b * along - mean) * rstd
            # of a token of no sample nothing was read, and its gradients are 0
            _store_pairs(dx + (token * H + head) * E, ga, gb, (token < tokens) & (head < H), E, P, PAIRING, BLOCK_P)

    if weight_sums is not None:
        _store_sums(weight_sums + program * SUMS, weight_a, weight_b, head, H, E, P, NORM, PAIRING, BLOCK_P)
    if bias_sums is not None:
        _store_sums(bias_sums + program * SUMS, bias_a, bias_b, head, H, E, P, NORM, PAIRING, BLOCK_P)
    if freq_sums is not None:
        pair = tl.arange(0, BLOCK_P)[None, None, :]
        HEADS: tl.constexpr = H if PER_HEAD else 1
        at = freq_sums + program * SUMS + (head * P if PER_HEAD else 0) + pair
        there = (pair < P) & (head < H) if PER_HEAD else pair < P
        tl.store(at, tl.sum(sum_t, 0, keep_dims=True), mask=there)
        tl.store(at + HEADS * P, tl.sum(sum_h, 0, keep_dims=True), mask=there)
        tl.store(at + 2 * HEADS * P, tl.sum(sum_w, 0, keep_dims=True), mask=there)


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
    """Programs (p, 0) of q and (p, 1) of k: gradients at tokens p * run .., and sums in row p, SUMS numbers, of a workspace.

    What is None is not there or not wanted. One program for both would share cosines, and with twice the sums take 55 to
    75 registers more, which is half of the programs that a multiprocessor can hold.
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
    """``tensor`` (N, H, E), the strides of its tokens and heads, and their unit; a copy if a head has its numbers apart.

    The unit tells the compiler what the strides are multiples of, and loads can be wide; the strides themselves, which may
    hold a length, are no constants.
    """
    if tensor is None:
        return None, 0, 0, 1
    tensor = rows_dense(tensor)
    token, head = (tensor.stride(axis) if tensor.shape[axis] != 1 else 0 for axis in (0, 1))
    unit = math.gcd(token, head, tensor.shape[2], 16)
    return tensor, token // unit, head // unit, unit


def _constants(heads, key_heads, head_dim, coords, freqs, norm, pairing, config):
    rotated = coords is not None
    block = lambda count: triton.next_power_of_2(max(count, 1))
    return dict(H=heads, HK=key_heads, E=head_dim, P=freqs.shape[-1] if rotated else 0, NORM=norm,
                PAIRING=pairing if rotated else "interleaved", PER_HEAD=rotated and freqs.dim() == 3, BLOCK_N=config.tokens,
                BLOCK_H=block(heads), BLOCK_HK=block(key_heads), BLOCK_P=block((head_dim + 1) // 2), num_warps=config.warps)


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
        constants = _constants(heads, 0 if k is None else k.shape[1], head_dim, coords, freqs, norm, pairing, config)
        inputs = contiguous(q_weight, k_weight, q_bias, k_bias, coords, freqs, rows)
        with on(q.device):
            forward_kernel[(triton.cdiv(tokens, config.tokens),)](
                q, k, q_out, k_out, *inputs, tokens, *q_strides, *k_strides, eps, Q_UNIT=q_unit, K_UNIT=k_unit, **constants)
    return q_out, k_out


def backward(d_q_out, d_k_out, q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, *, norm, pairing, eps, wanted,
             config: BackwardConfig):
    """Gradients of (q, k, q_weight, k_weight, q_bias, k_bias, freqs), None for those that ``wanted``, 7 bools, leaves out.

    d_q_out, d_k_out: gradients of forward's outputs, copied only if a head's numbers are not side by side; None: all 0, and
    nothing is wanted for that output alone. q, k: forward's inputs; None where there is no norm and freqs want no gradient.

    Workspace, float32: (multiprocessors x config.programs at most, and half of that for q with k; numbers of the weights and
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

    blocks = triton.cdiv(tokens, config.tokens) if d_q_out.numel() else 0
    run = max(triton.cdiv(sides * blocks, multiprocessors(device) * config.programs), 1) * config.tokens
    programs = triton.cdiv(tokens, run) if blocks else 0
    summed = [tensor if want else None for tensor, want in zip(
        (q_weight, k_weight, q_bias, k_bias, freqs, freqs), (*wanted[2:], want_freqs and for_k), strict=True)]
    sizes = [0 if tensor is None else tensor.numel() for tensor in summed]
    sums = torch.empty((programs, sum(sizes)), dtype=torch.float32, device=device)

    if programs:
        constants = _constants(heads, d_k_out.shape[1] if for_k else 0, head_dim, coords, freqs, norm, pairing, config)
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
