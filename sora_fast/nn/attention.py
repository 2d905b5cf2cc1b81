"""VarlenAttention: self- or cross-attention within the samples of a pack.

N tokens, L text tokens, D width, H heads, E head dim.
"""

import torch
from torch import nn

from .. import ops
from ..pack import Pack


class VarlenAttention(nn.Module):
    """Multi-head attention on packs with optional QK-norm and 3-D RoPE.

    Args:
        width: D. heads: H, divides D.
        context_width: width of the tokens attended to; None: self-attention, with q, k and v in one ``qkv`` layer
            (the official DiT's and timm's names).
        qk_norm: RMS norm of each head's queries and keys.
        rope_axes: rotated entries of t, h, w; None: no rotation. theta: base of the rotation's frequencies.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, qk_norm: bool = False,
                 rope_axes: tuple[int, int, int] | None = None, theta: float = 1e4):
        super().__init__()
        if width % heads:
            raise ValueError(f"VarlenAttention: expected heads to divide the width {width}, got {heads}; choose a "
                             f"divisor")
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
        heads = lambda t, *parts: t.unflatten(-1, (*parts, self.heads, -1))
        if context is None:
            q, k, v = heads(self.qkv(x), 3).unbind(1)
            cu_k, max_k = pack.cu_seqlens, pack.max_seqlen
        else:
            q, (k, v) = heads(self.q(x)), heads(self.kv(context), 2).unbind(1)
            cu_k, max_k = pack.text_cu_seqlens, pack.text_max_seqlen
        q, k = self._norm_rope(q, k, pack, context is None)
        out = ops.varlen_attention(q, k, v, pack.cu_seqlens, cu_k, pack.max_seqlen, max_k)
        return self.proj(out.flatten(1))

    def _norm_rope(self, q, k, pack, itself: bool):
        norm = None if self.q_norm is None else "rms_head"
        turn = itself and self.rope_axes is not None
        if norm is None and not turn:
            return q, k
        return ops.qk_norm_rope(q, k, pack.coords if turn else None, q_weight=self.q_norm, k_weight=self.k_norm,
                                norm=norm, axes=self.rope_axes or (0, 0, 0), theta=self.theta,
                                rows=pack.rows if itself else None)
