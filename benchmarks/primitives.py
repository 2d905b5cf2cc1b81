"""The proof of csrc/sm90.cuh and csrc/layout.h on a Hopper GPU, before the kernels that stand on them are validated.

A small matrix product (csrc/product.cuh) goes through every width of product, both swizzles, the copy engine both ways and
its edges. Factors are small integers, so that every sum is exact and the result must be right to the last bit.

python -m sora_fast.benchmarks.primitives --device cuda [--jsonl FILE]
"""

import sys

import torch

from sora_fast.environment import environment
from sora_fast.ops import cuda_backend

from . import rows

WIDTHS = (96, 128, 160, 192, 256)  # output channels of a tile
SLICES = (64, 32)  # numbers of the inner dimension in a row of shared memory, of 128 or 64 bytes
# rows, columns beyond a tile's, inner: one tile, tiles cut short on every side, many slices, next to nothing
SIZES = ((64, 0, 64), (200, 40, 160), (130, 8, 1000), (1, 8, 8))


def product(a: torch.Tensor, b: torch.Tensor, tile_columns: int, slice: int) -> torch.Tensor:
    """a (rows, inner) @ b (columns, inner)^T in bfloat16 on a Hopper GPU, by csrc/product.cuh."""
    y = a.new_full((a.shape[0], b.shape[0]), float("nan"))
    cuda_backend.launch("product", y, a=a, b=b, y=y, rows=a.shape[0], columns=b.shape[0], inner=a.shape[1],
                        tile_columns=tile_columns, slice=slice)
    return y


def wrong_numbers(device: str, tile_columns: int, slice: int, size: tuple[int, int, int]) -> int:
    """How many numbers of one product are not what float64 gives, rounded once."""
    count, more, inner = size
    random = torch.Generator().manual_seed(0)
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=random).to(device, torch.bfloat16)
    a, b = integers(count, inner), integers(tile_columns + more, inner)
    expected = (a.double() @ b.double().T).to(torch.bfloat16)
    return int((product(a, b, tile_columns, slice) != expected).sum())  # NaN counts as wrong


def main(arguments: list[str] | None = None) -> int:
    asked = rows.arguments_of("primitives", __doc__, "a Hopper GPU", "append a row for each product to it", arguments)
    device = torch.device(asked.device)
    reasons = cuda_backend.cannot_run(device, "product")
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
