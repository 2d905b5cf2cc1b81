"""Configs of adaLN: what the best ones depend on, and what is taken where nothing is tuned."""

from dataclasses import dataclass

import torch
import triton


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


def forward_heuristic(launch: Launch, gpu: str) -> ForwardConfig:
    """16 numbers a thread, and no fewer than 2048 a program, or narrow rows would cost more to launch than to move."""
    block = triton.next_power_of_2(max(launch.width, 1))
    tile = max(block, 2048)
    return ForwardConfig(warps=min(tile // 512, 16), tokens=min(tile // block, 16))


def backward_heuristic(launch: Launch, gpu: str) -> BackwardConfig:
    """16 numbers a thread, and as many programs as are resident, or the last ones would wait for a turn of their own.

    They take at most 128 registers a thread with two sums, 130 to 184 with a gate's besides or an affine norm, 64 to 80
    without a norm.
    From 4097 columns on 8 warps may have 255, where 16 warps may have 128 and spill.
    """
    warps = min(max(triton.next_power_of_2(max(launch.width, 1)) // 512, 1), 8)
    resident = 1 if launch.width > 4096 else 16 // warps
    if launch.norm is None:
        resident = resident * 3 // 2
    elif launch.y_dtype is not None or launch.affine:
        resident = 1 if warps == 8 else resident * 3 // 4
    return BackwardConfig(warps=warps, tokens=8, programs=resident)


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
