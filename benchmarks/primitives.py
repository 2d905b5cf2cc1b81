"""A self-test of csrc/sm90.cuh and csrc/layout.h on a Hopper GPU, run before the kernels that use them are validated.

A small GEMM (csrc/wgmma_selftest.cuh) covers every wgmma N, both swizzles, TMA loads and stores and their bounds checks.
Operands are small integers, so that every sum is exact and the result must be bitwise right.

python -m sora_fast.benchmarks.primitives --device cuda [--jsonl FILE]
"""

import sys

import torch

from sora_fast.environment import environment
from sora_fast.ops import cuda_backend

from . import rows

WIDTHS = (96, 128, 160, 192, 256)  # output channels of a tile
SLICES = (64, 32)  # K of a pipeline stage: rows of 128 or 64 bytes in shared memory
# rows, columns beyond a tile's, inner: one tile, tiles cut short on every side, many slices, next to nothing
SIZES = ((64, 0, 64), (200, 40, 160), (130, 8, 1000), (1, 8, 8))


def product(a: torch.Tensor, b: torch.Tensor, tile_columns: int, slice: int) -> torch.Tensor:
    """a (rows, inner) @ b (columns, inner)^T in bfloat16 on a Hopper GPU, by csrc/wgmma_selftest.cuh."""
    y = a.new_full((a.shape[0], b.shape[0]), float("nan"))
    cuda_backend.launch("wgmma_selftest", y, a=a, b=b, y=y, rows=a.shape[0], columns=b.shape[0], inner=a.shape[1],
                        tile_columns=tile_columns, slice=slice)
    return y


def wrong_numbers(device: str, tile_columns: int, slice: int, size: tuple[int, int, int]) -> int:
    """How many elements of one product are not what float64 gives, rounded once."""
    count, more, inner = size
    random = torch.Generator().manual_seed(0)
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=random).to(device, torch.bfloat16)
    a, b = integers(count, inner), integers(tile_columns + more, inner)
    expected = (a.double() @ b.double().T).to(torch.bfloat16)
    return int((product(a, b, tile_columns, slice) != expected).sum())  # NaN counts as wrong


def main(arguments: list[str] | None = None) -> int:
    asked = rows.arguments_of("primitives", __doc__, "a Hopper GPU", "append a row for each product to it", arguments)
    device = torch.device(asked.device)
    reasons = cuda_backend.cannot_run(device, "wgmma_selftest")
    if reasons:
        print(f"UNSUPPORTED: {' '.join(reasons)}")
        return 0
    found, failed = [], 0
    for width in WIDTHS:
        for slice in SLICES:
            for size in SIZES:
                wrong = wrong_numbers(asked.device, width, slice, size)
                failed += wrong > 0
                case = f"{size[0]} x {width + size[1]} x {size[2]}, tiles of {width}, slices of {slice}"
                print(f"{'FAILED' if wrong else 'PASSED'}: {case}" + (f": {wrong:,} numbers are wrong" if wrong else ""))
                found.append(dict(schema=rows.SCHEMA, row="primitive", case=case, wrong=wrong, passed=not wrong))
    if asked.jsonl:
        here = environment(device)
        rows.append(asked.jsonl, [row | dict(environment=here) for row in found])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
