"""Kernels of a cubin: their names, listings and resources, by cuobjdump (in Triton's wheel, or a CUDA toolkit's)."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Function:
    name: str
    cc: int
    sass: str
    registers: int
    shared: int  # bytes of static shared memory
    local: int  # bytes of local memory per thread


def tool(name: str = "cuobjdump") -> str:
    """The path of a CUDA binary utility; ImportError if there is none."""
    try:
        from triton import knobs

        return getattr(knobs.nvidia, name).path
    except (ImportError, AttributeError, RuntimeError):
        found = shutil.which(name)
        if found is None:
            raise ImportError(f"cyclemodel: expected {name}, of Triton's wheel for Linux or a CUDA toolkit, got none; run "
                              f"pip install triton") from None
        return found


def _run(*arguments: str, by: str = "cuobjdump") -> str:
    done = subprocess.run([tool(by), *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f"cyclemodel: expected a cubin that {by} reads, got {arguments[-1]}: {said[-1]}; pass a "
                         f".cubin of one GPU architecture")
    return done.stdout


def _usage(path: str | Path) -> list[tuple[str, str]]:
    """(name, resources as cuobjdump prints them) of each kernel."""
    return re.findall(r"Function (\S+):\s*\n(.*)", _run("-res-usage", str(path)))


def names(path: str | Path) -> list[str]:
    """Mangled names of the kernels in a cubin."""
    return [name for name, _ in _usage(path)]


def functions(path: str | Path, pattern: str = "") -> list[Function]:
    """The kernels in a cubin whose names match ``pattern``, a regular expression."""
    found = []
    for name, numbers in _usage(path):
        if not re.search(pattern, name):
            continue
        number = lambda key, numbers=numbers: int((re.search(rf"\b{key}:(\d+)", numbers) or [0, 0])[1])
        listing = _run("-sass", "-fun", name, str(path))
        arch = re.search(r"sm_(\d+)", listing)
        if arch is None:
            raise ValueError(f"cyclemodel: expected machine code of {name} in {path}, got none; pass a .cubin that holds "
                             f"SASS")
        # on sm_90 and later static shared memory includes the 1 KiB per block that the system reserves
        shared = number("SHARED") - (1024 if int(arch[1]) >= 90 else 0)
        found.append(Function(name, int(arch[1]), listing, number("REG"), max(0, shared), number("STACK")))
    return found


def source_lines(path: str | Path, name: str) -> dict[int, tuple[str, int]]:
    """(file, line) of each address of a kernel in a cubin, the innermost where functions were inlined.

    Empty where it was compiled without line information (nvcc needs -lineinfo).
    """
    listing = _run("-g", "-c", str(path), by="nvdisasm")
    found, here = {}, None
    section = listing.partition(f"\n.text.{name}:\n")[2].partition("\n.text.")[0]
    for file, line, address in re.findall(r'## File "([^"]*)", line (\d+)|^\s+/\*([0-9a-f]{4,})\*/', section, re.MULTILINE):
        if file:
            here = file, int(line)
        elif here:
            found[int(address, 16)] = here
    return found
