"""Causal 3-D convolution: frames of the past only, a streaming cache in and out, explicit padding.

B batch, C channels, T frames, H height, W width; kT, kH, kW kernel, sT, sH, sW stride.
(Causal video VAEs: MAGVIT-v2, arXiv 2310.05737, section 3.1.)
"""

import torch
import torch.nn.functional as F

from ..precision import wide_dtype
from .normalization import norm_act

__all__ = ["causal_conv3d", "norm_act_conv3d"]

_SPACE_MODES = {"zeros": "constant", "replicate": "replicate", "reflect": "reflect"}


def history(x, cache):
    """The frames there are: those of the cache, then the clip's."""
    return x if cache is None or cache.shape[2] == 0 else torch.cat([cache, x], dim=2)


def next_cache(x, cache, frames: int):
    """The last ``frames`` frames seen, as a tensor of its own."""
    seen = history(x, cache)
    return seen[:, :, max(0, seen.shape[2] - frames) :].clone(memory_format=torch.preserve_format)


def pad_time(x, cache, kernel_frames: int, lookahead: int, time_pad: str):
    """Put kT - 1 - lookahead frames before the clip (cache, then ``time_pad``) and ``lookahead`` after it."""
    seen = history(x, cache)
    before = kernel_frames - 1 - lookahead - (seen.shape[2] - x.shape[2])
    if before < 0:
        seen = seen[:, :, -before:]
    if seen.shape[2] == 0:
        return seen.new_zeros((*seen.shape[:2], kernel_frames - 1, *seen.shape[3:]))
    first, last = seen[:, :, :1], seen[:, :, -1:]
    if time_pad == "zeros":
        first, last = torch.zeros_like(first), torch.zeros_like(last)
    if before <= 0 and lookahead == 0:
        return seen
    return torch.cat([first.expand(-1, -1, max(before, 0), -1, -1), seen, last.expand(-1, -1, lookahead, -1, -1)], dim=2)


def upsample_space(x, factor: int, height_axis: int = 3):
    """Every pixel ``factor`` x ``factor`` times; width is the axis after ``height_axis``."""
    return x if factor == 1 else x.repeat_interleave(factor, height_axis + 1).repeat_interleave(factor, height_axis)


def pad_space(x, padding, space_pad: str):
    """``padding`` = (left, right, top, bottom) around every frame."""
    if not any(padding) or x.numel() == 0 and space_pad != "zeros":
        left, right, top, bottom = padding
        return x.new_zeros((*x.shape[:3], x.shape[3] + top + bottom, x.shape[4] + left + right)) if any(padding) else x
    batch, channels, frames, height, width = x.shape
    flat = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
    flat = F.pad(flat, tuple(padding), mode=_SPACE_MODES[space_pad])
    return flat.reshape(batch, frames, channels, *flat.shape[2:]).transpose(1, 2)


def causal_conv3d(x, weight, bias=None, *, stride=(1, 1, 1), padding, time_pad="zeros", space_pad="zeros", cache=None,
                  phase=0, lookahead=0, upsample=1, residual=None, return_cache=False):
    """``y [, cache_out]``; see ``sora_fast.ops.causal_conv3d``, which fills in ``stride`` and ``padding``."""
    wide = wide_dtype(x, weight, bias, cache, residual)
    kernel_frames = weight.shape[2]
    old = None if cache is None else cache.to(wide)
    seen = pad_time(x.to(wide), old, kernel_frames, lookahead, time_pad)
    padded = pad_space(upsample_space(seen, upsample), padding, space_pad)
    frames = -(-(x.shape[2] - phase) // stride[0]) if phase < x.shape[2] else 0
    height = (padded.shape[3] - weight.shape[3]) // stride[1] + 1
    width = (padded.shape[4] - weight.shape[4]) // stride[2] + 1
    if frames == 0 or x.shape[0] == 0:
        # Nothing to compute, but the result stays part of the graph: gradients of 0 frames are zeros, not None.
        nothing = sum(t.to(wide).sum() * 0 for t in (x, padded, weight, bias) if t is not None)
        y = nothing.expand(x.shape[0], weight.shape[0], frames, height, width)
    else:
        y = F.conv3d(padded[:, :, phase:], weight.to(wide), None if bias is None else bias.to(wide), stride=stride)
    if residual is not None:
        y = y + residual.to(wide)
    y = y.to(x.dtype)
    return (y, next_cache(x, cache, kernel_frames - 1)) if return_cache else y


def norm_act_conv3d(x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm="rms", groups=32, eps=1e-6,
                    act="silu", **convolution):
    """``causal_conv3d(norm_act(x))``; see ``sora_fast.ops.norm_act_conv3d``."""
    h = norm_act(x, norm_weight, norm_bias, norm=norm, groups=groups, eps=eps, act=act).to(weight.dtype)
    return causal_conv3d(h, weight, bias, **convolution)
