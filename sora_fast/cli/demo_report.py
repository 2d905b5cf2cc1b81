"""report.html of the demo: one file, pictures inside. T frames, H height, W width."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..evaluation.plots import png
from ..explanation import KINDS, taken
from ..files import save_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2a78d6; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { max-width: 46rem; } .lead { opacity: .8; margin-top: 0; }
table { border-collapse: collapse; font-size: .92rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; background: var(--soft); }
.card p { margin: .4rem 0 0; font-size: .9rem; } .card small { opacity: .7; }
.pair { display: flex; gap: .4rem; align-items: flex-end; } figure { margin: 0; min-width: 0; }
.pair figure { flex: 0 1 50%; }
figcaption { font-size: .75rem; opacity: .7; } img { width: 100%; height: auto; border-radius: .25rem; display: block; }
.three { display: grid; gap: .6rem; grid-template-columns: repeat(3, 1fr); margin-bottom: 1rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.plots img { background: #fff; } pre { overflow-x: auto; font-size: .78rem; background: var(--soft); padding: .7rem; }
.bar { background: var(--accent); height: .6rem; border-radius: .2rem; }
"""


def picture(clip_THWC: torch.Tensor, alt: str, fps: float = 12.5) -> str:
    """An <img> of a uint8 clip: a moving WebP, or a PNG of one frame."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in clip_THWC.numpy()]
    data = io.BytesIO()
    if len(frames) == 1:
        frames[0].save(data, "PNG")
    else:
        frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0,
                       quality=85)
    kind = "png" if len(frames) == 1 else "webp"
    return (f'<img alt="{html.escape(alt)}" width="{clip_THWC.shape[2]}" height="{clip_THWC.shape[1]}" '
            f'src="data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}">')


def side_by_side(left_THWC: torch.Tensor, right_THWC: torch.Tensor) -> torch.Tensor:
    """Two uint8 clips of one size with a white gap between them."""
    gap = left_THWC.new_full((*left_THWC.shape[:2], 8, 3), 255)
    return torch.cat([left_THWC, gap, right_THWC], dim=2)


def strip(clip_THWC: torch.Tensor, given: tuple[int, int], alt: str) -> str:
    """All frames of a clip side by side at half size as one <img>; the given ones at its ends have a blue frame."""
    begin, end = given
    frames, edge = [], 3
    for index, frame in enumerate(clip_THWC[:, ::2, ::2]):
        known = index < begin or index >= len(clip_THWC) - end
        colour = torch.tensor((42, 120, 214) if known else (255, 255, 255), dtype=torch.uint8)
        framed = colour.expand(frame.shape[0] + 2 * edge, frame.shape[1] + 2 * edge, 3).clone()
        framed[edge:-edge, edge:-edge] = frame
        frames.append(framed)
    return picture(torch.cat(frames, dim=1)[None], alt)


def plot(title: str, rows: Sequence[Mapping]) -> str:
    """An <img> of a loss curve."""
    def draw(axes):
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#2a78d6", linewidth=1.2)
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")

    data = base64.b64encode(png(draw, size=(5.2, 3.0))).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def write_report(out: Path, *, reconstructions, samples, prompted, stages: Mapping[str, float], losses,
                 facts: Mapping[str, str], device: str, dtype: torch.dtype) -> Path:
    """Write OUT/report.html atomically and return its path."""
    figure = lambda clip, label: f"<figure>{picture(clip, label)}<figcaption>{label}</figcaption></figure>"
    cells = lambda values, tag="td": "".join(
        f'<{tag}{" class=number" if i else ""}>{value}</{tag}>' for i, value in enumerate(values))
    table = [(html.escape(r.name), " x ".join(map(str, r.real.shape[:3])), f"{r.psnr:.2f}", f"{r.ssim:.3f}",
              f"{r.baseline_psnr:.2f}", f"{r.baseline_ssim:.3f}", f"{r.psnr - r.baseline_psnr:+.2f}",
              f"{r.psnr - r.start_psnr:+.2f}")
             for r in reconstructions]
    heads = ("clip", "frames x height x width", "PSNR, dB", "SSIM", "baseline PSNR", "baseline SSIM", "gain, dB",
             "of it by training")
    gain_rows = "".join(f"<tr>{cells(row)}</tr>" for row in table)
    strips = "".join(
        f"<div class=three>{figure(r.real, 'real')}{figure(r.decoded, f'VAE, {r.psnr:.2f} dB')}"
        f"{figure(r.baseline, f'averaged and interpolated, {r.baseline_psnr:.2f} dB')}</div>" for r in reconstructions)
    cards = ""
    for s in samples:
        size = " x ".join(str(n) for n in s.generated.shape[:3])
        pair = (figure(s.real, "real") if s.real is not None else "") + figure(s.generated, "generated")
        cards += (f"<div class=card><div class=pair>{pair}</div><p>{html.escape(s.caption)}<br>"
                  f"<small>{size} &middot; {html.escape(s.note)} &middot; samples/{html.escape(s.file)}</small></p></div>")
    shown = ""
    for s in prompted:
        pair = (figure(s.real, "given") if s.real is not None else "") + figure(s.generated, "generated")
        frames = strip(s.generated, s.given, f"all frames, {s.note}") if len(s.generated) > 1 else ""
        shown += (f"<div class=card><div class=pair>{pair}</div>{frames}<p>{html.escape(s.caption)}<br>"
                  f"<small>{html.escape(s.note)} &middot; samples/{html.escape(s.file)}</small></p></div>")
    longest = max(stages.values())
    stage_rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=number>{seconds:.1f} s</td>"
        f'<td style="width:40%"><div class=bar style="width:{100 * seconds / longest:.1f}%"></div></td></tr>'
        for name, seconds in stages.items())
    fact_rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    used = "".join(f"<tr>{cells((op, name, KINDS[name]))}</tr>" for op, name in
                   sorted({**taken("vae", device, dtype), **taken("dit", device, dtype)}.items()))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>sora_fast demo</title><style>{STYLE}</style></head><body>
<h1>sora_fast: the whole system, on real clips</h1>
<p class=lead>A causal video VAE and a diffusion transformer, trained from nothing on three clips and twelve photos
({html.escape("; ".join(losses))}), {sum(stages.values()) / 60:.1f} minutes in all. The DiT memorises
{sum(s.real is not None for s in samples)} captions: this shows that every part works, not that so small a model, so briefly
trained, generalises.</p>
<h2>Generated from captions</h2>
<p>Clips and images of different sizes were denoised together, packed into one token sequence. The last ones have sizes
that no training sample had.</p>
<div class=grid>{cards}</div>
<h2>Prompted with images and clips</h2>
<p>Given frames (blue) stay as they are, at t = 0, while the others are denoised; the DiT has met such packs in training. In
the clip they are the real pixels, and what the VAE's copy missed of the one at a seam is faded out over the generated frames
beside it. SDEdit begins from the given picture, noised, and goes on to another caption.</p>
<div class=grid>{shown}</div>
<h2>The VAE on frames it never saw</h2>
<p>The last fifth of each clip was kept from training. Beside it: the same frames averaged over 4 x 8 x 8 blocks, the
latent's own resolution, and interpolated back. The VAE starts from the principal components of training blocks (its linear
path), so it is a fair codec before its first step; the last column of the table says what training added to that.</p>
<div class=wide><table><tr>{cells(heads, 'th')}</tr>
{gain_rows}</table></div><br>{strips}
<h2>Losses</h2><div class=plots>{"".join(plot(title, rows) for title, rows in losses.items())}</div>
<h2>Time per stage</h2><table>{stage_rows}</table>
<h2>How it was made</h2><div class=wide><table>{fact_rows}</table></div>
<h2>What ran on which backend</h2>
<div class=wide><table class=compact><tr><th>op</th><th>backend</th><th></th></tr>{used}</table></div>
<p><small>Why, op by op: <code>sora-fast explain --device {device}</code></small></p>
</body></html>
"""
    path = out / "report.html"
    save_text(path, page)
    return path
