"""What launches of every kind share: a kernel is executed under each schedule, and findings raise."""

import copy
import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from threadpoolctl import ThreadpoolController

from . import memory
from .codegen import Program
from .counters import Counters
from .machine import Launch, Schedule
from .ptx import demangled, parse


def schedules(asked: int | str | Schedule | Iterable) -> tuple[Schedule, ...]:
    """The schedules that ``asked`` names, of asynchronous copies and MMAs and of the order of warps.

    Args:
        asked: "late" (completion as late as the PTX ISA allows, warps in order), "early" (at once), "random" (warps and
            completions by a seed, 1), a Schedule, several of these, or how many of late, early, random, random, ...
    """
    if isinstance(asked, Schedule):
        return (asked,)
    if isinstance(asked, bool) or not isinstance(asked, (int, str, Iterable)) or isinstance(asked, int) and asked < 1:
        raise ValueError(f"emulated_gpu: expected schedules to be a number from 1 on, or some of 'late', 'early' and "
                         f"'random', got {asked!r}; pass one of them")
    if isinstance(asked, int):
        first = (Schedule(), Schedule(when="early"))[:asked]
        return (*first, *(Schedule(seed, "random") for seed in range(1, asked - 1)))
    if not isinstance(asked, str):
        return tuple(schedule for each in asked for schedule in schedules(each))
    if asked not in ("late", "early", "random"):
        raise ValueError(f"emulated_gpu: expected schedules among 'late', 'early' and 'random', got {asked!r}; pass some")
    return (Schedule(1 if asked == "random" else None, asked),)


@dataclass(frozen=True)
class Launched:
    """One launch as it was executed: ``runs`` holds the machine's Launch of each schedule, ``seconds`` the time of all.

    ``digest`` is the same for launches of the same instructions with the same arguments, whatever the names of kernel and
    tensors, the lines of the source and the addresses.
    """

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    ptx: str
    seconds: float
    runs: tuple[Launch, ...]
    digest: str

    @property
    def counters(self) -> Counters:
        """Of the last schedule's run; what a kernel executes does not depend on it."""
        return self.runs[-1].counters

    @property
    def instructions(self) -> int:
        """Warp instructions of one run."""
        return self.runs[-1].warp_instructions

    @property
    def findings(self) -> list[str]:
        return list(dict.fromkeys(text for run in self.runs for text in run.findings.values()))


@dataclass
class Emulator:
    """How kernels are executed, and what was launched.

    ``compute_capability``: 90 of sm90. ``race``: look for races, three to five times as slow. ``count``: Counters for each
    launch. ``configs``: of autotuned kernels, by name (triton_launch.py). ``cache``: folder of compiled PTX, or None.
    ``change``: takes and returns the PTX of a kernel: planted faults. ``raises``: whether findings raise memory.Fault.
    ``dry``: launches are compiled and recorded, and not executed.
    ``shared``: bytes of shared memory that a CTA may have; None: any number. ``sms``: SMs that launchers see.
    """

    compute_capability: int = 90
    schedules: tuple[Schedule, ...] = (Schedule(),)
    race: bool = False
    count: bool = False
    configs: dict = field(default_factory=dict)
    cache: object = None
    change: Callable[[str], str] | None = None
    raises: bool = True
    dry: bool = False
    shared: int | None = None
    sms: int = 3
    records: list[Launched] = field(default_factory=list)

    def execute(self, name: str, ptx: str, grid, block, params: Callable, allocations: memory.Allocations,
                shared: int) -> Launched:
        """Run one launch under every schedule, each from the same memory; the last one's results stay.

        Args:
            ptx: text with this kernel alone. params: Program -> the bytes of its parameters. shared: bytes of dynamic
            shared memory.

        Raises:
            memory.Fault: a finding, or results that depend on the schedule though nothing is added atomically.
            RuntimeError: more shared memory than a CTA may have.
        """
        if self.change is not None:
            ptx = self.change(ptx)
        program = program_of(ptx)
        raw = params(program)
        asked = shared + sum(each.size for each in program.kernel.variables.values() if each.space == "shared")
        if self.shared is not None and asked > self.shared:
            raise RuntimeError(f"{name}: expected at most {self.shared} bytes of shared memory, what "
                               f"sm{self.compute_capability} has for a CTA, got {asked}; ask for less")
        digest = _digest(ptx, grid, block, shared, raw, allocations)
        several = len(self.schedules) > 1  # or nothing is copied: of a large tensor a kernel may touch little
        before = _Snapshot(allocations) if several and not self.dry else None
        results, runs, start = [], [], time.perf_counter()
        for place, schedule in enumerate(() if self.dry else self.schedules):
            if place:
                before.restore()
            counters = Counters(program) if self.count else None
            with _blas().limit(limits=1):
                run = Launch(program, grid, block, raw, copy.deepcopy(allocations), shared=shared, schedule=schedule,
                             race=self.race, counters=counters)
            runs.append(run)
            if several:
                results.append(_Snapshot(allocations))
        record = Launched(name, tuple(grid), tuple(block), ptx, time.perf_counter() - start, tuple(runs), digest)
        self.records.append(record)
        found = record.findings
        if results and not found and not _rounding_depends_on_schedule(program):
            found = [f"{name}: results differ between {self.schedules[0]} and {schedule}, first in {where}, and nothing is "
                     f"added atomically" for schedule, result in zip(self.schedules[1:], results[1:], strict=True)
                     if (where := results[0].difference(result))]
        if found and self.raises:
            raise memory.Fault("\n".join(found))
        return record


