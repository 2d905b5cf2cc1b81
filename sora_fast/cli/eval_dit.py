"""sora-fast eval of a DiT. Clips are uint8 (T, H, W, 3)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..data import FitPolicy, MediaItem, UnreadableMedia, write_image, write_video
from ..data.frames import Frames
from ..data.media import shown
from ..evaluation import TimestepLosses, loss_by_timestep
from ..evaluation.features import Features
from ..named import parse_size
from ..progress import Progress
from ..training.dit import FPS, Generator, load_run, policy_for, sample
from ..training.latents import LatentClip, encode_library
from .eval_report import Findings, sheet, timestep_plot

SAMPLES_AT_ONCE = 16  # denoised in one pack


def evaluate(a, training: dict, items: Sequence[MediaItem], device, function, found: Findings, out: Path) -> None:
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
        found.distance(real, generated)


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
