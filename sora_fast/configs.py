"""Which Config a kernel is launched with: the store that the tuner fills and every launcher asks.

A kernel's Config is a frozen dataclass of numbers, strings and booleans, and its ``heuristic(problem, gpu)`` a pure function
that always has an answer ("sm90-H200" is a gpu). ``problem`` is a frozen dataclass of all that the best Config depends
on: dtypes, widths and flags as they are, lengths in buckets (``bucket``). ``lookup`` goes through

1. ``override`` (the tuner's, and yours to try something);
2. the user's cache, ``<SORA_FAST_CACHE>/configs/<gpu>/<family>.json``, which ``save`` writes;
3. what the package ships, ``sora_fast/tuning/configs/<gpu>/<family>.json``;
4. the heuristic.

An entry is of exactly this gpu and this problem, of this Triton minor version and this kernel (``records.launch_hash``), or
it is not used: nothing is taken from the nearest. Files are read once per process.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import env, files, records

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuning" / "configs"
# What an entry must say beside its config: how it was measured, against what, where, and how to do so again.
EVIDENCE = ("us", "heuristic_us", "n", "gpu", "command")

_overrides: list[tuple[str, str, object, object]] = []
_recordings: list[tuple[dict["Asked", object], bool]] = []  # and whether what was tuned counts
_found: dict["Asked", "Found"] = {}
generation = 0  # of answers: who remembers one remembers it with this number


def _changed() -> None:
    global generation
    generation += 1


@dataclass(frozen=True)
class Asked:
    """What a launch asks for: the Config of ``kernel`` of sora_fast.kernels.<family> for ``problem`` on ``gpu``."""

    family: str
    kernel: str
    problem: object
    gpu: str

    @property
    def key(self) -> str:
        """What names its entry in the file of its gpu and family."""
        return f"{self.kernel}: " + ", ".join(f"{field.name}={getattr(self.problem, field.name)}"
                                              for field in fields(self.problem))


@dataclass(frozen=True)
class Found:
    """A Config and where it came from; ``ignored``: sentences on entries that were there and not used."""

    config: object
    source: str
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{text(self.config)} from {self.source}", *self.ignored])


def text(config) -> str:
    """"warps=4, tokens=8" of a Config."""
    return ", ".join(f"{name}={value}" for name, value in asdict(config).items())


def bucket(n: int) -> int:
    """The smallest power of two that is no less than ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def gpu_name(device: torch.device | str) -> str:
    """"sm90-H200" of a CUDA device; "sm90" of the ``"cuda:sm90"`` of a problem where no such GPU is here."""
    if isinstance(device, str) and device.startswith("cuda:sm"):
        name = device.removeprefix("cuda:")
        here = (gpu_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
        return next((each for each in here if each.startswith(f"{name}-")), name)
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    return f"sm{major}{minor}-" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def lookup(family: str, kernel: str, problem, gpu: str, heuristic: Callable[..., object]) -> Found:
    """The Config for one launch.

    Args:
        family: module of sora_fast.kernels, and name of the files. kernel: which of its kernels.
        problem: frozen dataclass. gpu: as ``gpu_name`` names it; "cpu" for the interpreter.
        heuristic: (problem, gpu) -> Config.
    """
    asked = Asked(family, kernel, problem, gpu)
    found = _answer(asked, heuristic)
    for recording, tuned in _recordings:
        recording[asked] = found.config if tuned else heuristic(problem, gpu)
    return found


def _answer(asked: Asked, heuristic: Callable[..., object]) -> Found:
    for of_family, of_kernel, of_problem, config in reversed(_overrides):
        if (of_family, of_kernel) == (asked.family, asked.kernel) and of_problem in (None, asked.problem):
            return Found(config, "override")
    if not all(tuned for _, tuned in _recordings):
        return Found(heuristic(asked.problem, asked.gpu), "the heuristic")
    found = _found.get(asked)
    if found is None:
        found = _found[asked] = _look(asked, heuristic(asked.problem, asked.gpu))
    return found


@contextmanager
def override(family: str, kernel: str, config, problem=None) -> Iterator[None]:
    """Launches of this kernel inside, in all threads, use ``config``; the innermost counts.

    ``problem``: for this one alone; None: for all.
    """
    _overrides.append((family, kernel, problem, config))
    _changed()
    try:
        yield
    finally:
        _overrides.pop()
        _changed()


@contextmanager
def recording(*, tuned: bool = False) -> Iterator[dict[Asked, object]]:
    """Collects what launches inside, in all threads, ask for, each with its heuristic's Config.

    That Config is also the answer: inside, what was tuned before is left out, and only an override goes before it.

    ``tuned``: True collects the answers that launches outside are given.
    """
    collected: dict[Asked, object] = {}
    _recordings.append((collected, tuned))
    _changed()
    try:
        yield collected
    finally:
        _recordings[:] = [each for each in _recordings if each[0] is not collected]
        _changed()


def entry(family: str, config, evidence: Mapping[str, object]) -> dict:
    """What a file says of one tuned Config.

    Args:
        evidence: ``us`` (of this config), ``heuristic_us``, ``n`` (measurements), ``gpu`` (its full name) and ``command``,
            which makes the entry again.

    Raises:
        ValueError: evidence that lacks one of them.
    """
    missing = [name for name in EVIDENCE if evidence.get(name) is None]
    if missing:
        raise ValueError(f"configs: expected evidence with {', '.join(EVIDENCE)}, got none for {', '.join(missing)}; "
                         f"measure a config before you save it")
    return dict(config=asdict(config), triton=records.triton_minor(), kernel_hash=records.launch_hash(family),
                **{name: evidence[name] for name in EVIDENCE},
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"))


def save(family: str, kernel: str, problem, gpu: str, config, evidence: Mapping[str, object]) -> Path:
    """Merge one tuned Config with its ``evidence`` (see ``entry``) into the user's cache; returns the file."""
    return keep(family, gpu, {Asked(family, kernel, problem, gpu).key: entry(family, config, evidence)})


def keep(family: str, gpu: str, entries: Mapping[str, dict], root: Path | None = None) -> Path:
    """Merge entries by key into ``root``/<gpu>/<family>.json, by default the user's cache; returns the file.

    Of two with one key the newer stays.

    Raises:
        OSError: a folder that cannot be written.
    """
    path = (root or env.cache() / "configs") / gpu / f"{family}.json"

    def merged(text: str) -> str:
        there, _ = _entries(text)
        for key, new in entries.items():
            old = there.get(key)
            if not isinstance(old, dict) or str(old.get("time", "")) <= new["time"]:
                there[key] = new
        return json.dumps(dict(schema=SCHEMA, entries=there), indent=1, sort_keys=True) + "\n"

    files.edit(path, merged)
    forget()
    return path


def forget() -> None:
    """Read the files again at the next lookup."""
    _found.clear()
    _changed()


def _look(asked: Asked, default) -> Found:
    ignored = []
    for what, root in (("the user's cache", env.cache() / "configs"), ("the shipped configs", SHIPPED)):
        path = root / asked.gpu / f"{asked.family}.json"
        try:
            entries, wrong = _entries(files.read_text(path))
        except OSError as error:
            entries, wrong = {}, str(error)
        if wrong:
            ignored.append(f"{path} is not used: {wrong}.")
        tuned = entries.get(asked.key)
        if tuned is None:
            continue
        config, stale = _usable(tuned, asked.family, type(default))
        if config is not None:
            return Found(config, f"{what} ({path})", tuple(ignored))
        ignored.append(f"An entry of {what} is not used: {stale}.")
    return Found(default, "the heuristic", tuple(ignored))


def _entries(text: str) -> tuple[dict, str]:
    """Entries of a file's text by key, and what is wrong with the file or ""."""
    if not text:
        return {}, ""
    try:
        value = json.loads(text)
        if value["schema"] != SCHEMA:
            return {}, f"it is of schema {value['schema']}, not {SCHEMA}"
        return dict(value["entries"]), ""
    except (ValueError, TypeError, KeyError):
        return {}, "it holds no JSON of configs"


def _usable(entry, family: str, kind: type) -> tuple[object, str]:
    """The Config of an entry and "", or None and why not."""
    if not isinstance(entry, dict):
        return None, "it is no object"
    here = records.triton_minor()
    if entry.get("triton") != here:
        return None, f"it was tuned with Triton {entry.get('triton')}, and here is {here or 'none'}"
    code = records.launch_hash(family)
    if code is None or entry.get("kernel_hash") != code:
        return None, f"sora_fast.kernels.{family} has changed since it was tuned"
    try:
        return kind(**entry["config"]), ""
    except (KeyError, TypeError, ValueError) as error:
        return None, f"its config does not fit {kind.__name__} ({error})"
