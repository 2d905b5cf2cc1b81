"""``CudaKernel``: kernels of a user's .cu file in the emulator, right ones and one fault of each kind."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from sora_fast.emulator.memory import Fault
from sora_fast.testing import CudaKernel, emulated_gpu

SOURCE = Path(__file__).with_name("emulated_cuda_kernels.cu")
pytestmark = [pytest.mark.full, pytest.mark.ci,
              pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")]


def line_of(text: str) -> str:
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, start=1) if text in line]
    return rf"{SOURCE.name}:{number}\b"


def test_right_kernels():
    x = torch.randn(100)
    for arch in ("sm80", "sm90"):
        with emulated_gpu(arch, schedules=3, race=True) as emulator:
            y = torch.zeros(100)
            CudaKernel(SOURCE, "scale<64>")((2,), (64,), (x, y, 100, 2))
            assert torch.equal(y, 2 * x) and f"sm_{arch[2:]}" in emulator.records[0].ptx
            for name, right in (("reversed", True), ("unwritten", 64), ("copied", True)):
                y = torch.zeros(64)
                CudaKernel(SOURCE, name)((1,), (64,), (x, y, right), shared_mem=256)
                assert torch.equal(y, x[:64].flip(0) if name == "reversed" else x[:64])


@pytest.mark.parametrize("name, wrong, line, finding", [
    ("unmasked", (), "// no mask", r"element 100 of argument 0 \(100 elements\)"),
    ("reversed", (False,), "// of another warp", "uninitialised shared memory|race"),
    ("unwritten", (63,), "// of what was written", "uninitialised shared memory"),
    ("copied", (False,), "// of what was copied", "uninitialised shared memory|race: a copy is still in flight"),
])  # fmt: skip
def test_faults_are_found_at_their_lines(name, wrong, line, finding):
    x, y = torch.randn(100), torch.zeros(100)
    with emulated_gpu(race=True), pytest.raises(Fault, match=rf"{name}.* at {line_of(line)}(.|\n)*({finding})"):
        CudaKernel(SOURCE, name)((2 if name == "unmasked" else 1,), (64,), (x, y, *wrong), shared_mem=256)


def test_wrong_launches_are_sentences():
    x, text = torch.zeros(64), SOURCE.read_text(encoding="utf-8")
    scale = CudaKernel(text, "scale<64>")
    with pytest.raises(RuntimeError, match="scale<64>: expected a launch inside sora_fast.testing.emulated_gpu"):
        scale((1,), (64,), (x, x, 64, 1.0))
    with emulated_gpu("sm86"):
        for raised, sentence, call in (
                (ValueError, "expected 4 arguments, got 2", lambda: scale((1,), (64,), (x, x))),
                (ValueError, "argument 3 to be of PTX type f32 (4 bytes), got Tensor",
                 lambda: scale((1,), (64,), (x, x, 64, x))),
                (ValueError, "argument 2 to be of PTX type u32 (4 bytes), got 1.5",
                 lambda: scale((1,), (64,), (x, x, 1.5, 1))),
                (ValueError, "1 to 1024 threads", lambda: scale((1,), (2048,), (x, x, 64, 1))),
                (RuntimeError, "expected at most 101376 bytes of shared memory, what sm86 has for a CTA, got 102400",
                 lambda: CudaKernel(text, "reversed")((1,), (64,), (x, x, True), shared_mem=100 << 10)),
                (RuntimeError, "expected a __global__ function of this name in the source, got scale<64>, unmasked",
                 lambda: CudaKernel(text, "scale<32>")((1,), (64,), (x, x, 64, 1))),
                (RuntimeError, "correct what it says", lambda: CudaKernel("int {", "f")((1,), (1,), ())),
                (RuntimeError, "nowhere.cu, which cannot be read", lambda: CudaKernel("nowhere.cu", "f")((1,), (1,), ()))):
            with pytest.raises(raised, match=re.escape(sentence)):
                call()
