"""The CUDA extension's kernels for ``sora-fast predict``: as csrc's launchers start them, with the code that was built.

What machine code does not say of them is read from their names and plans (csrc/<family>.cuh).
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..cyclemodel import GPU, Kernel
from ..testing import cuda_launches
from .predict_kernels import MEMORY
from .predict_measured import Call


@dataclass(frozen=True)
class Work:
    """A launch, whose machine code is read when its turn comes."""

    family: str
    case: str
    launch: cuda_launches.Launch

    @property
    def name(self) -> str:
        return f"{self.family}, {self.case}, {self.launch.kernel}"

    @property
    def call(self) -> Call:
        """What a measured row must be of to stand beside it."""
        if self.family == "normalization":
            channels, dtype = self.case.split(", ")
            return Call("norm_act", "forward", "cuda", dtype, dict(C=int(channels), norm="rms"))
        inputs, outputs = map(int, re.findall(r"(\d+) to (\d+)", self.case)[0])
        return Call("causal_conv3d", "forward", "cuda", "bfloat16",
                    dict(Cin=inputs, Cout=outputs, kernel=[3, 3, 3], stride=[1, 1, 1]))

    def kernel(self, gpu: GPU, tokens: int = 0, emulate: bool = False) -> Kernel:
        """As predict_kernels.Work's; what is asked there is known of these."""
        launch = self.launch
        found = cuda_launches.machine_code(launch.kernel, gpu.cc)
        return Kernel(
            launch.kernel, found.sass, found.registers, found.shared + launch.shared, case=f"{self.family} {self.case}",
            direction="forward", memory=self.family in MEMORY, **PLANS[launch.kernel.partition("<")[0]](self))

    def source_lines(self, gpu: GPU) -> dict[int, tuple[str, int]]:
        """None: the extension is built without line information."""
        return {}


def _convolution(work: Work) -> dict:
    """A warpgroup copies and two multiply, so that eight warps compute; a turn has 64 channels, or all of 96 or 160."""
    channels, full = map(int, re.findall(r"-?\d+", work.launch.kernel.partition("<")[2]))
    pixels, summed = 256 if channels <= 192 else 128, 64 if full < 0 else 64 * full + 32
    return dict(warps=8, tile=f"P{pixels} C{channels} w4+8", bulk=2 * (pixels + channels) * summed,
                turns=27 * int(re.match(r"\d+", work.case)[0]) / summed)


def _norm_act(work: Work) -> dict:
    """Shared memory has two floats for each element that the lanes of a pixel have, of which some are past the last channel.

    The path through a turn stores to y and to cache_out, of which nearly every pixel has one.
    """
    elements = work.launch.shared // 8
    read, written = (4 if name == "float" else 2 for name in work.launch.kernel.partition("<")[2].split(", ")[:2])
    return dict(warps=work.launch.threads // 32, tile=f"C{elements} w{work.launch.threads // 32}",
                useful=int(re.match(r"\d+", work.case)[0]) / elements, traffic=(read + written) / written / 2)


PLANS: dict[str, Callable[[Work], dict]] = {"causal_conv3d_kernel": _convolution, "norm_act_kernel": _norm_act}


def ours(family: str, gpu: GPU, text: str, tell: Callable[[str], None]) -> Iterator[Work]:
    """The launches of a family's cases whose name contains ``text``; one line where there is no code for ``gpu``."""
    module = importlib.import_module(f"..testing.launches.{family}", __package__)
    cases = [case for case in getattr(module, "cuda_cases", tuple)() if text.lower() in case[0].lower()]
    reason = cuda_launches.why_not(family, gpu.cc) if cases else ""
    if reason:
        tell(f"{family}: without the kernels of csrc. {reason}")
        return
    for name, call in cases:
        for launch in cuda_launches.launches(call, gpu.cc, gpu.sms):
            yield Work(family, name, launch)
