"""What the tuner tries for adaLN."""

from collections.abc import Iterator

import triton

from .modulation_config import BackwardConfig, ForwardConfig, Launch


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[ForwardConfig | BackwardConfig]:
    """What the tuner tries beside the heuristic of ``kernel``, "forward" or "backward"; the first are the likeliest."""
    block = triton.next_power_of_2(max(launch.width, 1))
    if kernel == "forward":
        for numbers in (16, 8, 32):  # a thread's share; 64 would not fit in its registers
            for tokens in (1, 2, 4, 8, 16):
                warps = max(block * tokens // (32 * numbers), 1)
                if warps <= 16:
                    yield ForwardConfig(warps=warps, tokens=tokens)
        return
    for numbers in (16, 8, 32):
        warps = min(max(block // (32 * numbers), 1), 16)
        for resident in (16, 12, 24, 8, 32):  # warps of a multiprocessor, each thread with 65,536 / 32 / resident registers
            for tokens in (8, 2, 32) if launch.tokens <= 16384 else (8,):  # a long pack's programs walk over more anyway
                if resident % warps == 0:
                    yield BackwardConfig(warps=warps, tokens=tokens, programs=resident // warps)
