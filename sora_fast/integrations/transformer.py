"""What the video transformers of other people share here: rows of modulation, rotation by tables or by places.

B batch, N tokens of a sample, D width, H heads, E head dim.
"""

from typing import NamedTuple

import torch

from .. import ops


class Places(NamedTuple):
    """In place of diffusers' pair of cosine and sine tables: where the tokens are, for angles made in the kernel."""

    coords: torch.Tensor  # (B * N, 3) int32
    axes: tuple[int, ...]


def grid_places(batch: int, grid: tuple[int, int, int], axes, device) -> Places:
    """The places of ``batch`` samples of ``grid`` tokens in t, h, w order."""
    ranges = [torch.arange(n, device=device, dtype=torch.int32) for n in grid]
    coords = torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, 3)
    return Places(coords.repeat(batch, 1), tuple(axes))


def tables(places: Places, batch: int, theta: float):
    """Cosines and sines (N, R) of one sample, each angle twice, as diffusers' tables hold them."""
    coords, angles = places.coords[: places.coords.shape[0] // batch].double(), []
    for axis, size in enumerate(places.axes):
        steps = torch.arange(0, size, 2, device=coords.device, dtype=torch.float64) / size
        angles.append(coords[:, axis : axis + 1] * theta**-steps)
    angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate_by_tables(x_BNHE, cos, sin):
    """Pairs (2i, 2i + 1) of the first R entries turned by tables that broadcast to (N, 1, R)."""
    rotated = cos.shape[-1]
    turned, rest = x_BNHE[..., :rotated].float(), x_BNHE[..., rotated:]
    other = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat([(turned * cos + other * sin).to(x_BNHE.dtype), rest], dim=-1)


def rows_of(batch: int, tokens: int, device) -> torch.Tensor | None:
    """Which row of modulation (one per sample) each of B * N tokens uses; None where there is one row."""
    return None if batch == 1 else torch.arange(batch, device=device, dtype=torch.int32).repeat_interleave(tokens)


def table_is(module_tables, axes, theta: float) -> bool:
    """Whether ``module_tables`` (M, R), cosines with each angle twice, are those of places 0, 1, ... at ``theta``."""
    length = min(module_tables.shape[0], 4)
    coords = torch.arange(length, device=module_tables.device, dtype=torch.int32)[:, None].expand(length, 3)
    wanted, _ = tables(Places(coords, tuple(axes)), 1, theta)
    return torch.allclose(module_tables[:length].float(), wanted, atol=1e-6)


def norm_rotate(q_BNHE, k_BNHE, places: Places | None, theta: float = 1e4, **norm):
    """ops.qk_norm_rope on batches; ``norm``: its keywords. k may have a length of its own where nothing is rotated."""
    batch, tokens, keys = q_BNHE.shape[0], q_BNHE.shape[1], k_BNHE.shape[1]
    more = {} if places is None else dict(axes=places.axes, theta=theta)
    q, k = ops.qk_norm_rope(q_BNHE.flatten(0, 1), k_BNHE.flatten(0, 1), None if places is None else places.coords,
                            **norm, **more)
    return q.unflatten(0, (batch, tokens)), k.unflatten(0, (batch, keys))
