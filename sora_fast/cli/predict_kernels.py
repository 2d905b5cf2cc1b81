"""Our kernels, and a user's, compiled for a GPU that is not here: what ``sora-fast predict`` gives the cycle model.

The launches are those of sora_fast.testing.launches; what machine code does not say of them (padding, bytes of TMA, DRAM
traffic) is read from their constants and tensors.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..cyclemodel import GPU, Kernel
from ..testing import aot

MEMORY = ("modulation", "normalization", "patches", "rotary")  # families whose time is DRAM's
PASSES = {"forward_kernel": "forward", "embed_kernel": "forward", "box_kernel": "forward or dgrad"}


@dataclass(frozen=True)
class Work:
    """A kernel that is compiled when its turn comes: seconds each."""

    family: str
    case: aot.AotCase
    traffic: float | None

    @property
    def name(self) -> str:
        return f"{self.family}, {self.case.name.partition(':')[0]}, {self.case.fn.__name__}"

    def kernel(self, gpu: GPU) -> Kernel:
        case = self.case
        compiled = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, gpu.cc, **case.options)
        warps, stages = case.options.get("num_warps", 4), case.options.get("num_stages", 3)
        constants = case.constexprs
        blocks = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in constants.items()
                  if name.startswith("BLOCK_") or name in ("C0", "C1", "TH", "TW", "MORE")]
        return Kernel(
            case.fn.__name__, compiled.sass, compiled.registers, compiled.shared, warps,
            case=f"{self.family} {case.name.partition(':')[0]}", tile=" ".join([*blocks, f"w{warps}", f"s{stages}"]),
            direction=PASSES.get(case.fn.__name__, "backward"), stages=stages, bulk=_bulk(case.fn.__name__, constants),
            useful=_useful(case.fn.__name__, constants, case.signature),
            memory=self.family in MEMORY, traffic=self.traffic)


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
    elif "BLOCK_O" in constants:
        share = _share(value("COUT"), value("BLOCK_O")) * _share(value("CIN"), value("BLOCK_I") + value("MORE"))
    elif "CIN" in constants:
        made, summed = ("COUT", "CIN") if kernel == "forward_kernel" else ("CIN", "COUT")
        share = _share(value(made), value("BLOCK_C")) * _share(value(summed), value("BLOCK_K"))
    else:
        share = 1.0
        for size in ("D", "C", "H", "P"):
            if f"BLOCK_{size}" in constants and (size != "P" or "H" in constants) and isinstance(value(size), int):
                share *= _share(value(size), value(f"BLOCK_{size}"))
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
    return 0.0


# -------------------------------------------------------------------------------------------------------- launches
class _Created(TorchDispatchMode):
    """Remembers tensors that a launcher makes: its kernels' outputs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and isinstance(out, torch.Tensor):
            self.found.append(out)
        return out


def _traffic(launch, created) -> float | None:
    """DRAM bytes for each byte that is stored: streams, as tables and weights are small or shared, over outputs."""
    tensors = [each for each in (*launch.args, *launch.kwargs.values()) if isinstance(each, torch.Tensor)]
    nbytes = lambda tensor: tensor.numel() * tensor.element_size()
    streams = [each for each in tensors if nbytes(each) * 2 >= max(map(nbytes, tensors))]
    outputs = [each for each in streams if any(each is other for other in created)]
    return sum(map(nbytes, streams)) / sum(map(nbytes, outputs)) if outputs else None


def _recorded(call: Callable[[], object]) -> list[tuple]:
    """(launch, its traffic) of each that ``call`` makes."""
    with _Created() as mode:
        launches = aot.launches(call)
    return [(launch, _traffic(launch, mode.found)) for launch in launches]


def ours(family: str, gpu: GPU, text: str = "", candidates: bool = False) -> Iterator[Work]:
    """The kernels of a family on ``gpu``; with ``candidates`` also with every tile that its tuner would try."""
    module = importlib.import_module(f"..testing.launches.{family}", __package__)
    seen = set()
    for name, call, wants in module.aot_cases():
        if text.lower() not in name.lower():
            continue
        for made in (call, *(_with_candidates(family, call) if candidates else ())):
            recorded = _recorded(made)
            for case, (_, traffic) in zip(aot.cases_of(name, made, wants), recorded, strict=True):
                key = case.fn.__name__, case.name, str(sorted(case.constexprs.items(), key=str)), str(case.options)
                if gpu.cc in case.ccs and key not in seen:
                    seen.add(key)
                    yield Work(family, case, traffic)


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


def theirs(call: Callable[[], object], name: str) -> Iterator[Work]:
    """The kernels that a user's function launches on tensors of the device "meta"."""
    recorded = _recorded(call)
    for case, (_, traffic) in zip(aot.cases_of(name, call, {}), recorded, strict=True):
        yield Work("yours", case, traffic)
