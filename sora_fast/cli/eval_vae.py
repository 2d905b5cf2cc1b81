"""sora-fast eval of a VAE. Clips are uint8 (T, H, W, 3)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..data import FitPolicy, MediaItem, UnreadableMedia
from ..data.frames import Frames
from ..data.media import shown
from ..evaluation import ClipQuality
from ..evaluation.features import Features
from ..evaluation.reconstruction import length_of, reconstruct
from ..progress import Progress
from ..training.vae import load_vae
from .demo_report import side_by_side
from .eval_report import Findings, vae_plot


def evaluate(a, training: dict, items: Sequence[MediaItem], device, function, found: Findings, out: Path) -> None:
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
                    parts.append(side_by_side(real, got))
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
        found.distance(features[1].values(), features[0].values())


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
