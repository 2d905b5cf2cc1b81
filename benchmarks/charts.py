"""Pictures of the report: bars of HTML, which phones can read, and the roofline as SVG written by hand."""

import html
import math
from collections.abc import Mapping, Sequence

from .figures import (
    ABOVE,
    COMPILE,
    MODEL,
    group,
    is_own,
    mfu,
    number,
    rate,
    rate_text,
    share,
    share_text,
    size,
    throughput,
)

STYLE = """
.bars { margin: .2rem 0 .8rem; }
.bar { display: grid; grid-template-columns: 9.5rem 1fr 7rem; column-gap: .7rem; align-items: center; padding: .22rem 0; }
.bar .name { overflow-wrap: anywhere; line-height: 1.25; } .bar .ms { text-align: right; white-space: nowrap; }
.bar .ms, .note { font-variant-numeric: tabular-nums; } .fastest .ms { font-weight: 650; }
.bar .note { grid-column: 2 / -1; font-size: .8rem; line-height: 1.35; opacity: .75; overflow-wrap: anywhere; }
.fact { display: inline-block; }
.track { background: var(--soft); border-radius: .2rem; height: .7rem; }
.track i { display: block; height: 100%; min-width: 2px; border-radius: .2rem; background: var(--other); }
.ours i { background: var(--accent); } .compiled i { background: var(--warm); }
.status { font-size: .75rem; font-weight: 650; letter-spacing: .02em; } .FAILED, .ERROR { color: var(--bad); }
.UNSUPPORTED { opacity: .65; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; margin: .4rem 0 .8rem; }
.key span::before { content: ""; display: inline-block; width: .75rem; height: .75rem; border-radius: .2rem;
  margin-right: .4rem; background: var(--other); vertical-align: -1px; }
.key .ours::before { background: var(--accent); } .key .compiled::before { background: var(--warm); }
svg { width: 100%; min-width: 38rem; max-width: 54rem; height: auto; display: block; }
svg text { fill: currentColor; font-size: 13px; }
svg .grid { stroke: var(--line); } svg .roof { stroke: currentColor; stroke-width: 2; fill: none; }
svg .published { stroke: currentColor; stroke-dasharray: 5 5; opacity: .55; fill: none; }
svg circle { fill: var(--other); fill-opacity: .8; stroke: var(--ground); } svg .ours { fill: var(--accent); }
svg .compiled { fill: var(--warm); }
@media (max-width: 40rem) {
  .bar { grid-template-columns: 1fr auto; } .bar .ms { grid-row: 1; grid-column: 2; }
  .bar .track, .bar .note { grid-column: 1 / -1; }
}
"""

KEY = ('<div class=key><span class=ours>ours</span><span class=compiled>torch.compile</span>'
       "<span>others, and the reference</span></div>")

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 430, 66, 16, 18, 48


def role(provider: str) -> str:
    """The class that colours a provider."""
    own = is_own(provider) and provider != "reference"
    return "ours" if own else "compiled" if provider == COMPILE else "other"


def bars(rows: Sequence[Mapping]) -> str:
    """The rows of one direction of one case, the fastest first, what failed after them, what could not run in a line.

    A full bar is the limit. Where a row has no share of one, a full bar is the fastest row.
    """
    timed = sorted((row for row in rows if row["status"] == "PASSED"), key=lambda row: row["median_ms"])
    by_share = all(share(row) is not None for row in timed)
    lines = []
    for row in timed:
        filled = min(1.0, share(row)) if by_share else timed[0]["median_ms"] / row["median_ms"]
        lines.append(f'<div class="bar {role(row["provider"])}{" fastest" if row is timed[0] else ""}">'
                     f'<span class=name>{html.escape(row["provider"])}</span>'
                     f'<span class=track><i style="width:{filled * 100:.1f}%"></i></span>'
                     f'<span class=ms><data value="{row["median_ms"]!r}">{number(row["median_ms"])}</data> ms</span>'
                     f'<span class=note>{_note(row)}</span></div>')
    for row in rows:
        if row["status"] in ("FAILED", "ERROR"):
            lines.append(f'<div class=bar><span class=name>{html.escape(row["provider"])}</span>'
                         f'<span class="note {row["status"]}"><span class=status>{row["status"]}</span> '
                         f'{html.escape(row["reason"])}</span></div>')
    absent = [row["provider"] for row in rows if row["status"] == "UNSUPPORTED"]
    if absent:
        lines.append(f'<small class=UNSUPPORTED>Not run, with reasons below: {html.escape(", ".join(absent))}</small>')
    unit = "" if by_share else "<small>A full bar is the fastest here: not every row has a share of the limit.</small>"
    return f"<div class=bars>{unit}{''.join(lines)}</div>"


