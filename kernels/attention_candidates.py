"""Configs that the tuner tries for attention."""

from collections.abc import Iterator
from dataclasses import replace

from . import arch
from .attention_config import HEURISTICS, SHARED_BY_TWO, Config, Launch
from .attention_tiles import chunks


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[Config]:
    """Configs for the tuner, the heuristic's first; all fit into shared memory."""
    best = HEURISTICS[kernel](launch, gpu)
    yield best
    if gpu == "cpu":
        return
    row = sum(chunks(launch.head_dim, best.split)) * launch.dtype.itemsize
    for block_m, block_n in ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (32, 64), (32, 128)):
        kept, passing, tensors = dict(forward=(block_m, block_n, 1), dq=(block_m, block_n, 2),
                                    dkdv=(block_n, block_m, 2))[kernel]
        for stages in (1, 2, 3):
            carried = passing if kernel == "forward" else 0  # keys prefetched for the next tile
            if (kept * tensors + passing * 2 * stages + carried) * row > arch.SHARED[arch.capability(gpu)]:
                continue
            for warps in (4, 8):
                for tma in (False, True) if arch.has_tma(gpu) else (False,):
                    config = Config(block_m, block_n, warps, stages, tma, best.split)
                    # lower register pressure: no lookahead, or few enough registers for two programs per SM
                    plain = replace(config, lookahead=False) if kernel == "forward" else config
                    shared = [replace(plain, maxnreg=SHARED_BY_TWO)] if warps == 8 and stages > 1 else []
                    yield from (each for each in dict.fromkeys((config, plain, *shared)) if each != best)
