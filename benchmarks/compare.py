"""Two runs of one suite on one device: SAME, FAST, SLOW or UNDECIDED for every row that both have.

A run's interval is [min, q3], its centre the median; the gap is the new centre over the base's, less 1. A row that PASSED
in both begins as UNDECIDED, and only evidence makes it something else:

    all five statistics (min, p20, median, q3, p80) are equal                             -> SAME
    the gap is 0.5 % or more, either way, and
        the intervals do not overlap, or all five statistics moved that way by 5 % or more, and
        the gap in cycles (median times clock) is 0.5 % or more that way, where both rows have a clock
                                                                                          -> FAST or SLOW
    the gap is 0.5 % or less, the narrower interval lies at least half inside the other, and
        both are at most 2 % of their centre wide                                         -> SAME
    anything else                                                                         -> UNDECIDED

The five statistics are evidence on a shared CPU, where the slowest quarter of the samples stretches every interval over the
other's. Peers are the control: where their software is the same in both runs, what they moved by is the machine's doing. A
row is FAST or SLOW only where it moved farther from the peers of its own case than any peer did (BEYOND), and none is where
the peers as a whole moved far (BUSY): what keeps a core from one keeps it from another in its own way. Else it is
UNDECIDED. SLOW alone fails nothing: the ratio must be beyond the caller's threshold. A row that PASSED and is FAILED or
ERROR now fails the comparison; one that is UNSUPPORTED or missing now is listed. Other commits, torch versions and drivers
are what a comparison is for, and stand in its header. Another device, dtype, suite, L2 state, timer or shape is refused.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import rows as schema
from .figures import CELL, STATISTICS, group, is_own, measurements, name_of, number

GAP = 0.005  # below it two centres are one
MOVED = 0.05  # of all five statistics at once: more than noise does
NARROW = 0.02  # of the centre: an interval from which sameness can be read
LEAST_PEERS = 8  # rows of other libraries in both runs; fewer do not tell what the machine did
BUSY = 1.25  # times, that the middle one of all peers moved: the machine was busy in one of the runs
BEYOND = 1.5  # times the farthest that a peer moved from the others of its case, as a logarithm
VERDICTS = ("SAME", "UNDECIDED", "FAST", "SLOW")  # in the order of the table: what matters stands at its end

_SOFTWARE = ("torch", "triton", "cuda", "cudnn", "driver", "packages")  # what peers are made of
_SHOWN = ("commit", "changed", "torch", "triton", "cuda", "cudnn", "driver", "power_limit_w", "time")
_REMEDY = "measure both with the same command"


@dataclass(frozen=True)
class Entry:
    """One row in both runs; ``why`` says what kept it UNDECIDED."""

    base: dict
    new: dict
    verdict: str
    why: str

    @property
    def ratio(self) -> float:
        """New time over base time: 1.2 is 20 % slower."""
        return self.new["median_ms"] / self.base["median_ms"]


@dataclass(frozen=True)
class RunComparison:
    """What ``compare`` found; ``str()`` is for logs."""

    fail_slower: float
    header: str
    entries: list[Entry]  # in VERDICTS' order
    broken: list[tuple[dict, dict]]  # PASSED in base, FAILED or ERROR in new
    refused: list[tuple[dict, dict]]  # PASSED in base, UNSUPPORTED in new
    mended: list[dict]  # PASSED in new only
    missing: list[dict]  # in base only
    added: list[dict]  # in new only
    neither: int  # rows in both runs that PASSED in none

    @property
    def fails(self) -> list[Entry]:
        """SLOW by more than ``fail_slower``."""
        return [entry for entry in self.entries if entry.verdict == "SLOW" and entry.ratio > 1 + self.fail_slower]

    @property
    def exit_code(self) -> int:
        return 1 if self.fails or self.broken else 0

    def __str__(self) -> str:
        was = lambda pairs: [f"{name_of(base)}: was PASSED, now {new['status']}: {new['reason']}" for base, new in pairs]
        named = lambda rows: [name_of(row) for row in rows]
        lists = {"no longer passing": was(self.broken), "no longer supported": was(self.refused),
                 "passing now and not before": named(self.mended), "missing in the new run": named(self.missing),
                 "in the new run only": named(self.added)}
        parts = [self.header, _table(self.entries),
                 *("\n    ".join((f"{what} ({len(lines)}):", *lines)) for what, lines in lists.items() if lines)]
        counts = Counter(entry.verdict for entry in self.entries)
        parts.append(", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS)
                     + (f"; {self.neither} passed in neither run" if self.neither else ""))
        found = f"{len(self.fails)} slower by more than {self.fail_slower * 100:.4g} %, {len(self.broken)} no longer pass"
        return "\n\n".join(filter(None, parts)) + f"\n{'fails' if self.exit_code else 'passes'}: {found}"


def compare(base_rows: Sequence[dict], new_rows: Sequence[dict], fail_slower: float = 0.05) -> RunComparison:
    """Verdicts of the rows that two runs share; ``fail_slower`` 0.05: fail what is slower by more than 5 %.

    Raises:
        ValueError: nothing in common, or measured under conditions that make times incomparable.
    """
    base, new = ({schema.key(row): row for row in measurements(rows)} for rows in (base_rows, new_rows))
    _refuse_runs(list(base.values()), list(new.values()))
    both = [(base[key], new[key]) for key in base if key in new]
    if not both:
        raise ValueError(f"bench compare: expected rows that both runs have, got none among {len(base)} and {len(new)}; "
                         f"{_REMEDY}")
    entries, broken, refused, mended, neither = [], [], [], [], 0
    drift = Drift(both)
    for old, row in both:
        _refuse_rows(old, row)
        if old["status"] == row["status"] == "PASSED":
            entries.append(Entry(old, row, *drift.checked(old, row, *verdict(old, row))))
        elif old["status"] == "PASSED":
            (refused if row["status"] == "UNSUPPORTED" else broken).append((old, row))
        elif row["status"] == "PASSED":
            mended.append(row)
        else:
            neither += 1
    entries.sort(key=lambda entry: VERDICTS.index(entry.verdict))  # stable: else in the order of the base run
    return RunComparison(fail_slower, _header(base, new, len(both)) + drift.told, entries, broken, refused, mended,
                         [row for key, row in base.items() if key not in new],
                         [row for key, row in new.items() if key not in base], neither)


def verdict(base: Mapping, new: Mapping) -> tuple[str, str]:
    """(verdict, what kept it UNDECIDED) of two rows that PASSED; the tree is in this file's docstring."""
    if all(base[name] == new[name] for name in STATISTICS):
        return "SAME", ""
    gap = new["median_ms"] / base["median_ms"] - 1
    side = 1 if gap > 0 else -1
    (low, high), (new_low, new_high) = ((row["min_ms"], row["q3_ms"]) for row in (base, new))
    overlap = min(high, new_high) - max(low, new_low)  # negative: they lie apart
    moved = min(side * (new[name] / base[name] - 1) for name in STATISTICS)
    if abs(gap) >= GAP and (overlap < 0 or moved >= MOVED):
        clocks = base["clock_mhz"], new["clock_mhz"]
        if None in clocks or side * (new["median_ms"] * clocks[1] / (base["median_ms"] * clocks[0]) - 1) >= GAP:
            return ("SLOW" if side > 0 else "FAST"), ""
        return "UNDECIDED", f"the clock went from {clocks[0]:,.0f} to {clocks[1]:,.0f} MHz"
    widest = max((high - low) / base["median_ms"], (new_high - new_low) / new["median_ms"])
    narrower = min(high - low, new_high - new_low)
    if abs(gap) <= GAP and overlap >= 0.5 * narrower and widest <= NARROW:
        return "SAME", ""
    return "UNDECIDED", f"the samples spread over {number(widest * 100, 2)} %" if widest > NARROW else "the samples overlap"


