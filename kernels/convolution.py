"""Causal 3-D convolution of video in channels_last_3d memory, forward and backward: how its kernels are launched.

B batch, T frames, H height, W width; Cin, Cout channels; KT, KH, KW kernel, ST, SH, SW stride, u upsampling. The kernels are
in convolution_forward.py and convolution_backward.py, those that load by TMA in convolution_tma.py, their tiles in
convolution_config.py.
"""

from dataclasses import replace

import torch

from .convolution_backward import dgrad_kernel, wgrad_kernel
from .convolution_config import Config, WgradConfig, box_sides
from .convolution_folding import folded
from .convolution_forward import forward_kernel
from .convolution_settings import ConvSettings
from .convolution_tma import can_load, conv_tma, wgrad_tma
from .integers import cdiv
from .launch import MAXNREG, dense, num_sms, on, precision

# Prologue and epilogue of a wgrad program, in K iterations (estimate): it fills the pipeline and stores the accumulators.
EDGE_ITERATIONS = 8


# ----------------------------------------------------------------------------------------------------------- launches
def empty(shape, like, dtype=None):
    """(B, C, T, H, W) in channels_last_3d memory."""
    batch, channels, *sizes = shape
    return torch.empty((batch, *sizes, channels), dtype=dtype or like.dtype, device=like.device).permute(0, 4, 1, 2, 3)


def _constants(settings: ConvSettings, in_channels: int, out_channels: int, dtype: torch.dtype, tf32: bool) -> dict:
    """Keyword arguments of the gather kernels, which load by pointers, not by TMA."""
    names = ("KT", "KH", "KW", "ST", "SH", "SW")
    return dict(zip(names, (*settings.kernel, *settings.stride), strict=True), CIN=in_channels, COUT=out_channels,
                UP=settings.upsample, REPLICATE=settings.time_pad == "replicate", PRECISION=precision(dtype, tf32))


def _sizes(settings: ConvSettings, x, cache) -> tuple:
    """The kernels' arguments frames, cached, height, width, out_frames, out_height, out_width, phase, before, top, left.

    ``out_frames``: of the output. ``before``: frames that the kernel reaches back from an output's own frame.
    """
    frames, height, width = x.shape[2:]
    left, _, top, _ = settings.padding
    return (frames, 0 if cache is None else cache.shape[2], height, width, *settings.out_sizes(frames, height, width),
            settings.phase, settings.kernel[0] - 1 - settings.lookahead, top, left)


def forward(x, weight, bias, cache, residual, settings: ConvSettings, *, tf32, config: Config):
    """y (B, Cout, T', H', W') in x's dtype, channels_last_3d.

    x (B, Cin, T, H, W), weight (Cout, Cin, KT, KH, KW), cache (B, Cin, c, H, W) or None, residual like y or None, all of one
    dtype; copied if they are not in channels_last_3d memory. tf32: whether float32 operands may be rounded to TF32.
    No workspace.
    """
    x, weight, cache, residual = dense(x), dense(weight), dense(cache), dense(residual)
    cache = None if cache is None or cache.shape[2] == 0 else cache
    in_channels, out_channels = weight.shape[1], weight.shape[0]
    y = empty((x.shape[0], out_channels, *settings.out_sizes(*x.shape[2:])), x)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    if config.tma and can_load(settings, weight, x):
        conv_tma(x, cache, weight, bias, residual, y, None, settings, frames=x.shape[2], out_frames=y.shape[2],
                 config=config)
        return y
    programs = y.shape[0] * y.shape[2] * cdiv(y.shape[3] * y.shape[4], config.pixels)
    with on(x.device):
        forward_kernel[(programs * cdiv(out_channels, config.channels),)](
            x, cache, weight, bias, residual, y, *_sizes(settings, x, cache),
            **_constants(settings, in_channels, out_channels, x.dtype, tf32), SPACE=settings.space_pad,
            BLOCK_P=config.pixels, BLOCK_C=config.channels, BLOCK_K=config.block_k, num_warps=config.warps,
            num_stages=config.stages, maxnreg=MAXNREG)
    return y


