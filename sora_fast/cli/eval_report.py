"""What sora-fast eval has found: tables, pictures, and report.html, one file, pictures inside.

T frames, H lines, W columns.
"""

import html
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.media import shown
from ..evaluation import TimestepLosses, frechet
from ..evaluation.features import sentence
from ..evaluation.plots import png
from ..files import replace, save_text
from ..training.dit import FPS
from .demo_report import STYLE, picture


@dataclass
class Findings:
    """What an evaluation found: facts and figures for eval.json, lines of tables for people, pictures for the report."""

    kind: str
    facts: dict[str, str]
    figures: dict = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    table: list[tuple[str, ...]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plot: bytes = b""
    pictures: list[tuple[str, torch.Tensor]] = field(default_factory=list)  # (caption, clip)
    fps: float = FPS

    def skip(self, name: str, reason: str) -> None:
        print(f"skipped {shown(name)}: {shown(reason)}", flush=True)
        self.skipped.append((shown(name), shown(reason)))

    def distance(self, real: torch.Tensor, got: torch.Tensor) -> None:
        """The Frechet distance of features, (samples, D)."""
        if min(len(real), len(got)) < 2:
            self.notes.append("No Frechet distance: it needs two samples or more; give more media, or fewer "
                              "--feature-frames.")
            return
        distance = frechet(got, real)
        self.figures["frechet"] = dict(distance=distance, samples=len(got), real_samples=len(real), dimensions=real.shape[1])
        self.notes.append(sentence(len(got), len(real), real.shape[1], distance))

    def tell(self) -> None:
        rows = [self.heads, *self.table]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.heads))]
        for row in rows:
            print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                            for i, (cell, width) in enumerate(zip(row, widths, strict=True))))
        print("\n".join(self.notes))
        if self.skipped:
            print(f"{len(self.skipped)} files were skipped; eval.json and the report name them")

    def save(self, out: Path) -> None:
        """eval.json (null: not defined, or infinite), eval.png where there is matplotlib, report.html."""
        figures = dict(kind=self.kind, **self.facts, **self.figures, notes=self.notes,
                       skipped=[dict(file=name, reason=why) for name, why in self.skipped])
        save_text(out / "eval.json", json.dumps(_finite(figures), indent=1, allow_nan=False))
        if self.plot:
            replace(out / "eval.png", lambda path: path.write_bytes(self.plot))
        write_report(out / "report.html", self)


def _finite(value):
    """``value`` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sheet(rows: Sequence[Sequence[torch.Tensor]], gap: int = 4) -> torch.Tensor:
    """Clips uint8 (T, H, W, 3) in rows as one clip on white, ``gap`` pixels apart; shorter ones stay at their last frame."""
    frames = max(len(clip) for row in rows for clip in row)
    columns = [max(clip.shape[2] for clip in column) for column in zip(*rows, strict=True)]
    heights = [max(clip.shape[1] for clip in row) for row in rows]
    grid = torch.full((frames, sum(heights) + gap * (len(rows) - 1), sum(columns) + gap * (len(columns) - 1), 3), 255,
                      dtype=torch.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for clip, width in zip(row, columns, strict=True):
            whole = torch.cat([clip, clip[-1:].expand(frames - len(clip), -1, -1, -1)])
            grid[:, top : top + clip.shape[1], left : left + clip.shape[2]] = whole
            left += width + gap
        top += height + gap
    return grid


def vae_plot(curves: Mapping[str, Sequence[float]], most: int = 8) -> bytes:
    """PSNR of each frame, by path; of many clips the ``most`` with the worst frames."""
    def draw(axes):
        for name in sorted(curves, key=lambda name: min(curves[name]))[:most]:
            axes.plot(curves[name], label=ascii(Path(name).name)[1:-1], linewidth=1.2,
                      marker="." if len(curves[name]) < 40 else None)
        axes.set(title="reconstruction" + (f", the {most} clips with the worst frames" if len(curves) > most else ""),
                 xlabel="frame", ylabel="PSNR, dB")
        axes.legend(frameon=False, fontsize="small")
    return png(draw)


def timestep_plot(losses: TimestepLosses) -> bytes:
    """The loss over timesteps, with the span from the 10th to the 90th of 100 clips."""
    def draw(axes):
        centres = [(low + high) / 2 for low, high in zip(losses.edges, losses.edges[1:], strict=False)]
        low, high = (torch.quantile(losses.losses, q, dim=1).tolist() for q in (0.1, 0.9))
        axes.fill_between(centres, low, high, color="#2a78d6", alpha=0.2, linewidth=0, label="10th to 90th of 100 clips")
        axes.plot(centres, losses.by_timestep.tolist(), color="#2a78d6", marker=".", label="mean")
        axes.set(title=f"loss over timesteps, averaged weights; mean {losses.mean:.4f}",
                 xlabel="timestep (0 clean, 1000 noise)", ylabel="loss", xlim=(0, 1000))
        axes.legend(frameon=False, fontsize="small")
    return png(draw)


def write_report(path: Path, found: Findings) -> Path:
    """One page, atomically: figures, plot, pictures, how it was made, what was skipped."""
    cells = lambda values, tag="td": "".join(
        f'<{tag}{" class=number" if i else ""}>{html.escape(value)}</{tag}>' for i, value in enumerate(values))
    pairs = lambda rows: "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    what = dict(vae="A VAE's reconstructions", dit="A DiT's loss and samples")[found.kind]
    table = "".join(f"<tr>{cells(row)}</tr>" for row in found.table)
    shown = "".join(f"<div class=card>{picture(clip, caption, found.fps)}<p>{html.escape(caption)}</p></div>"
                    for caption, clip in found.pictures)
    wide = 17 if found.kind == "vae" else 34
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in found.notes)
    skipped = f"<h2>Skipped</h2><div class=wide><table>{pairs(found.skipped)}</table></div>" if found.skipped else ""
    plot = f'<img alt="plot" style="max-width:46rem" src="data:image/png;base64,{b64encode(found.plot).decode()}">' * (
        bool(found.plot))
    save_text(path, f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>sora_fast eval</title><style>{STYLE}</style></head><body>
<h1>{what}</h1>
<p class=lead>{html.escape(found.facts["model"])} on {html.escape(found.facts["media"])}</p>
<div class=wide><table><tr>{cells(found.heads, "th")}</tr>{table}</table></div>{notes}
<div class=plots>{plot}</div>
<h2>{"Real, and reconstructed" if found.kind == "vae" else "Samples"}</h2>
<div class=grid style="grid-template-columns:repeat(auto-fill, minmax({wide}rem, 1fr))">{shown}</div>
<h2>How it was made</h2><div class=wide><table>{pairs(found.facts.items())}</table></div>{skipped}
</body></html>
""")
    return path
