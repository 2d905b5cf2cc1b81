"""What every report says of rows: which count, who stands where, and numbers as text.

A cell is what can be compared: one case of one op in one direction and dtype, with a row per provider.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sora_fast.ops import FAMILIES

from . import rows as schema

# What a user of ours gets is the first of these that passed.
OURS = ("auto", "cuda", "triton", "torch")
COMPILE = "compile"
MODEL = "model"
CELL = ("suite", "op", "case", "direction", "dtype")
STATISTICS = ("min_ms", "p20_ms", "median_ms", "q3_ms", "p80_ms")
STATUSES = ("PASSED", "FAILED", "ERROR", "UNSUPPORTED")
ABOVE = "above the roof: check"
# ms of the fastest provider by the wall clock; below it what Python does before the arithmetic (up to 60 us more of ours
# than of plain PyTorch on a slow core) is an eighth of the time or more, and no order of providers says anything
LEAST_TO_RANK = 0.5
TOO_SMALL = "too small to rank"
MOST = 1.05  # of a roof: beyond it the roof was not measured for such work, or the work was not done


# ------------------------------------------------------------------------------------------------------------- rows
def measurements(rows: Iterable[dict]) -> list[dict]:
    """The time rows, of two with one key the later. Raises ValueError for a time without a pass, or a pass without one."""
    found = {schema.key(row): row for row in rows if row["row"] == "time"}
    for row in found.values():
        times = [row[name] for name in STATISTICS]
        if row["status"] not in STATUSES:
            expected, got = f"one of {', '.join(STATUSES)}", repr(row["status"])
        elif row["status"] == "PASSED" and not all(isinstance(t, (int, float)) and 0 < t < math.inf for t in times):
            expected, got = "five positive times in a row that PASSED", times
        elif row["status"] != "PASSED" and any(t is not None for t in times):
            expected, got = f"no time in a row that is {row['status']}", times
        else:
            continue
        raise ValueError(f"bench: expected {expected}, got {got} in {name_of(row)}; measure it again")
    return list(found.values())


def roofs(rows: Iterable[dict]) -> list[dict]:
    """The roof rows, matrix first, the later of two of one kind."""
    found = {(row["kind"], row["dtype"] or "", row["bytes"] if row["kind"] == "copy" else 0): row
             for row in rows if row["row"] == "roof"}
    return [found[key] for key in sorted(found, key=lambda key: (key[0] != "matrix", *key[1:]))]


def name_of(row: Mapping) -> str:
    return " / ".join((row["op"], row["case"], row["direction"], row["provider"], row["dtype"]))


def group(rows: Iterable[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Rows by the values of ``fields``, in the order in which they first come."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in fields), []).append(row)
    return found


def families(rows: Iterable[dict]) -> list[str]:
    """The families of ``rows``: the ops' in their usual order, then others, whole models last."""
    order = {name: place for place, name in enumerate(FAMILIES)} | {MODEL: len(FAMILIES) + 1}
    return sorted({row["family"] for row in rows}, key=lambda name: (order.get(name, len(FAMILIES)), name))


def title(family: str) -> str:
    return "whole models" if family == MODEL else family


def too_small(rows: Iterable[Mapping]) -> bool:
    """Whether the rows of one cell tell more of Python than of the work: LEAST_TO_RANK. A GPU's own clock sees no Python."""
    timed = [row for row in rows if row["status"] == "PASSED"]
    return bool(timed) and timed[0]["timer"] == "wall" and min(row["median_ms"] for row in timed) < LEAST_TO_RANK


def cells(rows: Iterable[dict]) -> list[dict[str, dict]]:
    """{provider: row} of those that PASSED, for every cell that can be ranked."""
    passed = [row for row in rows if row["status"] == "PASSED"]
    return [{row["provider"]: row for row in theirs} for theirs in group(passed, *CELL).values() if not too_small(theirs)]


def is_own(provider: str) -> bool:
    """Whether a provider is this library: a backend, "auto" with a setting of its own ("auto_chunk4"), the definition."""
    return provider in OURS or provider == "reference" or provider.startswith("auto_chunk")


def ours(cell: Mapping[str, dict]) -> dict | None:
    return next((cell[name] for name in OURS if name in cell), None)


def best_other(cell: Mapping[str, dict], provider: str) -> dict | None:
    """The fastest row of another library than ``provider``'s; of ours, its variants and the definition are never meant."""
    counts = lambda name: name != provider and (not is_own(name) or name in OURS and not is_own(provider))
    return min((row for name, row in cell.items() if counts(name)), key=lambda row: row["median_ms"], default=None)


