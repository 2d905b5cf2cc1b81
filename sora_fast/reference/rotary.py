"""Norm of queries and keys, then a rotary embedding by the token's position in time, height and width.

N tokens, H heads, E head dim, R rotated channels of a head (R <= E), P = R / 2 pairs.
(RoPE: Su et al., arXiv 2104.09864; one share of the pairs per axis.)
"""

import torch

from ..precision import wide_dtype
from .modulation import only_samples
from .normalization import normalise

__all__ = ["qk_norm_rope"]


def angles(coords_N3, axes, theta, freqs, dtype):
    """The angle of every pair: (N, 1, P), or (N, H, P) where ``freqs`` has heads."""
    coords_N3 = coords_N3.to(dtype)
    if freqs is not None:
        spec = "na,ahp->nhp" if freqs.dim() == 3 else "na,ap->np"
        result = torch.einsum(spec, coords_N3, freqs.to(dtype))
        return result if freqs.dim() == 3 else result[:, None]
    thetas = theta if isinstance(theta, (tuple, list)) else (theta,) * len(axes)
    parts = []
    for axis, (size, base) in enumerate(zip(axes, thetas, strict=True)):
        steps = torch.arange(size // 2, dtype=dtype, device=coords_N3.device)
        parts.append(coords_N3[:, axis : axis + 1] * torch.pow(base, -2.0 * steps / max(size, 1)))
    return torch.cat(parts, dim=1)[:, None]


def rotate(x_NHE, angles_NHP, pairing: str):
    """Turn pairs (2i, 2i+1) ("interleaved") or (i, i + R/2) ("half") by angle i; the rest of E passes through."""
    pairs = angles_NHP.shape[-1]
    x_rot, rest = x_NHE[..., : 2 * pairs], x_NHE[..., 2 * pairs :]
    if pairing == "interleaved":
        a, b = x_rot[..., 0::2], x_rot[..., 1::2]
    else:
        a, b = x_rot[..., :pairs], x_rot[..., pairs:]
    cos, sin = angles_NHP.cos(), angles_NHP.sin()
    a, b = a * cos - b * sin, a * sin + b * cos
    if pairing == "interleaved":
        x_rot = torch.stack([a, b], dim=-1).flatten(-2)
    else:
        x_rot = torch.cat([a, b], dim=-1)
    return torch.cat([x_rot, rest], dim=-1)


def _norm_rope(x, weight, bias, angles_NHP, norm, pairing, eps, rows):
    tokens, heads, head_dim = x.shape
    wide = wide_dtype(x, weight, bias, angles_NHP)
    x_NHE = only_samples(x.to(wide).reshape(tokens, heads * head_dim), rows).reshape(x.shape)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if norm == "rms_all":
        x_NHE = normalise(x_NHE.reshape(tokens, heads * head_dim), "rms", weight, bias, eps).reshape(x.shape)
    elif norm is not None:
        x_NHE = normalise(x_NHE, "rms" if norm == "rms_head" else "layer", weight, bias, eps)
    if angles_NHP is not None:
        x_NHE = rotate(x_NHE, angles_NHP.to(wide), pairing)
    return only_samples(x_NHE.reshape(tokens, heads * head_dim), rows).reshape(x.shape).to(x.dtype)


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """Wan's division of a head between t, h and w, of at most 128 entries: (44, 42, 42) of 128, (24, 20, 20) of 64."""
    side = min(head_dim, 128) // 6 * 2
    return min(head_dim, 128) // 2 * 2 - 2 * side, side, side


def qk_norm_rope(q, k, coords, *, q_weight=None, k_weight=None, q_bias=None, k_bias=None, norm="rms_head",
                 axes=None, theta=1e4, freqs=None, pairing="interleaved", eps=1e-6, rows=None):
    """``q`` and ``k`` normalised and rotated; see ``sora_fast.ops.qk_norm_rope``."""
    turn = None
    if coords is not None:
        axes = default_axes(q.shape[-1]) if axes is None else axes
        tensors = (q, k, freqs, q_weight, k_weight)
        if coords.is_floating_point():
            tensors += (coords,)
        # the coordinates of no sample's tokens are not read either, nor do they reach the gradient of freqs
        turn = angles(only_samples(coords, rows), axes, theta, freqs, wide_dtype(*tensors))
    q_out = _norm_rope(q, q_weight, q_bias, turn, norm, pairing, eps, rows)
    k_out = None if k is None else _norm_rope(k, k_weight, k_bias, turn, norm, pairing, eps, rows)
    return q_out, k_out
