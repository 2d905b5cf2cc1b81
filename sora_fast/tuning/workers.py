"""The tasks that setup gives to worker processes: kernels to compile, and to say whether they are right.

A kernel that reads past its memory ends its own process's GPU context and nobody else's: what such a worker was given after
that is done again in another.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from .. import configs
from ..benchmarks import gate
from ..testing.validation import validate
from .launched import launched
from .recorded import Recorded

TRIES = 3  # processes that a task may be lost in


@dataclass(frozen=True)
class Compilation:
    """One Triton kernel, the ``place``-th that a call launches: into Triton's cache, where whoever launches it finds it."""

    case: Recorded
    place: int
    kernel: str

    def __str__(self) -> str:
        return f"compiling {self.kernel} of {self.case.op}"

    def run(self, device: str) -> str:
        launch = launched(self.case, configs.gpu_name(torch.device(device))).launches[self.place]
        with torch.cuda.device(device):
            launch.fn.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
        return self.kernel


@dataclass(frozen=True)
class Validation:
    """A kernel in one dtype over all cases of its op; gives rows, those of records among them."""

    op: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}, {self.backend}, {str(self.dtype).removeprefix('torch.')}"

    def run(self, device: str) -> list[dict]:
        return validate(self.op, backend=self.backend, device=device, dtypes=(self.dtype,)).to_dicts()


@dataclass(frozen=True)
class Gate:
    """Every backend on the small twin of a problem; gives what is wrong with each, "" of those that passed.

    The twin's kernels have the Configs of the problem itself: what is judged is what is timed, and compiled once.
    """

    case: Recorded

    def __str__(self) -> str:
        return f"{self.case.op} at {self.case.problem.size or 'any size'}"

    def run(self, device: str) -> dict[str, str]:
        small, place = self.case.small(), torch.device(device)
        truth = small.truth(small.inputs(place, seed=0), seed=0)
        found = {}
        with ExitStack() as stack:
            for asked, config in launched(self.case, configs.gpu_name(place)).lookups.items():
                stack.enter_context(configs.override(asked.family, asked.kernel, config))
            for provider in small.providers():
                verdicts = gate.check(small, provider, truth, place, tuple(small.directions()))
                (verdict,) = verdicts.values()
                found[provider.name] = "" if verdict.status == "PASSED" else f"{verdict.status}: {verdict.reason}"
                if not answers(device):  # the rest was not judged
                    break
        return found


def _run(task, device: str):
    """What a task gives, or raises; None where this process has lost the GPU before."""
    if not answers(device):
        return None
    try:
        return task.run(device)
    except Exception as error:  # such as memory that a truth does not fit: the others go on
        return RuntimeError(gate.explain(error))


def answers(device: str) -> bool:
    """Whether this process can still use the GPU."""
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def run(tasks: Sequence, device: str, jobs: int, tell: Callable[[object], object]) -> Iterator[tuple]:
    """(task, what it gives or an exception), as they are done, in ``jobs`` processes; in this one where it is 1.

    ``tell`` is told each task's beginning, where it is this process that begins it.
    """
    if jobs == 1:
        for task in tasks:
            tell(task)
            found = _run(task, device)
            if found is None:
                raise RuntimeError(f"setup: {device} answers no more, before {task}; call setup again, it goes on")
            yield task, found
        return
    left = list(tasks)
    for _ in range(TRIES):
        if not left:
            return
        lost = []
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            with _no_main():
                running = {pool.submit(_run, task, device): task for task in left}
            for each in as_completed(running):
                try:
                    found = each.result()
                except BrokenProcessPool:
                    found = None
                if found is None:
                    lost.append(running[each])
                else:
                    yield running[each], found
        left = lost
    if left:
        raise RuntimeError(f"setup: {len(left)} tasks were lost in {TRIES} processes each, the first is {left[0]}; "
                           f"run sora-fast setup --jobs 1 to see what ends them")


@contextmanager
def _no_main() -> Iterator[None]:
    """Processes that are begun inside do not run the user's script again, which has no need to guard its main part."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_jobs() -> int:
    return min(cores(), 16)
