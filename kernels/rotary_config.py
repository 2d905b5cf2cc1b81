"""Configs of QK-norm and rotation: what the best ones depend on, and the heuristics for shapes that are not tuned."""

import functools
from dataclasses import dataclass

import torch

from .integers import cdiv, next_power_of_2
from .rows import split_row


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
    """``warps`` of a program, ``tokens`` it takes at once, and ``programs`` for each SM."""

    warps: int
    tokens: int
    programs: int


@functools.cache
def pair_block(head_dim: int) -> int:
    """Pairs of a part: all, to the next power of two, or a quarter of it where three cover them: 3 * 16 of 36."""
    pairs = max((head_dim + 1) // 2, 1)
    block = next_power_of_2(pairs)
    return block // 4 if block >= 4 and 4 * pairs <= 3 * block else block


@functools.cache
def head_block(heads: int, head_dim: int, pairing: str, warps: int) -> int:
    """Heads of a piece, with the least padding: 8 of 24 or 40.

    Near 8 elements a thread in each load, which takes both elements of pairs side by side and one of "half": a thread then
    loads 16 bytes, and once a weight that is one head's for all.
    """
    columns = pair_block(head_dim) * (2 if pairing == "interleaved" else 1)
    return split_row(max(heads, 1), max(32 * 8 * warps // columns, 1), 1)[0]


def elements_of(heads: int, head_dim: int) -> int:
    """Of one token in registers, padding and all."""
    block, pairs = split_row(max(heads, 1), 1, 1), pair_block(head_dim)
    return block[0] * block[1] * 2 * pairs * cdiv(max((head_dim + 1) // 2, 1), pairs)


def _tokens(launch: Launch) -> tuple[int, int]:
    """(tokens, elements): as many as make 1024 elements of q a program, and its elements of the larger of q and k."""
    elements = elements_of(max(launch.heads, launch.key_heads), launch.head_dim)
    tokens = min(1 << max(1024 // elements, 1).bit_length() - 1, 16)
    return tokens, tokens * elements


def forward_heuristic(launch: Launch, gpu: str) -> ForwardConfig:
    """64 elements of q and k a thread or more, 48 without norm: with fewer, more threads would compute the same cosine."""
    tokens, _ = _tokens(launch)
    elements = tokens * sum(elements_of(heads, launch.head_dim) for heads in (launch.heads, launch.key_heads) if heads)
    share = elements // (32 * (48 if launch.norm is None else 64))
    return ForwardConfig(warps=min(1 << max(share, 1).bit_length() - 1, 8), tokens=tokens)


def backward_heuristic(launch: Launch, gpu: str) -> BackwardConfig:
    """16 elements a thread or more, and as many programs as are resident, or the last would wait for a turn of their own.

    20 at most where all heads are normed together, and have sums for each.
    """
    tokens, elements = _tokens(launch)
    if launch.norm == "rms_all":
        warps = min(next_power_of_2(cdiv(elements, 32 * 20)), 16)
    else:
        warps = min(1 << max(elements // (32 * 16), 1).bit_length() - 1, 16)
    # of 65,536 registers: up to 128 a thread, 55 where there is nothing to sum, 168 for 24 learned sums
    resident = 16
    if launch.freqs == "learned":
        resident = 12 if elements > 32 * 20 * warps else 16
    elif launch.norm is None:
        resident = 32
    return BackwardConfig(warps=warps, tokens=tokens, programs=max(resident // warps, 1))


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
