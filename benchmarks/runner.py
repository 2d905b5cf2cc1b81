"""Gate, then time: from cases and providers to rows.

For each case: the truth once, the gate for every provider, then every direction's providers timed in turns, then the gate
once more. A case's rows are written when the case is done, all at once, so that a run that is killed loses no finished row
and goes on where it stopped.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config

from sora_fast.environment import clock_mhz, environment
from sora_fast.precision import keep_float32
from sora_fast.testing.rule import tensors

from . import gate, rows, timing
from .case import Case, Provider, Subject, nbytes
from .figures import MODEL, MOST
from .gate import Verdict
from .model.case import ModelCase, ModelProvider
from .roofs import Roofs


def set_conditions() -> None:
    """What a process that measures sets for all providers alike."""
    # A backward is timed many times on one graph, so that torch.compile's may not give its buffers away.
    torch._functorch.config.donated_buffer = False
    # What cuDNN runs must not depend on which provider asked first; float32 is float32, in figures and in the gate.
    torch.backends.cudnn.benchmark = True
    keep_float32()


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run."""

    device: torch.device
    suite: str
    l2: str
    out: Path
    minutes: float = 0.0  # stop beginning cases after so long; 0: never
    effort: timing.Effort = timing.GPU


@dataclass(frozen=True)
class Memory:
    """What a row tells of a provider's memory."""

    peak_bytes: int | None
    saved_bytes: int | None