def dgrad(dy, weight, dcache_out, x_shape, cached, settings: ConvSettings, *, want_x, want_cache, tf32, config: Config):
    """``(dx, dcache)`` in dy's dtype, channels_last_3d; None for one that is not wanted, and for a cache without frames.

    dy (B, Cout, T', H', W'); dcache_out (B, Cin, n, H, W), the gradient of the last n frames, or None; x_shape (B, Cin, T,
    H, W); ``cached``, c: frames in the cache.

    Workspace: float32, (B, c + T, u H + top + bottom, u W + left + right, Cin), if padding in space replicates or reflects
    pixels, or if an upsampled input is convolved with a stride; else none.
    """
    dy, weight, dcache_out = dense(dy), dense(weight), dense(dcache_out)
    batch, in_channels, frames, height, width = x_shape
    make = lambda count: empty((batch, in_channels, count, height, width), dy)
    keep = 0 if dcache_out is None else dcache_out.shape[2]
    repeats = settings.repeats_pixels
    want_cache = want_cache and cached > 0
    left, right, top, bottom = settings.padding
    u = settings.upsample
    if not repeats:
        dx, dcache = make(frames if want_x or frames else 0), make(cached) if want_cache else None
        sizes, start, origin, added, up = (height, width), -cached if want_cache else 0, (top, left), dcache_out, u
    else:
        sizes = (u * height + top + bottom, u * width + left + right)
        wide = torch.empty((batch, cached + frames, *sizes, in_channels), dtype=torch.float32, device=dy.device)
        dx, dcache, start, origin, added, up = wide, None, -cached, (0, 0), None, 1
    (_, sh, sw), count = settings.stride, frames - start
    if config.tma and can_load(settings, weight, dy):
        conv_tma(dy, None, weight, None, added, dx, dcache, settings, frames=frames, out_frames=dy.shape[2], cached=cached,
            keep=keep, transposed=True, config=config)
    elif dx.numel() or dcache is not None and dcache.numel():
        constants = _constants(settings, in_channels, dy.shape[1], dy.dtype, tf32) | dict(UP=up, WIDE=repeats)
        tiles = cdiv(cdiv(sizes[0], sh) * cdiv(sizes[1], sw), config.pixels) * sh * sw
        with on(dy.device):
            dgrad_kernel[(batch * count * tiles * cdiv(in_channels, config.channels),)](
                dy, weight, added, dx, dcache, frames, cached, *sizes, *dy.shape[2:], settings.phase,
                settings.kernel[0] - 1 - settings.lookahead, *origin, keep, start, **constants, BLOCK_P=config.pixels,
                BLOCK_C=config.channels, BLOCK_K=config.block_k, num_warps=config.warps, num_stages=config.stages,
                maxnreg=MAXNREG)
    if repeats:
        seen = folded(wide, settings, 2)
        if keep:
            seen[:, seen.shape[1] - keep:] += dcache_out.permute(0, 2, 3, 4, 1)
        own = lambda part: part.to(dy.dtype).contiguous().permute(0, 4, 1, 2, 3)
        dx, dcache = own(seen[:, cached:]), own(seen[:, :cached])
    return dx if want_x else None, dcache if want_cache else None


def wgrad(dy, x, cache, weight, settings: ConvSettings, *, tf32, config: WgradConfig):
    """dweight like ``weight``, channels_last_3d; dy (B, Cout, T', H', W'), x and cache as in ``forward``.

    Workspace: float32, (splits, Cout, KT, KH, KW, Cin): the split-K slices, as many as fill the SMs.
    """
    dy, x, cache = dense(dy), dense(x), dense(cache)
    cache = None if cache is None or cache.shape[2] == 0 else cache
    out_channels, in_channels = weight.shape[:2]
    if dy.numel() == 0 or weight.numel() == 0:
        return empty(weight.shape, weight).zero_()
    by_tma = config.tma and can_load(settings, weight, x)
    if not by_tma:
        config = replace(config, extra_out=0, taps=1)
    kt, kh, kw = settings.kernel
    tiles = (cdiv(out_channels, config.out_channels + config.extra_out)
             * cdiv(in_channels, config.in_channels + config.extra_in) * kt * kh * cdiv(kw, config.taps))
    high, wide = box_sides(config.pixels)
    units = dy.shape[0] * dy.shape[2] * cdiv(dy.shape[3], high) * cdiv(dy.shape[4], wide)
    splits, run = _split_k(units, tiles, num_sms(dy.device) * config.programs)
    sums = torch.empty((splits, out_channels, *settings.kernel, in_channels), dtype=torch.float32, device=dy.device)
    if by_tma:
        wgrad_tma(dy, x, cache, sums, settings, units=units, run=run, programs=splits * tiles, config=config)
    else:
        with on(dy.device):
            wgrad_kernel[(splits * tiles,)](
                dy, x, cache, sums, *_sizes(settings, x, cache), units, run,
                **_constants(settings, in_channels, out_channels, dy.dtype, tf32), SPACE=settings.space_pad,
                BLOCK_O=config.out_channels, BLOCK_I=config.in_channels, EXTRA_I=config.extra_in, TH=high, TW=wide,
                num_warps=config.warps, num_stages=config.stages, maxnreg=MAXNREG)
    return sums.sum(0).to(weight.dtype).permute(0, 4, 1, 2, 3)


def _split_k(units: int, tiles: int, resident: int) -> tuple[int, int]:
    """The number of split-K slices, and the units (boxes of pixels, K iterations) in each.

    The grid has slices x tiles programs, of which ``resident`` run at a time. It fills one, two or three waves, whichever is
    estimated to end first: a partial wave takes as long as a full one.
    """
    found = []
    for waves in (1, 2, 3):
        run = cdiv(units, min(units, max(1, waves * resident // tiles)))
        splits = cdiv(units, run)
        found.append((cdiv(splits * tiles, resident) * (run + EDGE_ITERATIONS), splits, run))
    return min(found)[1:]
