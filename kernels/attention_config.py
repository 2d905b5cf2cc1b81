"""Tile shapes of the attention kernels: what the best ones depend on, and the heuristics for what is not tuned."""

from dataclasses import dataclass

import torch

from . import arch
from .attention_tiles import chunks


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on; ``band``: whether the mask is causal or a sliding window."""

    head_dim: int
    dtype: torch.dtype
    group: int
    band: bool


@dataclass(frozen=True)
class Config:
    """A tile of ``block_m`` queries and ``block_n`` keys, computed by ``warps`` in a pipeline of ``stages``.

    ``tma``: load by TMA (sm_90 and later) where strides and addresses are multiples of 16 bytes. A program's descriptors end
    where its sample ends, so rows past it are filled with 0. ``split``: load the head dim as two powers of two where one
    would be larger (72 as 64 + 16, not as 128). ``lookahead``, forward only: issue QK^T one tile ahead. ``maxnreg``:
    registers per thread; 128 let two programs of 8 warps share an SM.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    split: bool = True
    lookahead: bool = True
    maxnreg: int = arch.REGISTERS_OF_THREAD


# Registers per thread with which two programs of 8 warps share an SM.
SHARED_BY_TWO = arch.REGISTERS // (2 * 8 * 32)


def forward_heuristic(launch: Launch, gpu: str) -> Config:
    """128 queries, and 3 stages, which prefetch keys two tiles ahead: 2 stages expose the latency of each load.

    Two programs share an SM, and one computes while the other waits, if the registers suffice. On sm_90 a 128 x 64 tile in
    128 registers suffices up to a head dim of 80 without a mask. Beyond that it spills, or, with TMA and two chunks, ptxas
    serialises the wgmma. On sm_100 Triton 3.9 rejects two chunks with lookahead ("Trying to multibuffer TMEM while there
    is no store to the accumulator").
    """
    split = arch.capability(gpu) != 100
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        return Config(32, 32, 4, 1, split=split) if launch.head_dim <= 64 else Config(32, 16, 8, 1, split=split)
    if launch.head_dim > 128:
        return Config(64, 32, 4, 2) if arch.uses_mma_sync(gpu) else Config(128, 32, 8, 2, split=split)
    if arch.uses_mma_sync(gpu):
        if launch.head_dim > 96 and arch.is_small(gpu):  # shared memory fits one program
            return Config(128, 32 if launch.band else 64, 8, 2)
        if launch.head_dim <= 64 and arch.capability(gpu) == 120:  # lookahead would spill
            return Config(128, 64, 8, 3)
        return Config(128, 32, 4, 3, lookahead=launch.head_dim <= 64)
    if arch.capability(gpu) == 90:
        one_chunk = launch.head_dim <= 64
        if one_chunk or launch.head_dim <= 80 and not launch.band:
            return Config(128, 64, 8, 3, tma=one_chunk, lookahead=False, maxnreg=SHARED_BY_TWO)
        return Config(64, 64, 4, 3, tma=True, lookahead=False) if launch.head_dim <= 96 else Config(128, 64, 8, 3, tma=True)
    return Config(128, 64, 8, 2, split=split)


def dq_heuristic(launch: Launch, gpu: str) -> Config:
    """As in forward; with mma.sync, whose operands are in registers, 64 x 32 by 4 warps does not spill."""
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        return Config(16, 32, 4, 1)
    if arch.uses_mma_sync(gpu):
        return Config(32, 32, 8, 1) if launch.head_dim > 128 else Config(64, 32, 4, 3)
    if launch.head_dim > 128:
        return Config(128, 32, 8, 1)
    if arch.capability(gpu) == 90:
        return Config(64, 64, 4, 3, tma=True) if launch.head_dim <= 96 else Config(128, 64, 8, 3, tma=True)
    return Config(128, 64, 8, 2)


def dkdv_heuristic(launch: Launch, gpu: str) -> Config:
    """64 queries by 128 keys. A head dim of 128 takes all 255 registers, and TMA, since pointers would spill. A head dim of
    64 takes 64 keys, which lets two programs share an SM.

    With mma.sync, few queries: Triton keeps all chunks of k and v in registers.
    """
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        if launch.head_dim <= 64:
            return Config(32, 16, 4, 1)
        return Config(16, 16 if chunks(launch.head_dim, True)[1] else 32, 4, 1)
    if arch.uses_mma_sync(gpu):
        if launch.head_dim > 128:
            return Config(32, 32, 8, 1)
        return Config(16, 64, 4, 3) if chunks(launch.head_dim, True)[1] else Config(32, 64, 4, 3)
    if launch.head_dim > 128:
        return Config(64, 64, 8, 1, tma=arch.capability(gpu) == 90)
    if arch.capability(gpu) == 90:
        return Config(64, 64, 4, 3, tma=True) if launch.head_dim <= 64 else Config(64, 128, 8, 3, tma=True)
    return Config(64, 128 if launch.group == 1 else 64, 8, 2)


HEURISTICS = {"forward": forward_heuristic, "dq": dq_heuristic, "dkdv": dkdv_heuristic}
