"""Rows as tables: Markdown, CSV, and README's measured tables. A run is (name, rows as rows.read returns them)."""

import csv
import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import rows as schema
from .figures import (
    CELL,
    COMPILE,
    MODEL,
    STATISTICS,
    STATUSES,
    TOO_SMALL,
    best_other,
    cells,
    error_text,
    families,
    geometric_mean,
    group,
    is_own,
    measurements,
    mfu,
    number,
    ours,
    percent,
    rate,
    rate_text,
    roofs,
    share,
    share_text,
    size,
    speed,
    standings,
    throughput,
    title,
    too_small,
    without_ours,
    without_time,
)

Run = tuple[str, Sequence[dict]]

_STANDING = ("speed / torch.compile", "speed / fastest other", "share of the limit")

_ENVIRONMENT = ("device", "driver", "torch", "triton", "cuda", "cudnn", "commit", "changed", "time")
_COLUMNS = ("suite", "family", "op", "case", "direction", "provider", "dtype", "shape", "status", "reason", "error",
            "allowed", *STATISTICS, "n", "timer", "l2", "clock_mhz", "flops", "bytes", "roof", "floor_ms", "share",
            "peak_bytes", "saved_bytes", "mfu", "details", "gate", "command")


# ------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Table:
    """Heads and rows of text; ``numbers``: the columns whose text is aligned right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()

    def markdown(self) -> str:
        rule = ["---:" if place in self.numbers else "---" for place in range(len(self.heads))]
        return "\n".join(f"| {' | '.join(line)} |" for line in
                         (map(_escaped, self.heads), rule, *(map(_escaped, row) for row in self.rows)))


def _escaped(text: str) -> str:
    """One line of Markdown that shows ``text`` itself."""
    for letter, shown in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;")):
        text = text.replace(letter, shown)
    return " ".join(text.split())


def conditions(runs: Sequence[Run]) -> Table:
    """What was measured, on what and with what: one column per run, lines that no run fills left out."""
    lines: dict[str, list[str]] = {}
    for _, rows in runs:
        for name, value in _conditions(rows).items():
            lines.setdefault(name, []).append(value)
    return Table(("", *(name for name, _ in runs)), [(name, *values) for name, values in lines.items() if any(values)])


def _conditions(rows: Sequence[dict]) -> dict[str, str]:
    def told(field: str, form=str) -> str:
        return _several(form(row["environment"][field]) for row in rows if row["environment"].get(field) is not None)

    timed = [row for row in rows if row["row"] == "time"]
    clocks = [row["clock_mhz"] for row in timed if row["clock_mhz"] is not None]
    times = sorted(row["environment"]["time"] for row in rows)
    changed = told("changed")
    return {
        "device": told("device"),
        "chip": _list(told("sm", lambda sm: f"sm_{sm}"), told("sms", lambda sms: f"{sms} multiprocessors"),
                      told("memory_bytes", size), told("l2_bytes", lambda l2: f"L2 cache {size(l2)}")),
        "driver": told("driver"), "CUDA": told("cuda"), "cuDNN": told("cudnn"), "torch": told("torch"),
        "triton": told("triton"),
        "packages": told("packages", lambda found: _pairs({name: found[name] for name in found if name != "triton"})),
        "system": _list(told("os"), told("python", lambda python: f"Python {python}")),
        "CPU": _list(told("cpu"), told("threads", lambda threads: f"{threads} threads used")),
        "TF32 for float32": told("tf32", lambda on: "on" if on else "off"),
        "L2 between calls": _several(row["l2"] for row in timed),
        "timer": _several(row["timer"] for row in timed if row["timer"]),
        "SM clock": _list(f"{min(clocks):,.0f} to {max(clocks):,.0f} MHz around the rows" if clocks else "",
                          told("clock_max_mhz", lambda mhz: f"highest {mhz:,.0f} MHz")),
        "power limit": told("power_limit_w", lambda watts: f"{watts:,.0f} W"),
        "commit": _list(told("commit"), changed and f"with uncommitted changes (hash {changed})"),
        "settings": told("variables", _pairs),
        "suite": _several(row["suite"] for row in timed),
        "measured": " to ".join(dict.fromkeys((times[0], times[-1]))) if times else "",
        "command": _several(_command(row) for row in timed),
    }


def _command(row: Mapping) -> str:
    """The command of a whole run, from that of a row; a row's own stands beside it."""
    return f"sora-fast bench --suite {row['suite']} --device {row['environment']['kind']} --l2 {row['l2']}"


