"""What sora-fast demo does: the whole system on real clips and photos, in minutes on a CPU.

T frames, H height, W width.
"""

import copy
import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
import torch.nn.functional as F

from ..data import FitPolicy, MediaItem, demo_media, read_clip, to_pixels, to_uint8, write_image, write_video
from ..data.frames import Frames
from ..diffusion import MediaPrompt
from ..evaluation import psnr, ssim
from ..files import save_text
from ..models import VideoVAE
from ..named import pick_device
from ..progress import bar
from ..training import dit as dit_task
from ..training import memory
from ..training import vae as vae_task
from ..training.config import DiTTraining, VAETraining
from ..training.dit import sample
from ..training.latents import LatentClip, save_library
from ..training.loop import Trainer
from ..training.throughput import pick_precision
from .demo_plan import Plan, plan, seconds_per_step
from .demo_report import side_by_side, write_report

FPS = 12.5
TRAIN_SPAN = (0.0, 0.8)  # of each clip, for both trainings; the rest is only ever looked at
FRAMES = 9
SHORT_SIDE = 128  # of what the VAE is trained and judged on
DIT_SIDES = dict(clip=80, image=96)  # short sides of what the DiT learns: few tokens, so that few minutes teach it
SAMPLING_STEPS = 10

# The windows that the DiT learns by caption: file, start in seconds (None: an image), caption.
WINDOWS = (
    ("bigbuckbunny.mp4", 0.4, "a grey rabbit crawls out of a burrow"),
    ("bigbuckbunny.mp4", 2.6, "a big rabbit stretches an arm"),
    ("carphone_pristine.mp4", 0.6, "a man in a suit talks in a car"),
    ("astronaut.png", None, "a smiling astronaut in an orange suit"),
    ("chelsea.png", None, "the face of a tabby cat"),
    ("coffee.png", None, "a red cup of coffee on a wooden table"),
    ("rocket.jpg", None, "a white rocket at dusk"),
    ("color.png", None, "a colour wheel on black"),
)
# Sizes that no training sample has: another aspect ratio, a still of a clip, a wider frame.
NEW_SIZES = (
    (1, (1, 80, 128), "a clip's caption as an image"),
    (2, (5, 80, 80), "a shorter clip in another shape"),
    (3, (1, 112, 96), "a photo in another shape"),
)

# Images and clips as prompts: what is shown, the window of the caption, the sample's frames (None: the window's own), and
# what is given of the real windows.
PROMPTED = (
    ("image to video", 2, None, lambda real, f: MediaPrompt.after(real[2][:1], f)),
    ("extension forward", 0, None, lambda real, f: MediaPrompt.after(real[0][: 1 + f], f)),
    ("extension backward", 1, None, lambda real, f: MediaPrompt.before(real[1][-f:], f)),
    ("loop", 1, None, lambda real, f: MediaPrompt.loop(real[1][: 1 + f], f)),
    ("interpolation", 1, 13, lambda real, f: MediaPrompt.between(real[0][-1 - f :], real[1][:f], f)),
    ("SDEdit, strength 0.4", 7, None, lambda real, f: MediaPrompt.edit(real[5], 0.4)),
)


class Stopwatch:
    """Seconds of each stage, in order."""

    def __init__(self):
        self.stages: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def stage(self, name: str):
        print(f"[{self.total() / 60:4.1f} min] {name}", flush=True)
        begin = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - begin

    def total(self) -> float:
        return time.perf_counter() - self.start


@dataclass(frozen=True)
class Reconstruction:
    """One clip never seen in training: real, decoded and baseline frames uint8 (T, H, W, 3), and their figures in dB."""

    name: str
    real: torch.Tensor
    decoded: torch.Tensor
    baseline: torch.Tensor
    psnr: float
    ssim: float
    baseline_psnr: float
    baseline_ssim: float
    start_psnr: float  # of the VAE before its first step, its linear path alone


@dataclass(frozen=True)
class Sample:
    """A generated clip beside the real one it was trained on (None for sizes that were never trained), or, for a
    ``MediaPrompt``, the given frames at its beginning and end; for an edit the real one is what was edited."""

    caption: str
    note: str
    generated: torch.Tensor
    real: torch.Tensor | None
    file: str
    given: tuple[int, int] | None = None


