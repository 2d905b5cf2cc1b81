"""Launches of sora_fast._C on CPU tensors: the extension's own launchers run, and the emulator executes their kernels.

The extension calls the CUDA runtime through one table (csrc/runtime.h), which ``_C.emulate`` replaces for the calling
thread. PTX is read from the extension's file by cuobjdump, which the CUDA toolkit and Triton's wheel have.
"""

import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from . import memory, tma
from .launches import Emulator
from .ptx import demangled


def launch(emulator: Emulator, extension: ModuleType, op: str, tensors: Mapping[str, object], arguments: Mapping) -> None:
    """Call ``extension.<op>(**arguments)`` with its kernels on ``emulator``.

    Args:
        tensors: the tensors whose addresses are in ``arguments``, by name.
    """
    allocations = memory.Allocations()
    for name, tensor in tensors.items():
        allocations.add_tensor(tensor, name)

    def execute(name: str, grid, block, addresses: int, shared: int) -> None:
        kernel = re.search(r"Kernel = (.*)\]$", name)[1]

        def parameters(program) -> bytes:
            pointers = (ctypes.c_void_p * len(program.kernel.params)).from_address(addresses)
            last = program.kernel.params[-1]
            raw = bytearray(last.offset + last.size)
            for pointer, param in zip(pointers, program.kernel.params, strict=True):
                raw[param.offset:param.offset + param.size] = ctypes.string_at(pointer, param.size)
            return bytes(raw)

        ptx = kernel_ptx(extension.__file__, kernel, emulator.compute_capability)
        emulator.execute(kernel, ptx, grid, block, parameters, allocations, shared)

    extension.emulate(execute, encode, emulator.sms)
    try:
        getattr(extension, op)(device=0, stream=0, **arguments)
    finally:
        extension.emulate(None, None, 0)


def encode(kind: int, address: int, sizes, strides, box, steps, interleave: int, swizzle: int, fill: int) -> bytes | None:
    """cuTensorMapEncodeTiled of the CUDA driver API, in the emulator's encoding; None for what the driver rejects.

    ``kind``: a CUtensorMapDataType; ``steps``: the element strides.
    """
    rank = len(sizes)
    legal = (1 <= rank <= 5 and address % 16 == 0 and all(1 <= size <= 1 << 32 for size in sizes)
             and all(stride % 16 == 0 and stride < 1 << 40 for stride in strides) and all(1 <= side <= 256 for side in box)
             and all(1 <= step <= 8 for step in steps))
    if not legal:
        return None
    tensor_map = np.zeros(1, tma.MAP)
    tensor_map["address"], tensor_map["rank"], tensor_map["type"] = address, rank, kind
    tensor_map["interleave"], tensor_map["swizzle"], tensor_map["fill"] = interleave, swizzle, fill
    tensor_map["dims"][0, :rank], tensor_map["box"][0, :rank], tensor_map["steps"][0, :rank] = sizes, box, steps
    tensor_map["strides"][0, :rank - 1] = strides
    return tensor_map.tobytes()


@functools.cache
def kernel_ptx(path: str, kernel: str, compute_capability: int) -> str:
    """The PTX of one kernel ("causal_conv3d_kernel<96, 1>") for a GPU of this compute capability.

    It is of the newest architecture among those embedded that such a GPU can run.
    """
    texts = _embedded(path)
    usable = [(number, arch_specific) for number, arch_specific in texts
            if (number == compute_capability if arch_specific else number <= compute_capability)]
    for key in sorted(usable, reverse=True):
        for text in texts[key]:
            for name in re.findall(r"\.entry (\w+)\(", text):
                if demangled(name) == kernel:
                    return isolate_kernel(text, name)
    available = ", ".join(f"compute_{number}{'a' * arch_specific}" for number, arch_specific in sorted(texts)) or "none"
    raise RuntimeError(f"emulated_gpu: expected PTX of {kernel} for sm{compute_capability} in the CUDA extension, got "
                       f"{available}; rebuild it with SORA_FAST_BUILD_CUDA=1 pip install -e .")


@functools.cache
def _embedded(path: str) -> dict[tuple[int, bool], list[str]]:
    """PTX by architecture: (90, True) is compute_90a."""
    listing = subprocess.run([_cuobjdump(), "--dump-ptx", path], capture_output=True, encoding="utf-8", errors="replace",
                          check=True).stdout
    found: dict[tuple[int, bool], list[str]] = {}
    for text in re.split(r"^Fatbin \w+ code:$", listing, flags=re.MULTILINE):
        target = re.search(r"^\.target sm_(\d+)(a?)", text, re.MULTILINE)
        if target:
            text = text[text.index(".version"):]
            found.setdefault((int(target[1]), bool(target[2])), []).append(text)
    return found


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            from triton import knobs

            found = knobs.nvidia.cuobjdump.path
        except Exception:  # no Triton, or a wheel without the tool
            raise RuntimeError("emulated_gpu: expected cuobjdump, which reads PTX out of the CUDA extension, got none; "
                               "install triton, or put the CUDA toolkit on the PATH") from None
    return found


def isolate_kernel(text: str, name: str) -> str:
    """A module with this kernel alone, its variables and files: parsing all kernels takes seconds."""
    at = text.index(f".entry {name}(")
    first, following = text.index(".entry "), text.find(".entry ", at + 1)
    # the last brace before the next kernel: inline assembly also has braces in the first column
    start, end = text.rfind("\n", 0, at), text.rfind("\n}", at, following if following > 0 else len(text)) + 3
    head = text[:text.rfind("\n", 0, first)]
    between = text[text.rfind("\n}", 0, at) + 3:start] if at > first else ""
    files = "\n".join(line for line in text.splitlines() if line.lstrip().startswith(".file"))
    return "\n".join([head, between, text[start:end], files])
