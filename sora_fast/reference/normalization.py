"""Norms, and a norm with its activation on video features.

B batch, C channels, T frames, H height, W width, G groups, D width of a token.
"""

import torch
import torch.nn.functional as F

from ..precision import widen

__all__ = ["norm_act"]


def normalise(x, norm: str, weight, bias, eps: float):
    """Norm over the last dimension, in x's own dtype: ``"layer"`` or ``"rms"``, then ``* weight + bias``."""
    if norm == "layer":
        centred = x - x.mean(dim=-1, keepdim=True)
        x = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    else:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight
    if bias is not None:
        x = x + bias
    return x


def norm_act(x, weight=None, bias=None, *, norm="rms", groups=32, eps=1e-6, act="silu"):
    """``act(norm(x))`` on ``(B, C, T, H, W)``: ``rms`` over C of each pixel, ``group`` over (C/groups, T, H, W).

    See ``sora_fast.ops.norm_act``.
    """
    dtype = x.dtype
    x_BCTHW, weight_C, bias_C = widen(x, weight, bias)
    if norm == "rms":
        x_BCTHW = normalise(x_BCTHW.movedim(1, -1), "rms", weight_C, bias_C, eps).movedim(-1, 1)
    else:
        batch, channels = x.shape[:2]
        group = (batch, groups, channels // groups, *x.shape[2:])
        x_BGcTHW = x_BCTHW.reshape(group)
        dims = (2, 3, 4, 5)
        centred = x_BGcTHW - x_BGcTHW.mean(dim=dims, keepdim=True)
        variance = centred.square().mean(dim=dims, keepdim=True)
        x_BCTHW = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
        if weight_C is not None:
            x_BCTHW = x_BCTHW * weight_C[:, None, None, None]
        if bias_C is not None:
            x_BCTHW = x_BCTHW + bias_C[:, None, None, None]
    if act == "silu":
        x_BCTHW = F.silu(x_BCTHW)
    return x_BCTHW.to(dtype)
