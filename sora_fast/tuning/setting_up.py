"""``sora_fast.setup``: kernels judged and backends timed on this machine's GPU, so that ``auto`` takes the fastest.

1. The calls that a model makes, or published models, by which the rest is chosen (walk.py, recorded.py), and the kernels
   that they launch (launched.py): a plan (plan.py).
2. In worker processes (workers.py): those kernels compiled, each once; then each without a record over all cases of its op,
   and every backend on a small twin of every call.
3. In this process, alone on the GPU: the time of every backend that passed, call by call.

What is done is on disk at once, in the user's records and measured times, and is not done again: a run that was killed goes
on, and a second one finds nothing to do. Two runs take turns.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import torch
from torch import nn

from .. import configs, dispatch, env, files, measured, records
from ..benchmarks import timing
from ..benchmarks.case import Provider
from ..benchmarks.runner import release
from ..explanation import all_ops
from ..testing.rule import random_cotangents, tensors
from . import plan, walk, workers
from .recorded import Recorded

EFFORT = timing.Effort(25.0, 60.0)
WORKER = 700 * 2**20  # bytes of the GPU that a process holds before it computes anything
SETS, LARGE = 4, 2**28  # of inputs gone through in turn; bytes of one that leaves no L2 anything of its beginning


@dataclass(frozen=True)
class Line:
    """One problem as it was measured; ``callers``: the classes of modules that it is of."""

    op: str
    problem: str
    size: tuple[int, ...]
    callers: tuple[str, ...]
    ms: dict[str, float]
    refused: dict[str, str]
    taken: str

    @property
    def speed_up(self) -> float | None:
        """PyTorch's time over that of the backend that auto takes."""
        return self.ms["torch"] / self.ms[self.taken] if "torch" in self.ms and self.taken in self.ms else None


@dataclass(frozen=True)
class Setup:
    """What ``setup`` found; print it. ``failed``: sentences on what could not be measured."""

    lines: tuple[Line, ...]
    failed: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        groups: dict[tuple, list[Line]] = defaultdict(list)
        for line in self.lines:
            for caller in line.callers or ("-",):
                groups[caller, line.op, line.taken].append(line)
        rows = [f"{'module':28} {'op':28} {'backend':10} {'problems':>8}  against torch, here"]
        for (caller, op, taken), lines in groups.items():
            ratios = sorted(line.speed_up for line in lines if line.speed_up is not None)
            span = "-" if not ratios else f"{ratios[0]:.2f}x" if ratios[0] == ratios[-1] else (
                f"{ratios[0]:.2f}x to {ratios[-1]:.2f}x")
            rows.append(f"{caller:28} {op:28} {taken:10} {len(lines):8}  {span}")
        wrong = {(line.op, name, why) for line in self.lines for name, why in line.refused.items()}
        rows += [f"not taken: {op}, {name}: {why}" for op, name, why in sorted(wrong)]
        return "\n".join([*rows, *self.failed])


def setup(model: nn.Module | None = None, *, call: Callable | None = None, device: str = "cuda", jobs: int | None = None,
          suite: str = "full", tell: Callable[[str], object] = print) -> Setup:
    """Judge and time what this machine's GPU runs, for ``model`` or for published models: ``auto`` then takes the fastest.

    Minutes the first time, seconds after; it may be stopped and goes on. What comes of it is in the folder SORA_FAST_CACHE.
    Where torch.distributed runs, rank 0 measures and the others wait.

    Args:
        model: seen through for the calls that it makes, in training mode with gradients too; it is left as it is.
        call: runs the model once; needed where the inputs of its class are not known.
        device: a CUDA device of this machine. jobs: processes that compile; None: one for each core, up to 16.
        suite: without a model, of the benchmark's cases: "full" has the sizes of published models, "quick" small ones.
        tell: takes each line of progress.

    Raises:
        RuntimeError: inside a graph that is traced, a capture or a transform; too little free memory on the GPU.
        ValueError: no GPU; a model without ``call`` whose inputs are not known.
        OSError: the cache cannot be written. What had been done stays.
    """
    place, name = _place(device), gpu(device)
    _refuse_inside()
    start = time.monotonic()
    work = walk.common(name, suite) if model is None else walk.of_model(model, name, call)
    failed: list[str] = []
    with _ranks_meet() as measures:
        if measures:
            with _alone(tell):
                _measure(work, place, jobs, tell, failed)
    measured.forget()
    return Setup(tuple(_lines(work)), tuple(failed), time.monotonic() - start)


