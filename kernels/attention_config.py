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


def forward_heuristic(launch: Launch, gpu: str) -> Config:
    """Tiles of 128 x 64 by 8 warps: at most 254 registers, no spill, and 64 kB of shared memory for a head of 128.

    On sm_90 128 x 128 has 255 and spills, or ptxas puts all exp2 behind the products. On sm_100 Triton 3.9 refuses two
    chunks in the product that is carried over ("Trying to multibuffer TMEM while there is no store to the accumulator").
    """
    split = arch.capability(gpu) != 100
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        return Config(32, 32, 4, 1, split=split) if launch.head_dim <= 64 else Config(32, 16, 8, 1, split=split)
    if launch.head_dim > 128:
        return Config(64, 32, 4, 2) if arch.multiplies_registers(gpu) else Config(128, 32, 8, 2, split=split)
    if arch.multiplies_registers(gpu) and launch.band and launch.head_dim > 64:
        return Config(128, 32, 8, 2)
    return Config(128, 64, 8, 2, split=split)


def dq_heuristic(launch: Launch, gpu: str) -> Config:
    """As in forward; where factors are in registers, 64 x 32 by 4 warps is what does not spill."""
    if gpu == "cpu":
        return Config(32, 32, 4, 1)
    if launch.dtype == torch.float32:
        return Config(16, 32, 4, 1)
    if arch.multiplies_registers(gpu):
        if launch.head_dim > 128:
            return Config(32, 32, 8, 1)
        return Config(64, 32, 4, 2)
    return Config(128, 64, 8, 2) if launch.head_dim <= 128 else Config(128, 32, 8, 1)


def dkdv_heuristic(launch: Launch, gpu: str) -> Config:
    """64 queries by 128 keys: with a head of 128 all 255 registers, and TMA, as the addresses of pointers would spill.

    Where factors are in registers, one chunk: with two Triton keeps both chunks of k and v in them and spills by the
    hundred.
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
        return Config(32, 128, 8, 2, split=False) if launch.head_dim <= 64 else Config(64, 64, 8, 2, split=False)
    tma = arch.capability(gpu) == 90 and launch.head_dim > 96
    return Config(64, 128, 8, 2, tma) if launch.head_dim <= 128 else Config(64, 64, 8, 1, tma)


HEURISTICS = {"forward": forward_heuristic, "dq": dq_heuristic, "dkdv": dkdv_heuristic}
