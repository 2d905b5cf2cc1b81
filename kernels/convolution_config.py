"""Tiles of the convolution's kernels: what the best ones depend on, and the heuristics for shapes that are not tuned."""

from dataclasses import dataclass

import torch

from . import arch
from .integers import cdiv, next_power_of_2


@dataclass(frozen=True)
class Launch:
    """What the best Config depends on. ``in_channels``, ``out_channels``: the weight's, whichever kernel is run."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    upsample: int
    space_pad: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """A tile of ``pixels`` x ``channels`` (+ ``extra``) from ``block_k`` channels of the other side at a time, by ``warps``.

    ``stages``: so many of them in flight. ``tma``: loaded by TMA (sm_90 and later),
    where the convolution is one that it can load, else by addresses. ``extra``, with ``tma`` alone: a second power of two,
    so that 192 channels are 128 and 64 and not 256; 0: none.
    """

    pixels: int
    channels: int
    extra: int
    block_k: int
    warps: int
    stages: int
    tma: bool


@dataclass(frozen=True)
class WgradConfig:
    """A tile of ``out_channels`` (+ ``extra_out``) x ``in_channels`` (+ ``extra_in``) from ``pixels`` at once, by ``warps``.

    ``extra_in``: as ``extra`` of Config, so that 96 is 64 and 32. ``programs``: for each SM, which decides into how many
    split-K slices the pixels are cut. ``tma``: as in Config; with it alone ``extra_out``, and ``taps`` of a row at once.
    """

    out_channels: int
    in_channels: int
    extra_in: int
    pixels: int
    warps: int
    stages: int
    programs: int
    extra_out: int = 0
    taps: int = 1
    tma: bool = False


def box_sides(pixels: int) -> tuple[int, int]:
    """Height and width of a box of ``pixels``, a power of two: 16 x 16, 8 x 16, 8 x 8."""
    high = 1 << (pixels.bit_length() - 1) // 2
    return high, pixels // high


def covered(channels: int, tile: int) -> int:
    """Channels that are computed where ``channels`` are done in tiles."""
    return cdiv(channels, tile) * tile


def _parts(channels: int, most: int) -> tuple[int, int]:
    """One or two powers of two, ``most`` together at the most, that tile ``channels`` with the least left over."""
    pairs = [(one, two) for one in (128, 64, 32, 16) for two in (0, 64, 32, 16) if two < one and one + two <= most]
    return min(pairs, key=lambda pair: (covered(channels, sum(pair)), -sum(pair)))


def _tile(channels: int) -> int:
    """128, or 64 where 128 would leave more of the last tile empty: 128 for 96, 64 for 160 and 192."""
    if channels <= 64:
        return max(16, next_power_of_2(channels))
    return min((128, 64), key=lambda tile: covered(channels, tile))


def loads_by_tma(launch: Launch, gpu: str) -> bool:
    """Whether ``gpu`` has TMA and the convolution is one that it can load.

    TMA wants strides of 16 bytes, steps by 1, and gives 0 outside of a frame; transposed weights are an operand
    in 16 bits alone.
    """
    around = launch.space_pad == "zeros" or launch.kernel[1:] == (1, 1)
    plain = launch.stride == (1, 1, 1) and launch.upsample == 1 and around
    aligned = launch.in_channels % 8 == launch.out_channels % 8 == 0
    return arch.has_tma(gpu) and plain and launch.dtype.itemsize == 2 and aligned


def _heuristic(launch: Launch, made: int, summed: int, gpu: str) -> Config:
    """For ``made`` channels written and ``summed`` read: Cout and Cin, of a dgrad the reverse."""
    small = arch.is_small(gpu)
    block_k = min((32, 16) if small or launch.dtype == torch.float32 else (64, 32, 16),
                  key=lambda block: (covered(summed, block), -block))
    if gpu == "cpu":  # the interpreter: few programs of small tiles
        return Config(64, max(16, min(64, next_power_of_2(made))), 0, block_k, 4, 2, False)
    if launch.dtype == torch.float32:
        return Config(64, min(_tile(made), 64), 0, block_k, 4, 2, False)
    if not loads_by_tma(launch, gpu):
        if arch.uses_mma_sync(gpu):
            # 4 warps: two blocks an SM, one of which multiplies while the other waits; 8 of one block take 1.4 times as long
            channels = min(_tile(made), 128 if summed >= 32 else 64)  # of few channels every load has its own address
            return Config(128, channels, 0, min(block_k, 32), 4, 3 if small else 4, False)
        # 128 channels for 192 too: a quarter of them does not exist, but pixels come from L2 twice and not three times
        return Config(256 if summed >= 32 else 128, 128 if made > 64 else _tile(made), 0, block_k, 8, 3, False)
    block_k = min((64, 32, 16), key=lambda block: (covered(summed, block), -block))
    if small:
        return Config(128, min((128, 64), key=lambda tile: covered(made, tile)), 0, min(block_k, 32), 4, 3, True)
    # Clocks of an sm_90 SM for each channel of 256 pixels and 64 summed: 8 at the Tensor Cores' rate, 11 with 64 channels
    # alone, where reading shared memory takes longest.
    cost = {(128, 64): 8, (128, 0): 8, (64, 0): 11}
    channels, extra = min(cost, key=lambda tile: covered(made, sum(tile)) * cost[tile])
    return Config(256, channels, extra, block_k, 8, min(8, (192 if extra else 256) // block_k), True)


def wgrad_heuristic(launch: Launch, gpu: str) -> WgradConfig:
    out_channels = _tile(launch.out_channels)
    if gpu == "cpu":
        return WgradConfig(min(64, out_channels), *_parts(launch.in_channels, 96), 64, 4, 2, 1)
    if launch.dtype == torch.float32:
        return WgradConfig(min(64, out_channels), *_parts(launch.in_channels, 64), 32, 4, 3, 2)
    if arch.capability(gpu) in (90, 100) and loads_by_tma(launch, gpu) and min(launch.out_channels, launch.in_channels) > 64:
        # 128 channels by those of three taps, or 192 by 192 of one: either takes 43 bytes a clock from L2 at full rate
        wide = covered(launch.out_channels, 192) < covered(launch.out_channels, 128)
        if not wide and covered(launch.in_channels, 128) <= covered(launch.in_channels, 192) and launch.kernel[2] == 3:
            return WgradConfig(128, 128, 0, 64, 8, 3, 1, taps=3, tma=True)
        return WgradConfig(128, *_parts(launch.in_channels, 192), 64, 8, 4, 1, extra_out=64 if wide else 0, tma=True)
    if arch.capability(gpu) == 90:
        # 4 warps: of 8, ptxas 12.8 waits for every MMA of 128 x 128 or 64 x 192
        return WgradConfig(out_channels, *_parts(launch.in_channels, 192 if out_channels <= 64 else 128), 64, 4, 3, 2)
    if arch.uses_mma_sync(gpu):
        # 16 rows are enough for mma.sync: 96 as three times 32. 4 warps: as in the forward.
        if launch.out_channels > 64:
            out_channels = min((128, 64, 32), key=lambda tile: covered(launch.out_channels, tile))
        parts = _parts(launch.in_channels, {128: 128, 64: 96}.get(out_channels, 160))
        return WgradConfig(out_channels, *parts, 32, 4, 3 if arch.is_small(gpu) else 4, 2 if out_channels == 128 else 3)
    return WgradConfig(out_channels, *_parts(launch.in_channels, 128), 64, 8, 3, 1)


HEURISTICS = dict(forward=lambda launch, gpu: _heuristic(launch, launch.out_channels, launch.in_channels, gpu),
                  dgrad=lambda launch, gpu: _heuristic(launch, launch.in_channels, launch.out_channels, gpu),
                  wgrad=wgrad_heuristic)