current_emulator: ContextVar[Emulator | None] = ContextVar("the emulator that takes launches", default=None)


@functools.cache
def _blas() -> ThreadpoolController:
    """numpy's BLAS: an MMA is so small a product that threads would mostly wait for one another."""
    return ThreadpoolController().select(user_api="blas")


_programs: dict[bytes, Program] = {}


def program_of(ptx: str) -> Program:
    """The numpy program of a text that holds one kernel, made once."""
    key = hashlib.sha256(ptx.encode()).digest()
    if key not in _programs:
        (kernel,) = parse(ptx).values()
        kernel.name = demangled(kernel.name)  # as findings call it
        _programs[key] = Program(kernel)
    return _programs[key]


def _digest(ptx: str, grid, block, shared: int, params: bytes, allocations: memory.Allocations) -> str:
    """Launched.digest."""
    words = []
    for at in range(0, len(params), 8):
        word = int.from_bytes(params[at:at + 8], "little")
        tensors = ((place, word - start) for place, (start, end, *_) in enumerate(allocations.registered)
                   if start <= word < end)
        words.append(next(tensors, word))
    return hashlib.sha256(repr((_normalised_code(ptx), *grid, *block, shared, words)).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _normalised_code(ptx: str) -> str:
    """PTX without comments, names of functions and parameters, and what only debuggers read."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx.partition("\n\t.section")[0], flags=re.DOTALL)
    code = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", code, flags=re.MULTILINE)
    for name in set(re.findall(r"\.(?:entry|func)\s+([\w$]+)", code)):
        code = code.replace(name, "f")
    return re.sub(r"\s+", " ", code)


def _rounding_depends_on_schedule(program: Program) -> bool:
    """Whether sums may round otherwise under another schedule: of atomics, and of wgmma, whose steps are executed together
    where they complete together."""
    return any(instr.parts[0] in ("atom", "red", "wgmma") for instr in program.instrs)


class _Snapshot:
    """The contents of all allocations at one moment."""

    def __init__(self, allocations: memory.Allocations):
        self.allocations = allocations
        self.bytes = {start: memory.span(start, end).copy() for start, (end, *_) in allocations.ranges.items()}

    def restore(self) -> None:
        for start, saved in self.bytes.items():
            memory.span(start, start + len(saved))[:] = saved

    def difference(self, other: "_Snapshot") -> str:
        """The element with the first byte that differs from ``other``, or ""."""
        for start, saved in self.bytes.items():
            differs = saved != other.bytes[start]
            if differs.any():
                return self.allocations.name(start + int(differs.argmax()))
        return ""
