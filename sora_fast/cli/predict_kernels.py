"""Our kernels, and a user's, compiled for a GPU that is not here: what ``sora-fast predict`` gives the cycle model.

The launches are those of sora_fast.testing.launches; what machine code does not say of them (padding, bytes of TMA, DRAM
traffic) is read from their constants and tensors.
"""

import functools
import importlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from .. import env
from ..cyclemodel import GPU, Kernel, cubins
from ..testing import aot, aot_cache
from .predict_measured import Call, call_of

MEMORY = ("modulation", "normalization", "patches", "rotary")  # families whose time is DRAM's
PASSES = {"forward_kernel": "forward", "embed_kernel": "forward", "tma_kernel": "forward or dgrad",
          **dict.fromkeys(("schedule_kernel", "reduce_slots_kernel", "merge_stats_kernel", "reduce_sums_kernel"),
                          "beside the others")}

TILE = ("C0", "C1", "O0", "O1", "I0", "I1", "NTAPS", "TH", "TW", "EXTRA_I")  # of a kernel's constants, beside BLOCK_...


def cache() -> Path:
    """Where compiled kernels are kept."""
    return env.cache() / "predict"


@dataclass(frozen=True)
class Work:
    """A kernel that is compiled when its turn comes: seconds each."""

    family: str
    case: aot.AotCase
    tensors: dict[str, int]  # bytes
    launches: Callable[[], object]  # makes this launch, among others
    place: int  # of this launch among them
    tried: bool = False  # a tile that only the tuner would take

    @property
    def call(self) -> Call | None:
        """What a measured row must be of to stand beside it."""
        case = self.case
        return None if self.tried else call_of(self.family, case.fn.__name__, case.constexprs, case.signature)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.case.name.partition(':')[0]}, {self.case.fn.__name__}"

    def kernel(self, gpu: GPU, tokens: int = 0, emulate: bool = False) -> Kernel:
        """``tokens``: of a sample, of attention; 0: not known. ``emulate``: count its wavefronts in shared memory."""
        case = self.case
        counted = _emulated(self.launches, gpu.cc)[self.place] if emulate and self.family not in MEMORY else {}
        if counted is None:
            raise ValueError(f"--emulate: expected {case.fn.__name__} to go through a loop twice on tensors of zeros, got "
                             f"fewer turns; leave the flag out")
        compiled = aot_cache.compile_for(cache(), case.fn, case.signature, case.constexprs, case.aligned, gpu.cc,
                                         **case.options)
        return self.of(compiled, tokens, counted)

    def source_lines(self, gpu: GPU) -> dict[int, tuple[str, int]]:
        """(file, line) of each address of its machine code, for which it is compiled anew."""
        case = self.case
        made, _ = aot.build(case.fn, case.signature, case.constexprs, case.aligned, gpu.cc, case.options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(made.asm["cubin"])
            return cubins.source_lines(cubin, made.metadata.name)

    def of(self, compiled: aot.Compiled, tokens: int = 0, counted: dict[str, float] | None = None) -> Kernel:
        """``counted``: wavefronts, as the emulator found them."""
        case = self.case
        warps, stages = case.options.get("num_warps", 4), case.options.get("num_stages", 3)
        constants = case.constexprs
        blocks = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in constants.items()
                  if name.startswith("BLOCK_") or name in TILE]
        return Kernel(
            case.fn.__name__, compiled.sass, compiled.registers, compiled.shared, warps,
            case=f"{self.family} {case.name.partition(':')[0]}", tile=" ".join([*blocks, f"w{warps}", f"s{stages}"]),
            direction=PASSES.get(case.fn.__name__, "backward"), stages=stages, bulk=_bulk(case.fn.__name__, constants),
            useful=_useful(case.fn.__name__, constants, case.signature),
            memory=self.family in MEMORY, traffic=_traffic(self.tensors, compiled.ttir) if self.tensors else None,
            turns=_turns(case.fn.__name__, constants, tokens), wavefronts=counted or {})


@functools.cache
def _emulated(call: Callable[[], object], cc: int) -> list[dict[str, float] | None]:
    from ..testing.emulated_launches import wavefronts

    return wavefronts(call, cc)


