"""sora-fast eval: figures of a trained VAE or DiT on given media.

T frames, H lines, W columns; clips are uint8 (T, H, W, 3).
"""

import json
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..data import FitPolicy, Library, MediaItem, UnreadableMedia, scan, write_image, write_video
from ..data.frames import Frames
from ..data.media import shown
from ..evaluation import ClipQuality, TimestepLosses, frechet, loss_by_timestep
from ..evaluation.features import Features, sentence
from ..evaluation.reconstruction import length_of, reconstruct
from ..files import check_folder, replace, save_text
from ..models.weights import is_published
from ..training import checkpoint
from ..training.dit import Generator, load_run, policy_for
from ..training.latents import LatentClip, encode_library, held_out
from ..training.loop import pick_device
from ..training.progress import Progress
from ..training.vae import load_vae
from .eval_report import sheet, timestep_plot, vae_plot, write_report
from .generate import FPS, parse_size, sample
from .validate import load_function

SAMPLES_AT_ONCE = 16  # denoised in one pack


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


def run(arguments) -> int:
    a, out, device = arguments, Path(arguments.out), pick_device(arguments.device)
    for name, least in dict(files=0, frames=0, short_side=0, fps=0, strata=1, steps=1, feature_frames=1,
                            feature_batch=0).items():
        if getattr(a, name) < least:
            raise ValueError(f"eval: expected --{name.replace('_', '-')} of {least} or more, got {getattr(a, name):g}; see "
                             f"sora-fast eval --help")
    check_folder("--out", out)  # before any work, as a wrong name
    function = _features(a.features)
    kind, described = _description(a.model)
    training = described.get("training", {})
    library = _library(a, training)
    facts = dict(command=_command(a), model=f"{a.model} ({kind})",
                 media=f"{a.data or training.get('data')}, {len(library.items)} files",
                 machine=f"{platform.machine()}, device {device}, Python {platform.python_version()}, torch "
                         f"{torch.__version__}")
    found = Findings(kind, facts, skipped=[(shown(path), shown(why)) for path, why in library.skipped])
    out.mkdir(parents=True, exist_ok=True)
    evaluate = evaluate_vae if kind == "vae" else evaluate_dit
    evaluate(a, training, list(library.items), device, function, found, out)
    _print(found)
    save(out, found)
    plot = f"{out / 'eval.png'}" if found.plot else "no plot, since matplotlib is not installed,"
    print(f"wrote {out / 'eval.json'}, {plot} and {out / 'report.html'}")
    return 0


def save(out: Path, found: Findings) -> None:
    """eval.json (null: not defined, or infinite), eval.png where there is matplotlib, report.html."""
    figures = dict(kind=found.kind, **found.facts, **found.figures, notes=found.notes,
                   skipped=[dict(file=name, reason=why) for name, why in found.skipped])
    save_text(out / "eval.json", json.dumps(_finite(figures), indent=1, allow_nan=False))
    if found.plot:
        replace(out / "eval.png", lambda path: path.write_bytes(found.plot))
    write_report(out / "report.html", found)


def _command(a) -> str:
    """What makes these figures again, defaults included."""
    given = {name: value for name, value in vars(a).items() if name not in ("run", "model") and value not in (None, "")}
    words = [a.model]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            words += ([flag] if each else []) if isinstance(each, bool) else [flag, str(each)]
    return f"sora-fast eval {shlex.join(words)}"


