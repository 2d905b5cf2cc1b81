"""Norm and activation of video features, forward and backward, on pixels of C contiguous channels.

B samples, C channels, T frames, H height, W width, P pixels, G groups. All arithmetic is in float32.

rms: a program holds pixels with all their channels in registers, so that each element is loaded and stored once.

group: the statistics need the whole sample before the first output, so x is loaded twice. Programs loop over runs of pixels
with a Welford accumulator (Technometrics 4(3), 1962) per tile element, which does not cancel however large the mean is; a
reduction kernel merges them. The backward makes the same two passes: sums over the sample, then the gradient.

Partial sums over pixels (group statistics, gradients of weight and bias) go to one workspace row per program and are added
in order. There are no atomics: results are deterministic.
"""

import torch
import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2
from .launch import channels_last, contiguous, num_sms, on, registers
from .normalization_config import Config, tile
from .rows import (
    add_rows,
    columns_of,
    load_f32,
    load_row,
    multiply_rows,
    reciprocal,
    rstd_of,
    sigmoid,
    store_row,
    sum_of_products,
    zero_row,
)


# ------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _broadcast_groups(values, C: tl.constexpr, GROUP_C: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """One value per group, broadcast to its channels as a row."""
    out = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK_C)
        out = out + (tl.load(values + column // GROUP_C, mask=column < C, other=0.0),)
    return out


@triton.jit(do_not_specialize=["samples", "frames", "size", "cached", "kept"])
def forward_kernel(x, cache, weight, bias, stats, y, cache_out, samples: tl.int64, frames: tl.int64, size: tl.int64,
                   cached: tl.int64, kept: tl.int64, eps, C: tl.constexpr, GROUP_C: tl.constexpr, NORM: tl.constexpr,
                   ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """y of BLOCK_P pixels of one frame; a frame has ``size`` pixels.

    cache_out, if not None: the last ``kept`` of the ``cached`` frames and y's. Programs past those of y copy its frames that
    come from the cache. ``stats`` (2, samples, G) for group norm: mean and rstd.
    """
    GROUPS: tl.constexpr = C // GROUP_C
    tiles = tl.cdiv(size, BLOCK_P)
    program = tl.program_id(0).to(tl.int64)
    index = program // tiles  # index of the frame among those of all samples
    pixel = (program % tiles * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    offset = pixel * C
    in_bounds = pixel < size

    if cache is not None and index >= samples * frames:
        index -= samples * frames
        copied = kept - frames
        sample, frame = index // copied, index % copied
        source = cache + (sample * cached + cached - copied + frame) * size * C
        old = load_row(source + offset, in_bounds, C, BLOCK_C, PIECES)
        store_row(cache_out + (sample * kept + frame) * size * C + offset, old, in_bounds, C, BLOCK_C, PIECES)
    else:
        sample = index // frames
        frame = index % frames - frames + kept  # index in cache_out
        x_PC = load_row(x + index * size * C + offset, in_bounds, C, BLOCK_C, PIECES)
        if weight is not None:  # in flight during the pixels' reduction
            weight_C = load_row(weight, True, C, BLOCK_C, PIECES)
        if bias is not None:
            bias_C = load_row(bias, True, C, BLOCK_C, PIECES)
        if NORM == "rms":
            rstd = rstd_of(sum_of_products(x_PC, x_PC, PIECES) * (1.0 / C), eps)
        else:
            mean_C = _broadcast_groups(stats + sample * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
            rstd_C = _broadcast_groups(stats + (samples + sample) * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
        for piece in tl.static_range(PIECES):
            column = columns_of(piece, BLOCK_C)
            z_PC = x_PC[piece] * rstd if NORM == "rms" else (x_PC[piece] - mean_C[piece]) * rstd_C[piece]
            if weight is not None:
                z_PC *= weight_C[piece]
            if bias is not None:
                z_PC += bias_C[piece]
            if ACT == "silu":
                z_PC *= sigmoid(z_PC)
            y_PC = z_PC.to(y.dtype.element_ty)
            tl.store(y + index * size * C + offset + column, y_PC, mask=in_bounds & (column < C))
            if cache_out is not None:
                last = pixel < tl.where(frame >= 0, size, 0)
                tl.store(cache_out + (sample * kept + frame) * size * C + offset + column, y_PC, mask=last & (column < C))


@triton.jit(do_not_specialize=["size", "run", "runs"])
def stats_kernel(x, means, squares, size: tl.int64, run: tl.int64, runs: tl.int64, C: tl.constexpr, BLOCK_P: tl.constexpr,
                 BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of each channel over ``run`` pixels of one sample."""
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // runs, program % runs * run
    last = tl.minimum(first + run, size)
    columns = tl.arange(0, BLOCK_C)
    offset = columns[None, :] + sample * size * C

    mean_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count_P = tl.zeros([BLOCK_P], tl.float32)
    step = 0.0
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        in_bounds = (pixel < last)[:, None] & (columns < C)[None, :]
        step += 1.0
        inv_step = reciprocal(step)
        diff = tl.where(in_bounds, load_f32(x + pixel[:, None] * C + offset, in_bounds) - mean_PC, 0.0)
        mean_PC += diff * inv_step
        square_PC += diff * diff * (1.0 - inv_step)
        count_P += tl.where(pixel < last, 1.0, 0.0)

    count = count_P[:, None]
    mean_C = tl.div_rn(tl.sum(mean_PC * count, 0), (last - first).to(tl.float32))
    diff = mean_PC - mean_C[None, :]
    tl.store(means + program * C + columns, mean_C, mask=columns < C)
    tl.store(squares + program * C + columns, tl.sum(square_PC + count * diff * diff, 0), mask=columns < C)


@triton.jit
def _run_of_group(start, runs, sample, group, C: tl.constexpr, GROUP_C: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_G: tl.constexpr):
    """The runs, their workspace offsets (runs x channels of the group), and the mask of those that exist."""
    run = start + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_G)[None, :]
    offset = (sample * runs + run)[:, None] * C + group * GROUP_C + channel
    return run, offset, (run < runs)[:, None] & (channel < GROUP_C)


@triton.jit
def _sum(sums_RG):
    return tl.sum(tl.sum(sums_RG, 1), 0)


@triton.jit(do_not_specialize=["samples", "size", "run", "runs"])
def merge_stats_kernel(means, squares, stats, samples: tl.int64, size: tl.int64, run: tl.int64, runs: tl.int64, eps,
                       C: tl.constexpr, GROUP_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr):
    """Mean and rstd of one group of one sample, ``stats`` (2, samples, G), merged from its runs (Chan et al., 1983)."""
    GROUPS: tl.constexpr = C // GROUP_C
    program = tl.program_id(0).to(tl.int64)
    sample, group = program // GROUPS, program % GROUPS
    total = size.to(tl.float32) * GROUP_C

    sum_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for start in range(0, runs, BLOCK_R):
        index, offset, in_bounds = _run_of_group(start, runs, sample, group, C, GROUP_C, BLOCK_R, BLOCK_G)
        count = tl.minimum(size - index * run, run).to(tl.float32)[:, None]
        sum_RG += load_f32(means + offset, in_bounds) * count
    mean = tl.div_rn(_sum(sum_RG), total)

    sum_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for start in range(0, runs, BLOCK_R):
        index, offset, in_bounds = _run_of_group(start, runs, sample, group, C, GROUP_C, BLOCK_R, BLOCK_G)
        count = tl.minimum(size - index * run, run).to(tl.float32)[:, None]
        diff = tl.where(in_bounds, load_f32(means + offset, in_bounds) - mean, 0.0)
        sum_RG += load_f32(squares + offset, in_bounds) + diff * diff * count
    tl.store(stats + program, mean)
    tl.store(stats + samples * GROUPS + program, rstd_of(tl.div_rn(_sum(sum_RG), total), eps))


@triton.jit(do_not_specialize=["samples", "size", "run", "runs"])
def backward_kernel(dy, x, weight, bias, stats, means, dx, dz_sums, dzx_sums, samples: tl.int64, size: tl.int64,
                    run: tl.int64, runs: tl.int64, eps, C: tl.constexpr, GROUP_C: tl.constexpr, NORM: tl.constexpr,
                    ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """dx of ``run`` pixels of one sample, and the sums over them of dz and dz * x_hat, a workspace row per program.

    None is not requested. dz: gradient before the activation. ``means`` (2, samples, G), for dx of group norm: the means of
    the gradient of x_hat, and of that times x_hat.
    """
    GROUPS: tl.constexpr = C // GROUP_C
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // runs, program % runs * run
    last = tl.minimum(first + run, size)
    if weight is not None:
        weight_C = load_row(weight, True, C, BLOCK_C, PIECES)
    if bias is not None:
        bias_C = load_row(bias, True, C, BLOCK_C, PIECES)
    if NORM == "group":
        mean_C = _broadcast_groups(stats + sample * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
        rstd_C = _broadcast_groups(stats + (samples + sample) * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
        if dx is not None:
            mean_g_C = _broadcast_groups(means + sample * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
            mean_gx_C = _broadcast_groups(means + (samples + sample) * GROUPS, C, GROUP_C, BLOCK_C, PIECES)

    dz_PC = zero_row(BLOCK_P, BLOCK_C, PIECES)
    dzx_PC = zero_row(BLOCK_P, BLOCK_C, PIECES)
    for start in range(first, last, BLOCK_P):
        pixel = (start + tl.arange(0, BLOCK_P))[:, None]
        in_bounds = pixel < last
        offset = (sample * size + pixel) * C
        x_PC = load_row(x + offset, in_bounds, C, BLOCK_C, PIECES)
        g_PC = load_row(dy + offset, in_bounds, C, BLOCK_C, PIECES)
        if NORM == "rms":
            rstd = rstd_of(sum_of_products(x_PC, x_PC, PIECES) * (1.0 / C), eps)
            rstd = tl.where(in_bounds, rstd, 0.0)  # inf past the last pixel, if eps is 0
        normed, gradient = (), ()
        for piece in tl.static_range(PIECES):
            n_PC = x_PC[piece] * rstd if NORM == "rms" else (x_PC[piece] - mean_C[piece]) * rstd_C[piece]
            dz = g_PC[piece]
            if ACT == "silu":
                z_PC = n_PC
                if weight is not None:
                    z_PC *= weight_C[piece]
                if bias is not None:
                    z_PC += bias_C[piece]
                s_PC = sigmoid(z_PC)
                dz *= s_PC * (1.0 + z_PC * (1.0 - s_PC))
            normed, gradient = normed + (n_PC,), gradient + (dz,)
        if dz_sums is not None:
            dz_PC = add_rows(dz_PC, gradient, PIECES)
        if dzx_sums is not None:
            dzx_PC = add_rows(dzx_PC, multiply_rows(gradient, normed, PIECES), PIECES)
        if dx is not None:
            if weight is not None:
                gradient = multiply_rows(gradient, weight_C, PIECES)
            if NORM == "rms":
                mean_gx = sum_of_products(gradient, normed, PIECES) * (1.0 / C)
            for piece in tl.static_range(PIECES):
                if NORM == "rms":
                    dx_PC = (gradient[piece] - normed[piece] * mean_gx) * rstd
                else:
                    dx_PC = (gradient[piece] - (mean_g_C[piece] + normed[piece] * mean_gx_C[piece])) * rstd_C[piece]
                column = columns_of(piece, BLOCK_C)
                tl.store(dx + offset + column, dx_PC.to(dx.dtype.element_ty), mask=in_bounds & (column < C))

    for piece in tl.static_range(PIECES):
        column = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        if dz_sums is not None:
            tl.store(dz_sums + program * C + column, tl.sum(dz_PC[piece], 0), mask=column < C)
        if dzx_sums is not None:
            tl.store(dzx_sums + program * C + column, tl.sum(dzx_PC[piece], 0), mask=column < C)


@triton.jit(do_not_specialize=["samples", "size", "runs"])
def reduce_sums_kernel(dz_sums, dzx_sums, weight, means, samples: tl.int64, size: tl.int64, runs: tl.int64, C: tl.constexpr,
                       GROUP_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr):
    """``means`` (2, samples, G) of backward_kernel for one group of one sample, reduced from the sums of its runs."""
    GROUPS: tl.constexpr = C // GROUP_C
    program = tl.program_id(0).to(tl.int64)
    sample, group = program // GROUPS, program % GROUPS
    total = size.to(tl.float32) * GROUP_C
    dz_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    dzx_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for start in range(0, runs, BLOCK_R):
        _, offset, in_bounds = _run_of_group(start, runs, sample, group, C, GROUP_C, BLOCK_R, BLOCK_G)
        dz_RG += load_f32(dz_sums + offset, in_bounds)
        dzx_RG += load_f32(dzx_sums + offset, in_bounds)
    if weight is not None:
        channel = tl.arange(0, BLOCK_G)[None, :]
        weight_G = load_f32(weight + group * GROUP_C + channel, channel < GROUP_C)
        dz_RG *= weight_G
        dzx_RG *= weight_G
    tl.store(means + program, tl.div_rn(_sum(dz_RG), total))
    tl.store(means + samples * GROUPS + program, tl.div_rn(_sum(dzx_RG), total))


# ----------------------------------------------------------------------------------------------------------- launches
def _video(batch, channels, frames, height, width, dtype, device):
    """An empty (B, C, T, H, W) tensor with channels_last_3d strides, in axes of size 1 too."""
    return torch.empty((batch, frames, height, width, channels), dtype=dtype, device=device).movedim(-1, 1)


def _split_runs(x, samples, size, config):
    """``(run, runs)``: pixels of one sample that a program loops over, at least four tiles; and runs per sample."""
    programs = max(num_sms(x.device) * config.programs // samples, 1)
    run = max(cdiv(size, programs * config.pixels), 4) * config.pixels
    return run, cdiv(size, run)


def _tile(channels, norm, config):
    block, count = tile(channels, norm)
    return dict(BLOCK_P=config.pixels, BLOCK_C=block, PIECES=count, num_warps=config.warps)


def _join_tile(channels_of_group):
    """4 elements per thread (8 spilled) and many threads: there are few programs, each bound by the latency of its loads."""
    block = next_power_of_2(channels_of_group)
    return dict(BLOCK_R=max(2048 // block, 1), BLOCK_G=block, num_warps=16)


def _group_stats(x, groups, eps, config):
    """(2, B, G) float32: mean and rstd; uninitialised if x is empty."""
    batch, channels, frames, height, width = x.shape
    stats = torch.empty((2, batch, groups), dtype=torch.float32, device=x.device)
    if x.numel():
        size = frames * height * width
        run, runs = _split_runs(x, batch, size, config)
        means, squares = (torch.empty((batch * runs, channels), dtype=torch.float32, device=x.device) for _ in range(2))
        stats_kernel[(batch * runs,)](x, means, squares, size, run, runs, C=channels, BLOCK_P=config.pixels,
                                      BLOCK_C=next_power_of_2(channels), num_warps=config.warps,
                                      maxnreg=registers(config.warps, config.programs, 8))
        merge_stats_kernel[(batch * groups,)](means, squares, stats, batch, size, run, runs, eps, C=channels,
                                             GROUP_C=channels // groups, **_join_tile(channels // groups))
    return stats


def forward(x, weight, bias, *, norm, groups, eps, act, dtype, config: Config, cache=None, keep=0):
    """``(y, cache_out, stats)``: ``act(norm(x) * weight + bias)``, and its last frames for the next chunk.

    x (B, C, T, H, W), copied if it is not contiguous in channels_last_3d; weight, bias (C,) or None; norm "rms", or "group"
    with ``groups``, which divides C; act "silu" or None. y: x's shape, ``dtype``, channels_last_3d.

    cache_out: the last ``keep`` frames, or all if there are fewer, of cache (B, C, c, H, W; None: c = 0) and y, in ``dtype``
    and channels_last_3d, stored by the same launch as y; None if ``keep`` is 0. cache is copied as x is.

    stats (2, B, G) float32, mean and rstd, for group norm (uninitialised if x is empty); None for rms.

    Workspace for group norm, float32: (2, R, C), R at most the larger of B and SMs x config.programs.
    """
    batch, channels, frames, height, width = x.shape
    eps = float(eps)  # Triton would specialise on an int
    x, cache, (weight, bias) = channels_last(x), channels_last(cache), contiguous(weight, bias)
    y = _video(*x.shape, dtype, x.device)
    cached = 0 if cache is None else cache.shape[2]
    kept = min(keep, cached + frames)
    copied = max(kept - frames, 0)
    cache_out = _video(batch, channels, kept, height, width, dtype, x.device) if keep else None
    with on(x.device):
        stats = _group_stats(x, groups, eps, config) if norm == "group" else None
        samples, size = batch, height * width
        if not keep:  # frames do not matter: treat each sample, or for rms the whole batch, as one frame
            samples, frames, size = (1, 1, x.numel() // max(channels, 1)) if norm == "rms" else (batch, 1, frames * size)
        grid = samples * (frames + copied) * cdiv(size, config.pixels)
        if grid and channels:
            forward_kernel[(grid,)](
                x, cache if copied else None, weight, bias, stats, y, cache_out if kept else None, samples, frames, size,
                cached, kept, eps, C=channels, GROUP_C=channels // groups if norm == "group" else channels, NORM=norm,
                ACT=act, **_tile(channels, norm, config))
    return y, cache_out, stats


def backward(dy, x, weight, bias, stats, *, norm, groups, eps, act, wanted, config: Config):
    """``(dx, dweight, dbias)``; None where ``wanted``, three bools, is False.

    dy: gradient of forward's y, any dtype and strides; x, weight, bias as given to forward; dy and x are copied if they are
    not contiguous in channels_last_3d. stats: forward's, for group norm. dx: x's dtype, channels_last_3d.

    Workspace, float32: (R, C) each for weight and bias, R at most the larger of B and SMs x config.programs; for dx of group
    norm both of them and (2, B, G).
    """
    want_x, want_weight, want_bias = wanted
    batch, channels, frames, height, width = x.shape
    device, eps, grouped = x.device, float(eps), norm == "group"
    dy, x, vectors = channels_last(dy), channels_last(x), contiguous(weight, bias)
    samples, size = (batch, frames * height * width) if grouped else (1, batch * frames * height * width)
    nonempty = samples * size * channels > 0
    run, runs = _split_runs(x, samples, size, config) if nonempty else (1, 0)
    sums = lambda want: torch.empty((samples * runs, channels), dtype=torch.float32, device=device) if want else None
    group_dx = grouped and want_x
    dz_sums, dzx_sums = sums(want_bias or group_dx), sums(want_weight or group_dx)
    dx = _video(*x.shape, x.dtype, device) if want_x else None
    group = channels // groups if grouped else channels

    def launch(means, dx, dz_sums, dzx_sums):
        backward_kernel[(samples * runs,)](
            dy, x, *vectors, stats, means, dx, dz_sums, dzx_sums, samples, size, run, runs, eps, C=channels, GROUP_C=group,
            NORM=norm, ACT=act, **_tile(channels, norm, config), maxnreg=registers(config.warps, config.programs, 8))

    if nonempty and any(wanted):
        with on(x.device):
            launch(None, None if grouped else dx, dz_sums, dzx_sums)
            if group_dx:
                means = torch.empty((2, batch, groups), dtype=torch.float32, device=device)
                reduce_sums_kernel[(batch * groups,)](dz_sums, dzx_sums, vectors[0], means, batch, size, runs, C=channels,
                                                    GROUP_C=group, **_join_tile(group))
                launch(means, dx, None, None)
    d_weight = dzx_sums.sum(dim=0).to(weight.dtype) if want_weight else None
    d_bias = dz_sums.sum(dim=0).to(bias.dtype) if want_bias else None
    return dx, d_weight, d_bias