def _share(size: int, block: int) -> float:
    """Of blocks that cover ``size``, how much is no padding."""
    return size / (-(-size // block) * block)


def _useful(kernel: str, constants, signature) -> float:
    """The share of lanes, or of FLOPs, that is on elements which exist."""
    value = constants.get
    if "E0" in constants:
        share = value("E") / (value("E0") + value("E1"))
    elif "MADE" in constants:
        share = _share(value("MADE"), value("C0") + value("C1")) * _share(value("SUMMED"), value("BLOCK_K"))
    elif "O0" in constants:
        share = (_share(value("COUT"), value("O0") + value("O1")) * _share(value("CIN"), value("I0") + value("I1"))
                 * _share(value("KW"), value("NTAPS")))
    elif "BLOCK_O" in constants:
        share = _share(value("COUT"), value("BLOCK_O")) * _share(value("CIN"), value("BLOCK_I") + value("EXTRA_I"))
    elif "CIN" in constants:
        made, summed = ("COUT", "CIN") if kernel == "forward_kernel" else ("CIN", "COUT")
        share = _share(value(made), value("BLOCK_C")) * _share(value(summed), value("BLOCK_K"))
    else:
        share = 1.0
        sizes = {size: value(size) for size in ("D", "C", "H") if isinstance(value(size), int)}
        if "H" in sizes:
            sizes["P"] = (value("E") + 1) // 2  # of pairs that are not rotated a head has as many lanes
        for size, count in sizes.items():
            if f"BLOCK_{size}" in constants:
                share *= _share(count, value(f"BLOCK_{size}"))
    whole = "*fp32" in signature.values() and not {"*bf16", "*fp16"} & set(signature.values())
    return share / 3 if whole and value("PRECISION") == "tf32x3" else share  # three products of 10 bits for one


def _bulk(kernel: str, constants) -> float:
    """Bytes that TMA loads for a block in one turn."""
    value = constants.get
    if value("TMA") and "E0" in constants:
        passing = value("BLOCK_M") if kernel == "dkdv_kernel" else value("BLOCK_N")
        return 2 * passing * (value("E0") + value("E1")) * 2
    if "MADE" in constants:
        return (value("TH") * value("TW") + value("C0") + value("C1")) * value("BLOCK_K") * 2
    if "O0" in constants:
        return value("TH") * value("TW") * (value("I0") + value("I1")) * value("NTAPS") * 2
    return 0.0


def _turns(kernel: str, constants, tokens: int) -> float | None:
    """Of a block's main loop; None: known to the launch alone, as in wgrad, of windows, and without ``tokens``.

    A block of causal attention sees half of its sample in the mean.
    """
    value = constants.get
    taps = lambda summed: value("KT") * value("KH") * value("KW") * -(-value(summed) // value("BLOCK_K"))
    if "MADE" in constants:
        return taps("SUMMED")
    if kernel in ("forward_kernel", "dgrad_kernel") and "CIN" in constants:
        strides = value("ST") * value("SH") * value("SW") if kernel == "dgrad_kernel" else 1  # a pixel is seen by some taps
        return taps("CIN" if kernel == "forward_kernel" else "COUT") / strides
    if "E0" in constants and tokens and not value("LEFT"):
        passing = value("GROUP") / value("BLOCK_M") if kernel == "dkdv_kernel" else 1 / value("BLOCK_N")
        return max(1.0, tokens * passing / (2 if value("RIGHT") else 1))
    return None


# -------------------------------------------------------------------------------------------------------- launches
def tensor_bytes(launch: aot.Launch) -> dict[str, int]:
    """Bytes of each tensor argument, by the parameter's name."""
    given = {**dict(zip(launch.fn.arg_names, launch.args, strict=False)), **launch.kwargs}
    return {name: each.numel() * each.element_size() for name, each in given.items() if isinstance(each, torch.Tensor)}


def _traffic(tensors: dict[str, int], ttir: str) -> float | None:
    """DRAM bytes for each byte that is stored: streams over those of them that Triton's own form of the kernel stores to.

    Tables and weights are small or shared: what has half of the largest tensor's bytes is a stream. None: none is stored.
    """
    source = dict(re.findall(r"(%\w+) = tt\.(?:splat|addptr|broadcast|bitcast|expand_dims) (%\w+)", ttir))
    stored = set()
    for pointer in re.findall(r"tt\.store (%\w+)", ttir):
        while pointer in source:
            pointer = source[pointer]
        stored.add(pointer.removeprefix("%"))
    streams = {name: nbytes for name, nbytes in tensors.items() if 2 * nbytes >= max(tensors.values())}
    outputs = sum(nbytes for name, nbytes in streams.items() if name in stored)
    return sum(streams.values()) / outputs if outputs else None


def ours(family: str, gpu: GPU, text: str = "", candidates: bool = False) -> Iterator[Work]:
    """The kernels of a family on ``gpu``; with ``candidates`` also with every tile that its tuner would try."""
    module = importlib.import_module(f"..testing.launches.{family}", __package__)
    seen = set()
    for name, call, wants in module.aot_cases():
        if text.lower() not in name.lower():
            continue
        for made in (call, *(_with_candidates(family, call) if candidates else ())):
            for place, (case, launch) in enumerate(zip(aot.cases_of(name, made, wants), aot.launches(made), strict=True)):
                key = case.fn.__name__, case.name, str(sorted(case.constexprs.items(), key=str)), str(case.options)
                if gpu.cc in case.ccs and key not in seen:
                    seen.add(key)
                    yield Work(family, case, tensor_bytes(launch), made, place, made is not call)


def _with_candidates(family: str, call: Callable[[], object]) -> Iterator[Callable[[], object]]:
    """``call`` with each config that the tuner would try of each kernel that it launches, all others as they are."""
    heuristics = importlib.import_module(f"..kernels.{family}_config", __package__).HEURISTICS
    tried = importlib.import_module(f"..kernels.{family}_candidates", __package__).candidates
    asked = {}

    def remember(kernel, heuristic):
        def choose(launch, gpu):
            asked[kernel] = launch, gpu
            return heuristic(launch, gpu)

        return choose

    with mock.patch.dict(heuristics, {kernel: remember(kernel, each) for kernel, each in heuristics.items()}):
        aot.launches(call)
    for kernel, (launch, gpu) in asked.items():
        for config in tried(kernel, launch, gpu):
            def changed(kernel=kernel, config=config):
                with mock.patch.dict(heuristics, {kernel: lambda launch, gpu: config}):
                    call()

            yield changed


def works_of(family: str, call: Callable[[], object], name: str) -> Iterator[Work]:
    """The kernels that a function launches, which are not launched here: "yours" are a user's, on tensors of "meta"."""
    for place, (case, launch) in enumerate(zip(aot.cases_of(name, call, {}), aot.launches(call), strict=True)):
        yield Work(family, case, tensor_bytes(launch), call, place)
