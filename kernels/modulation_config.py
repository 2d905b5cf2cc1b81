"""Configs of adaLN: what the best ones depend on, and the heuristics for what is not tuned."""

from dataclasses import dataclass

import torch

from .integers import cdiv, next_power_of_2
from .rows import split_row


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on; ``y_dtype`` is None without a gate, ``tokens`` a bucket (configs.bucket)."""

    width: int
    tokens: int
    x_dtype: torch.dtype
    y_dtype: torch.dtype | None
    norm: str | None
    affine: bool


@dataclass(frozen=True)
class ForwardConfig:
    """``warps`` per program and ``tokens`` per tile, a power of two."""

    warps: int
    tokens: int


@dataclass(frozen=True)
class BackwardConfig:
    """``warps`` per program, the minimum number of ``tokens`` it loops over, and ``programs`` per SM."""

    warps: int
    tokens: int
    programs: int


def tile(width: int) -> tuple[int, int]:
    """Columns per piece, and pieces per row."""
    return split_row(max(width, 1), 1024 if width <= 6144 else 2048)


def backward_tile(width: int) -> tuple[int, int]:
    """The same for the backward, which processes one token at a time: pieces that fill 4 warps."""
    return split_row(max(width, 1), 1024 if width <= 6144 else 2048, 1024)


def forward_heuristic(launch: Launch, gpu: str) -> ForwardConfig:
    """8 elements per thread and piece, 16 bytes in 16-bit types; tiles of at least 1024 elements, as for smaller ones
    the launch overhead would exceed the time to move them.
    """
    block, _ = tile(launch.width)
    return ForwardConfig(warps=min(max(block // 256, 4), 16), tokens=min(max(1024 // block, 1), 16))


def backward_heuristic(launch: Launch, gpu: str) -> BackwardConfig:
    """Up to 24 elements per thread, and as many programs as are resident, which avoids a partial second wave.

    16 elements take at most 128 registers per thread with two sums, 130 to 184 with a gate or an affine norm as well, 64 to
    80 without a norm; 24 elements take 168, with a gate 242, and 119 without a norm.
    """
    block, count = backward_tile(launch.width)
    warps = min(max(next_power_of_2(cdiv(block * count, 32 * 24)), 1), 8)
    wide, gated = block * count > 2048, launch.y_dtype is not None
    if launch.norm is None:
        resident = 16 if wide else 24
    elif gated or launch.affine:
        resident = 8 if wide and gated else 12
    else:
        resident = 12 if wide else 16
    return BackwardConfig(warps=warps, tokens=8, programs=max(resident // warps, 1))


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
