"""How a call is timed: CUDA graph, CUDA events or the wall clock, providers taking turns.

Figures of one row come from one process, one set of inputs and interleaved rounds (A B C A B C ...), so that a clock that
drifts, drifts for all. The card's clocks are read, never set: this is the fixed-power test, a chip as it is delivered.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ROUNDS = 5
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Effort:
    """How long each provider is warmed up and timed, in ms."""

    warm_up_ms: float
    timed_ms: float


# A clock on a GPU needs some 100 ms of this very work to settle; a CPU is timed in a check of the suite, not of itself.
GPU, CPU = Effort(100.0, 200.0), Effort(4.0, 25.0)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls, all rounds; ``median_ms`` is the median of the rounds' medians.

    ``not_captured``: why the calls are in no CUDA graph where they might have been, or "".
    """

    rounds: tuple[tuple[float, ...], ...]
    timer: str
    not_captured: str = ""

    def statistics(self) -> dict[str, float | int]:
        every = sorted(sample for samples in self.rounds for sample in samples)
        return dict(min_ms=every[0], p20_ms=_quantile(every, 0.2),
                    median_ms=statistics.median(statistics.median(samples) for samples in self.rounds),
                    q3_ms=_quantile(every, 0.75), p80_ms=_quantile(every, 0.8), n=len(every))


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Wall:
    """The wall clock around calls that return when they are done (a CPU's)."""

    name, not_captured = "wall", ""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        self.calls, self.turn = calls, 0

    def sample(self) -> float:
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class Events:
    """CUDA events around one call, issued behind a short delay so that the GPU never waits for Python's launches."""

    name = "events"

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device, stream=None, not_captured: str = ""):
        self.calls, self.device, self.stream, self.turn = calls, device, stream, 0
        self.not_captured = not_captured

    def sample(self) -> float:
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):  # of None: the current one
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # cycles: about 0.6 ms, more than the launches of one op take
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)


class Graph:
    """One CUDA graph that holds all calls, one after the other; a sample is its replay divided by their number."""

    name, not_captured = "graph", ""

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device, stream: "torch.cuda.Stream"):
        self.device, self.count = device, len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self.graph, stream=stream):
            self.kept = [call() for call in calls]  # the replays write into these

    def sample(self) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / self.count


def side_stream(device: torch.device):
    """The stream to run on before and while capturing: gradients are computed on the stream of their forward."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def timer(calls: Sequence[Callable[[], object]], device: torch.device, stream, *, capture: bool = True):
    """The best timer there is for ``calls``; where they cannot be captured, events, which say why (``not_captured``)."""
    if device.type != "cuda":
        return Wall(calls)
    if not capture:
        return Events(calls, device, stream)
    why = _waits(calls[0])
    if not why:
        try:
            return Graph(calls, device, stream)
        except Exception as error:  # whatever else cannot be captured, such as allocations outside torch
            torch.cuda.synchronize(device)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return Events(calls, device, stream, why)


def _waits(call: Callable[[], object]) -> str:
    """A sentence if ``call`` waits for the GPU, as PyTorch sees it, or "".

    It is asked before a capture and not told by one that fails: that leaves the allocator of PyTorch 2.11 and 2.12 broken.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return "It waits for the GPU."
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def measure(timers: Mapping[str, object], effort: Effort) -> dict[str, Timing]:
    """Time every provider in ``timers`` (name -> timer), in turns.

    Returns:
        A Timing per name: at least LEAST_SAMPLES samples of calls of less than 10 ms, or half of ``effort.timed_ms``.
    """
    each = {name: _warm_up(timer, effort.warm_up_ms) for name, timer in timers.items()}
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            least = LEAST_SAMPLES // ROUNDS if each[name] < max(10.0, effort.timed_ms / 2) else 1
            count = max(least, min(200, round(effort.timed_ms / ROUNDS / max(each[name], 1e-3))))
            rounds[name].append(tuple(timer.sample() for _ in range(count)))
    return {name: Timing(tuple(samples), timers[name].name, timers[name].not_captured) for name, samples in rounds.items()}


def _warm_up(timer, milliseconds: float) -> float:
    """Run for about ``milliseconds``, at least twice; the last sample, in ms."""
    start = time.perf_counter()
    timer.sample()
    last = timer.sample()
    while (time.perf_counter() - start) * 1e3 < milliseconds:
        last = timer.sample()
    return last


def input_sets(bytes_per_set: int, device: torch.device, l2: str) -> int:
    """How many sets of inputs to go through in turn: cold means that a set has left the L2 before it comes again."""
    if device.type != "cuda" or l2 == "hot":
        return 1
    chip = torch.cuda.get_device_properties(device)
    cache = getattr(chip, "L2_cache_size", 0) or 64 * 2**20
    if bytes_per_set * 8 > chip.total_memory:  # so far beyond the L2 that a set evicts itself
        return 1
    return min(64, max(2, math.ceil(3 * cache / max(bytes_per_set, 1))))
