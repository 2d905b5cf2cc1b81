"""README's figure: how much of an H200's limit each kernel reaches, predicted. SVG written by hand.

From kernels/predicted.json, as the table of evidence.
"""

import html
import json
import statistics
from pathlib import Path

from sora_fast import files, records

from .evidence import FAMILIES, KERNELS
from .roofs import published

FIGURE = Path("docs/images/limits.svg")
WIDTH, LEFT, RIGHT, TOP, ROW = 760, 270, 60, 64, 22
STYLE = ("text{font:14px system-ui,sans-serif;fill:#1f2328}.small{font-size:12px;fill:#59636e}.bar{fill:#2a78d6}"
         ".backward{fill:#7fb0ea}.grid{stroke:#d1d9e0}.spread{stroke:#1f2328;stroke-width:1.5}")


def shares(rows: list[dict], family: str, direction: str) -> list[float]:
    """Of the limit, in 16 bits: of the data sheet's Tensor Core rate where a kernel multiplies, else of the copy rate."""
    mine = [row for row in rows
            if (row["family"], row["direction"]) == (family, direction) and "float32" not in row["case"]]
    rates = [row["tflops"] / published(row["gpu"]).bf16 for row in mine if row["tflops"]]
    return rates or [row["copy_share"] for row in mine if row["copy_share"]]


def svg(kernels: Path = KERNELS) -> str:
    """The figure: a bar to the median of the cases, a line from the least to the most."""
    rows = json.loads(files.read_text(kernels / "predicted.json") or "[]")
    gpu = rows[0]["gpu"] if rows else "H200"
    full, y, parts = WIDTH - LEFT - RIGHT, TOP, []
    text = lambda x, y, words, more="": parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>')
    bottom = TOP + len(FAMILIES) * (2 * ROW + 8)
    for percent in range(0, 101, 25):
        x = LEFT + full * percent / 100
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP - 6}V{bottom}"/>')
        text(x, bottom + 16, f"{percent}%", 'class="small" text-anchor="middle"')
    for family, title in FAMILIES.items():
        text(10, y + ROW, title)
        mine = [row for row in rows if row["family"] == family]
        stale = any(row["kernel_hash"] != records.kernel_hash(family) for row in mine)
        for direction in ("forward", "backward"):
            text(LEFT - 10, y + 15, direction, 'class="small" text-anchor="end"')
            found = [] if stale else shares(rows, family, direction)
            if found:
                low, middle, high = (LEFT + full * min(of(found), 1.0) for of in (min, statistics.median, max))
                parts.append(f'<rect class="bar {direction}" x="{LEFT}" y="{y + 3}" width="{middle - LEFT:.1f}" '
                             f'height="{ROW - 6}" rx="2"/><path class="spread" d="M{low:.1f} {y + ROW / 2}H{high:.1f}"/>')
                text(max(middle, high) + 8, y + 15, f"{statistics.median(found):.0%}")
            else:
                text(LEFT + 6, y + 15, "of other kernels: run sora-fast predict" if stale else "not predicted",
                     'class="small"')
            y += ROW
        y += 8
    text(10, 22, f"Share of an {gpu}'s limit, 16 bits: predicted, not measured", 'style="font-weight:650"')
    text(10, 42, f"Median of the cases; line: least to most. Limit: Tensor Cores, {published(gpu).bf16:.0f} TFLOP/s "
                 f"(attention, convolution), or the copy rate (others).", 'class="small"')
    height = bottom + 26
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
            f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n")


def update(path: str | Path = FIGURE, check: bool = False) -> None:
    """Write the figure; with ``check`` raise ValueError if another one is there."""
    path, wanted = Path(path), svg()
    if files.read_text(path) == wanted:
        return
    if check:
        raise ValueError(f"bench readme: expected {path} to show the committed predictions, got another figure; run "
                         f"sora-fast bench readme")
    files.save_text(path, wanted)
