"""VarlenAttention: self- or cross-attention within the samples of a pack.

N tokens, L text tokens, D width, H heads, E head dim.
"""

import torch
from torch import nn

from .. import checks, ops
from ..ops.rotary import check_axes
from ..other_names import Named
from ..pack import Pack, check_pack, check_text


class VarlenAttention(nn.Module, Named):
    """Multi-head attention on packs with optional QK-norm and 3-D RoPE.

    Args:
        width: D. heads: H, divides D.
        context_width: width of the tokens attended to; None: self-attention, with q, k and v in one ``qkv`` layer
            (the names of facebookresearch/DiT and timm).
        qk_norm: RMS norm of each head's queries and keys.
        rope_axes: rotated channels of t, h, w; None: no rotation. theta: base of the rotation's frequencies.

    Raises:
        ValueError, TypeError: heads, axes or theta that do not fit; a pack of other tokens.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, qk_norm: bool = False,
                 rope_axes: tuple[int, int, int] | None = None, theta: float = 1e4):
        super().__init__()
        if width % heads:
            raise ValueError(f"VarlenAttention: expected heads to divide the width {width}, got {heads}; choose a "
                             f"divisor")
        if rope_axes is not None:
            check_axes("VarlenAttention", rope_axes, theta, width // heads, "rope_axes")
        self.heads, self.rope_axes, self.theta = heads, rope_axes, theta
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
        self.q_norm = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x, pack: Pack, context=None):
        """x (N, D), for cross-attention context (L, Dc) with the pack's text lengths -> (N, D)."""
        op, heads = "VarlenAttention", lambda t, *parts: t.unflatten(-1, (*parts, self.heads, -1))
        checks.shape(op, "x", x, ("N", "D"), "flatten the tokens of all samples into one row each")
        check_pack(op, pack, x=x)
        itself = context is None
        if itself != hasattr(self, "qkv"):
            expected = "context for a layer with context_width" if itself else "no context for a layer without context_width"
            raise checks.error(op, expected, checks.came(context), "call it as it was made, or make another layer")
        if itself:
            q, k, v = heads(self.qkv(x), 3).unbind(1)
        else:
            check_text(op, pack, context)
            q, (k, v) = heads(self.q(x)), heads(self.kv(context), 2).unbind(1)
        q, k = self._norm_rope(q, k, pack, itself)
        out = ops.varlen_attention(q, k, v, pack, None if itself else pack.text_cu_seqlens)
        return self.proj(out.flatten(1))

    def _norm_rope(self, q, k, pack, itself: bool):
        norm = None if self.q_norm is None else "rms_head"
        turn = itself and self.rope_axes is not None
        if norm is None and not turn:
            return q, k
        return ops.qk_norm_rope(q, k, pack if turn else None, q_weight=self.q_norm, k_weight=self.k_norm, norm=norm,
                                axes=self.rope_axes or (0, 0, 0), theta=self.theta,
                                rows=pack if itself and not turn else None)