# ------------------------------------------------------------------------------------------------------------ the work
def _measure(work: list[Recorded], device: torch.device, jobs: int | None, tell, failed: list[str]) -> None:
    todo = plan.make(work)
    if not (todo.validations or todo.groups):
        tell("setup: nothing to do, all of it is measured here")
        return
    jobs = _jobs(todo, device, jobs)
    clock = _Clock(tell, todo.seconds(jobs))
    tell(f"setup: {len(todo.kernels)} kernels to compile, {len(todo.validations)} to validate and {len(todo.timed)} "
         f"problems to time on {torch.cuda.get_device_name(device)}, in {jobs} {'process' if jobs == 1 else 'processes'}: "
         f"about {_time(clock.whole)}; it may be stopped and goes on")
    for sentence in todo.unseen:
        tell(f"setup: its kernels are compiled only when they run: {sentence}")
    verdicts: dict[int, dict[str, str]] = {}
    for task, found in workers.run(todo.tasks(jobs), str(device), jobs, clock.say):
        if isinstance(task, workers.Compilation):
            pass  # what does not compile fails again where it is launched, and is told there
        elif isinstance(found, Exception):
            failed.append(f"{task} was not judged: {type(found).__name__}: {found}")
        elif isinstance(task, workers.Validation):
            records.save(found)
        else:
            verdicts[id(task.case)] = found
            if found.get("torch", "").startswith("FAILED"):  # what the user would have without us: told, and taken
                failed.append(f"{task}: PyTorch's own answer {found['torch']}")
                found["torch"] = ""
        clock.did(task, todo.seconds_of(task) / jobs)
    for group in todo.groups:
        for case in group if id(group[0]) in verdicts else ():
            clock.say(f"timing {workers.Gate(case)}")
            ms, refused = _times(case, verdicts[id(group[0])], device, failed)
            if ms or refused:
                measured.save([_row(case, ms, refused)])
            clock.did(case, todo.seconds_of(case))


def _times(case: Recorded, verdicts: dict[str, str], device: torch.device, failed: list[str]) -> tuple[dict, dict]:
    """Milliseconds of each backend that passed, and why the others did not."""
    refused = {name: why for name, why in verdicts.items() if why}
    runs = [provider for provider in plan.allowed(case) if verdicts.get(provider.name) == ""]
    try:
        return _race(case, runs, device, refused), refused
    except Exception as error:
        failed.append(f"{workers.Gate(case)} was not timed: {type(error).__name__}: {error}")
        if not workers.answers(str(device)):  # nobody knows whose fault it was; PyTorch's it was not
            measured.save([_row(case, {}, refused | {each.name: "The GPU was lost when it was timed." for each in runs
                                                     if each.name != "torch"})])
            raise RuntimeError(f"{failed[-1]}; the GPU answers this process no more, call setup again") from error
        return {}, refused
    finally:
        if workers.answers(str(device)):
            release(device)


