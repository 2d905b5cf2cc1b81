"""Launches of the CUDA extension's kernels, recorded instead of made, and their machine code: for GPUs that are not here.

A family takes part through ``cuda_cases()`` in sora_fast.testing.launches: names, and calls of its op on CPU tensors. What
is recorded is what csrc's own launchers ask of the CUDA runtime.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..cyclemodel import cubins
from ..dispatch import use_emulated_gpu
from ..ops import cuda_backend
from .emulated import Device


@dataclass(frozen=True)
class Launch:
    kernel: str  # as in the source: "causal_conv3d_kernel<96, 1>"
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory


@dataclass
class _Recorder:
    """In the place of an emulator."""

    compute_capability: int
    sms: int
    found: list[Launch] = field(default_factory=list)

    def execute(self, name, ptx, grid, block, params, allocations, shared) -> None:
        self.found.append(Launch(name, block[0] * block[1] * block[2], shared))


def why_not(family: str, cc: int) -> str:
    """Why there are no kernels of csrc's ``family`` for such a GPU, or ""."""
    if importlib.util.find_spec("numpy") is None:
        return "Reading their launches needs numpy; run pip install 'sora_fast[emulator]'."
    return " ".join(cuda_backend.why_not(f"emulated:sm{cc}", family))


def launches(call: Callable[[], object], cc: int, sms: int) -> list[Launch]:
    """What ``call`` launches on a GPU of this compute capability with so many SMs; outputs hold nothing."""
    recorder = _Recorder(cc, sms)
    with use_emulated_gpu(Device(f"sm{cc}", recorder)), torch.no_grad():
        call()
    return recorder.found


def machine_code(kernel: str, cc: int) -> cubins.Function:
    """What such a GPU would run of a kernel of the extension: the newest code that is for it."""
    from ..emulator.csrc_launch import demangled

    extension, missing = cuda_backend.extension()
    if missing:
        raise RuntimeError(f"cuda_launches: {missing}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cubins.tool(), "-xelf", "all", extension.__file__], cwd=folder, check=True, capture_output=True)
        found = [(int(arch[1]), arch[2], path) for path in Path(folder).iterdir()
                 if (arch := re.search(r"\.sm_(\d+)(a?)\.cubin$", path.name))]
        runs = [each for each in found if (each[0] == cc if each[1] else each[0] // 10 == cc // 10 and each[0] <= cc)]
        for _, _, path in sorted(runs, reverse=True):
            for name in cubins.names(path):
                if demangled(name) == kernel:
                    (code,) = cubins.functions(path, f"^{re.escape(name)}$")
                    return code
    raise RuntimeError(f"cuda_launches: expected machine code of {kernel} for sm_{cc} in the CUDA extension, got none; "
                       f"{cuda_backend.HOW_TO_BUILD}")
