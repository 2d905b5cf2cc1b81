"""What every CUDA kernel was compiled to: registers, shared memory, wgmma, TMA loads and waits.

python tests/cuda_resources.py writes csrc/RESOURCES.md anew from build/cuda, after a build.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sora_fast.testing import sass

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "cuda"
TABLE = ROOT / "csrc" / "RESOURCES.md"
FAMILIES = ("normalization", "wgmma_selftest", "convolution")


@dataclass(frozen=True)
class Kernel:
    """One instantiation for one architecture. ``name`` as in the source: "causal_conv3d_kernel<96, 1>"."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes of local memory
    code: list[sass.Instruction]

    @property
    def numbers(self) -> list[int]:
        """The numbers among its template's arguments."""
        words = self.name.partition("<")[2].rstrip(">").split(", ")
        return [int(word) for word in words if word.lstrip("-").isdecimal()]

    def count(self, *bases: str) -> int:
        return sum(i.base in bases for i in self.code)

    @property
    def spills(self) -> int:
        return self.count("LDL", "STL")

    @property
    def waits(self) -> tuple[int, ...]:
        """How often an iteration of each main loop waits for all wgmma, which drains the Tensor Cores."""
        return sass.drains(self.code)

    @property
    def waits_in_all(self) -> int:
        return sum(i.body.startswith("WARPGROUP.DEPBAR") for i in self.code)


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: the toolkit's, or the one in Triton's wheel."""
    try:
        from triton import knobs
        return knobs.nvidia.cuobjdump.path
    except Exception:  # no Triton, or one without the tool
        return shutil.which("cuobjdump")


def _short(mangled: str) -> str:
    """"causal_conv3d_kernel<96, 1>" of a mangled name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((?:int|bool)\)", "", text.removeprefix("void ").partition("(sf::")[0])
    return re.sub(r"\bsf::|\(.*$", "", name)


@functools.cache
def kernels(family: str) -> list[Kernel]:
    """Everything in the object of a family, in the order of its names."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(BUILT / f"{family}.o", folder)
        dump = lambda flag: subprocess.run([cuobjdump(), flag, Path(folder, f"{family}.o")], capture_output=True, text=True,
                                           check=True).stdout
        listing, usage = dump("-sass"), dump("--dump-resource-usage")
    found = []
    for part in re.split(r"\narch = ", usage)[1:]:
        arch = part.split()[0]
        codes = {}
        for each in re.split(r"\s*arch = ", listing)[1:]:
            if each.split()[0] == arch:
                for function in each.split("Function :")[1:]:
                    codes[function.split()[0]] = sass.functions("Function :" + function)[0]
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", part):
            found.append(Kernel(_short(name), arch, int(registers), int(stack), codes[name]))
    return sorted(found, key=lambda k: (re.sub(r"-?\b\d+\b", "", k.name), k.numbers, k.arch))


def shared_memory() -> dict[str, int]:
    """Bytes of dynamic shared memory that each kernel is launched with, at most."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "plans")
        subprocess.run(["g++", "-std=c++17", "-I", ROOT / "csrc", ROOT / "tests/csrc/plans.cpp", "-o", program], check=True)
        printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in printed.splitlines()}


def nvcc_version() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", printed)[1]


def table() -> str:
    """csrc/RESOURCES.md as it should be."""
    shared = shared_memory()
    head = ("kernel", "GPU", "registers", "shared (bytes)", "spills", "HGMMA", "UTMALDG",
            "full waits per main loop")
    rows = [head, ("---",) * len(head)]
    for family in FAMILIES:
        for k in kernels(family):
            rows.append((k.name, k.arch, k.registers, f"{shared[k.name]:,}", k.spills,
                         k.count("HGMMA"), k.count("UTMALDG"), " ".join(map(str, k.waits)) or "-"))
    lines = "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
    return ("# What the kernels are compiled to\n\n"
            f"By nvcc {nvcc_version()}; `python tests/cuda_resources.py` writes this file after a build, and "
            "`tests/test_cuda_sass.py` compares it. Shared memory is the maximum over all channels. HGMMA (wgmma) and "
            "UTMALDG (TMA loads) count the instructions of the whole kernel. A full wait drains all wgmma. Registers are "
            "those at the launch, before any `setmaxnreg`.\n\n"
            + lines)


if __name__ == "__main__":
    if not all((BUILT / f"{family}.o").exists() for family in FAMILIES):
        raise SystemExit(f"expected a build in {BUILT}, got none; SORA_FAST_BUILD_CUDA=1 pip install -e . makes one")
    TABLE.write_text(table(), encoding="utf-8")
    print(f"wrote {TABLE}")
