"""What the tuner tries for the convolution."""

from collections.abc import Iterator

from .convolution_config import HEURISTICS, Config, Launch, WgradConfig, loads_by_tma


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[Config | WgradConfig]:
    """What the tuner tries beside the heuristic of ``kernel``, "forward", "dgrad" or "wgrad"; the likeliest first."""
    first = HEURISTICS[kernel](launch, gpu)
    if kernel == "wgrad":
        if first.tma:
            ours = (first.out_channels, first.extra_out, first.in_channels, first.extra_in, first.taps)
            tiles = (ours, (128, 0, 128, 0, 3), (128, 64, 128, 64, 1), (128, 0, 64, 32, 3), (64, 0, 128, 0, 3))
            for out_channels, extra_out, in_channels, extra_in, taps in dict.fromkeys(tiles):
                for pixels, stages in ((64, 3), (64, 4), (32, 6)):
                    if 2 * stages * pixels * (out_channels + extra_out + taps * (in_channels + extra_in)) <= 192 << 10:
                        yield WgradConfig(out_channels, in_channels, extra_in, pixels, 8, stages, 1, extra_out, taps, True)
        for programs in (1, 2, 4):
            for warps, stages in ((4, 3), (8, 3), (4, 2), (4, 4), (8, 4)):
                for out_channels in sorted({first.out_channels, 64, 128}):
                    for pixels in (64, 32, 128):
                        yield WgradConfig(out_channels, first.in_channels, first.extra_in, pixels, warps, stages, programs)
        return
    for tma in ((True, False) if loads_by_tma(launch, gpu) else (False,)):
        for channels, extra in dict.fromkeys(((first.channels, first.extra if tma else 0), (128, 0), (64, 0))):
            for pixels in (256, 128, 64):
                for block_k in dict.fromkeys((first.block_k, max(first.block_k // 2, 16))):
                    for warps, stages in ((8, 3), (8, 4), (8, 6), (4, 3), (4, 4)):
                        if (channels + extra) * pixels <= 32 * warps * 192:  # accumulators in 3/4 of the registers
                            yield Config(pixels, channels, extra, block_k, warps, stages, tma)
