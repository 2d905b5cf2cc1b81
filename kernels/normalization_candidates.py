"""Configs that the tuner tries for norm and activation."""

from collections.abc import Iterator

from .normalization_config import Config, Launch, config_of_threads


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[Config]:
    """Configs beyond the heuristic's for ``kernel``, "forward" or "backward", likeliest first."""
    walks = kernel == "backward" or launch.norm == "group"
    seen = set()
    for elements in (32, 16, 8) if kernel == "forward" else (16, 8, 32):
        for warps in (4, 8, 2, 1):
            for resident in ((16, 32, 24, 8) if walks else (32,)):
                config = config_of_threads(launch, elements, warps, resident)
                if config not in seen and config.warps <= 16:
                    seen.add(config)
                    yield config
