"""Backend "cuda" of causal_conv3d and norm_act_conv3d: the forward on Hopper, in bfloat16."""

import torch

from .. import checks
from ..dispatch import Backend
from ..kernels.convolution_settings import ConvSettings
from ..kernels.launch import aligned, dense
from ..reference import convolution as reference
from . import cuda_backend, normalization_cuda, operators
from .convolution_outputs import FORWARD, fake_forward, settings_of
from .operators import video

TILE_CHANNELS = (256, 192, 160, 128, 96)  # N of a tile; csrc/convolution.cu


def _forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings):
    """[y], then cache_out if ``keep``.

    Workspace: with a norm, or with a spatial padding other than zeros, the convolution's input, of x's size in weight's
    dtype (with its padding and the cached frames before it).
    """
    s = settings_of(weight, *settings)
    batch, channels, frames, height, width = x.shape
    (kt, kh, kw), (left, _, top, _) = s.kernel, s.padding
    y = video(x, weight.dtype, batch, weight.shape[0], *s.out_sizes(frames, height, width))
    cache = None if cache is None or cache.shape[2] == 0 else dense(cache)
    cached = 0 if cache is None else cache.shape[2]
    halo = not s.pads_with_zeros
    cache_out = None
    if s.norm is not None or halo and y.numel():
        # with a halo the cached frames are included, since they must be padded too
        h, cache_out = normalization_cuda.launch(
            x, norm_weight, norm_bias, norm=s.norm, eps=s.eps, act=s.act, dtype=weight.dtype, cache=cache,
            keep=s.keep if s.norm is not None else 0, front=cached if halo else 0,
            padding=s.padding if halo else (0, 0, 0, 0), space_pad=s.space_pad)
    else:
        h = dense(x)
    if s.norm is None and s.keep:
        cache_out = reference.next_cache(x, cache, s.keep)
    if y.numel():
        frame = h.shape[1] * h.shape[3] * h.shape[4]
        if halo:
            top = left = 0
            clip, earlier, earlier_stride = h[:, :, cached:], h, h.shape[2] * frame
        else:
            clip, earlier, earlier_stride = h, cache, cached * frame
        cuda_backend.launch(
            "causal_conv3d", y, x=clip, cache=earlier if cached else None,
            weight=dense(weight), bias=None if bias is None else aligned(bias.float().contiguous()),
            residual=dense(residual), y=y, samples=batch, frames=frames, height=h.shape[3], width=h.shape[4],
            in_channels=channels, cached=cached, x_stride=h.shape[2] * frame, cache_stride=earlier_stride,
            out_frames=y.shape[2], out_height=y.shape[3], out_width=y.shape[4], out_channels=y.shape[1], kt=kt, kh=kh, kw=kw,
            stride_t=s.stride[0], phase=s.phase, lookahead=s.lookahead, top=top, left=left,
            replicate=s.time_pad == "replicate")
    return [y] if cache_out is None else [y, cache_out]


_convolution_cuda_forward = operators.define(f"convolution_cuda_forward{FORWARD}", _forward, fake_forward)


def _run(settings: ConvSettings, *, x, weight, bias, cache, residual, norm_weight=None, norm_bias=None):
    made = _convolution_cuda_forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings.values)
    if settings.return_cache and settings.keep == 0:  # a kernel of one frame has no cache
        return made[0], x[:, :, :0].to(weight.dtype).clone()
    return tuple(made) if settings.return_cache else made[0]


def _unsupported(problem) -> list[str]:
    reasons = cuda_backend.unsupported(problem, "convolution", problem.wide)
    if problem.dtype != torch.bfloat16:
        reasons.append(f"Its kernel convolves bfloat16, and not {str(problem.dtype).removeprefix('torch.')}.")
    if problem.norm or problem.space_pad != "zeros":
        reasons += normalization_cuda.unsupported(problem.norm, problem.in_channels, problem.dtype)
    if problem.in_channels % 64 and problem.in_channels not in (96, 160):
        reasons.append(f"Its kernel takes 96, 160 or a multiple of 64 input channels, and not "
                       f"{checks.shown(problem.in_channels)}.")
    if not any(problem.out_channels and problem.out_channels % n == 0 for n in TILE_CHANNELS):
        reasons.append(f"Its kernel supports multiples of 96, 128, 160, 192 or 256 output channels, and not "
                       f"{checks.shown(problem.out_channels)}.")
    if problem.stride[1:] != (1, 1):
        reasons.append(f"Its kernel does not stride in space, and the stride is {checks.shown(problem.stride)}.")
    if problem.upsample != 1:
        reasons.append(f"Its kernel does not upsample, and upsample is {checks.shown(problem.upsample)}.")
    return reasons


CONVOLUTION = Backend("cuda", _run, _unsupported, kernel="convolution")