def without_ours(cell: Mapping[str, dict]) -> dict[str, dict]:
    return {name: row for name, row in cell.items() if not is_own(name)}


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def without_time(rows: Iterable[dict]) -> list[tuple[str, str, str, list[dict]]]:
    """(status, provider, reason, rows), FAILED and ERROR before UNSUPPORTED."""
    found = group((row for row in rows if row["status"] != "PASSED"), "status", "provider", "reason")
    order = sorted(found, key=lambda key: (STATUSES.index(key[0]), -len(found[key]), key[1:]))
    return [(*key, found[key]) for key in order]


@dataclass(frozen=True)
class Standing:
    """A provider in a family: rows by status, and geometric means with the number of cells that each is over.

    ``compile`` and ``other`` are speeds relative to torch.compile and to the fastest other provider (above 1: faster),
    over the cells in which both passed; ``share`` is that of the limit.
    """

    provider: str
    statuses: Mapping[str, int]
    compile: tuple[float | None, int]
    other: tuple[float | None, int]
    share: tuple[float | None, int]


def standings(rows: Sequence[dict]) -> list[Standing]:
    """One Standing per provider, ours first."""
    statuses = {name: Counter(row["status"] for row in theirs) for (name,), theirs in group(rows, "provider").items()}
    every = cells(rows)
    names = sorted(statuses, key=lambda name: (OURS.index(name) if name in OURS else len(OURS) + (not is_own(name)), name))

    def mean(name: str, value: Callable[[dict[str, dict]], float | None]) -> tuple[float | None, int]:
        values = [v for v in (value(cell) for cell in every if name in cell) if v is not None]
        return geometric_mean(values), len(values)

    return [Standing(name, statuses[name],
                     mean(name, lambda cell, n=name: speed(cell[n], cell.get(COMPILE) if n != COMPILE else None)),
                     mean(name, lambda cell, n=name: speed(cell[n], best_other(cell, n))),
                     mean(name, lambda cell, n=name: share(cell[n])))
            for name in names]


def speed(row: Mapping, other: Mapping | None) -> float | None:
    """How many times faster ``row`` is than ``other``; None where there is no other."""
    return other["median_ms"] / row["median_ms"] if other else None


def share(row: Mapping) -> float | None:
    """The share of the limit, None where there is none or where it cannot be one."""
    return row["share"] if row["share"] is not None and 0 < row["share"] <= MOST and not above_roof(row) else None


def above_roof(row: Mapping) -> bool:
    return "above_roof" in row["details"] or (row["share"] is not None and row["share"] > MOST)


# ------------------------------------------------------------------------------------------------------ numbers as text
def number(value: float | None, digits: int = 4) -> str:
    """``digits`` significant digits, never an exponent; "" for None."""
    if value is None:
        return ""
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.1f} %"


def share_text(row: Mapping) -> str:
    return ABOVE if above_roof(row) else percent(share(row))


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= scale:
            return f"{number(count / scale, 3)} {unit}"
    return f"{count:,.0f} B"


def rate_text(work_per_s: float | None, kind: str) -> str:
    """FLOP/s (kind "matrix") or bytes/s (kind "copy") in the units that papers use."""
    if work_per_s is None:
        return ""
    if kind == "matrix":
        return f"{number(work_per_s / 1e12, 3)} TFLOP/s" if work_per_s >= 1e11 else f"{number(work_per_s / 1e9, 3)} GFLOP/s"
    return f"{number(work_per_s / 1e9, 3)} GB/s"


def rate(row: Mapping) -> str:
    """What a row reached in the unit of its roof, "" where it has none."""
    work = {"matrix": row["flops"], "copy": row["bytes"]}.get(row["roof"])
    return rate_text(work / row["median_ms"] * 1e3, row["roof"]) if work and row["median_ms"] else ""


def throughput(row: Mapping) -> str:
    """Tokens or frames per second, where the row's shape or details say how many a step has."""
    told = {**row["shape"], **row["details"]}
    found = [f"{number(told[unit] / row['median_ms'] * 1e3, 3)} {unit}/s" for unit in ("tokens", "frames")
             if row["median_ms"] and isinstance(told.get(unit), (int, float))]
    return ", ".join(found)


def mfu(row: Mapping) -> str:
    if row["mfu"] is None:
        return ""
    return percent(row["mfu"]) if row["mfu"] <= 1 else "above the published peak: check"


def error_text(row: Mapping) -> str:
    return "" if row["error"] is None else f"{row['error']:.2g} / {row['allowed']:.2g}"
