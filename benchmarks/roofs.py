"""The limits of the machine: measured at the start of every run, beside the chip's published figures.

The limit of some work is the larger of FLOPs over the measured matrix rate and bytes over the measured copy rate. On a GPU
both are taken at large sizes. On a CPU whatever fits its caches is faster, so the copy is measured at the case's own working
set.
"""

import math
from dataclasses import dataclass

import torch

from . import timing

_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True)
class Chip:
    """A vendor's figures: dense bf16 matrix rate with float32 sums (TFLOP/s), plain float32 (TFLOP/s), memory (GB/s)."""

    bf16: float
    fp32: float
    memory: float
    source: str


# The longest name that a device's name contains is taken, so that "NVIDIA H100 PCIe" does not take the SXM part's figures.
PUBLISHED = {
    "A100-SXM4-80GB": Chip(312, 19.5, 2039, _NVIDIA + "a100/"),
    "A100-SXM4-40GB": Chip(312, 19.5, 1555, _NVIDIA + "a100/"),
    "A100 80GB PCIe": Chip(312, 19.5, 1935, _NVIDIA + "a100/"),
    "A10": Chip(125, 31.2, 600, _NVIDIA + "products/a10-gpu/"),
    "L4": Chip(121, 30.3, 300, _NVIDIA + "l4/"),
    "L40S": Chip(362, 91.6, 864, _NVIDIA + "l40s/"),
    "H100 80GB HBM3": Chip(989.4, 66.9, 3350, _NVIDIA + "h100/"),
    "H100 PCIe": Chip(756, 51.2, 2000, "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"),
    "H100 NVL": Chip(835, 60.0, 3938, _NVIDIA + "h100/"),
    "H200": Chip(989.4, 66.9, 4800, _NVIDIA + "h200/"),
    "GH200 480GB": Chip(989.4, 66.9, 4000, _NVIDIA + "grace-hopper-superchip/"),
    "B200": Chip(2250, 75.0, 8000, _NVIDIA + "dgx-b200/"),
    "RTX 3090": Chip(71, 35.6, 936, "https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/"
                     "NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"),
    "RTX 4090": Chip(165.2, 82.6, 1008, "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
                     "nvidia-ada-gpu-architecture.pdf"),
    "RTX 5090": Chip(209.5, 104.8, 1792, "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
                     "nvidia-rtx-blackwell-gpu-architecture.pdf"),
}


def published(name: str) -> Chip | None:
    """The chip that a device's name names, or None."""
    words = name.replace("-", " ").split()
    fits = lambda model: all(word in words for word in model.replace("-", " ").split())
    return PUBLISHED.get(max((model for model in PUBLISHED if fits(model)), key=len, default=""))


class Roofs:
    """Measured limits of one device: ``matrix(dtype)`` in FLOP/s, ``copy(bytes)`` in bytes/s, each measured once."""

    def __init__(self, device: torch.device, l2: str):
        self.device, self.l2 = device, l2
        self.chip = published(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.effort = timing.GPU if device.type == "cuda" else timing.CPU
        self.found: dict[tuple, dict] = {}

    def matrix(self, dtype: torch.dtype) -> float:
        """The best rate of a square matrix product of random numbers, in FLOP/s.

        A CPU may compute 16-bit products in float32, and small ones from its caches: the best of both and of three sizes
        counts there.
        """
        name = str(dtype).removeprefix("torch.")
        if ("matrix", name) not in self.found:
            on_gpu = self.device.type == "cuda"
            sizes = (8192,) if on_gpu else (256, 512, 1024)
            kinds = (dtype,) if on_gpu else {dtype, torch.float32}
            trials = [self._product(kind, size) for kind in kinds for size in sizes]
            rate, size, measured = max(trials, key=lambda trial: trial[0])
            self._keep("matrix", name, 3 * size * size * dtype.itemsize, rate, self.published_matrix(dtype), measured)
        return self.found["matrix", name]["rate"]

    def published_matrix(self, dtype: torch.dtype) -> float | None:
        """The vendor's figure in FLOP/s, or None where the chip or the dtype is not in the table."""
        figures = {} if self.chip is None else {torch.bfloat16: self.chip.bf16, torch.float16: self.chip.bf16,
                                                torch.float32: self.chip.fp32}
        return figures[dtype] * 1e12 if dtype in figures else None

    def copy(self, working_set: int) -> float:
        """The rate of a copy, bytes read plus bytes written per second, at the working set's size on a CPU."""
        size = 4 * 2**30 if self.device.type == "cuda" else 2 ** max(12, min(31, round(math.log2(max(working_set, 1)))))
        if ("copy", size) not in self.found:
            source = torch.randn(size // 8, device=self.device)  # half of the bytes are read, half written
            target = torch.empty_like(source)
            rate, measured = self._rate(lambda: target.copy_(source), size)
            self._keep("copy", size, size, rate, self.chip and self.chip.memory * 1e9, measured)
        return self.found["copy", size]["rate"]

    def floor_ms(self, flops: int, least_bytes: int, dtype: torch.dtype) -> tuple[str, float]:
        """Which roof is the lower one for this work, and the time it allows."""
        matrix_ms = flops / self.matrix(dtype) * 1e3 if flops else 0.0
        copy_ms = least_bytes / self.copy(least_bytes) * 1e3
        return ("matrix", matrix_ms) if matrix_ms > copy_ms else ("copy", copy_ms)

    def _product(self, dtype: torch.dtype, size: int):
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        rate, measured = self._rate(lambda: a @ b, 2 * size**3)
        return rate, size, measured

    def _rate(self, call, work: int):
        calls = timing.Events([call], self.device) if self.device.type == "cuda" else timing.Wall([call])
        measured = timing.measure({"roof": calls}, self.effort)["roof"]
        figures = measured.statistics()
        # a roof is what the machine can do: on a shared CPU the best of many, on a GPU the median as for every provider
        best = figures["median_ms"] if self.device.type == "cuda" else figures["min_ms"]
        return work / best * 1e3, measured

    def _keep(self, kind, name, working_set, rate, figure, measured):
        self.found[kind, name] = dict(
            row="roof", schema=1, kind=kind, dtype=name if kind == "matrix" else None, bytes=working_set, rate=rate,
            published=figure, source=self.chip.source if self.chip and figure else "", l2=self.l2,
            timer=measured.timer, n=measured.statistics()["n"])
