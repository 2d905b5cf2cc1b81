"""Tiles of attention's kernels: what the best ones depend on, and what is taken where nothing is tuned."""

from dataclasses import dataclass

import torch

from . import arch
from .attention_tiles import chunks


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on; ``band``: causal, or a window."""

    head_dim: int
    dtype: torch.dtype
    group: int
    band: bool


@dataclass(frozen=True)
class Config:
    """A tile of ``block_m`` queries and ``block_n`` keys, by ``warps``; ``stages`` tiles on their way from memory.

    ``tma``: read by the tensor memory accelerator (sm_90 and later) where strides and addresses are multiples of 16 bytes.
    Each program makes descriptors that end where its sample ends, so that 0 and no neighbour's number is behind it.
    ``split``: read heads as two powers of two where one would be more (72 as 64 and 16, not as 128). ``lookahead``, of the
    forward: scores of a tile ahead in registers. ``maxnreg``: registers of a thread, 128 for two programs of 8 warps on a
    multiprocessor.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    split: bool = True
    lookahead: bool = True
    maxnreg: int = arch.REGISTERS_OF_THREAD


# Registers of a thread with which two programs of 8 warps share a multiprocessor.
SHARED_BY_TWO = arch.REGISTERS // (2 * 8 * 32)


def forward_heuristic(launch: Launch, gpu: str) -> Config:
    """128 queries, and with 3 stages the keys of two tiles ahead on their way: with 2 a tile is waited for as it is asked.

    Two programs share a multiprocessor, each at work while the other waits, where scores ahead of a tile, or these, find
    room in the registers. On sm_90 128 x 64 in 128 registers has room for 80 numbers and no mask: beyond that it spills, or,
    with TMA and two chunks, ptxas waits for every product by itself.
    On sm_100 Triton 3.9 refuses two chunks in the product that is carried over ("Trying to multibuffer TMEM while there is
    no store to the accumulator").
    """
    split = arch.capability(gpu) != 100
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        return Config(32, 32, 4, 1, split=split) if launch.head_dim <= 64 else Config(32, 16, 8, 1, split=split)
    if launch.head_dim > 128:
        return Config(64, 32, 4, 2) if arch.multiplies_registers(gpu) else Config(128, 32, 8, 2, split=split)
    if arch.multiplies_registers(gpu):
        if launch.head_dim > 96 and arch.is_small(gpu):  # its shared memory has room for one program
            return Config(128, 32 if launch.band else 64, 8, 2)
        if launch.head_dim <= 64 and arch.capability(gpu) == 120:  # ptxas would spill the scores ahead
            return Config(128, 64, 8, 3)
        return Config(128, 32, 4, 3, lookahead=launch.head_dim <= 64)
    if arch.capability(gpu) == 90:
        one_chunk = launch.head_dim <= 64
        if one_chunk or launch.head_dim <= 80 and not launch.band:
            return Config(128, 64, 8, 3, tma=one_chunk, lookahead=False, maxnreg=SHARED_BY_TWO)
        return Config(64, 64, 4, 3, tma=True, lookahead=False) if launch.head_dim <= 96 else Config(128, 64, 8, 3, tma=True)
    return Config(128, 64, 8, 2, split=split)


def dq_heuristic(launch: Launch, gpu: str) -> Config:
    """As in forward; where factors are in registers, 64 x 32 by 4 warps is what does not spill."""
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        return Config(16, 32, 4, 1)
    if arch.multiplies_registers(gpu):
        return Config(32, 32, 8, 1) if launch.head_dim > 128 else Config(64, 32, 4, 3)
    if launch.head_dim > 128:
        return Config(128, 32, 8, 1)
    if arch.capability(gpu) == 90:
        return Config(64, 64, 4, 3, tma=True) if launch.head_dim <= 96 else Config(128, 64, 8, 3, tma=True)
    return Config(128, 64, 8, 2)


def dkdv_heuristic(launch: Launch, gpu: str) -> Config:
    """64 queries by 128 keys: with a head of 128 all 255 registers, and TMA, as the addresses of pointers would spill. With
    one of 64, half the keys leave room for two programs.

    Where factors are in registers, few queries: Triton keeps all chunks of k and v in them.
    """
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        if launch.head_dim <= 64:
            return Config(32, 16, 4, 1)
        return Config(16, 16 if chunks(launch.head_dim, True)[1] else 32, 4, 1)
    if arch.multiplies_registers(gpu):
        if launch.head_dim > 128:
            return Config(32, 32, 8, 1)
        return Config(16, 64, 4, 3) if chunks(launch.head_dim, True)[1] else Config(32, 64, 4, 3)
    if launch.head_dim > 128:
        return Config(64, 64, 8, 1, tma=arch.capability(gpu) == 90)
    if arch.capability(gpu) == 90:
        return Config(64, 64, 4, 3, tma=True) if launch.head_dim <= 64 else Config(64, 128, 8, 3, tma=True)
    return Config(64, 128 if launch.group == 1 else 64, 8, 2)


HEURISTICS = {"forward": forward_heuristic, "dq": dq_heuristic, "dkdv": dkdv_heuristic}
