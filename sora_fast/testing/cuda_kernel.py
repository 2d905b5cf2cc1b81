"""``CudaKernel``: a kernel of a CUDA source on CPU tensors. nvcc makes PTX, which sora_fast.emulator executes."""

import functools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class CudaKernel:
    """A ``__global__`` function of a CUDA source, launched in ``emulated_gpu``; called as CuPy's RawKernel is.

    Args:
        source: path of a .cu file, or the source itself.
        name: of the function as it is written, of a template with its arguments: "scale", "scale<float, 4>".
        options: further options of nvcc ("-I...", "-DN=4", "-std=c++20").

    Raises, when called:
        RuntimeError: outside emulated_gpu, nvcc is missing or refuses the source, too much shared memory is asked for.
        ValueError: arguments that are not what the function takes. sora_fast.emulator.memory.Fault: a finding.

    >>> # needs: nvcc
    >>> kernel = CudaKernel("scale.cu", "scale")
    >>> with emulated_gpu("sm90", race=True):
    ...     kernel((blocks, 1, 1), (256, 1, 1), (x, y, n, 2.0))
    """

    def __init__(self, source: str | Path, name: str, options: Sequence[str] = ()):
        self.source, self.name, self.options = source, name, tuple(options)

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence, *, shared_mem: int = 0) -> None:
        """Launch.

        Args:
            grid, block: one to three numbers, of CTAs and of threads in each.
            args: in order: contiguous or strided CPU tensors and None for pointers, numbers for numbers, bytes for
            structures (a CUtensorMap: sora_fast.emulator.csrc_launch.encode). shared_mem: bytes of dynamic shared memory.
        """
        from ..emulator import launches, memory

        emulator = launches.current_emulator.get()
        if emulator is None:
            raise RuntimeError(f"{self.name}: expected a launch inside sora_fast.testing.emulated_gpu, got one outside; "
                               f"open it around the launch")
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        threads = block[0] * block[1] * block[2]
        if min(*grid, *block) < 1 or threads > 1024:
            raise ValueError(f"{self.name}: expected at least one CTA and 1 to 1024 threads in each, got a grid of {grid} "
                             f"and blocks of {block}; change the launch")
        text = self.ptx(emulator.compute_capability)
        allocations = memory.Allocations()
        for place, value in enumerate(args):
            if hasattr(value, "data_ptr"):
                if value.device.type != "cpu":
                    raise ValueError(f"{self.name}: expected argument {place} to be a CPU tensor, got one on "
                                     f"{value.device}; move it to the CPU")
                allocations.add_tensor(value, f"argument {place}")

        def parameters(program) -> bytes:
            params = program.kernel.params
            if len(params) != len(args):
                raise ValueError(f"{self.name}: expected {len(params)} arguments, got {len(args)}; pass one for each "
                                 f"parameter")
            raw = bytearray(params[-1].offset + params[-1].size if params else 0)
            for place, (param, value) in enumerate(zip(params, args, strict=True)):
                raw[param.offset:param.offset + param.size] = self._bytes(place, param, value)
            return bytes(raw)

        emulator.execute(self.name, text, grid, block, parameters, allocations, shared_mem)

    def ptx(self, compute_capability: int) -> str:
        """What nvcc makes of this function for a GPU, alone in its module."""
        from ..emulator import csrc_launch, ptx

        text = self.source
        names_a_file = isinstance(text, Path) or "\n" not in text and "{" not in text
        path = Path(text) if names_a_file else None
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise RuntimeError(f"{self.name}: expected a CUDA source, got {path}, which cannot be read "
                                   f"({error.strerror}); name a file, or pass the source") from error
        whole = _compiled(text, path and path.resolve(), self.options, compute_capability)
        there = re.findall(r"\.entry (\w+)\(", whole)
        wanted = self.name.replace(" ", "")
        for name in there:
            if ptx.demangled(name).replace(" ", "") == wanted:
                return csrc_launch.isolate_kernel(whole, name)
        raise RuntimeError(f"{self.name}: expected a __global__ function of this name in the source, got "
                           f"{', '.join(map(ptx.demangled, there)) or 'none'}; templates are there once they are "
                           f"instantiated (template __global__ void f<4>(...);)")

    def _bytes(self, place: int, param, value) -> bytes:
        """``value`` as the bytes of a parameter."""
        if isinstance(value, bytes) and len(value) == param.size:
            return value
        if (value is None or hasattr(value, "data_ptr")) and param.kind == "u64":
            return struct.pack("<Q", 0 if value is None else value.data_ptr())
        if isinstance(value, (int, float)) and param.kind in ("f32", "f64"):
            return struct.pack("<f" if param.kind == "f32" else "<d", value)
        bits = 8 * param.size
        if isinstance(value, int) and param.kind[0] in "us" and -(1 << bits - 1) <= value < 1 << bits:
            return (value % (1 << bits)).to_bytes(param.size, "little")
        raise ValueError(f"{self.name}: expected argument {place} to be of PTX type {param.kind} ({param.size} bytes), got "
                         f"{value if isinstance(value, (int, float)) else type(value).__name__}; pass a tensor for a "
                         f"pointer, a number for a number, bytes of this size for a structure")


@functools.lru_cache(maxsize=64)
def _compiled(text: str, path: Path | None, options: tuple[str, ...], compute_capability: int) -> str:
    """``text`` by nvcc; of a file, beside it, so that it finds what it includes. ``-lineinfo`` names lines in findings."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("CudaKernel: expected nvcc on the PATH, got none; install the CUDA toolkit")
    target = f"compute_{compute_capability}{'a' if compute_capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = path
        if source is None:
            source = Path(folder) / "source.cu"
            source.write_text(text, encoding="utf-8")
        made = Path(folder) / "kernel.ptx"
        run = subprocess.run([nvcc, "-ptx", "-lineinfo", f"-arch={target}", *options, str(source), "-o", str(made)],
                             capture_output=True, encoding="utf-8", errors="replace")
        if run.returncode:
            raise RuntimeError(f"CudaKernel: expected a source that nvcc compiles for {target}; correct what it says:\n"
                               f"{(run.stderr or run.stdout).strip()}")
        return made.read_text(encoding="utf-8")