def _several(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _list(*values: str) -> str:
    return ", ".join(filter(None, values))


def _pairs(mapping: Mapping) -> str:
    return ", ".join(f"{name} {value}" for name, value in mapping.items())


def roof_table(runs: Sequence[Run]) -> Table:
    """Measured limits beside the chip's published figures."""
    lines = []
    for name, rows in runs:
        for roof in roofs(rows):
            what = f"matrix product, {roof['dtype']}" if roof["kind"] == "matrix" else f"copy of {size(roof['bytes'])}"
            figure = roof["published"]
            lines.append((name, what, rate_text(roof["rate"], roof["kind"]), rate_text(figure, roof["kind"]),
                          percent(roof["rate"] / figure if figure else None), roof["source"]))
    heads = ("run", "limit", "measured", "published", "measured / published", "source")
    return _per_run(runs, heads, lines, (2, 3, 4))


def host_table(runs: Sequence[Run]) -> Table:
    """What Python costs before a launch: microseconds of ours, of plain PyTorch and of a library, and calls."""
    lines = []
    for name, rows in runs:
        for row in (row for row in rows if row["row"] == "host"):
            us = [number(row[column], 3) for column in ("ours_us", "eager_us", "more_us")]
            peer = f"{number(row['peer_us'], 3)} ({row['peer']})" if row["peer"] else ""
            lines.append((name, row["backend"], row["op"], row["what"], *us, peer, str(row["python_calls"])))
    heads = ("run", "backend", "op", "what", "ours, us", "plain, us", "ours beyond it, us", "library, us", "Python calls")
    return _per_run(runs, heads, lines, range(4, 9))


def summary(runs: Sequence[Run]) -> Table:
    """Ours in each family, beside torch.compile, the fastest other provider and the limit; and rows, of ours / of peers."""
    lines = []
    measured = [(name, measurements(rows)) for name, rows in runs]
    for family in families(row for _, rows in measured for row in rows):
        for name, rows in measured:
            theirs = [row for row in rows if row["family"] == family]
            pairs = [(cell, own) for cell in cells(theirs) if (own := ours(cell))]
            counts = Counter((row["status"], is_own(row["provider"])) for row in theirs)
            lines.append((name, title(family),
                          _mean([speed(own, cell[COMPILE]) for cell, own in pairs if COMPILE in cell]),
                          _mean([speed(own, other) for cell, own in pairs if (other := best_other(cell, own["provider"]))]),
                          _mean([share(own) for _, own in pairs if share(own) is not None], percent),
                          *(f"{counts[status, True]} / {counts[status, False]}" for status in STATUSES)))
    return _per_run(runs, ("run", "family", *_STANDING, *STATUSES), lines, range(2, 9))


def _mean(values: Sequence[float], form=lambda value: number(value, 3)) -> str:
    """"1.32 (24)": a geometric mean over 24 cells."""
    return f"{form(geometric_mean(values))} ({len(values)})" if values else ""


def _per_run(runs: Sequence[Run], heads: Sequence[str], lines: Sequence[Sequence[str]], numbers: Iterable[int]) -> Table:
    """A table whose first column names the run; of a single run it says nothing and is left out."""
    if len(runs) > 1:
        return Table(heads, lines, frozenset(numbers))
    return Table(heads[1:], [line[1:] for line in lines], frozenset(place - 1 for place in numbers))


def standing_table(runs: Sequence[Run], family: str) -> Table:
    """Standings of one family in every run."""
    mean = lambda pair, form: f"{form(pair[0])} ({pair[1]})" if pair[1] else ""
    lines = []
    for name, rows in runs:
        for s in standings([row for row in measurements(rows) if row["family"] == family]):
            lines.append((name, s.provider, mean(s.compile, lambda v: number(v, 3)), mean(s.other, lambda v: number(v, 3)),
                          mean(s.share, percent), *(str(s.statuses.get(status, 0)) for status in STATUSES)))
    return _per_run(runs, ("run", "provider", *_STANDING, *STATUSES), lines, range(2, 9))


def side_by_side(runs: Sequence[Run], family: str) -> Table:
    """Milliseconds and share of the limit, two columns per run; a row without a time has its status there."""
    found = [{schema.key(row): row for row in measurements(rows) if row["family"] == family} for _, rows in runs]
    lines = []
    for key in dict.fromkeys(key for run in found for key in run):
        _, op, case, direction, provider, dtype = key
        values = []
        for run in found:
            row = run.get(key)
            values += ["", ""] if row is None else [number(row["median_ms"]) or row["status"], share_text(row)]
        lines.append((op, case, direction, dtype, provider, *values))
    heads = [f"{name}, {what}" for name, _ in runs for what in ("ms", "share of the limit")]
    return Table(("op", "case", "direction", "dtype", "provider", *heads), lines, frozenset(range(5, 5 + len(heads))))


def detail_table(rows: Sequence[dict]) -> Table:
    """Every figure of the rows of one family of one run; a row without a time has status and reason in its place."""
    last = "tokens or frames, MFU" if rows and rows[0]["family"] == MODEL else "error / allowed"
    small = {key for key, cell in group(rows, *CELL).items() if too_small(cell)}
    mark = lambda row: f", {TOO_SMALL}" if tuple(row[name] for name in CELL) in small else ""
    lines = [(row["op"], row["case"], row["direction"] + mark(row), row["dtype"], row["provider"],
              number(row["median_ms"]) or f"{row['status']}: {row['reason']}", rate(row), share_text(row),
              size(row["peak_bytes"]),
              ", ".join(filter(None, (throughput(row), mfu(row)))) if row["family"] == MODEL else error_text(row))
             for row in rows]
    return Table(("op", "case", "direction", "dtype", "provider", "ms", "rate", "share of the limit", "peak memory", last),
                 lines, frozenset(range(5, 10)))


def markdown(runs: Sequence[Run]) -> str:
    """report.md: what report.html shows, as plain tables."""
    every = [row for _, rows in runs for row in measurements(rows)]
    parts = ["# sora_fast benchmarks", "Times are medians of single calls. Columns are explained in report.html.",
             "## In short", summary(runs).markdown(), "## Conditions", conditions(runs).markdown(),
             "## Limits of the machine", roof_table(runs).markdown()]
    host = host_table(runs)
    parts += ["## Host time", host.markdown()] if host.rows else []
    for family in families(every):
        parts += [f"## {_escaped(title(family))}", standing_table(runs, family).markdown()]
        theirs = [row for row in every if row["family"] == family]
        parts.append(side_by_side(runs, family).markdown() if len(runs) > 1 else detail_table(theirs).markdown())
    lines = [(name, status, provider, str(len(theirs)), reason) for name, rows in runs
             for status, provider, reason, theirs in without_time(measurements(rows))]
    if lines:
        parts += ["## Rows without a time",
                  Table(("run", "status", "provider", "rows", "reason"), lines, frozenset((3,))).markdown()]
    return "\n\n".join(parts) + "\n"


def as_csv(runs: Sequence[Run]) -> str:
    """report.csv: the time rows with all their numbers, exactly; a share above the roof is left out."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(("run", *_COLUMNS, *_ENVIRONMENT))
    for name, rows in runs:
        for row in measurements(rows):
            shown = {**row, "share": share(row), "shape": json.dumps(row["shape"]), "details": json.dumps(row["details"])}
            write([name, *(shown[column] for column in _COLUMNS), *(row["environment"].get(e) for e in _ENVIRONMENT)])
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------- README
def readme_block(results_folder: str | Path, brief: bool = False) -> str:
    """The measured tables, from ``results_folder``/<gpu>/bench*.jsonl and its cpu.jsonl; equal for equal files.

    ``brief``: of a CPU's only those in _BRIEF.
    """
    parts = []
    for folder in sorted(path for path in Path(results_folder).glob("*") if path.is_dir()):
        rows = [row for path in sorted(folder.glob("bench*.jsonl")) for row in schema.read(path)]
        if measurements(rows):
            parts += _readme_gpu(folder.name, rows)
    on_cpu = Path(results_folder) / "cpu.jsonl"
    if on_cpu.exists():
        parts += _readme_cpu([row for row in schema.read(on_cpu) if not brief or row["group"] in _BRIEF])
    return "\n\n".join(parts) if parts else "No measured results are committed yet."


def _readme_gpu(folder: str, rows: Sequence[dict]) -> list[str]:
    timed, said = measurements(rows), _conditions(rows)
    commits = _several(row["environment"]["commit"][:12] for row in timed if row["environment"]["commit"])
    changed = " with uncommitted changes" if any(row["environment"]["changed"] for row in timed) else ""
    facts = {"Commit": commits + changed, "torch": said["torch"], "Triton": said["triton"], "driver": said["driver"],
             "L2": said["L2 between calls"], "measured": said["measured"]}
    told = ", ".join(f"{name} {_escaped(value)}" for name, value in facts.items() if value)
    parts = [f"### {_escaped(said['device'])}",
             _paragraph(f"{told}. Every row: `benchmarks/results/{folder}/`."),
             _paragraph("Ours beside others: geometric means of speed (above 1: ours is faster) over as many cases and "
                        "directions as stand in brackets, those in which both passed. Then the rows, ours / "
                        "peers': only what passed the gate has a time."), summary([(folder, timed)]).markdown()]
    models = [row for row in timed if row["family"] == MODEL]
    layers = [row for row in timed if row["family"] != MODEL]
    if layers:
        parts += ["The largest case of each op, in ms; in brackets what ran.", _readme_cases(layers).markdown()]
    if models:
        parts += ["One step of whole models.", _readme_models(models).markdown()]
    return parts


_ON_A_CPU = {
    "vae": "Wan 2.1's graph, one block per level: `VideoVAE` beside diffusers' `AutoencoderKLWan`, accelerated or not",
    "memory": "Peak memory of tensors, without weights and inputs, by the length of the clip",
    "packing": "A DiT trained on mixed sizes: one pack, a batch of each size, one batch padded to the longest",
    "transformers": "diffusers' transformers, accelerated and plain",
}
_BRIEF = ("vae",)


def _readme_cpu(rows: Sequence[dict]) -> list[str]:
    """A table for each group: of every case, each side's share of the base's time or memory, and the base's own."""
    first, rounds = rows[0]["environment"], max(len(row["samples"] or ()) for row in rows)
    packages = f", diffusers {first['packages']['diffusers']}" if "diffusers" in first["packages"] else ""
    parts = [f"### {_escaped(first['cpu'])}, one thread, float32",
             _paragraph(f"CPU time of whole steps as a share of the last column (below 1 is faster): the median of {rounds} "
                        f"interleaved rounds, timed only after all sides had given the same results, and with freed memory "
                        f"kept for the next step. torch {first['torch']}{packages}; reproduce with `{rows[0]['command']}`. "
                        f"Every row: `benchmarks/results/cpu.jsonl`.")]
    for (name,), theirs in group(rows, "group").items():
        sides = list(dict.fromkeys(row["side"] for row in theirs))
        lines = []
        for (case,), cell in group(theirs, "case").items():
            own = lambda row: size(row["bytes"]) if row["seconds"] is None else f"{number(row['seconds'], 3)} s"
            text = {row["side"]: own(row) if row["side"] == row["base"] else f"{row['share']:.2f}" for row in cell}
            lines.append((case, *(text[side] for side in sides)))
        table = Table(("", *sides), lines, frozenset(range(1, len(sides) + 1)))
        parts += [_paragraph(f"{_ON_A_CPU[name]}."), table.markdown()]
    return parts


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _readme_cases(rows: Sequence[dict]) -> Table:
    """A fixed choice, the largest case of an op, so that none is picked for its figures."""
    named = lambda row: f"{number(row['median_ms'])} ({row['provider']})" if row else ""
    lines = []
    for family in families(rows):
        by_op = group(sorted((row for row in rows if row["family"] == family), key=schema.key), "op")
        for (op,), theirs in by_op.items():
            largest = max(theirs, key=lambda row: (row["flops"] or 0, row["bytes"] or 0, row["case"], row["dtype"]))
            chosen = [row for row in theirs if all(row[name] == largest[name] for name in ("suite", "case", "dtype"))]
            by_direction = group(chosen, "direction")
            for (direction,) in sorted(by_direction, key=lambda key: (key[0] != "forward", key)):
                cell = {row["provider"]: row for row in by_direction[direction,] if row["status"] == "PASSED"}
                own, compiled = ours(cell), cell.get(COMPILE)
                other = best_other(without_ours(cell), COMPILE)
                lines.append((op, f"{largest['case']}, {largest['dtype']}", direction, named(own) or "none passed",
                              number(compiled["median_ms"]) if compiled else "", named(other),
                              share_text(own) if own else ""))
    return Table(("op", "case", "direction", "ours", "torch.compile", "fastest of the rest", "share of the limit"), lines,
                 frozenset((3, 4, 5, 6)))


def _readme_models(rows: Sequence[dict]) -> Table:
    lines = [(row["op"], f"{row['case']}, {row['dtype']}", row["provider"], number(row["median_ms"]) or row["status"],
              throughput(row), size(row["peak_bytes"]), mfu(row)) for row in sorted(rows, key=schema.key)]
    return Table(("model", "case", "provider", "ms", "throughput", "peak memory", "MFU"), lines, frozenset((3, 4, 5, 6)))
