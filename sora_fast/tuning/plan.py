"""What setup has to do, and how long it will take: ``sora-fast setup --plan`` prints it, on any machine.

Counted: kernels, each once whoever launches it, validated calls, gates, and backends to time. Measured: the seconds that a
kernel takes to compile. Assumed, as it takes a GPU: whatever runs on one.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from .. import configs, measured, records
from ..benchmarks.case import Provider
from ..explanation import all_ops
from . import launched, walk, workers
from .recorded import Recorded

# Seconds of a core (AMD EPYC) in which Triton 3.9 and its ptxas compile a kernel for sm_90: rounded means of 45 kernels.
COMPILE = dict(attention=2.1, convolution=2.0, modulation=0.6, normalization=0.9, patches=1.5, rotary=2.7)
# Assumed seconds: of a process that begins; beside compiling, of a validated call, of a gate and of a backend that is timed.
PROCESS, CALL, GATE, BACKEND = 10.0, 0.3, 1.0, 0.4
FLOPS, BYTES, TIMES = 3e14, 2e12, 10  # assumed of a backend: per second; and the calls of a timing


@dataclass(frozen=True)
class Plan:
    """``validations``: each with the number of its calls; ``groups``: of calls to time, those that one gate judges.

    ``unseen``: sentences on calls whose kernels are compiled only when they run.
    """

    kernels: tuple[workers.Compilation, ...]
    validations: dict[workers.Validation, int]
    groups: tuple[tuple[Recorded, ...], ...]
    unseen: tuple[str, ...]

    @property
    def timed(self) -> tuple[Recorded, ...]:
        return tuple(case for group in self.groups for case in group)

    def tasks(self, jobs: int) -> list:
        """For worker processes, in order; one process alone compiles what it runs, when it runs it."""
        return [*(self.kernels if jobs > 1 else ()), *self.validations, *(workers.Gate(group[0]) for group in self.groups)]

    def seconds_of(self, task) -> float:
        """Of a core, or, of a call that is timed, of all."""
        if isinstance(task, workers.Compilation):
            return _seconds_compiled(task)
        if isinstance(task, workers.Validation):
            return CALL * self.validations[task]
        return GATE if isinstance(task, workers.Gate) else _seconds_timed(task)

    def seconds(self, jobs: int) -> float:
        pooled = sum(map(self.seconds_of, (*self.kernels, *self.tasks(1))))
        return pooled / jobs + (PROCESS if jobs > 1 else 0.0) + sum(map(self.seconds_of, self.timed))

    def lines(self, jobs: int) -> Iterator[str]:
        """The arithmetic of ``seconds``."""
        families: dict[str, list[float]] = defaultdict(list)
        for kernel in self.kernels:
            families[kernel.kernel.partition(".")[0]].append(self.seconds_of(kernel))
        for family, each in sorted(families.items()):
            yield f"{len(each):6} kernels of {family} to compile, {each[0]:.1f} s each: {sum(each):.0f} s"
        compiled, checked = sum(map(sum, families.values())), sum(map(self.seconds_of, self.validations))
        gates, alone = GATE * len(self.groups), sum(map(self.seconds_of, self.timed))
        calls = sum(self.validations.values())
        yield f"{calls:6} calls of {len(self.validations)} validations, {CALL} s each (assumed): {checked:.0f} s"
        yield f"{len(self.groups):6} gates, {GATE} s each (assumed): {gates:.0f} s"
        count = sum(len(case.providers()) for case in self.timed)
        yield f"{count:6} backends to time at {len(self.timed)} problems, alone (assumed): {alone:.0f} s"
        yield f"({compiled:.0f} + {checked:.0f} + {gates:.0f}) s / {jobs} + {PROCESS:.0f} s + {alone:.0f} s = " \
              f"{self.seconds(jobs):.0f} s in {jobs} processes"


def make(work: Sequence[Recorded]) -> Plan:
    """The plan for ``work``, calls on one GPU: what is judged or timed there already is left out."""
    validations: dict[workers.Validation, int] = {}
    kernels: dict[tuple, workers.Compilation] = {}
    groups: dict[tuple, list[Recorded]] = defaultdict(list)
    unseen = []

    def launches(case: Recorded) -> tuple:
        try:
            found = launched.launched(case, configs.gpu_name(case.problem.device)).launches
        except Exception as error:  # nothing is lost but time
            unseen.append(f"{workers.Gate(case)}: {type(error).__name__}: {error}")
            return ()
        keys = tuple(map(launched.key, found))
        for place, (launch, key) in enumerate(zip(found, keys, strict=True)):
            if key not in kernels:
                family = launch.fn.__module__.rpartition(".")[2].partition("_")[0]
                kernels[key] = workers.Compilation(case, place, f"{family}.{launch.fn.__name__}")
        return keys

    for case in work:
        op = all_ops()[case.op]
        for name, backend in op.backends.items():
            if not backend.kernel or backend.unsupported(case.problem) or records.settled(op.name, backend, case.problem):
                continue
            validation = workers.Validation(op.name, name, case.dtype)
            if validation not in validations:
                calls = walk.of_validation(op.name, case.dtype, case.problem.device)
                validations[validation] = len(calls)
                if name == "triton":
                    for call in calls:
                        launches(call)
        if not _is_measured(case):
            groups[case.op, measured.text(case.problem), launches(case)].append(case)
    return Plan(tuple(sorted(kernels.values(), key=_seconds_compiled, reverse=True)), validations,
                tuple(map(tuple, groups.values())), tuple(unseen))


def allowed(case: Recorded) -> list[Provider]:
    """Backends that run it and, if they are kernels, have their record."""
    op = all_ops()[case.op]
    return [each for each in case.providers() if not records.why_not(op.name, op.backends[each.name], case.problem)]


def _is_measured(case: Recorded) -> bool:
    """Whether all that may be taken was timed, or refused."""
    row = measured.find(all_ops()[case.op], case.problem)
    exact = row is not None and tuple(row["size"]) == tuple(getattr(case.problem, "size", ()))
    return exact and {provider.name for provider in allowed(case)} <= {*row["ms"], *row["refused"]}


def _seconds_compiled(task: workers.Compilation) -> float:
    return COMPILE.get(task.kernel.partition(".")[0], 2.0)


def _seconds_timed(case: Recorded) -> float:
    """Of all its backends, each called ``TIMES`` times and for as long as it needs beside."""
    once = case.least_bytes("") / BYTES + _flops(case) / FLOPS
    return len(case.providers()) * (BACKEND + TIMES * (3.5 if case.problem.grad else 1.0) * once)


def _flops(case: Recorded) -> float:
    """Of the forward of attention, or of a convolution with stride 1; of other ops, which move bytes, 0."""
    shape = case.shape()
    if case.op == "varlen_attention":
        samples = max(shape["cu_seqlens_q"][0] - 1, 1)
        return 4 * shape["q"][0] * shape["k"][0] / samples * prod(shape["q"][1:])
    if "conv3d" in case.op:
        return 2 * prod(shape["x"]) * case.arguments.get("upsample", 1) ** 2 * prod(shape["weight"]) / shape["weight"][1]
    return 0.0
