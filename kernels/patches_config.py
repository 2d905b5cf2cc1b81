"""Configs of patch embedding and its way back: what the best ones depend on, and what is taken where nothing is tuned."""

from dataclasses import dataclass

import torch
import triton

from . import arch
from .rows import pieces


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on: ``rows`` of a patch, ``run`` elements in each; ``width`` D, or C of unpatchify.

    ``tokens`` is a bucket.
    """

    tokens: int
    width: int
    rows: int
    run: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ProductConfig:
    """Tile of tokens (``block_n``), columns of the width (``block_d``) and elements of a patch (``block_k``)."""

    block_n: int
    block_d: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PermuteConfig:
    """Tokens, rows (pt, ph) of a patch and channels of a tile: powers of two."""

    block_n: int
    block_r: int
    block_c: int
    warps: int


LONGEST_RUN = 64  # elements of a patch along w; all of them are in a tile


def _padded(launch: Launch) -> int:
    """Numbers of a patch as tiles count them; a product of matrices takes 16 at least."""
    return max(triton.next_power_of_2(launch.rows) * triton.next_power_of_2(launch.run), 16)


def embed_heuristic(launch: Launch, gpu: str) -> ProductConfig:
    """The whole patch up to 256 elements, gathered once for all columns. Tiles are small enough for several blocks on an SM:
    one waits for its part of the weight while another stores.
    """
    padded = _padded(launch)
    if gpu == "cpu":
        return ProductConfig(32, 16, min(padded, LONGEST_RUN), warps=4, stages=1)
    small = arch.is_small(gpu)
    if launch.dtype == torch.float32:
        if padded <= 64 and not small:
            return ProductConfig(32 if arch.uses_mma_sync(gpu) else 64, 64, max(padded, 32), warps=4, stages=3)
        return ProductConfig(64, 64, max(triton.next_power_of_2(launch.run), 32), warps=8, stages=2)
    if launch.width % 8 != 0:
        return ProductConfig(64, 64, min(padded, 64), warps=4, stages=2)
    if padded <= 64:
        return ProductConfig(64, 64, padded, warps=4, stages=3)
    if padded <= 256:
        fits = not small or launch.rows * triton.next_power_of_2(launch.run) <= 192
        return ProductConfig(64, 64, 128, warps=4, stages=3 if fits else 2)
    if launch.run < 8:  # the addresses of 64 elements in shorter runs, or of more tokens, spill
        return ProductConfig(64, 64 if small else 128, 32, warps=8, stages=3)
    return ProductConfig(64 if small else 128, 128, 64, warps=8, stages=2 if small else 3)


def latents_heuristic(launch: Launch, gpu: str) -> ProductConfig:
    """The gradient of the latents: a sum over the width, in a pipeline.

    One wgmma of 64 x 64 x 32 for each group of 4 warps: with larger ones ptxas waits for each instruction (C7514).
    """
    padded = _padded(launch)
    if gpu == "cpu":
        return ProductConfig(32, 16, min(padded, LONGEST_RUN), warps=4, stages=1)
    if launch.dtype == torch.float32:
        return ProductConfig(64, 32, min(padded, 64), warps=4, stages=2)
    return ProductConfig(128, 32, min(padded, 64), warps=8, stages=4)


def weight_heuristic(launch: Launch, gpu: str) -> ProductConfig:
    """The gradient of the weight: a sum over tokens. No pipeline: the gather of a tile waits, other programs do not."""
    padded = _padded(launch)
    if gpu == "cpu":
        return ProductConfig(16, 16, min(padded, LONGEST_RUN), warps=4, stages=1)
    if launch.dtype == torch.float32:
        return ProductConfig(32, 64, min(padded, 64), warps=4, stages=1)
    if arch.is_small(gpu):
        return ProductConfig(64, 64, min(padded, 64), warps=4, stages=1)
    return ProductConfig(64, 128, min(padded, 128), warps=8 if padded > 64 else 4, stages=1)


def permute_heuristic(launch: Launch, gpu: str) -> PermuteConfig:
    """Tiles of 4096 elements, 32 a thread: channels without padding (3 x 16 of 48), and 32 tokens or more where a patch has
    no more than 128 elements.
    """
    run = triton.next_power_of_2(launch.run)
    channels = pieces(launch.width, 128)[0] if launch.width >= 8 else triton.next_power_of_2(launch.width)
    channels = min(channels, 128, max(512 // run, 1))
    rows = min(triton.next_power_of_2(launch.rows), max(128 // (run * channels), 1))
    tokens = min(max(4096 // (run * channels * rows), 8), 16 if gpu == "cpu" else 256)
    return PermuteConfig(tokens, rows, channels, warps=4)


HEURISTICS = dict(embed=embed_heuristic, latents=latents_heuristic, weight=weight_heuristic, permute=permute_heuristic)
