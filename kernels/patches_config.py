"""Configs of patch_embed and unpatchify: what the best ones depend on, and the heuristics for shapes that are not tuned."""

from dataclasses import dataclass

import torch

from . import arch
from .integers import next_power_of_2
from .rows import split_row


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on.

    ``tokens``: rounded up to a bucket. ``width``: D, or C for unpatchify. ``rows`` of a patch: C * pt * ph, or pt * ph for
    unpatchify, of ``run`` = pw elements each.
    """

    tokens: int
    width: int
    rows: int
    run: int
    dtype: torch.dtype


@dataclass(frozen=True)
class GemmConfig:
    """The tile of a GEMM: ``block_n`` tokens, ``block_d`` columns of the width and ``block_k`` elements of a patch."""

    block_n: int
    block_d: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PermuteConfig:
    """The tile of a permutation: tokens, rows (pt, ph) of a patch, and channels, powers of two."""

    block_n: int
    block_r: int
    block_c: int
    warps: int


LONGEST_RUN = 64  # the largest pw: a tile holds all elements of a patch along w


def _padded(launch: Launch) -> int:
    """Elements of a patch, with rows and runs padded to powers of two; at least 16, the least that tl.dot supports."""
    return max(next_power_of_2(launch.rows) * next_power_of_2(launch.run), 16)


def embed_heuristic(launch: Launch, gpu: str) -> GemmConfig:
    """A patch of up to 256 elements is gathered whole, once for all columns. Tiles are small enough for several CTAs per SM:
    one loads its part of the weight while another stores.
    """
    padded = _padded(launch)
    if gpu == "cpu":
        return GemmConfig(32, 16, min(padded, LONGEST_RUN), warps=4, stages=1)
    small = arch.is_small(gpu)
    if launch.dtype == torch.float32:
        if padded <= 64 and not small:
            return GemmConfig(32 if arch.uses_mma_sync(gpu) else 64, 64, max(padded, 32), warps=4, stages=3)
        return GemmConfig(64, 64, max(next_power_of_2(launch.run), 32), warps=8, stages=2)
    if launch.width % 8 != 0:  # stores of 2 bytes: the addresses of more would spill
        return GemmConfig(64, 32, min(padded, 64), warps=4, stages=2)
    if padded <= 64:
        return GemmConfig(64, 64, padded, warps=4, stages=3)
    if padded <= 256:
        fits = not small or launch.rows * next_power_of_2(launch.run) <= 192
        return GemmConfig(64, 64, 128, warps=4, stages=3 if fits else 2)
    if launch.run < 8:  # the addresses of 64 elements in shorter runs, or of more tokens, spill
        return GemmConfig(64, 64 if small else 128, 32, warps=8, stages=3)
    return GemmConfig(64 if small else 128, 128, 64, warps=8, stages=2 if small else 3)


def latents_heuristic(launch: Launch, gpu: str) -> GemmConfig:
    """The gradient of the latents: a GEMM whose K is the width, pipelined.

    The MMA of a warpgroup is 64 x 64 x 32: with larger ones ptxas serialises the wgmma (warning C7514).
    """
    padded = _padded(launch)
    if gpu == "cpu":
        return GemmConfig(32, 16, min(padded, LONGEST_RUN), warps=4, stages=1)
    if launch.dtype == torch.float32:
        return GemmConfig(64, 32, min(padded, 64), warps=4, stages=2)
    return GemmConfig(128, 32, min(padded, 64), warps=8, stages=4)


def weight_heuristic(launch: Launch, gpu: str) -> GemmConfig:
    """The gradient of the weight: a GEMM whose K is the tokens.

    It is not pipelined: while a program waits for the tile that it gathers, others on the SM run.
    """
    padded = _padded(launch)
    if gpu == "cpu":
        return GemmConfig(16, 16, min(padded, LONGEST_RUN), warps=4, stages=1)
    if launch.dtype == torch.float32:
        return GemmConfig(32, 64, min(padded, 64), warps=4, stages=1)
    if arch.is_small(gpu):
        return GemmConfig(64, 64, min(padded, 64), warps=4, stages=1)
    return GemmConfig(64, 128, min(padded, 128), warps=8 if padded > 64 else 4, stages=1)


def permute_heuristic(launch: Launch, gpu: str) -> PermuteConfig:
    """Tiles of 4096 elements, 32 per thread: channels without padding (3 x 16 for 48), and 32 tokens or more if a patch has
    at most 128 elements.
    """
    run = next_power_of_2(launch.run)
    channels = split_row(launch.width, 128)[0] if launch.width >= 8 else next_power_of_2(launch.width)
    channels = min(channels, 128, max(512 // run, 1))
    rows = min(next_power_of_2(launch.rows), max(128 // (run * channels), 1))
    tokens = min(max(4096 // (run * channels * rows), 8), 16 if gpu == "cpu" else 256)
    return PermuteConfig(tokens, rows, channels, warps=4)


HEURISTICS = dict(embed=embed_heuristic, latents=latents_heuristic, weight=weight_heuristic, permute=permute_heuristic)
