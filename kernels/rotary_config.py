"""Configs of QK-norm and rotation: what the best ones depend on, and what is taken where nothing is tuned."""

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on.

    ``key_heads`` is 0 without k, ``tokens`` a bucket, ``freqs`` "fixed", "learned" or None.
    """

    heads: int
    key_heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype
    norm: str | None
    affine: bool
    freqs: str | None
    pairing: str


@dataclass(frozen=True)
class ForwardConfig:
    """``warps`` of a program and ``tokens`` it takes at once, a power of two."""

    warps: int
    tokens: int


@dataclass(frozen=True)
class BackwardConfig:
    """``warps`` of a program, ``tokens`` it takes at once, and ``programs`` for each multiprocessor."""

    warps: int
    tokens: int
    programs: int


def tile(heads: int, head_dim: int) -> int:
    """Numbers of one token in registers: both lengths of a tile are powers of two."""
    return triton.next_power_of_2(max(heads, 1)) * max(triton.next_power_of_2(max(head_dim, 1)), 2)


def forward_heuristic(launch: Launch, gpu: str) -> ForwardConfig:
    """32 numbers of q a thread: with fewer, more threads would compute the same cosine; 1024 or more a program."""
    block = tile(max(launch.heads, launch.key_heads), launch.head_dim)
    numbers = max(block, 1024)
    return ForwardConfig(warps=min(numbers // 1024, 8), tokens=min(numbers // block, 16))


def backward_heuristic(launch: Launch, gpu: str) -> BackwardConfig:
    """16 numbers a thread, and as many programs as are resident, or the last ones would wait for a turn of their own."""
    block = tile(max(launch.heads, launch.key_heads), launch.head_dim)
    numbers = max(block, 1024)
    warps = min(numbers // 512, 16)
    # of 65,536 registers: up to 128 a thread, 55 where there is nothing to sum
    resident = 32 if launch.norm is None and launch.freqs != "learned" else 16
    return BackwardConfig(warps=warps, tokens=min(numbers // block, 16), programs=resident // warps)


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