def _finite(value):
    """``value`` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _features(name: str | None):
    if not name:
        return None
    try:
        return load_function(name)
    except (ValueError, ImportError) as error:
        raise type(error)(str(error).replace("--impl", "--features")) from error


def _description(model: str) -> tuple[str, dict]:
    """("vae" or "dit", config.json of the run); a published VAE has no description. Else one sentence, before any work."""
    folder = Path(model)
    if folder.is_file() or is_published(folder):
        return "vae", {}
    file = folder / "config.json"
    described = checkpoint.load_json(file) if file.is_file() else {}
    if described.get("kind") not in ("vae", "dit"):
        came = f"one of kind {described.get('kind')!r}" if described else (
            "no config.json there" if folder.is_dir() else "nothing there")
        raise FileNotFoundError(f"{model}: expected a run folder of sora-fast train-vae or train, or weights of Wan 2.1's "
                                f"VAE, got {came}; pass the folder given as --out")
    if not (folder / "vae.safetensors").is_file():
        checkpoint.newest(folder)  # or its sentence
    return described["kind"], described


def _library(a, training: dict) -> Library:
    """The media of --data; without it those that the run kept from its training."""
    folder = a.data or training.get("data")
    if not folder:
        raise ValueError("eval: expected --data FOLDER with clips or images, got none, and the model names none that it was "
                         "trained on; pass it")
    library = scan(folder, progress=sys.stderr.isatty())
    print(library.summary(), flush=True)
    items = library.items
    if not a.data:
        share, latents = training.get("heldout", 0.0), Path(a.model) / "latents.json"
        # A DiT's run chose among the files that it could encode.
        among = ([clip["source"] for clip in checkpoint.load_json(latents)] if latents.is_file()
                 else [str(item.path) for item in items])
        names = held_out(among, share)
        items = tuple(item for item in items if str(item.path) in names)
        if not items:
            raise ValueError(f"eval: expected files in {folder} that the run held out, got none ({share:.0%} of "
                             f"{len(library.items)}); pass --data FOLDER with what to judge it on")
        print(f"{len(items)} files that the run held out from training", flush=True)
    if a.files and len(items) > a.files:
        print(f"{a.files} of {len(items)} files, evenly spread; --files 0 takes all", flush=True)
        items = tuple(items[i * len(items) // a.files] for i in range(a.files))
    return Library(items, library.skipped, library.others)


# ------------------------------------------------------------------------------------------------ VAE
def evaluate_vae(a, training: dict, items: Sequence[MediaItem], device, function, found: Findings, out: Path) -> None:
    """Reconstruction, streamed: rounded to uint8 as a player shows it."""
    vae = load_vae(a.model, device)
    policy = FitPolicy(short_side=a.short_side or training.get("short_side", 256), fps=a.fps or training.get("fps") or None,
                       space_multiple=vae.config.space_factor, time_factor=vae.config.time_factor)
    frames = Frames(items, policy, memory_gb=0.0, progress=False)
    lengths = [length_of(vae, frames.frames(i), a.frames) for i in range(len(frames))]
    features = [Features(function, a.feature_batch) for _ in range(2)] if function else []
    total, done, rows, curves = ClipQuality(), 0, [], {}
    shown_frames = Progress("reconstruct", sum(lengths), 0)
    for index, length in enumerate(lengths):
        name, quality, pending, parts = str(frames.item(index).path), ClipQuality(), [], []
        try:
            for got, real in reconstruct(vae, frames, index, most=a.frames):
                quality.add(got, real)
                done += len(got)
                shown_frames.update(done, f"{shown(Path(name).name)}, {len(quality.errors):,} of {length:,} frames",
                                    last=done == sum(lengths))
                pending = _windows(features, pending, (got, real), a.feature_frames)
                if len(rows) < 3 and sum(len(p) for p in parts) < 33:  # for the report
                    parts.append(torch.cat([real, got], dim=2))
        except UnreadableMedia as error:
            found.skip(name, str(error))
            done += length - len(quality.errors)
            continue
        if pending and length < a.feature_frames:  # shorter than a window: all of it is one
            for each, clip in zip(features, map(torch.cat, zip(*pending, strict=True)), strict=True):
                each.add(clip)
        result, (height, width) = quality.result(), frames.size(index)
        total, curves[name] = total + quality, quality.frame_psnr
        rows.append(dict(file=name, lines=height, columns=width, **asdict(result), frame_psnr=quality.frame_psnr))
        found.table.append((shown(Path(name).name), f"{length} x {height} x {width}",
                            *_decibels(result, f" (frame {result.worst_frame})" if length > 1 else "")))
        if parts:
            found.pictures.append((f"{shown(Path(name).name)}: real, and reconstructed at {result.psnr:.2f} dB",
                                   torch.cat(parts)))
            found.fps = frames.fps(index) or found.fps
    shown_frames.close()
    if not rows:
        raise ValueError("eval: expected at least one file that can be read, got none; see the reasons above")
    result = total.result()
    found.heads = ("file", "frames x lines x columns", "PSNR, dB", "SSIM", "temporal PSNR, dB", "worst frame, dB")
    found.table.append(("all", f"{result.frames} frames", *_decibels(result)))
    found.figures = dict(clips=rows, all={k: v for k, v in asdict(result).items() if k != "worst_frame"})
    found.notes.append("All: PSNR of the error over all numbers, SSIM over all frames. Temporal PSNR: of the differences of "
                       "neighbouring frames. Frames are rounded to 8 bits.")
    found.plot = vae_plot(curves)
    if function:
        _distance(features[1].values(), features[0].values(), found)


def _windows(features: list[Features], pending: list, parts: tuple, length: int) -> list:
    """Hand full windows of ``length`` frames to ``features`` (of what was made, of the real ones); what is left over."""
    if not features:
        return []
    pending = [*pending, parts]
    while sum(len(got) for got, _ in pending) >= length:
        both = [torch.cat(each) for each in zip(*pending, strict=True)]
        for each, clip in zip(features, both, strict=True):
            each.add(clip[:length])
        pending = [tuple(clip[length:] for clip in both)] if len(both[0]) > length else []
    return pending


def _decibels(quality, where: str = "") -> tuple[str, ...]:
    number = lambda value, digits: "-" if math.isnan(value) else f"{value:.{digits}f}"
    return (number(quality.psnr, 2), number(quality.ssim, 4), number(quality.temporal_psnr, 2),
            number(quality.worst_psnr, 2) + where)


# ------------------------------------------------------------------------------------------------ DiT
def evaluate_dit(a, training: dict, items: Sequence[MediaItem], device, function, found: Findings, out: Path) -> None:
    """Loss over timesteps, a sheet of samples, and a Frechet distance where there is a function of features."""
    made = load_run(a.model, device)
    policy, clips = policy_for(made.training, made.vae, made.dit.config.patch), []
    shown_files = Progress("latents", len(items), 0)
    kept = {}
    for number, item in enumerate(items):
        try:
            clips += encode_library(made.vae, [item], policy, windows=made.training.windows, progress=False)
            kept[str(item.path)] = item
        except UnreadableMedia as error:
            found.skip(str(item.path), str(error))
        shown_files.update(number + 1, shown(item.path.name), last=number + 1 == len(items))
    shown_files.close()
    if not clips:
        raise ValueError("eval: expected at least one file that can be read, got none; see the reasons above")
    losses = _losses(made, clips, a)
    _tell_losses(losses, clips, found)
    sheet_of_samples(a, made, clips, found, out)
    if function:
        real, generated = _generated_features(a, made, clips, kept, policy, function)
        _distance(real, generated, found)


def _losses(made: Generator, clips: Sequence[LatentClip], a) -> TimestepLosses:
    bar: list[Progress] = []

    def progress(done: int, many: int) -> None:
        bar[:] = bar or [Progress("loss", many, 0)]
        bar[0].update(done, f"pack {1 + (done - 1) // a.strata}, stratum {1 + (done - 1) % a.strata} of {a.strata}",
                      last=done == many)

    losses = loss_by_timestep(made.dit, made.text_encoder, made.objective, clips, strata=a.strata, seed=a.seed,
                              progress=progress)
    bar[0].close()
    return losses


def _tell_losses(losses: TimestepLosses, clips: Sequence[LatentClip], found: Findings) -> None:
    edges, by_clip = losses.edges, losses.by_clip.tolist()
    found.heads = ("timesteps", "loss", "lowest clip", "highest clip")
    for b, value in enumerate(losses.by_timestep.tolist()):
        row = losses.losses[b]
        found.table.append((f"{edges[b]:g} to {edges[b + 1]:g}", f"{value:.4f}", f"{row.min():.4f}", f"{row.max():.4f}"))
    found.table.append(("all", f"{losses.mean:.4f}", f"{min(by_clip):.4f}", f"{max(by_clip):.4f}"))
    found.figures = dict(
        loss=losses.mean, edges=edges, by_timestep=losses.by_timestep.tolist(),
        clips=[dict(clip=clip.name, caption=clip.caption, loss=loss, by_timestep=losses.losses[:, k].tolist(),
                    timesteps=losses.timesteps[:, k].tolist()) for k, (clip, loss) in enumerate(zip(clips, by_clip,
                                                                                                  strict=True))])
    found.notes.append(f"Loss of the averaged weights on {len(clips)} windows, each at one timestep of every stratum; noise "
                       f"and timesteps depend on --seed and the window's number alone. 0 is clean, 1000 noise.")
    found.plot = timestep_plot(losses)


def sheet_of_samples(a, made: Generator, clips: Sequence[LatentClip], found: Findings, out: Path) -> None:
    """sheet.png (the middle frames) and sheet.mp4 or .gif: prompts from top to bottom, sizes from left to right."""
    prompts = list(a.prompt or dict.fromkeys(clip.caption for clip in clips))[: None if a.prompt else 3]
    patch = made.dit.config.patch
    if a.size:
        sizes = [parse_size(text, made.vae, patch) for text in a.size]
    else:
        f = made.vae.config.space_factor
        own = max(clips, key=lambda clip: clip.frames)
        sizes = list(dict.fromkeys((frames, *(f * n for n in own.latent.shape[2:])) for frames in (own.frames, 1)))
    pairs = [(prompt, size) for prompt in prompts for size in sizes]
    made_clips = _sample(made, pairs, a)
    rows = [made_clips[i * len(sizes) : (i + 1) * len(sizes)] for i in range(len(prompts))]
    grid, fps = sheet(rows), made.training.fps or clips[0].fps or FPS
    files = [write_image(out / "sheet.png", sheet([[clip[len(clip) // 2][None] for clip in row] for row in rows])[0])]
    if len(grid) > 1:
        files.append(write_video(out / ("sheet.gif" if a.gif else "sheet.mp4"), grid, fps))
    columns = ", ".join("x".join(map(str, size)) for size in sizes)
    found.notes.append(f"Samples: {a.steps} steps, guidance {a.guidance:g}. Rows: {'; '.join(map(repr, prompts))}. Columns: "
                       f"{columns}.")
    found.figures["samples"] = dict(prompts=prompts, sizes=sizes, steps=a.steps, guidance=a.guidance, seed=a.seed,
                                    files=[file.name for file in files])
    found.fps = fps
    found.pictures.append((found.notes[-1], grid))


def _sample(made: Generator, pairs: Sequence[tuple[str, tuple[int, int, int]]], a) -> list[torch.Tensor]:
    """A clip for each (caption, size); each has a seed of its own, so that packs change nothing."""
    clips = []
    for start in range(0, len(pairs), SAMPLES_AT_ONCE):
        some = pairs[start : start + SAMPLES_AT_ONCE]
        clips += sample(made, [prompt for prompt, _ in some], [size for _, size in some], steps=a.steps,
                        guidance=a.guidance, seed=a.seed + start)
    return clips


def _generated_features(a, made: Generator, clips: Sequence[LatentClip], items: dict[str, MediaItem], policy: FitPolicy,
                        function) -> tuple[torch.Tensor, torch.Tensor]:
    """(of real windows, of one sample each of the same caption and size)."""
    real, generated = Features(function, a.feature_batch), Features(function, a.feature_batch)
    f = made.vae.config.space_factor
    for start in range(0, len(clips), SAMPLES_AT_ONCE):
        some = clips[start : start + SAMPLES_AT_ONCE]
        sizes = [(clip.frames, *(f * n for n in clip.latent.shape[2:])) for clip in some]
        for clip in sample(made, [clip.caption for clip in some], sizes, steps=a.steps, guidance=a.guidance,
                           seed=a.seed + start):
            generated.add(clip)
        for clip in some:
            frames = Frames([items[clip.source]], policy, memory_gb=0.0, progress=False)
            real.add(frames.window(0, clip.start, clip.frames))
        print(f"features: {min(start + SAMPLES_AT_ONCE, len(clips)):,} of {len(clips):,} samples", flush=True)
    return real.values(), generated.values()


def _distance(real: torch.Tensor, got: torch.Tensor, found: Findings) -> None:
    if min(len(real), len(got)) < 2:
        found.notes.append("No Frechet distance: it needs two samples or more; give more media, or fewer --feature-frames.")
        return
    distance = frechet(got, real)
    found.figures["frechet"] = dict(distance=distance, samples=len(got), real_samples=len(real), dimensions=real.shape[1])
    found.notes.append(sentence(len(got), len(real), real.shape[1], distance))


def _print(found: Findings) -> None:
    rows = [found.heads, *found.table]
    widths = [max(len(row[i]) for row in rows) for i in range(len(found.heads))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths, strict=True))))
    print("\n".join(found.notes))
    if found.skipped:
        print(f"{len(found.skipped)} files were skipped; eval.json and the report name them")
