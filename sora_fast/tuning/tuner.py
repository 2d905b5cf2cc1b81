"""Measures what a kernel module could be launched with, and keeps what beats its heuristic by more than the noise.

The benchmark's cases say what there is to tune: every Config that the timed calls of one look up. Beside a kernel module
stands ``<family>_candidates`` with

    candidates(kernel, problem, gpu) -> iterable of Config

for the kernel and problem that were given to ``configs.lookup``, the likeliest first, or as ``Tuner``'s ``likeliest`` has
them; of a family without that module nothing is tuned. Of each lookup, for the first case that makes it:

1. every candidate goes through the benchmark's gate, all outputs and gradients of the case: only what passes can win;
2. in heats of four and the heuristic, in interleaved rounds, the slower half drops out until one heat is left;
3. the fastest meets the heuristic once more, alone: those are the figures that count, so that being picked for a lucky
   sample helps nobody. It is kept if benchmarks/compare.py calls it FAST and it passes the gate in the memory it was
   timed in; else the next one's turn comes, and SAME, SLOW or UNDECIDED leaves the heuristic in its place.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import configs, files, records
from ..benchmarks import compare, gate, rows, timing
from ..benchmarks.case import FORWARD, Case, Provider, nbytes
from ..benchmarks.figures import STATISTICS
from ..benchmarks.runner import prepare, release, set_conditions
from ..environment import environment
from ..testing import Truth
from ..testing.rule import random_cotangents, run, tensors

HEAT = 4  # candidates that are timed together: a CUDA graph of each holds its outputs
SAVING = "forward that saves"  # for the backward; the direction of lookups that no timed call of a case makes


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run; ``out`` is the file of rows."""

    device: torch.device
    suite: str
    out: Path
    root: Path | None = None  # folder of the files of configs; None: the user's cache
    minutes: float = 0.0  # begin no further lookup after so long; 0: never stop
    most: int = 0  # candidates of a lookup; 0: all
    effort: timing.Effort = timing.GPU