# -------------------------------------------------------------------------------------------- what the machine did
class Drift:
    """How rows moved from one run to the other, as logarithms, and how far peers did so by themselves."""

    def __init__(self, pairs: Sequence[tuple[Mapping, Mapping]]):
        same = lambda base, new: all(base["environment"].get(name) == new["environment"].get(name) for name in _SOFTWARE)
        timed = [(base, new) for base, new in pairs if base["status"] == new["status"] == "PASSED" and same(base, new)]
        self._moved: dict[tuple, dict[str, float]] = {}
        for base, new in timed:
            cell = self._moved.setdefault(_cell(base), {})
            cell[base["provider"]] = math.log(new["median_ms"] / base["median_ms"])
        peers = [moved for cell in self._moved.values() for name, moved in cell.items() if not is_own(name)]
        self._middle = statistics.median(peers) if len(peers) >= LEAST_PEERS else None
        self._alone = {} if self._middle is None else {
            (place, name): abs(moved - self._of_peers(place, name))
            for place, cell in self._moved.items() for name, moved in cell.items()}
        farthest = max((far for (_, name), far in self._alone.items() if not is_own(name)), default=0.0)
        self.told = "" if self._middle is None else (
            f"\n{len(peers)} rows of peers: the middle one at {math.exp(self._middle):.3f} of its base time, none farther "
            f"than {math.exp(farthest):.3f} times from those of its case")

    def _of_peers(self, place: tuple, name: str) -> float:
        """The middle of what other peers of the case moved by, or all peers where it has no other."""
        others = [moved for other, moved in self._moved[place].items() if other != name and not is_own(other)]
        return statistics.median(others) if others else self._middle

    def checked(self, base: Mapping, new: Mapping, verdict: str, why: str) -> tuple[str, str]:
        """``verdict``, or UNDECIDED where the row did not move farther than what had no reason to move.

        That is the peers; for one of them, ours too.
        """
        place, name = _cell(base), base["provider"]
        if verdict not in ("FAST", "SLOW") or name not in self._moved.get(place, {}) or self._middle is None:
            return verdict, why
        if abs(self._middle) > math.log(BUSY):
            return "UNDECIDED", f"the machine was busy: the peers moved to {math.exp(self._middle):.3f}"
        control = [far for (_, other), far in self._alone.items() if other != name and not (is_own(name) and is_own(other))]
        drift = self._of_peers(place, name)
        side = 1 if verdict == "SLOW" else -1
        if side * (self._moved[place][name] - drift) > BEYOND * max(control, default=0.0):
            return verdict, why
        return "UNDECIDED", f"peers of the case moved to {math.exp(drift):.3f}"


