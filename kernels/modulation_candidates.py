"""Configs that the tuner tries for adaLN."""

from collections.abc import Iterator

from .integers import cdiv, next_power_of_2
from .modulation_config import BackwardConfig, ForwardConfig, Launch, backward_tile, tile


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[ForwardConfig | BackwardConfig]:
    """Configs beyond the heuristic's for ``kernel``, "forward" or "backward", likeliest first."""
    if kernel == "forward":
        block, count = tile(launch.width)
        seen = set()
        for elements in (48, 24, 12):  # at most, per thread
            for tokens in (1, 2, 4, 8, 16):
                config = ForwardConfig(next_power_of_2(cdiv(block * count * tokens, 32 * elements)), tokens)
                if config.warps <= 16 and config not in seen:
                    seen.add(config)
                    yield config
        return
    block, count = backward_tile(launch.width)
    for elements in (16, 8, 32):  # at most, per thread
        warps = min(next_power_of_2(cdiv(block * count, 32 * elements)), 16)
        for resident in (16, 12, 24, 8, 32):  # warps per SM, with 65,536 / 32 / resident registers per thread
            for tokens in (8, 2, 32) if launch.tokens <= 16384 else (8,):  # programs loop over more in a long pack
                if resident % warps == 0:
                    yield BackwardConfig(warps=warps, tokens=tokens, programs=resident // warps)
