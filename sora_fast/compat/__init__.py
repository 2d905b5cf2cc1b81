"""Other libraries' interfaces on top of ``ops.varlen_attention``, so that a model needs one changed import.

``sora_fast.compat.flash_attn``: flash-attn 2.8's varlen functions. ``sora_fast.compat.xformers``:
``memory_efficient_attention``, ``BlockDiagonalMask`` and its causal and local forms. Every function also takes
``backend="auto"``.
"""

from ..other_names import missing
from .flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from .xformers import (
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    memory_efficient_attention,
)

__all__ = [
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalMask",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "memory_efficient_attention",
]


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