class Tuner:
    """Tunes the lookups of cases into the files of ``configs`` and writes a row for each to ``settings.out``.

    ``likeliest(asked, candidates, call)`` gives the candidates in the order in which they are tried; ``call`` makes the
    launches that look them up. It decides nothing else.

    After ``run``: ``rows`` of what it came by, in order, those of earlier runs included; ``failures``, sentences on cases
    that could not be tuned; ``left``, the cases that the time limit left.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None] = print,
                 progress: Callable[[int, str], None] = lambda done, text: None,
                 likeliest: Callable[[configs.Asked, list, Callable], list] = lambda asked, candidates, call: candidates):
        self.settings, self.tell, self.progress, self.likeliest = settings, tell, progress, likeliest
        set_conditions()
        self.environment = environment(settings.device)
        self.rows: list[dict] = []
        self.failures: list[str] = []
        self.left = 0
        self.place = self.tuned = 0
        self.told: set[str] = set()
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        found = rows.read(settings.out) if settings.out.exists() else []
        self.done = {_row_key(row): row for row in found if row["row"] == "tune"}

    def run(self, work: Sequence[tuple[str, Case, Provider]]) -> list[dict]:
        """Tune all that the cases, each with its family, look up; whoever calls again with the same files goes on."""
        self.end = time.monotonic() + self.settings.minutes * 60 if self.settings.minutes else float("inf")
        with configs.recording():  # every lookup but the tuned one is its heuristic's, whatever was tuned before
            for self.place, (family, case, provider) in enumerate(work):
                self.progress(self.place, case.id)
                try:
                    finished = not self._late() and self._case(family, case, provider)
                except NotImplementedError as error:
                    self.tell(f"{case.id} is not tuned: {error}")
                    continue
                except Exception as error:  # such as memory that a case does not fit: the others go on
                    self._fail(f"{case.id} is not tuned: {gate.explain(error)}")
                    continue
                finally:
                    release(self.settings.device)
                if not finished:
                    self.left = len(work) - self.place
                    break
        return self.rows

    def _late(self) -> bool:
        """Whether the time is up; never before something was tuned, so that every call gets further."""
        return time.monotonic() > self.end and self.tuned > 0

    def _fail(self, sentence: str) -> None:
        self.failures.append(sentence)
        self.tell(sentence)

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self.told:
            self.told.add(sentence)
            self.tell(sentence)

    # ------------------------------------------------------------------------------------------------- one case
    def _case(self, family: str, case: Case, provider: Provider) -> bool:
        """Tune what the case looks up and is not done; False where the time was up before the end."""
        device = self.settings.device
        inputs = case.inputs(device, seed=0)
        truth = None
        asked_for = lookups(case, provider, inputs, device)
        if not asked_for:
            self._tell_once(f"{case.op} looks up no config: nothing to tune.")
        for asked, (direction, heuristic) in asked_for.items():
            known = self.done.get(_lookup_key(asked))
            if known is not None:
                if known not in self.rows:
                    self.rows.append(known)
                    keep(known, self.settings.root)
                continue
            candidates = self._candidates(asked, heuristic)
            if not candidates:
                continue
            if self._late():
                return False
            if truth is None:
                truth = case.truth(inputs, seed=0)
                wrong = self._heuristics_fail(case, provider, truth)
                if wrong:
                    self._fail(f"{case.id} is not tuned: {wrong}")
                    return True
            candidates = self.likeliest(asked, candidates, _call(case, provider, truth, direction))
            candidates = candidates[:self.settings.most or None]
            try:
                row = _Lookup(self, family, case, provider, truth, asked, direction, heuristic).tune(candidates)
            except Exception as error:
                self._fail(f"{asked.family} {asked.key} is not tuned: {gate.explain(error)}")
                continue
            keep(row, self.settings.root)  # before its row: a run killed in between tunes it again
            with files.locked(self.settings.out):
                rows.append(self.settings.out, [row])
            self.done[_row_key(row)] = row
            self.rows.append(row)
            self.tuned += 1
            self.tell(line(row))
        return True

    def _candidates(self, asked: configs.Asked, heuristic) -> list:
        name = f"sora_fast.kernels.{asked.family}_candidates"
        if importlib.util.find_spec(name) is None:
            self._tell_once(f"There is no {name}: nothing to tune.")
            return []
        offered = importlib.import_module(name).candidates(asked.kernel, asked.problem, asked.gpu)
        found = [each for each in dict.fromkeys(offered) if each != heuristic]
        if not found:
            self._tell_once(f"{asked.family} has no candidate beside the heuristic for {asked.key}: nothing to tune.")
        return found

    def _heuristics_fail(self, case: Case, provider: Provider, truth: Truth) -> str:
        """A sentence where the case does not even pass the gate with its heuristics, or ""."""
        verdicts = gate.check(case, provider, truth, self.settings.device, tuple(case.directions()))
        bad = next(((d, v) for d, v in verdicts.items() if v.status != "PASSED"), None)
        return bad and f"with its heuristics {bad[0]} is {bad[1].status}: {bad[1].reason}" or ""


def lookups(case: Case, provider: Provider, inputs: dict, device: torch.device) -> dict[configs.Asked, tuple[str, object]]:
    """What the timed calls of a case look up: (the first direction that does so, the heuristic's Config) of each.

    What only the forward before a timed backward looks up has the direction SAVING.
    """
    with torch.no_grad():
        outputs = tensors(provider.run(**provider.prepare(dict(inputs))))
    # calls need no more of a Truth than this
    calls_for = Truth(case.op, inputs, random_cotangents(outputs, seed=0), None, ([], {}), ([], {}))
    found, untimed = {}, {}
    for direction, names in case.directions().items():
        with configs.recording() as before:
            calls, _ = prepare(provider, [inputs], names, calls_for, device)
        with configs.recording() as timed:
            calls[0]()
        found |= {asked: (direction, config) for asked, config in timed.items() if asked not in found}
        untimed |= before
    return found | {asked: (SAVING, config) for asked, config in untimed.items() if asked not in found}


# ---------------------------------------------------------------------------------------------------- one lookup
class _Lookup:
    """One lookup of a case: its calls, made once for all candidates, and the race between them."""

    def __init__(self, tuner: Tuner, family: str, case: Case, provider: Provider, truth: Truth, asked: configs.Asked,
                 direction: str, heuristic):
        self.tuner, self.settings = tuner, tuner.settings
        self.family, self.case, self.provider, self.truth, self.heuristic = family, case, provider, truth, heuristic
        self.asked, self.direction = asked, direction
        self.skipped: list[dict] = []

    def tune(self, candidates: Sequence) -> dict:
        """The row: who won, by how much, and who was left out for which reason."""
        passed = [config for place, config in enumerate(candidates, start=1) if self._passes(config, place, len(candidates))]
        if not passed:
            return self._row(len(candidates))
        self._make_calls()
        for config in self._fastest_first(passed):
            self._progress(f"{configs.text(config)} against the heuristic")
            measured = self._race([config], self.settings.effort)
            verdict, why = compare.verdict(measured[self.heuristic], measured[config])
            wrong = self._wrong_after(config) if verdict == "FAST" else ""
            if not wrong:
                return self._row(len(candidates), config, measured, verdict, why)
            self._skip(config, "FAILED", wrong)
            self._make_calls()  # the gate has written into the inputs, and graphs that saved them cannot be gone through
        return self._row(len(candidates))

    def _wrong_after(self, config) -> str:
        with self._under(config):
            return gate.check_again(self.provider, self.truth, self.inputs[0], self.names)

    def _passes(self, config, place: int, count: int) -> bool:
        self._progress(f"gate {place} of {count}")
        with self._under(config):
            verdicts = gate.check(self.case, self.provider, self.truth, self.settings.device, tuple(self.case.directions()))
        release(self.settings.device)
        bad = next((verdict for verdict in verdicts.values() if verdict.status != "PASSED"), None)
        if bad is not None:
            self._skip(config, bad.status, bad.reason)
        return bad is None

    def _skip(self, config, status: str, reason: str) -> None:
        self.skipped.append(dict(config=asdict(config), status=status, reason=reason))

    def _under(self, config):
        return configs.override(self.asked.family, self.asked.kernel, config, self.asked.problem)

    def _progress(self, text: str) -> None:
        self.tuner.progress(self.tuner.place, f"{self.asked.family} {self.asked.kernel}: {text}")

    # ---------------------------------------------------------------------------------------------------- timing
    def _make_calls(self) -> None:
        """Inputs, and a call for each set of them, as the benchmark makes them."""
        device, case = self.settings.device, self.case
        sets = timing.input_sets(nbytes(*tensors(self.truth.inputs)), device, "cold")
        self.inputs = [case.inputs(device, seed=seed + 1) for seed in range(sets)]
        self.stream = timing.side_stream(device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # for the inputs
        every = case.directions()
        self.names = every.get(self.direction) or ()
        if self.direction == SAVING:
            self.names = tuple({name: None for names in every.values() for name in names})
        with torch.cuda.stream(self.stream):  # of None: nothing
            if self.direction == SAVING:
                self.calls = [_saving(self.provider, values, self.names) for values in self.inputs]
            else:
                self.calls, _ = prepare(self.provider, self.inputs, self.names, self.truth, device)

    def _fastest_first(self, alive: list) -> list:
        """The best of ``alive``, at most HEAT of them, by their time over the heuristic's in the same rounds."""
        effort, heats = self.settings.effort, 0
        short = replace(effort, warm_up_ms=effort.warm_up_ms / 4, timed_ms=effort.timed_ms / 4)
        while len(alive) > 1:
            heats += 1
            last = len(alive) <= HEAT
            ratio = {}
            for first in range(0, len(alive), HEAT):
                self._progress(f"round {heats}, {len(alive)} left")
                measured = self._race(alive[first:first + HEAT], effort if last else short)
                base = measured.pop(self.heuristic)
                ratio |= {config: found["median_ms"] / base["median_ms"] for config, found in measured.items()}
            alive = sorted(ratio, key=ratio.get)
            if last:
                break
            alive = alive[:(len(alive) + 1) // 2]
        return alive

    def _race(self, candidates: Sequence, effort: timing.Effort) -> dict[object, dict]:
        """Statistics of the heuristic and of ``candidates``, in turns; all by one kind of timer."""
        device, runners = self.settings.device, [self.heuristic, *candidates]

        def timers(capture: bool) -> dict:
            with torch.cuda.stream(self.stream):
                return {config: timing.timer([self._call(config, call) for call in self.calls], device, self.stream,
                                             capture=capture) for config in runners}

        made = timers(capture=True)
        if len({each.name for each in made.values()}) > 1:  # a graph of one that could not be captured by the others
            made.clear()
            release(device)
            made = timers(capture=False)
        measured = timing.measure(made, effort)
        made.clear()
        release(device)
        # one clock for all who take turns
        return {config: found.statistics() | dict(timer=found.timer, clock_mhz=None) for config, found in measured.items()}

    def _call(self, config, call: Callable[[], object]) -> Callable[[], object]:
        def under():
            with self._under(config):
                return call()
        return under

    # ------------------------------------------------------------------------------------------------------- row
    def _row(self, tried: int, config=None, measured: dict | None = None, verdict: str = "", why: str = "") -> dict:
        """``config``: the last to meet the heuristic, None where no candidate passed; it won if the verdict is FAST."""
        settings, case, asked = self.settings, self.case, self.asked
        row = dict(
            row="tune", schema=rows.SCHEMA, suite=settings.suite, family=asked.family, kernel=asked.kernel, key=asked.key,
            gpu=asked.gpu, kernel_hash=records.launch_hash(asked.family), triton=records.triton_minor(), op=case.op,
            case=case.label, dtype=str(case.dtype).removeprefix("torch."), direction=self.direction, tried=tried,
            skipped=self.skipped, heuristic=asdict(self.heuristic), config=None, heuristic_us=None, us=None, verdict=verdict,
            why=why, statistics=None, timer=None, n=0, entry=None, environment=self.tuner.environment,
            l2="cold" if settings.device.type == "cuda" else "hot",
            command=f"sora-fast tune {self.family} --suite {settings.suite} --device {settings.device.type} "
                    f"--case '{case.id}' --fresh")
        if config is None:
            return row
        base, mine = measured[self.heuristic], measured[config]
        row |= dict(config=asdict(config), heuristic_us=base["median_ms"] * 1e3, us=mine["median_ms"] * 1e3,
                    statistics={name: (base[name], mine[name]) for name in STATISTICS}, timer=mine["timer"], n=mine["n"])
        if verdict == "FAST":
            evidence = {name: row[name] for name in ("us", "heuristic_us", "n", "command")}
            row["entry"] = configs.entry(asked.family, config, evidence | dict(gpu=row["environment"]["device"]))
        return row


def _call(case: Case, provider: Provider, truth: Truth, direction: str) -> Callable[[], object]:
    """A call that makes the launches of ``direction``, those of the forward before a backward too."""
    cotangents = None if direction == FORWARD else truth.cotangents
    names = case.directions().get(direction) or truth.names
    return lambda: run(lambda **given: provider.run(**provider.prepare(given)), truth.inputs, cotangents, names)


def _saving(provider: Provider, values: dict, names: Sequence[str]) -> Callable[[], object]:
    """A forward that saves what the backward for ``names`` needs."""
    with torch.no_grad():
        given = provider.prepare(dict(values))
    for name in names:
        for tensor in tensors(given.get(name)):
            tensor.requires_grad_(tensor.is_floating_point())
    return lambda: provider.run(**given)


# ------------------------------------------------------------------------------------------------------ what is kept
def _row_key(row: dict) -> tuple:
    return tuple(row[name] for name in ("family", "key", "gpu", "kernel_hash", "triton"))


def _lookup_key(asked: configs.Asked) -> tuple:
    return asked.family, asked.key, asked.gpu, records.launch_hash(asked.family), records.triton_minor()


def keep(row: dict, root: Path | None) -> Path | None:
    """Merge what won into its file of configs, by default the user's; the file, or None where the heuristic stays."""
    return row["entry"] and configs.keep(row["family"], row["gpu"], {row["key"]: row["entry"]}, root)


def config_of(row: dict) -> str:
    """The Config that a row is about, "-" where there is none."""
    return _text(row["config"]) if row["config"] else "-"


def line(row: dict) -> str:
    """What came of one lookup, in a line."""
    if row["config"] is None:
        found = "no candidate passed, the heuristic stays"
    elif row["entry"] is None:
        found = f"the heuristic stays, {config_of(row)} is {row['verdict']}"
    else:
        found = f"{config_of(row)} takes {row['us'] / row['heuristic_us']:.1%} of the heuristic's time"
    skipped = f", {len(row['skipped'])} skipped" if row["skipped"] else ""
    return f"{row['family']} {_plain(row['key'])}: {found} ({row['tried']} tried{skipped})"


def reasons(row: dict) -> Iterator[str]:
    """A sentence for each candidate that was left out."""
    for each in row["skipped"]:
        yield f"{row['family']} {_plain(row['key'])}: {_text(each['config'])} {each['status']}: {each['reason']}"


def _text(config: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items())


def _plain(key: str) -> str:
    return key.replace("torch.", "")
