"""Norms of video features (B, C, T, H, W) with their activation."""

import torch
from torch import nn

from .. import checks, ops
from ..ops.normalization import ACTS


class RMSNorm(nn.Module):
    """RMS norm over channels of each pixel, then ``act``: causal, so it streams.

    The default eps is Wan's form (division by the vector's length): zeros stay zeros.

    Args:
        channels: C.
        act: "silu" or None.
        eps: under the square root.
        device, dtype: of the weight (C,).

    Raises:
        ValueError, TypeError: settings that do not fit.
    """

    def __init__(self, channels: int, *, act: str | None = None, eps: float = 1e-24, device=None, dtype=None):
        super().__init__()
        checks.choice("RMSNorm", "act", act, ACTS)
        checks.whole("RMSNorm", "channels", channels, 1)
        checks.number("RMSNorm", "eps", eps)
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = None
        self.settings = dict(norm="rms", eps=eps, act=act)

    def forward(self, x):
        return ops.norm_act(x, self.weight, **self.settings)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.settings['eps']}, act={self.settings['act']!r}"


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm (same state_dict) with its activation in the same pass. It mixes frames, so it does not stream.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as in nn.GroupNorm.
        act: "silu" or None.

    Raises:
        ValueError, TypeError: settings that do not fit.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, device=None,
                 dtype=None, *, act: str | None = None):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        checks.choice("GroupNorm", "act", act, ACTS)
        checks.number("GroupNorm", "eps", eps)
        self.settings = dict(norm="group", groups=num_groups, eps=eps, act=act)

    def forward(self, x):
        return ops.norm_act(x, self.weight, self.bias, **self.settings)
