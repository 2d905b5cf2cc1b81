"""Configs of adaLN: what the best ones depend on, and what is taken where nothing is tuned."""

from dataclasses import dataclass

import torch
import triton

from .rows import pieces


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on; ``y_dtype`` is None without a gate, ``tokens`` a bucket."""

    width: int
    tokens: int
    x_dtype: torch.dtype
    y_dtype: torch.dtype | None
    norm: str | None
    affine: bool


@dataclass(frozen=True)
class ForwardConfig:
    """``warps`` of a program and ``tokens`` it takes at once, a power of two."""

    warps: int
    tokens: int


@dataclass(frozen=True)
class BackwardConfig:
    """``warps`` of a program, the fewest ``tokens`` it walks over, and ``programs`` for each multiprocessor."""

    warps: int
    tokens: int
    programs: int


def tile(width: int) -> tuple[int, int]:
    """Columns of a piece, and pieces of a row."""
    return pieces(max(width, 1), 1024 if width <= 6144 else 2048)


def backward_tile(width: int) -> tuple[int, int]:
    """The same of the backward, which takes a token at a time: blocks that fill 4 warps."""
    return pieces(max(width, 1), 1024 if width <= 6144 else 2048, 1024)


def forward_heuristic(launch: Launch, gpu: str) -> ForwardConfig:
    """8 numbers a thread and piece, 16 bytes of 16 bits; and 1024 a piece, or narrow rows would cost more to launch than to
    move.
    """
    block, _ = tile(launch.width)
    return ForwardConfig(warps=min(max(block // 256, 4), 16), tokens=min(max(1024 // block, 1), 16))


def backward_heuristic(launch: Launch, gpu: str) -> BackwardConfig:
    """Up to 24 numbers a thread, and as many programs as are resident, or the last ones would wait for a turn of their own.

    16 numbers take at most 128 registers a thread with two sums, 130 to 184 with a gate's besides or an affine norm, 64 to
    80 without a norm; 24 of them 168, with a gate 242, and 119 without a norm.
    """
    block, count = backward_tile(launch.width)
    warps = min(max(triton.next_power_of_2(triton.cdiv(block * count, 32 * 24)), 1), 8)
    wide, gated = block * count > 2048, launch.y_dtype is not None
    if launch.norm is None:
        resident = 16 if wide else 24
    elif gated or launch.affine:
        resident = 8 if wide and gated else 12
    else:
        resident = 12 if wide else 16
    return BackwardConfig(warps=warps, tokens=8, programs=max(resident // warps, 1))


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