class Runner:
    """Measures cases into ``settings.out / "bench.jsonl"``."""

    def __init__(self, settings: Settings, tell: Callable[[str], None] = print,
                 show: Callable[[list[dict]], None] = lambda rows: None):
        self.settings, self.tell, self.show = settings, tell, show
        self.path = settings.out / "bench.jsonl"
        self.roofs = Roofs(settings.device, settings.l2)
        set_conditions()
        self.environment = environment(settings.device)
        self.done = self._go_on()
        self.left = 0  # cases that the time limit left for another call
        kept = [row for row in self.done if row["row"] == "roof"]
        self.roofs.found |= {(row["kind"], row["dtype"] or row["bytes"]): row for row in kept}
        self.written_roofs = set(self.roofs.found)

    def _go_on(self) -> list[dict]:
        """The rows of an earlier run in the same folder; refuses those measured under other conditions."""
        if not self.path.exists():
            return []
        done = rows.read(self.path)
        for row in done:
            then = row["environment"] | {"l2": row["l2"]}
            now = self.environment | {"l2": self.settings.l2}
            for name in (*rows.CONDITIONS, "l2"):
                if then.get(name) != now.get(name):
                    raise ValueError(f"bench: expected to go on with the run in {self.path} under its conditions, got "
                                     f"{name} {now.get(name)!r} where it has {then.get(name)!r}; choose another --out, or "
                                     f"pass --fresh to begin again")
        return done

    def run(self, work: Sequence[tuple]) -> list[dict]:
        """Measure (family, case, providers) in order and return every row of the file.

        The family "model" has ModelCases and ModelProviders, all others Cases and Providers.
        """
        start = time.monotonic()
        for dtype in sorted({case.dtype for _, case, _ in work}, key=str):
            self.roofs.matrix(dtype)
        if self.settings.device.type == "cuda":  # on a CPU each working set has its own, measured when its case comes
            self.roofs.copy(0)
        finished = {rows.key(row) for row in self.done if row["row"] == "time"}
        for place, (family, case, providers) in enumerate(work, start=1):
            left = [p for p in providers if any(self._key(case, d, p) not in finished for d in case.directions())]
            if not left:
                continue
            if self.settings.minutes and time.monotonic() - start > self.settings.minutes * 60:
                self.left = len(work) - place + 1
                self.tell(f"{self.left} of {len(work)} cases are left after {self.settings.minutes:g} minutes; "
                          f"the same command goes on with them")
                break
            self.tell(f"[{place}/{len(work)}] {case.id}")
            torch.compiler.reset()  # every case compiles anew: past eight shapes torch.compile would stop compiling
            try:
                new = self._model(case, left) if family == MODEL else self._case(family, case, left)
            except Exception as error:  # of the reference or the inputs, such as memory they do not fit: the others go on
                verdict = gate.refusal("ERROR", f"Nothing of this case was timed: {gate.explain(error)}")
                new = [self._blank(family, case, direction, provider.name, verdict, "", None)
                       for direction in case.directions() for provider in left]
            self.write(new)
            release(self.settings.device)
        return self.done

    def _key(self, case: Subject, direction: str, provider) -> tuple:
        return rows.key(dict(suite=self.settings.suite, op=case.op, case=case.label, direction=direction,
                             provider=provider.name, dtype=str(case.dtype).removeprefix("torch.")))

    def write(self, new: list[dict]) -> None:
        new = [row | {"environment": self.environment} for row in new]
        rows.append(self.path, new)
        self.done += new
        self.show([row for row in new if row["row"] == "time"])

    # ------------------------------------------------------------------------------------------------- one case
    def _case(self, family: str, case: Case, providers: Sequence[Provider]) -> list[dict]:
        device = self.settings.device
        verdicts: dict[str, dict[str, Verdict]] = {}
        truth, scope = None, ""
        for provider in providers:
            away = {d: provider.unavailable(case, d, device) for d in case.directions()}
            verdicts[provider.name] = {d: gate.refusal("UNSUPPORTED", why) for d, why in away.items() if why}
            if len(verdicts[provider.name]) == len(away):
                continue
            if truth is None:
                truth = case.truth(case.inputs(device, seed=0), seed=0)
                scope = truth.scope
            found = gate.check(case, provider, truth, device, tuple(d for d, why in away.items() if not why))
            verdicts[provider.name] |= found
            release(device)
        new = []
        for direction, names in case.directions().items():
            passed = [p for p in providers if verdicts[p.name][direction].status == "PASSED"]
            timed, clock = self._direction(case, names, passed, truth, verdicts, direction) if passed else ({}, None)
            for provider in providers:
                new.append(self._row(family, case, direction, provider, verdicts[provider.name][direction], scope,
                                     timed.get(provider.name), clock))
            release(device)
        return self._fresh_roofs() + new

    def _fresh_roofs(self) -> list[dict]:
        """Roofs measured since the last case; they go before its rows."""
        fresh = [row for key, row in self.roofs.found.items() if key not in self.written_roofs]
        self.written_roofs |= set(self.roofs.found)
        return fresh

    def _direction(self, case, names, providers, truth, verdicts, direction):
        """Time one direction; a provider that breaks here, or afterwards, loses its verdict and gets no time."""
        device = self.settings.device
        sets = timing.input_sets(nbytes(*tensors(truth.inputs)), device, self.settings.l2)
        inputs = [case.inputs(device, seed=seed + 1) for seed in range(sets)]
        stream = timing.side_stream(device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # for the inputs

        def make(provider):
            with torch.cuda.stream(stream):  # of None: nothing
                calls, memory = prepare(provider, inputs, names, truth, device)
                return memory, timing.timer(calls, device, stream)

        result, broken, clock = self._in_turns(providers, make)
        for provider in providers:
            again = gate.check_again(provider, truth, inputs[0], names) if provider.name in result else ""
            if again:
                broken[provider.name] = gate.refusal("FAILED", again)
                del result[provider.name]
        for name, verdict in broken.items():
            verdicts[name][direction] = verdict
        return result, clock

    def _in_turns(self, providers: Sequence, make: Callable):
        """Time what ``make(provider)`` gives, (memory, timer): all in turns, or where memory is short, in groups that fit.

        Returns (timing, memory) by name, the Verdict of each that could not be made, and the mean clock.
        """
        result, broken, clocks, waiting = {}, {}, [], list(providers)
        while waiting:
            ready: dict[str, tuple] = {}
            while waiting:
                provider = waiting.pop(0)
                try:
                    ready[provider.name] = make(provider)
                except Exception as error:
                    if ready and isinstance(error, torch.cuda.OutOfMemoryError):
                        waiting.insert(0, provider)
                        break
                    broken[provider.name] = gate.refusal("ERROR", gate.explain(error))
            clocks.append(clock_mhz(self.settings.device))
            timings = timing.measure({name: timer for name, (_, timer) in ready.items()}, self.settings.effort)
            clocks.append(clock_mhz(self.settings.device))
            result |= {name: (timings[name], memory) for name, (memory, _) in ready.items()}
            del ready
            release(self.settings.device)
        known = [clock for clock in clocks if clock is not None]
        return result, broken, sum(known) / len(known) if known else None

    # ------------------------------------------------------------------------------------------------ whole models
    def _model(self, case: ModelCase, providers: Sequence[ModelProvider]) -> list[dict]:
        """One step of a model: the gate at the size that ``case.scope()`` names, then the step, timed by events."""
        device, verdicts = self.settings.device, {}
        for provider in providers:
            why = provider.unavailable(case, device)
            verdicts[provider.name] = gate.refusal("UNSUPPORTED", why) if why else gate.check_model(case, provider, device)
            release(device)

        def make(provider):
            step = provider.build(case, device)
            return Memory(_peak(step, device), None), timing.timer([step], device, None, capture=False)

        timed, broken, clock = self._in_turns([p for p in providers if verdicts[p.name].status == "PASSED"], make)
        verdicts |= broken
        new = []
        for provider in providers:
            name = provider.name
            row = self._blank(MODEL, case, "step", name, verdicts[name], case.scope(), clock) | dict(flops=case.flops())
            if name in timed:
                measured, memory = timed[name]
                row |= measured.statistics() | dict(timer=measured.timer, peak_bytes=memory.peak_bytes, roof="matrix")
                row["floor_ms"] = row["flops"] / self.roofs.matrix(case.dtype) * 1e3
                share, peak = row["floor_ms"] / row["median_ms"], self.roofs.published_matrix(case.dtype)
                row["share"] = share if share <= MOST else None
                row["mfu"] = row["flops"] / row["median_ms"] * 1e3 / peak if peak else None
            new.append(row)
        release(device)
        return self._fresh_roofs() + new

    # -------------------------------------------------------------------------------------------------------- rows
    def _row(self, family, case, direction, provider, verdict: Verdict, scope, timed, clock) -> dict:
        row = self._blank(family, case, direction, provider.name, verdict, scope, clock) | dict(
            flops=case.flops(direction), bytes=case.least_bytes(direction))
        if timed is None:
            return row
        measured, memory = timed
        row |= measured.statistics()
        roof, floor = self.roofs.floor_ms(row["flops"], row["bytes"], case.dtype)
        share = floor / row["median_ms"]
        return row | dict(timer=measured.timer, roof=roof, floor_ms=floor, share=share if share <= MOST else None,
                          peak_bytes=memory.peak_bytes, saved_bytes=memory.saved_bytes,
                          details=dict(provider.details(case, self.settings.device))
                          | ({"above_roof": round(share, 3)} if share > MOST else {})
                          | ({"not_captured": measured.not_captured} if measured.not_captured else {}))

    def _blank(self, family, case, direction, name, verdict: Verdict, scope, clock) -> dict:
        """A row without figures."""
        settings = self.settings
        return dict(
            row="time", schema=rows.SCHEMA, suite=settings.suite, family=family, op=case.op, case=case.label,
            direction=direction, provider=name, dtype=str(case.dtype).removeprefix("torch."), shape=case.shape(),
            status=verdict.status, reason=verdict.reason, error=verdict.error, allowed=verdict.allowed, gate=scope,
            min_ms=None, p20_ms=None, median_ms=None, q3_ms=None, p80_ms=None, n=0, timer=None, l2=settings.l2,
            clock_mhz=clock, flops=None, bytes=None, roof=None, floor_ms=None, share=None, peak_bytes=None,
            saved_bytes=None, mfu=None, details={},
            command=f"sora-fast bench {family} --suite {settings.suite} --device {settings.device.type} --l2 {settings.l2} "
                    f"--case '{case.op} / {case.label}' --providers {name}",
        )


def prepare(provider: Provider, inputs: Sequence[dict], names: tuple[str, ...], truth, device):
    """(calls, Memory) of one direction: a call per set of inputs; a backward is called alone, on a graph that is kept."""
    calls, first, saved = [], None, None
    for values in inputs:
        with torch.no_grad():
            given = provider.prepare(dict(values))
        given = {name: _leaf(value, name in names) for name, value in given.items()}
        first = first or given
        if not names:
            calls.append(_forward(provider, given))
            continue
        counted = _Saved(given)
        with counted:
            outputs = tensors(provider.run(**given))
        saved = counted.bytes
        pairs = [(o, _laid_out(c, o)) for o, c in zip(outputs, truth.cotangents, strict=True) if o.requires_grad]
        leaves = [t for name in names for t in tensors(given.get(name)) if t.requires_grad]
        calls.append(_backward(pairs, leaves))
    return calls, Memory(_peak(_whole(provider, first, names, truth.cotangents), device), saved)


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a second call holds beyond what was there before it, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _leaf(value, wanted: bool):
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(wanted and value.is_floating_point())
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return [_leaf(v, wanted) for v in value]
    return value


def _forward(provider: Provider, given: dict) -> Callable[[], object]:
    def call():
        with torch.no_grad():
            return provider.run(**given)
    return call


def _backward(pairs, leaves) -> Callable[[], object]:
    outputs, cotangents = [o for o, _ in pairs], [c for _, c in pairs]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)