def _race(case: Recorded, runs: Sequence[Provider], device: torch.device, refused: dict[str, str]) -> dict[str, float]:
    """Milliseconds by backend, in turns; what cannot be run is added to ``refused``."""
    nbytes = case.least_bytes("")
    sets = 1 if nbytes > LARGE else min(SETS, timing.input_sets(nbytes, device, "cold"))
    inputs = [case.inputs(device, seed=seed) for seed in range(sets)]
    stream = timing.side_stream(device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # for the inputs
    timers = {}
    for provider in runs:
        try:
            with torch.cuda.stream(stream):
                timers[provider.name] = timing.timer(_calls(case, provider, inputs), device, stream)
        except torch.cuda.OutOfMemoryError as error:
            refused[provider.name] = f"It had too little memory when it was timed: {error}"
    return {name: found.statistics()["median_ms"] for name, found in timing.measure(timers, EFFORT).items()}


def _row(case: Recorded, ms: dict[str, float], refused: dict[str, str]) -> dict:
    """A line of measured.py."""
    return dict(schema=measured.SCHEMA, row="measured", op=case.op, problem=measured.text(case.problem),
                size=list(getattr(case.problem, "size", ())), gpu=configs.gpu_name(case.problem.device), ms=ms,
                refused=refused, shape=case.shape(), **measured.conditions(measured.kernels(all_ops()[case.op])),
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"))


def _calls(case: Recorded, provider: Provider, inputs: list[dict]) -> list[Callable]:
    """A call for each set of inputs: forward, and where gradients are wanted, backward behind it."""
    (names,) = case.directions().values()
    calls = []
    for values in inputs:
        if not names:
            def forward(values=values):
                with torch.no_grad():
                    return provider.run(**values)
            calls.append(forward)
            continue
        given = {name: value.requires_grad_(name in names) if isinstance(value, torch.Tensor) else value
                 for name, value in values.items()}
        outputs = tensors(provider.run(**given))
        cotangents = random_cotangents(outputs, 0)

        def both(given=given, cotangents=cotangents):
            outputs = tensors(provider.run(**given))
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            leaves = [given[name] for name in names]
            return torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
        calls.append(both)
    return calls


def _lines(work: Sequence[Recorded]) -> Iterator[Line]:
    for case in work:
        op = all_ops()[case.op]
        row = measured.find(op, case.problem)
        if row is not None:
            yield Line(case.op, row["problem"], tuple(row["size"]), tuple(sorted(case.callers)), row["ms"], row["refused"],
                       op.choose(case.problem).name)


# ----------------------------------------------------------------------------------------------------- before and between
def gpu(device: str) -> str:
    """"cuda:sm90" of a device of this machine."""
    return dispatch.device_name(torch.empty(0, device=_place(device)))


def _place(device: str) -> torch.device:
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        raise ValueError(f"setup: expected a CUDA GPU of this machine, got {device!r}, and PyTorch finds "
                         f"{'one that is none of NVIDIA' if torch.version.hip else 'none'}; nothing is to be set up here")
    return place if place.index is not None else torch.device("cuda", torch.cuda.current_device())


def _refuse_inside() -> None:
    inside = ("a graph that is traced" if torch.compiler.is_compiling() else
              "a transform of torch.func" if torch._C._are_functorch_transforms_active() else
              "a CUDA graph that is captured" if torch.cuda.is_current_stream_capturing() else "")
    if inside:
        raise RuntimeError(f"setup: expected to be called before the first step, got a call inside {inside}; call it before")


def _jobs(todo: plan.Plan, device: torch.device, jobs: int | None) -> int:
    """How many processes: as asked, or as there are cores, and the GPU has room for."""
    free, _ = torch.cuda.mem_get_info(device)
    need = max((case.least_bytes("") for case in todo.timed), default=0) * (SETS + 2) + WORKER
    if free < need:
        raise RuntimeError(f"setup: expected {need / 2**30:.1f} GB of free memory on {device}, got {free / 2**30:.1f} GB; "
                           f"end what else holds it, or call setup before the model is moved there")
    return max(1, min(jobs or workers.usual_jobs(), len(todo.tasks(2)), int(free // (2 * WORKER))))


@contextmanager
def _alone(tell) -> Iterator[None]:
    """Inside, no other process of this user measures; what another has done by then is read anew."""
    folder, told = env.cache() / "setup", False
    files.check_folder("SORA_FAST_CACHE", folder)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(files.claimed(folder))
                break
            except FileExistsError:
                if not told:
                    tell("setup: another process is at it; this one waits for its turn")
                told = True
                time.sleep(1.0)
        measured.forget()
        yield


@contextmanager
def _ranks_meet() -> Iterator[bool]:
    """Whether this process is the one that measures; all leave together.

    They wait over the CPU, as long as it takes: NCCL's barrier would give up after ten minutes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield True
        return
    everybody = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=12))
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.barrier(everybody)
        torch.distributed.destroy_process_group(everybody)


class _Clock:
    """Says every few seconds how far the work is, and how long the rest will take at the pace so far."""

    def __init__(self, tell, seconds: float):
        self.tell, self.whole, self.done = tell, seconds, 0.0
        self.start, self.last = time.monotonic(), 0.0

    def did(self, what, seconds: float) -> None:
        self.done += seconds
        self.say(what)

    def say(self, what) -> None:
        now = time.monotonic()
        if now - self.last < 5.0:
            return
        self.last, left = now, max(0.0, self.whole - self.done)
        pace = (now - self.start) / self.done if self.done > 0.1 * self.whole else 1.0  # before that, as estimated
        self.tell(f"setup: {self.done / self.whole:4.0%}, {_time(left * pace)} left: {what}")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