def _note(row: Mapping) -> str:
    told = share_text(row)
    facts = [throughput(row) if row["family"] == MODEL else "", rate(row),
             told if told == ABOVE or not told else f"{told} of the limit",
             mfu(row) and f"MFU {mfu(row)}", size(row["peak_bytes"]) and f"peak {size(row['peak_bytes'])}",
             "" if row["error"] is None else f"error {row['error']:.2g} of {row['allowed']:.2g} allowed"]
    return " \u00b7 ".join(f"<span class=fact>{html.escape(fact)}</span>" for fact in facts if fact)


def roofline(rows: Sequence[Mapping], roofs: Sequence[Mapping], dtype: str) -> str:
    """An <svg> of rate over FLOPs per byte, log by log, with measured and published limits; "" where it would be empty."""
    # a dot above the line would be a claim that its share is not
    points = [row for row in rows if row["status"] == "PASSED" and row["dtype"] == dtype and row["flops"] and row["bytes"]
              and "above_roof" not in row["details"]]
    matrix = next((roof for roof in roofs if roof["kind"] == "matrix" and roof["dtype"] == dtype), None)
    copies = sorted((roof for roof in roofs if roof["kind"] == "copy"), key=lambda roof: roof["bytes"])
    if not points or matrix is None or not copies:
        return ""
    copy = copies[-1]  # the largest working set: memory's own rate, where smaller ones may be a cache's
    ridge = matrix["rate"] / copy["rate"]
    intensity = lambda row: row["flops"] / row["bytes"]
    rate_of = lambda row: row["flops"] / row["median_ms"] * 1e3
    xs, ys = [*map(intensity, points), ridge], [*map(rate_of, points), matrix["rate"], matrix["published"] or matrix["rate"]]
    x_low, x_high = math.log10(min(xs) / 2), math.log10(max(xs) * 4)
    y_low, y_high = math.log10(min(ys) / 2), math.log10(max(ys) * 2)
    x = lambda value: _LEFT + (math.log10(value) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
    y = lambda value: _HEIGHT - _BOTTOM - (math.log10(value) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
    parts = [_grid(x, y, (x_low, x_high), (y_low, y_high))]

    def roof(style: str, memory: float, compute: float) -> None:
        start, end = max(10**x_low, 10**y_low / memory), 10**x_high
        parts.append(f'<path class={style} d="M{x(start):.1f} {y(memory * start):.1f} L{x(compute / memory):.1f} '
                     f'{y(compute):.1f} L{x(end):.1f} {y(compute):.1f}"/>')

    if matrix["published"] and copy["published"]:
        roof("published", copy["published"], matrix["published"])
    roof("roof", copy["rate"], matrix["rate"])
    for (provider,), theirs in sorted(group(points, "provider").items(), key=lambda item: role(item[0][0]) == "ours"):
        for row in theirs:  # ours last, on top
            said = f"{row['op']}, {row['case']}, {row['direction']}, {provider}: {rate_text(rate_of(row), 'matrix')}"
            parts.append(f'<circle class={role(provider)} cx="{x(intensity(row)):.1f}" cy="{y(rate_of(row)):.1f}" r="5">'
                         f"<title>{html.escape(said)}</title></circle>")
    limits = lambda figure: f"{rate_text(matrix[figure], 'matrix')} and {rate_text(copy[figure], 'copy')}"
    dashed = f"; dashed, published: {limits('published')}" if matrix["published"] and copy["published"] else ""
    return (f"<p>Line, measured: {limits('rate')}{dashed}.</p><div class=wide>"
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Roofline, {html.escape(dtype)}">'
            f"{''.join(parts)}</svg></div>")


def _grid(x, y, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    """Lines and labels, and both axes' names."""
    parts = []
    for value in _ticks(*x_range):
        at = x(value)
        parts.append(f'<line class=grid x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
                     f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{number(value, 1)}</text>')
    for value in _ticks(*y_range):
        at = y(value)
        parts.append(f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(value / 1e12, 1)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">FLOPs per byte that must be moved</text>'
                 f'<text x="{_LEFT + 8}" y="{_TOP + 12}">TFLOP/s</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two powers of ten; over more than three decades the powers alone."""
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    every = (step * 10.0**power for power in range(math.floor(low), math.ceil(high)) for step in steps)
    return [value for value in every if low <= math.log10(value) <= high]
