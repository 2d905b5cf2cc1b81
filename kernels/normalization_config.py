"""Configs of norm and activation: what the best ones depend on, and what is taken where nothing is tuned."""

from dataclasses import dataclass

import torch
import triton

from .rows import pieces


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on; ``pixels`` of all samples, a bucket; ``y_dtype``: of the output or its gradient."""

    channels: int
    pixels: int
    norm: str
    act: str | None
    x_dtype: torch.dtype
    y_dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """``warps`` of a program, ``pixels`` it takes at once, a power of two.

    ``programs`` for each multiprocessor, of kernels that walk over pixels: the backward and group statistics.
    """

    warps: int
    pixels: int
    programs: int


def tile(channels: int, norm: str) -> tuple[int, int]:
    """Channels of a piece, and pieces of a pixel: few, so that a thread has 16 bytes of each.

    One piece of a group norm: a thread has statistics for each of its channels, and with more of them they would spill.
    """
    whole = triton.next_power_of_2(max(channels, 1))
    return (whole, 1) if norm == "group" else pieces(max(channels, 1), max(whole // 2, 128))


def config_of_threads(launch: Launch, numbers: int, warps: int, resident: int, most: int = 512) -> Config:
    """``numbers`` a thread and ``resident`` warps a multiprocessor; ``most`` pixels, for the sake of few channels."""
    block, count = tile(launch.channels, launch.norm)
    warps = max(warps, triton.next_power_of_2(block * count) // (32 * numbers))
    pixels = triton.next_power_of_2(triton.cdiv(32 * warps * numbers, block * count))
    return Config(warps, min(pixels, most), max(resident // warps, 1))


def forward_heuristic(launch: Launch, gpu: str) -> Config:
    """32 numbers a thread, so that weights are fetched once for many; 16 of less video, which would not fill the GPU.

    16 of a group norm, whose statistics hold three of each: 16 warps a multiprocessor then have the registers for them.
    """
    if launch.norm == "group":
        return config_of_threads(launch, 16, 4, 16)
    return config_of_threads(launch, 32 if launch.pixels * launch.channels >= 2**23 else 16, 4, 32)


def backward_heuristic(launch: Launch, gpu: str) -> Config:
    """16 numbers a thread, which holds five of each at once, and 16 warps a multiprocessor, of 128 registers a thread.

    8 warps of more than 1024 channels: a thread's weights and biases are of 8 channels then, and of 16 would spill.
    """
    # the interpreter adds the pixels of a tile one after the other: with more, it errs by more than a GPU's tree would
    return config_of_threads(launch, 16, 8 if launch.channels > 1024 else 4, 16, 16 if gpu == "cpu" else 512)


HEURISTICS = dict(forward=forward_heuristic, backward=backward_heuristic)
