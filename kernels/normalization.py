"""Norm and activation of video features, forward and backward, on pixels that are rows of C numbers.

B samples, C channels, T frames, H height, W width, P pixels, G groups. Everything is computed in float32.

rms: a program has some pixels with all their channels in registers, so that each number is read and written once.

group: the statistics of a sample need all of it before the first number can be written, so x is read twice. Programs walk
over runs of pixels and keep mean and squared distance of every place in their tile (Welford, Technometrics 4(3), 1962), so
nothing cancels however far the mean is from 0; a second kernel joins them. The backward is the same twice: sums over the
sample, then the gradient.

Sums over pixels (of group statistics, of the gradients of weight and bias) go to a workspace, a row a program, and are added
up in order. No atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from .launch import channels_last, contiguous, multiprocessors, on, registers
from .normalization_config import Config, tile
from .rows import (
    add_rows,
    columns_of,
    load_row,
    multiply_rows,
    numbers,
    reciprocal,
    rstd_of,
    sigmoid,
    store_row,
    sum_of_products,
    zero_row,
)


# ------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _of_groups(numbers, C: tl.constexpr, GROUP_C: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """A group's number for each of its channels, as a row."""
    found = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK_C)
        found = found + (tl.load(numbers + column // GROUP_C, mask=column < C, other=0.0),)
    return found


@triton.jit(do_not_specialize=["samples", "frames", "size", "cached", "kept"])
def forward_kernel(x, cache, weight, bias, stats, y, cache_out, samples: tl.int64, frames: tl.int64, size: tl.int64,
                   cached: tl.int64, kept: tl.int64, eps, C: tl.constexpr, GROUP_C: tl.constexpr, NORM: tl.constexpr,
                   ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """y: BLOCK_P pixels of one of the samples' frames, of ``size`` pixels each.

    cache_out, where there is one: the last ``kept`` frames of the ``cached`` ones and y's; programs past those of y copy the
    cached ones among them. ``stats`` (2, samples, G) of a group norm: mean and rstd.
    """
    GROUPS: tl.constexpr = C // GROUP_C
    tiles = tl.cdiv(size, BLOCK_P)
    program = tl.program_id(0).to(tl.int64)
    place = program // tiles  # of the frame among all samples'
    pixel = (program % tiles * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    at = pixel * C
    inside = pixel < size

    if cache is not None and place >= samples * frames:
        place -= samples * frames
        copied = kept - frames
        sample, frame = place // copied, place % copied
        old = load_row(cache + (sample * cached + cached - copied + frame) * size * C + at, inside, C, BLOCK_C, PIECES)
        store_row(cache_out + (sample * kept + frame) * size * C + at, old, inside, C, BLOCK_C, PIECES)
    else:
        sample = place // frames
        frame = place % frames - frames + kept  # of cache_out
        x_PC = load_row(x + place * size * C + at, inside, C, BLOCK_C, PIECES)
        if weight is not None:  # on their way while the pixels' norms are made
            weight_C = load_row(weight, True, C, BLOCK_C, PIECES)
        if bias is not None:
            bias_C = load_row(bias, True, C, BLOCK_C, PIECES)
        if NORM == "rms":
            rstd = rstd_of(sum_of_products(x_PC, x_PC, PIECES) * (1.0 / C), eps)
        else:
            mean_C = _of_groups(stats + sample * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
            rstd_C = _of_groups(stats + (samples + sample) * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
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
            tl.store(y + place * size * C + at + column, y_PC, mask=inside & (column < C))
            if cache_out is not None:
                last = pixel < tl.where(frame >= 0, size, 0)
                tl.store(cache_out + (sample * kept + frame) * size * C + at + column, y_PC, mask=last & (column < C))


@triton.jit(do_not_specialize=["size", "run", "runs"])
def stats_kernel(x, means, squares, size: tl.int64, run: tl.int64, runs: tl.int64, C: tl.constexpr, BLOCK_P: tl.constexpr,
                 BLOCK_C: tl.constexpr):
    """Of each channel of ``run`` pixels of one sample: the mean, and the sum of the squared distances from it."""
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // runs, program % runs * run
    last = tl.minimum(first + run, size)
    columns = tl.arange(0, BLOCK_C)
    at = columns[None, :] + sample * size * C

    mean_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count_P = tl.zeros([BLOCK_P], tl.float32)
    step = 0.0
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & (columns < C)[None, :]
        step += 1.0
        share = reciprocal(step)
        away = tl.where(inside, numbers(x + pixel[:, None] * C + at, inside) - mean_PC, 0.0)
        mean_PC += away * share
        square_PC += away * away * (1.0 - share)
        count_P += tl.where(pixel < last, 1.0, 0.0)

    count = count_P[:, None]
    mean_C = tl.div_rn(tl.sum(mean_PC * count, 0), (last - first).to(tl.float32))
    away = mean_PC - mean_C[None, :]
    tl.store(means + program * C + columns, mean_C, mask=columns < C)
    tl.store(squares + program * C + columns, tl.sum(square_PC + count * away * away, 0), mask=columns < C)


@triton.jit
def _run_of_group(start, runs, sample, group, C: tl.constexpr, GROUP_C: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_G: tl.constexpr):
    """The runs, their places in the workspace (runs x channels of the group), and which of these there are."""
    run = start + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_G)[None, :]
    at = (sample * runs + run)[:, None] * C + group * GROUP_C + channel
    return run, at, (run < runs)[:, None] & (channel < GROUP_C)


@triton.jit
def _total(sums_RG):
    return tl.sum(tl.sum(sums_RG, 1), 0)


@triton.jit(do_not_specialize=["samples", "size", "run", "runs"])
def join_stats_kernel(means, squares, stats, samples: tl.int64, size: tl.int64, run: tl.int64, runs: tl.int64, eps,
                      C: tl.constexpr, GROUP_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr):
    """``stats`` (2, samples, G), mean and rstd, of one group of one sample from those of its runs (Chan et al., 1983)."""
    GROUPS: tl.constexpr = C // GROUP_C
    program = tl.program_id(0).to(tl.int64)
    sample, group = program // GROUPS, program % GROUPS
    total = size.to(tl.float32) * GROUP_C

    sum_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for start in range(0, runs, BLOCK_R):
        place, at, inside = _run_of_group(start, runs, sample, group, C, GROUP_C, BLOCK_R, BLOCK_G)
        count = tl.minimum(size - place * run, run).to(tl.float32)[:, None]
        sum_RG += numbers(means + at, inside) * count
    mean = tl.div_rn(_total(sum_RG), total)

    sum_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for start in range(0, runs, BLOCK_R):
        place, at, inside = _run_of_group(start, runs, sample, group, C, GROUP_C, BLOCK_R, BLOCK_G)
        count = tl.minimum(size - place * run, run).to(tl.float32)[:, None]
        away = tl.where(inside, numbers(means + at, inside) - mean, 0.0)
        sum_RG += numbers(squares + at, inside) + away * away * count
    tl.store(stats + program, mean)
    tl.store(stats + samples * GROUPS + program, rstd_of(tl.div_rn(_total(sum_RG), total), eps))


@triton.jit(do_not_specialize=["samples", "size", "run", "runs"])
def backward_kernel(dy, x, weight, bias, stats, means, dx, dz_sums, dzx_sums, samples: tl.int64, size: tl.int64,
                    run: tl.int64, runs: tl.int64, eps, C: tl.constexpr, GROUP_C: tl.constexpr, NORM: tl.constexpr,
                    ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """``run`` pixels of one sample: dx, and in the program's row of the sums those of dz and dz times normed x.

    What is None is not wanted. dz: gradient before the activation. ``means`` (2, samples, G) of a group norm's dx: of the
    gradient of normed x, and of that times normed x.
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
        mean_C = _of_groups(stats + sample * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
        rstd_C = _of_groups(stats + (samples + sample) * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
        if dx is not None:
            off_C = _of_groups(means + sample * GROUPS, C, GROUP_C, BLOCK_C, PIECES)
            along_C = _of_groups(means + (samples + sample) * GROUPS, C, GROUP_C, BLOCK_C, PIECES)

    dz_PC = zero_row(BLOCK_P, BLOCK_C, PIECES)
    dzx_PC = zero_row(BLOCK_P, BLOCK_C, PIECES)
    for start in range(first, last, BLOCK_P):
        pixel = (start + tl.arange(0, BLOCK_P))[:, None]
        inside = pixel < last
        at = (sample * size + pixel) * C
        x_PC = load_row(x + at, inside, C, BLOCK_C, PIECES)
        g_PC = load_row(dy + at, inside, C, BLOCK_C, PIECES)
        if NORM == "rms":
            rstd = rstd_of(sum_of_products(x_PC, x_PC, PIECES) * (1.0 / C), eps)
            rstd = tl.where(inside, rstd, 0.0)  # infinite where there is no pixel and no eps
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
                along = sum_of_products(gradient, normed, PIECES) * (1.0 / C)
            for piece in tl.static_range(PIECES):
                if NORM == "rms":
                    dx_PC = (gradient[piece] - normed[piece] * along) * rstd
                else:
                    dx_PC = (gradient[piece] - (off_C[piece] + normed[piece] * along_C[piece])) * rstd_C[piece]
                column = columns_of(piece, BLOCK_C)
                tl.store(dx + at + column, dx_PC.to(dx.dtype.element_ty), mask=inside & (column < C))

    for piece in tl.static_range(PIECES):
        column = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        if dz_sums is not None:
            tl.store(dz_sums + program * C + column, tl.sum(dz_PC[piece], 0), mask=column < C)
        if dzx_sums is not None:
            tl.store(dzx_sums + program * C + column, tl.sum(dzx_PC[piece], 0), mask=column < C)


@triton.jit(do_not_specialize=["samples", "size", "runs"])
def join_sums_kernel(dz_sums, dzx_sums, weight, means, samples: tl.int64, size: tl.int64, runs: tl.int64, C: tl.constexpr,
                     GROUP_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr):
    """``means`` (2, samples, G) of one group of one sample, as backward_kernel takes them, from the sums of its runs."""
    GROUPS: tl.constexpr = C // GROUP_C
    program = tl.program_id(0).to(tl.int64)
    sample, group = program // GROUPS, program % GROUPS
    total = size.to(tl.float32) * GROUP_C
    dz_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    dzx_RG = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for start in range(0, runs, BLOCK_R):
        _, at, inside = _run_of_group(start, runs, sample, group, C, GROUP_C, BLOCK_R, BLOCK_G)
        dz_RG += numbers(dz_sums + at, inside)
        dzx_RG += numbers(dzx_sums + at, inside)
    if weight is not None:
        channel = tl.arange(0, BLOCK_G)[None, :]
        weight_G = numbers(weight + group * GROUP_C + channel, channel < GROUP_C)
        dz_RG *= weight_G
        dzx_RG *= weight_G
    tl.store(means + program, tl.div_rn(_total(dz_RG), total))
    tl.store(means + samples * GROUPS + program, tl.div_rn(_total(dzx_RG), total))


# ----------------------------------------------------------------------------------------------------------- launches
def _video(batch, channels, frames, height, width, dtype, device):
    """Memory for (B, C, T, H, W) in channels_last_3d, strides of axes of 1 too."""
    return torch.empty((batch, frames, height, width, channels), dtype=dtype, device=device).movedim(-1, 1)


def _walk(x, samples, size, config):
    """``(run, runs)``: pixels of one sample that a program walks over, of at least four tiles; and runs of a sample."""
    programs = max(multiprocessors(x.device) * config.programs // samples, 1)
    run = max(triton.cdiv(size, programs * config.pixels), 4) * config.pixels
    return run, triton.cdiv(size, run)


def _tile(channels, norm, config):
    block, count = tile(channels, norm)
    return dict(BLOCK_P=config.pixels, BLOCK_C=block, PIECES=count, num_warps=config.warps)


def _join_tile(channels_of_group):
    """4 numbers a thread (8 have spilled), and many threads: the programs are few, and each waits for its own loads."""
    block = triton.next_power_of_2(channels_of_group)
    return dict(BLOCK_R=max(2048 // block, 1), BLOCK_G=block, num_warps=16)


def _group_stats(x, groups, eps, config):
    """(2, B, G) float32: mean and rstd; not written where x is empty."""
    batch, channels, frames, height, width = x.shape
    stats = torch.empty((2, batch, groups), dtype=torch.float32, device=x.device)
    if x.numel():
        size = frames * height * width
        run, runs = _walk(x, batch, size, config)
        means, squares = (torch.empty((batch * runs, channels), dtype=torch.float32, device=x.device) for _ in range(2))
        stats_kernel[(batch * runs,)](x, means, squares, size, run, runs, C=channels, BLOCK_P=config.pixels,
                                      BLOCK_C=triton.next_power_of_2(channels), num_warps=config.warps,
                                      maxnreg=registers(config.warps, config.programs, 8))
        join_stats_kernel[(batch * groups,)](means, squares, stats, batch, size, run, runs, eps, C=channels,
                                             GROUP_C=channels // groups, **_join_tile(channels // groups))
    return stats


def forward(x, weight, bias, *, norm, groups, eps, act, dtype, config: Config, cache=None, keep=0):
    """``(y, cache_out, stats)``: ``act(norm(x) * weight + bias)``, and the last frames of it for the next chunk.

    x (B, C, T, H, W), copied where it is not dense in channels_last_3d; weight, bias (C,) or None; norm "rms", or "group" of
    ``groups``, which divide C; act "silu" or None. y: x's shape, ``dtype``, channels_last_3d.

    cache_out: the last ``keep`` frames, or as many as there are, of cache (B, C, c, H, W; None: c = 0) and y, in ``dtype``
    and channels_last_3d, written by the launch that writes y; None where ``keep`` is 0. cache is copied as x is.

    stats (2, B, G) float32, mean and rstd of a group norm (not written where x is empty); None of rms.

    Workspace of a group norm, float32: (2, R, C), R at most the larger of B and multiprocessors x config.programs.
    """
    batch, channels, frames, height, width = x.shape
    eps = float(eps)  # an int would be specialised
    x, cache, (weight, bias) = channels_last(x), channels_last(cache), contiguous(weight, bias)
    y = _video(*x.shape, dtype, x.device)
    cached = 0 if cache is None else cache.shape[2]
    kept = min(keep, cached + frames)
    copied = max(kept - frames, 0)
    cache_out = _video(batch, channels, kept, height, width, dtype, x.device) if keep else None
    with on(x.device):
        stats = _group_stats(x, groups, eps, config) if norm == "group" else None
        samples, size = batch, height * width
        if not keep:  # pixels need not know their frames: all of a sample's are as one frame, of rms all there are
            samples, frames, size = (1, 1, x.numel() // max(channels, 1)) if norm == "rms" else (batch, 1, frames * size)
        grid = samples * (frames + copied) * triton.cdiv(size, config.pixels)
        if grid and channels:
            forward_kernel[(grid,)](
                x, cache if copied else None, weight, bias, stats, y, cache_out if kept else None, samples, frames, size,
                cached, kept, eps, C=channels, GROUP_C=channels // groups if norm == "group" else channels, NORM=norm,
                ACT=act, **_tile(channels, norm, config))
    return y, cache_out, stats


def backward(dy, x, weight, bias, stats, *, norm, groups, eps, act, wanted, config: Config):
    """``(dx, dweight, dbias)``, None for those that ``wanted``, three bools, leaves out.

    dy: gradient of forward's y, any dtype and strides; x, weight, bias as they were given to forward; dy and x are copied
    where they are not dense in channels_last_3d. stats: forward's, of a group norm. dx: x's dtype, channels_last_3d.

    Workspace, float32: (R, C) for weight and for bias, R at most the larger of B and multiprocessors x config.programs; both
    where a group norm's dx is wanted, and (2, B, G).
    """
    want_x, want_weight, want_bias = wanted
    batch, channels, frames, height, width = x.shape
    device, eps, grouped = x.device, float(eps), norm == "group"
    dy, x, vectors = channels_last(dy), channels_last(x), contiguous(weight, bias)
    samples, size = (batch, frames * height * width) if grouped else (1, batch * frames * height * width)
    some = samples * size * channels > 0
    run, runs = _walk(x, samples, size, config) if some else (1, 0)
    sums = lambda want: torch.empty((samples * runs, channels), dtype=torch.float32, device=device) if want else None
    of_group = grouped and want_x
    dz_sums, dzx_sums = sums(want_bias or of_group), sums(want_weight or of_group)
    dx = _video(*x.shape, x.dtype, device) if want_x else None
    group = channels // groups if grouped else channels

    def walk(means, dx, dz_sums, dzx_sums):
        backward_kernel[(samples * runs,)](
            dy, x, *vectors, stats, means, dx, dz_sums, dzx_sums, samples, size, run, runs, eps, C=channels, GROUP_C=group,
            NORM=norm, ACT=act, **_tile(channels, norm, config), maxnreg=registers(config.warps, config.programs, 8))

    if some and any(wanted):
        with on(x.device):
            walk(None, None if grouped else dx, dz_sums, dzx_sums)
            if of_group:
                means = torch.empty((2, batch, groups), dtype=torch.float32, device=device)
                join_sums_kernel[(batch * groups,)](dz_sums, dzx_sums, vectors[0], means, batch, size, runs, C=channels,
                                                    GROUP_C=group, **_join_tile(group))
                walk(means, dx, None, None)
    d_weight = dzx_sums.sum(dim=0).to(weight.dtype) if want_weight else None
    d_bias = dz_sums.sum(dim=0).to(bias.dtype) if want_bias else None
    return dx, d_weight, d_bias