def _whole(provider: Provider, given: dict, names, cotangents) -> Callable[[], object]:
    """Forward alone, or forward and backward: the call whose peak memory a row tells."""
    if not names:
        return _forward(provider, given)

    with torch.no_grad():
        outputs = tensors(provider.run(**given))
        cotangents = [_laid_out(c, o) for o, c in zip(outputs, cotangents, strict=True)]

    def call():
        outputs = tensors(provider.run(**given))
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        leaves = [t for name in names for t in tensors(given.get(name)) if t.requires_grad]
        return torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
    return call


def _laid_out(cotangent: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """``cotangent`` in the output's memory format, as the next layer's backward would hand it on."""
    return torch.empty_like(output, requires_grad=False).copy_(cotangent)


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what a forward keeps for its backward beyond its inputs, each memory once."""

    def __init__(self, inputs: dict):
        self.seen = {t.untyped_storage().data_ptr() for t in tensors(inputs)}
        self.bytes = 0
        super().__init__(self._count, lambda t: t)

    def _count(self, t: torch.Tensor) -> torch.Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in self.seen:
            self.seen.add(place)
            self.bytes += t.untyped_storage().nbytes()
        return t


def release(device: torch.device) -> None:
    """Give back what PyTorch's allocator holds of a GPU and nobody uses."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
