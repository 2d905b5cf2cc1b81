"""Layers on top of ``sora_fast.ops``, weight-compatible with the plain modules they replace."""

from .attention import VarlenAttention
from .convolution import CausalConv3d, norm_act_conv
from .modulation import FinalLayer, Modulation, Residual
from .normalization import GroupNorm, RMSNorm
from .patches import PatchEmbed3d
from .streaming import StreamState

__all__ = [
    "CausalConv3d",
    "FinalLayer",
    "GroupNorm",
    "Modulation",
    "PatchEmbed3d",
    "RMSNorm",
    "Residual",
    "StreamState",
    "VarlenAttention",
    "norm_act_conv",
]
