"""Layers on top of ``sora_fast.ops``, weight-compatible with the plain modules they replace."""

from ..other_names import missing
from .attention import VarlenAttention
from .convolution import CausalConv3d, norm_act_conv
from .masking import Masking, continuous_drop_rates, random_masking, size_drop_rates
from .modulation import FinalLayer, Modulation, Residual
from .normalization import GroupNorm, RMSNorm
from .patches import PatchEmbed3d
from .quantize import VectorQuantizer
from .streaming import StreamState

__all__ = ["CausalConv3d", "FinalLayer", "GroupNorm", "Masking", "Modulation", "PatchEmbed3d", "RMSNorm", "Residual",
           "StreamState", "VarlenAttention", "VectorQuantizer", "continuous_drop_rates", "norm_act_conv", "random_masking",
           "size_drop_rates"]


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