def demo(arguments, out: Path) -> int:
    watch = Stopwatch()
    torch.manual_seed(arguments.seed)
    threads = arguments.threads or fastest_threads()
    torch.set_num_threads(threads)
    precision = pick_precision("auto", pick_device(arguments.device))
    common = dict(seed=arguments.seed, device=arguments.device, threads=threads, precision=precision, tensorboard=False,
                  save_every=10**9)
    vae_config = VAETraining(out=str(out / "vae"), short_side=SHORT_SIDE, fps=FPS, warmup=15, **common)
    # Found by trying, for a few hundred steps: clean patches as the prediction, most steps near the noisy end. No sample is
    # guided, so none is trained without its caption.
    dit_config = DiTTraining(out=str(out / "dit"), vae=str(out / "vae"), preset="nano", lr=4e-3, warmup=15, ema=0.97,
                             prediction="x0", shift="8", condition_dropout=0.0, fps=FPS, frames=FRAMES, budget=640,
                             look_ahead=32, **common)

    with watch.stage("find the clips and photos"):
        items = demo_media()
        clips, photos = [i for i in items if i.kind == "clip"], [i for i in items if i.kind == "image"]
        print(f"  {len(clips)} clips, {len(photos)} photos; {threads} CPU threads; {precision}; everything "
              f"goes to {out}")
    with watch.stage("measure this machine"):
        windows = [(caption, size) for _, _, caption, size in windows_of(items)]
        speed = seconds_per_step(vae_config, dit_config, windows)
        steps = plan(*speed, arguments.minutes, arguments.vae_steps, arguments.dit_steps)
        print(f"  a step of the VAE takes {speed[0]:.2f} s, of the DiT {speed[1]:.2f} s\n  {steps.sentence()}")
    with watch.stage("train the VAE"):
        trainer = vae_task.make_trainer(replace(vae_config, steps=steps.vae_steps), items, span=TRAIN_SPAN)
        print("  " + memory.estimate(trainer))
        before = copy.deepcopy(trainer.modules["vae"]).eval()
        trainer.run()
        vae, vae_losses, vae_steps = vae_task.finish(trainer), trainer.rows, trainer.step
    with watch.stage("reconstruct frames never seen in training"):
        reconstructions = reconstruct(vae, before, clips)
        for r in reconstructions:
            print(f"  {r.name}: {r.real.shape[1]} x {r.real.shape[2]}, PSNR {r.psnr:.2f} dB, SSIM {r.ssim:.3f}; averaged "
                  f"4x8x8 and interpolated back {r.baseline_psnr:.2f} dB, {r.baseline_ssim:.3f}: "
                  f"{r.psnr - r.baseline_psnr:+.2f} dB (before training {r.start_psnr:.2f} dB)")
            write_video(out / "reconstructions" / f"{Path(r.name).stem}.mp4", side_by_side(r.real, r.decoded), FPS)
    with watch.stage("encode the latents"):
        latents, real = encode_windows(vae, items)
        save_library(out / "latents", latents)
        print(f"  {len(latents)} latents, {sum(c.latent[0].numel() // 4 for c in latents):,} tokens")
    with watch.stage("train the DiT on packs of clips and images"):
        trainer = dit_task.make_trainer(replace(dit_config, steps=steps.dit_steps), vae, latents)
        print("  " + memory.estimate(trainer))
        trainer.run()
    with watch.stage("generate"):
        found = dit_task.load_run(str(out / "dit"), pick_device(arguments.device))
        samples = generate_all(found, latents, real, out, arguments)
    with watch.stage("generate from images and clips"):
        prompted = generate_prompted(found, real, out, arguments)
    report = write_report(out, reconstructions=reconstructions, samples=samples, prompted=prompted, stages=watch.stages,
                          losses={f"VAE, {vae_steps:,} of {steps.vae_steps:,} planned steps": vae_losses,
                                  f"DiT, {trainer.step:,} of {steps.dit_steps:,} planned steps": trainer.rows},
                          facts=facts(arguments, steps, threads, vae, trainer), device=trainer.device.type,
                          dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    save_figures(out, reconstructions, samples, watch)
    print(f"[{watch.total() / 60:4.1f} min] done: open {report}")
    return 0


def fastest_threads() -> int:
    """All cores, unless something else is using them: a thread that waits for a busy core slows all others down."""
    most, times = torch.get_num_threads(), {}
    x, w = torch.randn(2, 64, 9, 32, 32), torch.randn(64, 64, 3, 3, 3)
    for threads in {1, most}:
        torch.set_num_threads(threads)
        F.conv3d(x, w)
        start = time.perf_counter()
        for _ in range(5):
            F.conv3d(x, w)
        times[threads] = time.perf_counter() - start
    return min(times, key=times.get)


@torch.no_grad()
def reconstruct(vae: VideoVAE, before: VideoVAE, clips: list[MediaItem]) -> list[Reconstruction]:
    """The held-out end of each clip through the VAE, and averaged down to the latent's size and interpolated back."""
    f, step = vae.config.space_factor, vae.config.time_factor
    frames = Frames(clips, FitPolicy(short_side=SHORT_SIDE, fps=FPS, space_multiple=f, time_factor=step),
                    span=(TRAIN_SPAN[1], 1.0), progress=False)
    results = []
    for index in bar(range(len(frames)), "reconstruct"):
        length = (frames.frames(index) - 1) // step * step + 1
        real = frames.window(index, 0, length)
        video = to_pixels(real)[None]
        decoded, start = (torch.cat(list(v.decode_stream(v.encode_stream(video))), dim=2) for v in (vae, before))
        baseline = average_and_interpolate(video, step, f)
        figures = [quality(to_uint8(v[0]), real) for v in (decoded, baseline, start)]
        results.append(Reconstruction(frames.item(index).path.name, real, to_uint8(decoded[0]), to_uint8(baseline[0]),
                                      *figures[0], *figures[1], figures[2][0]))
    return results


def average_and_interpolate(video, step: int, f: int):
    """What a latent of that size holds without learning: the first frame alone, then groups of ``step`` frames,
    averaged over ``f`` x ``f`` pixels, and trilinear interpolation back."""
    first, rest = video[:, :, :1], video[:, :, 1:]
    first = F.interpolate(F.avg_pool3d(first, (1, f, f)), size=first.shape[2:], mode="trilinear")
    if rest.shape[2] == 0:
        return first
    rest = F.interpolate(F.avg_pool3d(rest, (step, f, f)), size=rest.shape[2:], mode="trilinear")
    return torch.cat([first, rest], dim=2)


def quality(got_THWC: torch.Tensor, real_THWC: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB over the whole clip, and SSIM averaged over frames, of uint8 clips."""
    return psnr(got_THWC, real_THWC), float(ssim(got_THWC, real_THWC).mean())


def windows_of(items: list[MediaItem]) -> list[tuple[MediaItem, float, str, tuple[int, int, int]]]:
    """Item, start in seconds, caption and size (T, H, W) of each of WINDOWS."""
    by_name, found = {item.path.name: item for item in items}, []
    for name, start, caption in WINDOWS:
        item = by_name[name]
        policy = FitPolicy(short_side=DIT_SIDES[item.kind], fps=FPS, max_frames=FRAMES, space_multiple=16, time_factor=4)
        found.append((item, start or 0.0, caption, policy.fit_item(item)))
    return found


@torch.no_grad()
def encode_windows(vae: VideoVAE, items: list[MediaItem]) -> tuple[list[LatentClip], list[torch.Tensor]]:
    """Latents of WINDOWS and the real frames beside them."""
    latents, real, device = [], [], vae.latent_mean.device
    for item, start, caption, (frames, height, width) in windows_of(items):
        clip = read_clip(item, frames=frames, start=start, fps=FitPolicy(fps=FPS).read_fps(item.fps), size=(height, width))
        latent = vae.encode(to_pixels(clip)[None].to(device))[0].cpu()
        latents.append(LatentClip(latent, caption, item.path.name, 0, frames, FPS))
        real.append(clip)
    return latents, real


def generate_all(found: dit_task.Generator, latents, real, out: Path, arguments) -> list[Sample]:
    """Every caption at its own size, and a few at sizes that were never trained, in two packs."""
    captions = [clip.caption for clip in latents]
    sizes = [tuple(clip.shape[:3]) for clip in real]
    common = dict(steps=SAMPLING_STEPS, guidance=1.0)
    own = sample(found, captions, sizes, seed=arguments.seed, **common)
    new = sample(found, [captions[i] for i, _, _ in NEW_SIZES], [size for _, size, _ in NEW_SIZES],
                 seed=arguments.seed + len(own), **common)
    rows = [(caption, "trained size", made, true) for caption, made, true in zip(captions, own, real, strict=True)]
    rows += [(captions[i], note, made, None) for (i, _, note), made in zip(NEW_SIZES, new, strict=True)]
    samples = []
    for index, (caption, note, made, true) in enumerate(rows):
        name = f"{index:02d}-{'-'.join(caption.split()[1:4])}"
        shown = made if true is None else side_by_side(true, made)
        samples.append(Sample(caption, note, made, true, _save(out, name, shown, made, f"{caption!r}, {note}")))
    return samples


def generate_prompted(found: dit_task.Generator, real, out: Path, arguments) -> list[Sample]:
    """Every way of prompting with images and clips, in one pack."""
    step = found.vae.config.time_factor
    media = [given(real, step) for *_, given in PROMPTED]
    captions = [WINDOWS[window][2] for _, window, _, _ in PROMPTED]
    pictures = [(m.source if m.source is not None else real[window]).shape[:3] for m, (_, window, _, _) in
                zip(media, PROMPTED, strict=True)]
    sizes = [(frames or own[0], *own[1:]) for own, (_, _, frames, _) in zip(pictures, PROMPTED, strict=True)]
    made = sample(found, captions, sizes, steps=SAMPLING_STEPS, guidance=1.0, seed=arguments.seed + 100, media=media)
    samples = []
    for (note, *_), caption, clip, m in zip(PROMPTED, captions, made, media, strict=True):
        for seam in m.seams(clip, step):
            own = "" if seam.largest is None else f", {seam.largest:.1f} at most between real ones"
            note += f"; {seam.place} neighbouring frames differ by {seam.jump:.1f} of 255{own}"
        begin, end = m.given(step)
        shown = clip if m.source is None else side_by_side(m.source, clip)
        name = f"{note.split(';')[0].split(',')[0].replace(' ', '-')}"
        samples.append(Sample(caption, note, clip, m.source, _save(out, name, shown, clip, f"{caption!r}, {note}"),
                              (begin, 0 if m.cut else end)))
    return samples


def _save(out: Path, name: str, shown, made, note: str) -> str:
    """Write ``shown`` as samples/name.mp4 or .png, tell it, and return the file's name."""
    path = out / "samples" / name
    if made.shape[0] == 1:
        file = write_image(path.with_suffix(".png"), shown[0])
    else:
        file = write_video(path.with_suffix(".mp4"), shown, FPS)
    print(f"  {file}: {'x'.join(map(str, made.shape[:3]))}, {note}")
    return file.name


def facts(arguments, steps: Plan, threads: int, vae: VideoVAE, trainer: Trainer) -> dict[str, str]:
    """What the report says about where and how it was made."""
    millions = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"
    return {
        "command": f"sora-fast demo --out {quote(arguments.out)} --vae-steps {steps.vae_steps} --dit-steps "
                   f"{steps.dit_steps} --seed {arguments.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {threads} threads, Python "
                   f"{platform.python_version()}, torch {torch.__version__}, device {trainer.device}, "
                   f"{trainer.config.precision}",
        "VAE": f"preset tiny, {millions(vae)}, {vae.config.time_factor} x {vae.config.space_factor} x "
               f"{vae.config.space_factor}, {vae.config.latent_channels} channels",
        "DiT": f"preset nano with byte-level text encoder, {millions(trainer.modules)}; {trainer.samples:,} samples, "
               f"{trainer.tokens:,} tokens, {trainer.pad / (trainer.tokens + trainer.pad):.1%} of the packs empty",
    }


def save_figures(out: Path, reconstructions: list[Reconstruction], samples: list[Sample], watch: Stopwatch) -> None:
    """The printed figures, and each sample's beside its clip, as JSON, for whoever compares runs."""
    rows = [dict(clip=r.name, frames=r.real.shape[0], height=r.real.shape[1], width=r.real.shape[2], psnr=r.psnr,
                 ssim=r.ssim, baseline_psnr=r.baseline_psnr, baseline_ssim=r.baseline_ssim,
                 start_psnr=r.start_psnr) for r in reconstructions]
    made = [dict(file=s.file, caption=s.caption, source=source, psnr=psnr(s.generated, s.real))
            for s, (source, *_) in zip(samples, WINDOWS, strict=False)]
    save_text(out / "figures.json", json.dumps(dict(reconstructions=rows, samples=made, seconds=watch.stages), indent=1))
