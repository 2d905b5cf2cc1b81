"""Configs of norm and activation: what the best ones depend on, and the heuristics for shapes that are not tuned."""

from dataclasses import dataclass

import torch

from . import arch
from .integers import cdiv, next_power_of_2
from .rows import split_row


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on.

    ``pixels``: of all samples together, rounded up to a bucket. ``y_dtype``: of the output or its gradient.
    """

    channels: int
    pixels: int
    norm: str
    act: str | None
    x_dtype: torch.dtype
    y_dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """``warps`` per program, and ``pixels`` per tile, a power of two.

    ``programs`` per SM, for kernels that loop over tiles: the backward and the group statistics.
    """

    warps: int
    pixels: int
    programs: int


def tile(channels: int, norm: str) -> tuple[int, int]:
    """Channels per piece, and pieces per pixel (see rows.py): few pieces, so that a thread loads 16 bytes of each.

    Group norm has one piece: a thread holds statistics of each of its channels, and those of more channels would spill.
    """
    whole = next_power_of_2(max(channels, 1))
    return (whole, 1) if norm == "group" else split_row(max(channels, 1), max(whole // 2, 128))


def config_of_threads(launch: Launch, elements: int, warps: int, resident: int, most: int = 512) -> Config:
    """``elements`` per thread and ``resident`` warps per SM; at most ``most`` pixels per tile, a limit for few channels."""
    block, count = tile(launch.channels, launch.norm)
    warps = max(warps, next_power_of_2(block * count) // (32 * elements))
    pixels = next_power_of_2(cdiv(32 * warps * elements, block * count))
    return Config(warps, min(pixels, most), max(resident // warps, 1))


def forward_heuristic(launch: Launch, gpu: str) -> Config:
    """32 elements per thread, so that a weight is loaded once for many; 16 for small inputs, or they would not fill the GPU.

    16 for group norm too, whose statistics take three registers per element, with 16 warps per SM: 128 registers per thread.
    """
    if launch.norm == "group":
        return config_of_threads(launch, 16, 4, 16)
    return config_of_threads(launch, 32 if launch.pixels * launch.channels >= 2**23 else 16, 4, 32)


def backward_heuristic(launch: Launch, gpu: str) -> Config:
    """16 elements per thread, with five registers each, and 16 warps per SM, with 128 registers per thread.

    8 warps for more than 1024 channels: a thread then holds weights and biases of 8 channels; with 4 warps, 16 would spill.
    """
    wide = launch.channels > 1024
    # 168 registers where 16 elements of rms need more than 128, or the loop spills
    resident = 12 if arch.capability(gpu) == 120 and launch.norm == "rms" and not wide else 16
    # the interpreter adds the pixels of a tile sequentially: with more, its error exceeds that of a GPU's tree reduction
    return config_of_threads(launch, 16, 8 if wide else 4, resident, 16 if gpu == "cpu" else 512)


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
