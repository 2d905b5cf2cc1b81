"""What the tuner tries for patch embedding and its way back."""

from collections.abc import Iterator
from dataclasses import replace

from .patches_config import HEURISTICS, GemmConfig, Launch, PermuteConfig


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[GemmConfig | PermuteConfig]:
    """What the tuner tries beside the heuristic of ``kernel``: tiles and pipelines around it."""
    start = HEURISTICS[kernel](launch, gpu)
    if kernel == "permute":
        for tokens in (start.block_n, start.block_n // 2, start.block_n * 2):
            for warps in (4, 8, 2):
                yield replace(start, block_n=max(tokens, 8), warps=warps)
        return
    for tokens in (start.block_n, start.block_n * 2, start.block_n // 2):
        for columns in (start.block_d, start.block_d * 2, start.block_d // 2):
            for warps in (start.warps, 12 - start.warps):  # 4 or 8
                for stages in (start.stages, start.stages + 1, start.stages - 1):
                    if min(tokens, columns) >= 16 and stages >= 1:
                        yield GemmConfig(tokens, columns, start.block_k, warps, stages)
