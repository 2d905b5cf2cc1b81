"""What third-party video transformers share: rows of modulation, and rotary embeddings from tables or positions.

B batch, N tokens of a sample, D width, H heads, E head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from .known import LAYER_NORM


class Positions(NamedTuple):
    """Token positions, from which the kernel computes angles; replaces diffusers' pair of cosine and sine tables."""

    coords: torch.Tensor  # (N, 3) int32, of one sample
    axes: tuple[int, ...]
    theta: float


def grid_positions(grid: tuple[int, int, int], axes, theta: float, device) -> Positions:
    """The positions of a sample of ``grid`` tokens in t, h, w order."""
    ranges = [torch.arange(n, device=device, dtype=torch.int32) for n in grid]
    coords = torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, 3)
    return Positions(coords, tuple(axes), theta)


def tables(positions: Positions):
    """Cosines and sines (N, R), each angle twice, in the layout of diffusers."""
    coords, angles = positions.coords.double(), []
    for axis, size in enumerate(positions.axes):
        steps = torch.arange(0, size, 2, device=coords.device, dtype=torch.float64) / size
        angles.append(coords[:, axis : axis + 1] * positions.theta**-steps)
    angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate_by_tables(x_BNHE, cos, sin):
    """Rotate the pairs (2i, 2i + 1) of the first R channels by tables that broadcast to (N, 1, R)."""
    rotated = cos.shape[-1]
    x_rot, rest = x_BNHE[..., :rotated].float(), x_BNHE[..., rotated:]
    other = torch.stack([-x_rot[..., 1::2], x_rot[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat([(x_rot * cos + other * sin).to(x_BNHE.dtype), rest], dim=-1)


def are_tables(cos, sin, axes, theta: float) -> bool:
    """Whether cosines and sines (M, R), each angle twice, are those of positions 0, 1, ... at ``theta``.

    Those without memory, of a model that computes nothing, are not in the way.
    """
    if cos.is_meta:
        return True
    coords = torch.arange(cos.shape[0], device=cos.device, dtype=torch.int32)[:, None].expand(-1, 3)
    right = tables(Positions(coords, tuple(axes), theta))
    return all(given.shape == exact.shape and torch.allclose(given.float(), exact, atol=1e-6)
               for given, exact in zip((cos, sin), right, strict=True))


def norm_rotate(q_BNHE, k_BNHE, positions: Positions | None, *, text_before: int = 0, **norm):
    """ops.qk_norm_rope on batches; ``norm``: its keywords. Without rotation k may have another length than q.

    q and k may have ``text_before`` more tokens before the positions, and more after them. These are text: at position 0,
    whose angles are 0.
    """
    batch, tokens, keys, rotation = q_BNHE.shape[0], q_BNHE.shape[1], k_BNHE.shape[1], dict(coords=None)
    if positions is not None:
        coords = F.pad(positions.coords, (0, 0, text_before, tokens - text_before - positions.coords.shape[0]))
        rotation = dict(coords=coords.repeat(batch, 1), axes=positions.axes, theta=positions.theta)
    elif norm.get("norm") is None:
        return q_BNHE, k_BNHE
    q, k = ops.qk_norm_rope(q_BNHE.flatten(0, 1), k_BNHE.flatten(0, 1), **rotation, **norm)
    return q.unflatten(0, (batch, tokens)), k.unflatten(0, (batch, keys))


# ------------------------------------------------------------------------------------------------ modulation
def is_plain_norm(norm) -> bool:
    """Whether a layer norm may be absorbed: PyTorch's, or diffusers' in float32."""
    return LAYER_NORM(norm)


def affine(norm, width: int) -> dict:
    """The keywords of a plain layer norm; raises on another width, as its own forward would."""
    if norm.normalized_shape != (width,):
        raise ValueError(f"layer norm: expected a width of {norm.normalized_shape}, got {width}; give it the width "
                         f"of its model")
    return dict(weight=norm.weight, bias=norm.bias, eps=norm.eps)


def rows_of(modulation_RD, tokens: int) -> torch.Tensor | None:
    """The modulation row (one per sample) of each of R * N tokens; None if all share one row."""
    if modulation_RD.shape[0] == 1:
        return None
    rows = torch.arange(modulation_RD.shape[0], device=modulation_RD.device, dtype=torch.int32)
    return rows.repeat_interleave(tokens)


def norm_modulate(norm, x_BND, shift_BD, scale_BD):
    """``norm(x) * (1 + scale) + shift`` of a plain layer norm."""
    out = ops.norm_modulate(x_BND.flatten(0, 1), shift_BD, scale_BD, rows_of(shift_BD, x_BND.shape[1]),
                            **affine(norm, x_BND.shape[-1]))
    return out.view_as(x_BND)


def add(x_BND, y_BND, gate_BD):
    """``x + gate * y``."""
    out = ops.gate_residual(x_BND.flatten(0, 1), y_BND.flatten(0, 1), gate_BD, rows_of(gate_BD, x_BND.shape[1]))
    return out.view(x_BND.shape)


def add_norm_modulate(norm, x_BND, y_BND, gate_BD, shift_BD, scale_BD):
    """``x + gate * y``, and its modulated plain layer norm."""
    x, h = ops.gate_residual_norm_modulate(
        x_BND.flatten(0, 1), y_BND.flatten(0, 1), gate_BD, shift_BD, scale_BD, rows_of(gate_BD, x_BND.shape[1]),
        **affine(norm, x_BND.shape[-1]))
    return x.view(x_BND.shape), h.view(x_BND.shape)