def _cell(row: Mapping) -> tuple:
    return tuple(row[name] for name in CELL)


# ------------------------------------------------------------------------------------------------- what is comparable
def _refuse(what: str, base, new, where: str = "") -> None:
    raise ValueError(f"bench compare: expected both runs to have one {what}, got {base} and {new}{where}; {_REMEDY}, or use "
                     f"sora-fast bench report, which shows runs side by side")


def _refuse_runs(base: Sequence[Mapping], new: Sequence[Mapping]) -> None:
    """Raise where the runs as a whole were measured on other devices or in another way."""
    cpu_only = lambda row: row["environment"]["threads"] if row["environment"]["kind"] == "cpu" else "any"
    for what, value in (("device", lambda row: row["environment"]["device"]), ("L2 state", lambda row: row["l2"]),
                        ("number of CPU threads", cpu_only), ("TF32 setting", lambda row: row["environment"]["tf32"])):
        mine, theirs = ({str(value(row)) for row in rows} for rows in (base, new))
        if mine and theirs and len(mine | theirs) > 1:
            _refuse(what, " or ".join(sorted(mine)), " or ".join(sorted(theirs)))
    mine, theirs = (group(rows, "op", "case", "direction", "provider") for rows in (base, new))
    for place in [place for place in mine if place in theirs]:
        for what in ("dtype", "suite"):
            old, now = ({row[what] for row in rows[place]} for rows in (mine, theirs))
            if not old & now:
                _refuse(what, " or ".join(sorted(old)), " or ".join(sorted(now)), f" for {' / '.join(place)}")


def _refuse_rows(base: Mapping, new: Mapping) -> None:
    """Raise where one label means two shapes, or two ways of timing."""
    if base["shape"] != new["shape"]:
        _refuse("shape", base["shape"], new["shape"], f" for {name_of(base)}")
    if base["status"] == new["status"] == "PASSED" and base["timer"] != new["timer"]:
        _refuse("timer", base["timer"], new["timer"], f" for {name_of(base)}")


# --------------------------------------------------------------------------------------------------------------- text
def _header(base: Mapping, new: Mapping, shared: int) -> str:
    first, last = (next(iter(rows.values())) for rows in (base, new))
    told = lambda row: ", ".join(f"{name} {row['environment'][name]}" for name in _SHOWN
                                 if row["environment"].get(name) is not None)
    return (f"base: {told(first)}\nnew:  {told(last)}\n"
            f"{first['environment']['device']}, L2 {first['l2']}, rows in both: {shared}")


def _table(entries: Sequence[Entry]) -> str:
    """Aligned columns; the names left, the numbers right."""
    if not entries:
        return ""
    lines = [("op", "case", "direction", "provider", "base ms", "new ms", "new / base", "verdict")]
    for e in entries:
        lines.append((*(e.base[name] for name in ("op", "case", "direction", "provider")), number(e.base["median_ms"]),
                      number(e.new["median_ms"]), f"{e.ratio:.3f}", f"{e.verdict}{f' ({e.why})' if e.why else ''}"))
    widths = [max(len(line[place]) for line in lines) for place in range(7)]
    align = lambda line: "  ".join(text.ljust(width) if place < 4 else text.rjust(width)
                                   for place, (text, width) in enumerate(zip(line, widths, strict=False)))
    return "\n".join(f"{align(line)}  {line[7]}" for line in lines)
