"""report.html, report.md and report.csv: one run or several side by side, for someone who was not there.

The page is one file: no scripts, nothing that is loaded from elsewhere. A run is (name, rows as rows.read returns them).
"""

import html as escaping
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sora_fast.files import save_text

from . import charts, tables
from .figures import (
    ABOVE,
    LEAST_TO_RANK,
    MODEL,
    OURS,
    STATISTICS,
    STATUSES,
    TOO_SMALL,
    families,
    group,
    is_own,
    measurements,
    number,
    roofs,
    share_text,
    size,
    title,
    too_small,
    without_time,
)
from .tables import Run, Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2a78d6; --warm: #c98a1b; --other: #8a94a3;
  --bad: #c62f2f; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --accent: #4a94ee; --warm: #d9a03a; --bad: #ff7b72; --ground: #121212; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem; } h4 { font-size: 1rem; margin: 0; }
h5 { font-size: .9rem; margin: .9rem 0 0; } h5 small { font-weight: 400; opacity: .7; }
p { max-width: 46rem; } .lead { opacity: .8; margin-top: 0; } small { font-size: .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0; } a { color: var(--accent); }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td:first-child { white-space: nowrap; } th { vertical-align: bottom; min-width: 4rem; }
.sides { margin: .1rem 0 .3rem; } .sides td.number, .sides td:first-child { white-space: normal; }
.statistics td, .statistics th { white-space: nowrap; }
.facts td:first-child { opacity: .75; } .facts td { overflow-wrap: anywhere; min-width: 9rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(33rem, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem .9rem; min-width: 0; }
.card > p { margin: .1rem 0 0; font-size: .8rem; opacity: .75; }
.reason { border-bottom: 1px solid var(--line); padding: .5rem 0; overflow-wrap: anywhere; max-width: 60rem; }
details { font-size: .85rem; } summary { cursor: pointer; padding: .25rem 0; } details table { font-size: .8rem; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 0 1rem; max-width: 46rem; }
code { font-size: .78rem; overflow-wrap: anywhere; }
"""

# What each word of the page means.
WORDS = {
    "ms": "Milliseconds of one call, the median. A backward is timed alone, without its forward.",
    "share of the limit":
        "The limit is the least time the machine could take: the larger of the work's FLOPs over the measured rate of a "
        "matrix product and its bytes, each read or written once, over the measured rate of a copy. The share is limit over "
        "time: 100 % is the limit, give or take the noise of measuring it. Bars show the share.",
    ABOVE:
        "A time more than 5 % below the limit. Either the numbers stayed in a cache, for which the limit was not measured, "
        "or the work was not done: no result before somebody has looked.",
    "rate": "FLOPs or bytes per second, whichever limit is the lower one for that work.",
    "peak": "The most memory that one call (of a backward: with its forward) held beyond its inputs.",
    "error":
        "The largest difference from the float64 reference in the tensor that came closest to its limit, and that limit: "
        "twice what the dtype itself costs, plus a rounding.",
    "speed / torch.compile, speed / fastest other":
        "Geometric means of how many times faster a provider is, over the cases and directions in which both passed; their "
        "number stands in brackets. For one of ours, the others are those that are not ours; what is too small to rank is "
        "left out.",
    TOO_SMALL:
        f"On a CPU, a case in one direction whose fastest provider takes less than {LEAST_TO_RANK} ms: what Python does "
        f"around the arithmetic decides there.",
    "MFU": "FLOPs per second over the published peak of the chip.",
    "PASSED, FAILED":
        "Every provider is compared with the reference on the benchmark's own inputs, before the timing and after it. Only "
        "what passes both has a time.",
    "UNSUPPORTED, ERROR": "The provider said why it cannot do that work, or broke.",
    "L2 cold, hot":
        "Cold: inputs take turns, three times the L2 cache in all, so that each call reads from memory, as it does in a "
        "model. Hot: the same inputs every time.",
    "ours": f"The providers {', '.join(OURS)}: this library's backends. The reference is its definition.",
}


def _table(table: Table, style: str = "") -> str:
    cell = lambda tag, place, text: (f"<{tag}{' class=number' if place in table.numbers else ''}>"
                                     f"{escaping.escape(text)}</{tag}>")
    line = lambda tag, values: f"<tr>{''.join(cell(tag, place, text) for place, text in enumerate(values))}</tr>"
    return (f'<div class=wide><table class="{style}">{line("th", table.heads)}'
            f"{''.join(line('td', row) for row in table.rows)}</table></div>")


def html(runs: Sequence[Run]) -> str:
    """The page. Raises ValueError for rows that no run writes: a time without a pass, or a pass without one."""
    measured = [(name, measurements(rows)) for name, rows in runs]
    every = [row for _, rows in measured for row in rows]
    devices = ", ".join(dict.fromkeys(row["environment"]["device"] for row in every)) or "no rows"
    links = "".join(f'<a href="#{escaping.escape(id)}">{escaping.escape(name)}</a>' for id, name in
                    (("short", "in short"), ("conditions", "conditions"), ("limits", "limits of the machine"),
                     *((f"family-{name}", title(name)) for name in families(every)), ("without", "rows without a time")))
    words = "".join(f"<dt>{escaping.escape(word)}</dt><dd>{escaping.escape(text)}</dd>" for word, text in WORDS.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>sora_fast benchmarks</title><style>{STYLE}{charts.STYLE}</style></head><body>
<h1>sora_fast benchmarks: {escaping.escape(devices)}</h1>
<p class=lead>{escaping.escape(_lead(measured))}</p>
<nav>{links}</nav>
<details><summary>What the words and numbers mean</summary><dl>{words}</dl></details>
<h2 id="short">In short</h2>
<p>Ours in every family: how many times faster than torch.compile and than the fastest other provider (geometric means over
as many cases and directions as stand in brackets, those in which both passed), and the share reached of the machine's
limit. Then the rows by status, ours / peers'.</p>{_table(tables.summary(runs))}
<h2 id="conditions">Conditions</h2>{_table(tables.conditions(runs), "facts")}
<h2 id="limits">Limits of the machine</h2>
<p>Measured in the same process as everything below, on random numbers.</p>{_table(tables.roof_table(runs))}
{_rooflines(runs)}
{_host(runs)}
{"".join(_family(runs, measured, name) for name in families(every))}
<h2 id="without">Rows without a time</h2>{_without_time(measured)}
</body></html>
"""


def _lead(measured: Sequence[Run]) -> str:
    rows = [row for _, found in measured for row in found]
    counts = Counter((row["status"], is_own(row["provider"])) for row in rows)
    layers = {row["op"] for row in rows if row["family"] != MODEL}
    cases = {(row["op"], row["case"], row["dtype"]) for row in rows}
    told = f"{len(layers)} {'op' if len(layers) == 1 else 'ops'}"
    told += (" and whole models" if any(row["family"] == MODEL for row in rows) else "")
    sides = " Runs stand side by side; times of different machines are no verdict on either." if len(measured) > 1 else ""
    who = lambda own: (f"{', '.join(f'{counts[status, own]:,} {status}' for status in STATUSES if counts[status, own])}"
                       or "no rows yet")
    return (f"{told} in {len(cases)} cases, forward and backward, by {len({row['provider'] for row in rows})} providers. "
            f"Rows of ours: {who(True)}; of peers: {who(False)}.{sides}")


def _rooflines(runs: Sequence[Run]) -> str:
    pictures = ""
    for name, rows in runs:
        timed = measurements(rows)
        for dtype in sorted({row["dtype"] for row in timed}):
            picture = charts.roofline([row for row in timed if row["family"] != MODEL], roofs(rows), dtype)
            if picture:
                device = next(row["environment"]["device"] for row in timed)
                pictures += (f"<h3>{escaping.escape(f'{dtype} on {device} ({name})')}</h3>"
                             f"{picture}")
    if not pictures:
        return ""
    return (f"<h3>Rooflines</h3><p>Each dot is an op's case in one direction; the line is the measured limit, dashed the "
            f"published one. Ops without matrix products or convolutions have no place here: their limit is the copy.</p>"
            f"{charts.KEY}{pictures}")


def _host(runs: Sequence[Run]) -> str:
    table = tables.host_table(runs)
    return "" if not table.rows else (
        f'<h2 id="host">Host time</h2><p>The processor\'s time of one call on inputs so small that nothing else takes time: '
        f"what a GPU waits for in front of each launch, beside plain PyTorch and other libraries.</p>{_table(table)}")


def _family(runs: Sequence[Run], measured: Sequence[Run], family: str) -> str:
    parts = [f'<h2 id="family-{escaping.escape(family)}">{escaping.escape(title(family))}</h2>',
             _table(tables.standing_table(runs, family))]
    named = [row | {"run": place} for place, (_, rows) in enumerate(measured) for row in rows if row["family"] == family]
    parts.append(charts.KEY)
    for (op,), rows in group(named, "op").items():
        cards = "".join(_card([name for name, _ in runs], found)
                        for found in group(rows, "suite", "case", "dtype").values())
        parts.append(f"<h3>{escaping.escape(op)}</h3><div class=cards>{cards}</div>")
    return "".join(parts)


def _card(names: Sequence[str], rows: Sequence[dict]) -> str:
    """One case: bars per direction, of several runs a table beside them, and every statistic folded away."""
    first = rows[0]
    shape = " \u00b7 ".join((first["dtype"], f"suite {first['suite']}", *(f"{name} {_plain(value)}"
                                                                      for name, value in first["shape"].items())))
    gates = ", ".join(dict.fromkeys(row["gate"] for row in rows if row["gate"]))
    parts = [f"<h4>{escaping.escape(first['case'])}</h4><p>{escaping.escape(shape)}</p>"]
    if gates:
        parts.append(f"<p>compared with the reference: {escaping.escape(gates)}</p>")
    alone = len({row["run"] for row in rows}) == 1  # of several runs, each may have cases of its own
    for (direction,), found in sorted(group(rows, "direction").items(), key=lambda item: item[0] != ("forward",)):
        by_run = {run: theirs for (run,), theirs in group(found, "run").items()}
        if alone:
            parts.append(f"<h5>{escaping.escape(direction)}{_limit(found)}</h5>{charts.bars(found)}")
            continue
        bars = "".join(f"<h5>{escaping.escape(names[run])}{_limit(theirs)}</h5>{charts.bars(theirs)}"
                       for run, theirs in by_run.items())
        parts.append(f"<h5>{escaping.escape(direction)} <small>ms, share of the limit</small></h5>"
                     f"{_table(_sides(names, by_run), 'sides')}<details><summary>Bars</summary>{bars}</details>")
    parts.append(f"<details><summary>All statistics, and each row's command</summary>{_statistics(names, rows)}</details>")
    return f"<div class=card>{''.join(parts)}</div>"


def _limit(rows: Sequence[dict]) -> str:
    told = [f"limit {number(row['floor_ms'])} ms ({row['roof']})" for row in rows if row["floor_ms"]][:1]
    told += [TOO_SMALL] if too_small(rows) else []
    return f" <small>{escaping.escape(', '.join(told))}</small>" if told else ""


def _sides(names: Sequence[str], by_run: Mapping[int, Sequence[dict]]) -> Table:
    """A line per provider, a column per run."""
    found = {(row["provider"], run): row for run, rows in by_run.items() for row in rows}

    def cell(row: dict | None) -> str:
        if row is None or row["status"] != "PASSED":
            return row["status"] if row else ""
        facts = filter(None, (f"{number(row['median_ms'])} ms", share_text(row)))
        return ", ".join(fact.replace(" ", "\u00a0") for fact in facts)  # so that a narrow cell breaks between them

    providers = dict.fromkeys(provider for provider, _ in found)
    return Table(("provider", *names), [(provider, *(cell(found.get((provider, run))) for run in range(len(names))))
                                        for provider in providers], frozenset(range(1, len(names) + 1)))


def _plain(value) -> str:
    """A size of a shape: numbers with commas, the rest as it is."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _statistics(names: Sequence[str], rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        if row["status"] == "PASSED":
            provider = row["provider"] if len(names) == 1 else f"{row['provider']} ({names[row['run']]})"
            lines.append((row["direction"], provider, *(number(row[name]) for name in STATISTICS), str(row["n"]),
                          str(row["timer"]), number(row["clock_mhz"]), size(row["saved_bytes"]),
                          ", ".join(f"{name} {value}" for name, value in row["details"].items()), row["command"]))
    heads = ("direction", "provider", "min", "p20", "median", "q3", "p80, ms", "samples", "timer", "clock, MHz",
             "saved for backward", "details", "command")
    return _table(Table(heads, lines, frozenset((2, 3, 4, 5, 6, 7, 9, 10))), "statistics")


def _without_time(measured: Sequence[Run]) -> str:
    lines = []
    for name, rows in measured:
        for status, provider, reason, theirs in without_time(rows):
            where = "".join(f"<div>{escaping.escape(' / '.join((r['op'], r['case'], r['direction'], r['dtype'])))}</div>"
                            for r in theirs)
            run = f" on {name}" if len(measured) > 1 else ""
            lines.append(f'<div class=reason><span class="status {status}">{status}</span> {escaping.escape(provider + run)}'
                         f"<div>{escaping.escape(reason)}</div><details><summary>{len(theirs)} "
                         f"{'row' if len(theirs) == 1 else 'rows'}</summary>{where}</details></div>")
    return "".join(lines) or "<p>There are none: every provider passed in every case.</p>"


def write(runs: Sequence[Run], out_dir: str | Path) -> None:
    """Write ``out_dir``/report.html, report.md and report.csv, each whole or not at all."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    save_text(out / "report.html", html(runs))
    save_text(out / "report.md", tables.markdown(runs))
    save_text(out / "report.csv", tables.as_csv(runs))
