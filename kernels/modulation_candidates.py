"""What the tuner tries for adaLN."""

from collections.abc import Iterator

import triton

from .modulation_config import BackwardConfig, ForwardConfig, Launch, backward_tile, tile


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[ForwardConfig | BackwardConfig]:
    """What the tuner tries beside the heuristic of ``kernel``, "forward" or "backward"; the first are the likeliest."""
    if kernel == "forward":
        block, count = tile(launch.width)
        seen = set()
        for numbers in (48, 24, 12):  # the most of a thread
            for tokens in (1, 2, 4, 8, 16):
                config = ForwardConfig(triton.next_power_of_2(triton.cdiv(block * count * tokens, 32 * numbers)), tokens)
                if config.warps <= 16 and config not in seen:
                    seen.add(config)
                    yield config
        return
    block, count = backward_tile(launch.width)
    for numbers in (16, 8, 32):  # a thread's, or fewer
        warps = min(triton.next_power_of_2(triton.cdiv(block * count, 32 * numbers)), 16)
        for resident in (16, 12, 24, 8, 32):  # warps of a multiprocessor, each thread with 65,536 / 32 / resident registers
            for tokens in (8, 2, 32) if launch.tokens <= 16384 else (8,):  # a long pack's programs walk over more anyway
                if resident % warps == 0:
                    yield BackwardConfig(warps=warps, tokens=tokens, programs=resident // warps)
