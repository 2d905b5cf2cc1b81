"""Training a VideoVAE on crops of clips and images.

B batch, T frames, H height, W width.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote

import torch

from .. import models
from ..data import FitPolicy, MediaItem, UnreadableMedia, to_pixels
from ..data.frames import Frames
from ..models import VAEConfig, VideoVAE
from ..models.vae import PRESETS
from ..models.weights import is_published
from ..named import load_function
from ..progress import bar
from ..to_device import to_device
from . import checkpoint, distributed
from .config import VAETraining
from .latents import held_out
from .loop import Trainer, check_start
from .vae_loss import Perceptual, VAELoss, count_together, modules_of, restart_codes

RESTART_EVERY = 100  # steps between restarts of unused codes; at the first, the codebook starts from data


@dataclass(frozen=True)
class Crop:
    """Where a crop is: item, first frame, line, column; ``mirrored`` from left to right."""

    item: int
    start: int = 0
    top: int = 0
    left: int = 0
    mirrored: bool = False


@dataclass(frozen=True)
class CropPlan:
    """The batch of running number ``number``: crops of ``frames`` frames."""

    number: int
    frames: int
    crops: tuple[Crop, ...]

    @property
    def keys(self) -> list[str]:
        return [f"{c.item}:{c.start}:{c.top}:{c.left}:{int(c.mirrored)}" for c in self.crops]


@dataclass(frozen=True)
class Crops:
    """A batch: video (B, 3, T, H, W) in [-1, 1], posterior noise like its latents (None: not drawn), names for people, and
    its running number (None: of no step of the training)."""

    video: torch.Tensor
    names: tuple[str, ...]
    noise: torch.Tensor | None = None
    number: int | None = None

    @property
    def learned(self) -> int:
        """Elements of the pixels: a batch weighs by them, so that a frame counts the same in a clip and as an image."""
        return self.video.numel()

    def only(self, index: int) -> "Crops":
        part = slice(index, index + 1)
        return replace(self, video=self.video[part], names=self.names[part], noise=self.noise[part])


class CropBatches:
    """Random crops: a batch of clip crops, or (``image_share``) of single frames; mirrored half the time.

    Batch n depends on (seed, n) alone, so the state is a count.
    """

    def __init__(self, frames: Frames, config: VAETraining):
        self.frames, self.config, self.number = frames, config, 0
        crop = config.crop
        # Small frames are turned away, which summary() tells: an enlarged crop would teach a blurred picture.
        self.usable = [i for i in range(len(frames)) if min(frames.size(i)) >= crop]
        self.clips = [i for i in self.usable if frames.frames(i) >= config.frames]
        if not self.usable:
            raise ValueError(f"train-vae: expected media of at least {crop} x {crop} pixels, got none; lower --crop or "
                             f"raise --short-side")

    def summary(self) -> str:
        """One line: what crops are cut from, and what is left out."""
        c, small = self.config, len(self.frames) - len(self.usable)
        only = "" if self.clips else f"; no clip has {c.frames} frames, so the VAE learns single frames only"
        return (f"crops of {c.crop} x {c.crop} from {len(self.usable)} items, {len(self.clips)} of them clips of "
                f"{c.frames} frames or more; {small} smaller items left out{only}")

    def plan(self, number: int) -> CropPlan:
        """Batch ``number``; numbers below 0 are other batches than those of the training."""
        c, generator = self.config, checkpoint.generator(self.config.seed, "crops", number)
        draw = lambda: float(torch.rand(1, generator=generator, dtype=torch.float32, device="cpu"))
        as_images = not self.clips or draw() < c.image_share
        count, length = (c.images, 1) if as_images else (c.clips, c.frames)
        items = self.usable if as_images else self.clips
        crops = [self._draw(items, length, generator) for _ in range(count)]
        return CropPlan(number, length, tuple(crops))

    def next(self) -> CropPlan:
        self.number += 1
        return self.plan(self.number - 1)

    def load(self, plan: CropPlan) -> Crops:
        size, videos, names = self.config.crop, [], []
        for index, crop in enumerate(plan.crops):
            crop, window = self._read(crop, plan, index)
            video = to_pixels(window[:, crop.top : crop.top + size, crop.left : crop.left + size])
            videos.append(video.flip(-1) if crop.mirrored else video)
            names.append(f"{self.frames.item(crop.item).path}, frames {crop.start} to {crop.start + plan.frames - 1}, line "
                         f"{crop.top}, column {crop.left}")
        return Crops(torch.stack(videos), tuple(names), number=plan.number)

    def _read(self, crop: Crop, plan: CropPlan, index: int) -> tuple[Crop, torch.Tensor]:
        """A crop and its frames; of a file that is damaged there, another one, the same in every run."""
        generator = checkpoint.generator(self.config.seed, "instead", plan.number, index)
        for _ in range(20):
            try:
                return crop, self.frames.window(crop.item, crop.start, plan.frames)
            except UnreadableMedia as error:
                warnings.warn(f"another crop is taken: {error}", stacklevel=2)
                crop = self._draw(self.usable if plan.frames == 1 else self.clips, plan.frames, generator)
        return crop, self.frames.window(crop.item, crop.start, plan.frames)

    def _draw(self, items: Sequence[int], length: int, generator) -> Crop:
        """A crop of ``length`` frames of one of ``items``."""
        below = lambda limit: int(torch.randint(limit, (1,), generator=generator, device="cpu"))
        item = items[below(len(items))]
        start = below(self.frames.frames(item) - length + 1)
        top, left = (below(size - self.config.crop + 1) for size in self.frames.size(item))
        return Crop(item, start, top, left, bool(below(2)))

    def held_out(self, most: int = 8) -> Crops:
        """The middle of the first frames of at most ``most`` clips, or of the first frame where there is no clip."""
        places = (self.clips or self.usable)[:most]
        middle = lambda size: (size - self.config.crop) // 2
        crops = tuple(Crop(i, 0, *map(middle, self.frames.size(i))) for i in places)
        return replace(self.load(CropPlan(0, self.config.frames if self.clips else 1, crops)), number=None)

    def probe(self, copies: int) -> tuple[Crops, float]:
        """A batch of ``copies`` crops, and how many crops the largest batch holds."""
        c = self.config
        clips = bool(self.clips) and c.clips * c.frames >= c.images
        video = torch.zeros(copies, 3, c.frames if clips else 1, c.crop, c.crop, dtype=torch.float32, device="cpu")
        return Crops(video, ("",) * copies), float(c.clips if clips else c.images)

    def state_dict(self) -> dict:
        return dict(number=self.number)

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"]


def check_sizes(config: VAETraining) -> None:
    """One sentence for a crop that the preset's VAE does not take; before any media are read."""
    f, step = PRESETS[config.preset].space_factor, PRESETS[config.preset].time_factor
    if config.crop % f or (config.frames - 1) % step:
        raise ValueError(f"train-vae: expected --crop a multiple of {f} and --frames 1 + {step} k, got {config.crop} and "
                         f"{config.frames}; for example {f * 8} and {1 + 2 * step}")


def make_trainer(config: VAETraining, items: Sequence[MediaItem], *, span: tuple[float, float] = (0.0, 1.0),
                 perceptual: Perceptual | None = None) -> Trainer:
    """A Trainer for a new VideoVAE on ``items``; ``span`` is the part of each clip it may see.

    ``perceptual``: as in VAELoss; None: what config.perceptual names.
    """
    check_start(config)
    check_sizes(config)
    if perceptual is None and config.perceptual:
        perceptual = load_function(config.perceptual, "--perceptual")
    device = distributed.own_device(config.device)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    vq = dict(regularisation="vq", codes=config.codes) if config.regularisation == "vq" else {}
    if vq and config.parallel == "fsdp" and distributed.size() > 1:
        raise ValueError("--regularisation vq: expected --parallel ddp with several processes, got fsdp, which leaves no "
                         "rank a whole codebook; leave --parallel out")
    vae = VideoVAE.preset(config.preset, **vq)
    modules = modules_of(vae, config.adversarial).to(device)
    f, step = vae.config.space_factor, vae.config.time_factor
    policy = FitPolicy(short_side=config.short_side, fps=config.fps or None, space_multiple=f, time_factor=step)
    frames = partial(Frames, policy=policy, span=span, memory_gb=config.memory_gb, progress=distributed.first())
    held_names = held_out([str(item.path) for item in items], config.heldout)
    batches = CropBatches(frames([item for item in items if str(item.path) not in held_names]), config)
    if vae.linear_path is not None and not config.resume:
        vae.linear_path.start(batches.load(batches.plan(-1 - i)).video.to(device) for i in range(200))

    def draw(crops: Crops, generator) -> Crops:
        shape = (len(crops.names), *vae.latent_shape(*crops.video.shape[2:]))
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return replace(crops, noise=noise)

    measure = VAELoss(modules, reconstruction=config.reconstruction, kl=config.kl, perceptual=perceptual,
                      perceptual_weight=config.perceptual_weight, adversarial=config.adversarial)

    def loss(crops: Crops):
        video, step = to_device(crops.video, device), None
        if crops.number is not None:
            step, place = divmod(crops.number, trainer.packs_per_step)
        if vq and step is not None and step % RESTART_EVERY == 0 and place < distributed.size():
            restart_codes(vae, video, checkpoint.generator(config.seed, "codes", step))
        before = vae.quantizer.counts.clone() if vq else None
        value = measure(video, to_device(crops.noise, device), step is None or step >= config.adversarial_start)
        if vq and vae.training:
            count_together(vae.quantizer, before)
        return value, dict(samples=video.shape[0], tokens=crops.noise[:, 0].numel(), pad=0)

    held = [item for item in items if str(item.path) in held_names]
    large = [i for i in held if min(policy.fit_item(i)[1:]) >= config.crop]
    kept = [("loss", draw(CropBatches(frames(large), config).held_out(), checkpoint.generator(config.seed, "held out")))
            ] if large else []
    description = dict(kind="vae", vae=asdict(vae.config))
    trainer = Trainer(config, modules, batches, draw, loss, description, held_out=(lambda: kept) if kept else None)
    keep_list(config, items)
    return trainer


def keep_list(config: VAETraining, items: Sequence[MediaItem]) -> None:
    """Write the run's media.json, the files it trains on; on resume say first which came, went or changed since."""
    file, root = Path(config.out) / "media.json", Path(config.data or ".")
    name = lambda path: str(path.relative_to(root) if path.is_relative_to(root) else path)
    now = {name(item.path): [item.frames, item.height, item.width] for item in items}
    if config.resume and not file.is_file():
        print(f"{config.out} has no media.json, since an older version began it: whether files were added or removed since "
              f"its last checkpoint is not known", flush=True)
    elif config.resume:
        before = checkpoint.load_json(file)
        changed = [each for each in now if before.get(each, now[each]) != now[each]]
        lists = dict(added=now.keys() - before.keys(), removed=before.keys() - now.keys(), changed=changed)
        told = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
                for what, names in lists.items() if names]
        learned = sorted(held_out(before, config.heldout) & now.keys() - held_out(now, config.heldout))
        if told:
            print(f"--resume: the files are not those that {config.out} was trained on before: {', '.join(told)}. Crops are "
                  f"drawn from what is there now, so that the run is not the one it would have been"
                  + (f"; held out before and trained on now: {', '.join(learned)}" if learned else ""), flush=True)
    if distributed.first():
        with distributed.claimed(config.out):
            checkpoint.save_json(file, now)


@torch.no_grad()
def measure_latents(vae: VideoVAE, frames: Frames, *, windows: int = 4, length: int = 9) -> None:
    """Set the VAE's latent mean and std from windows of ``frames``."""
    sums, count = [0.0, 0.0], 0
    for index in bar(range(len(frames)), "latent statistics"):
        have = frames.frames(index)
        take = length if have >= length else 1
        for window in range(windows if take > 1 else 1):
            start = (have - take) * window // max(windows - 1, 1)
            try:
                video = to_pixels(frames.window(index, start, take))[None].to(vae.latent_mean.device)
            except UnreadableMedia as error:
                warnings.warn(f"latent statistics without it: {error}", stacklevel=2)
                continue
            mean = vae.moments(video)[:, : vae.config.latent_channels].double().flatten(2).transpose(0, 1).flatten(1)
            sums = [sums[0] + mean.sum(1), sums[1] + mean.square().sum(1)]
            count += mean.shape[1]
    mean = sums[0] / count
    std = (sums[1] / count - mean.square()).clamp(min=1e-8).sqrt()
    vae.set_latent_statistics(mean.float(), std.float())


def finish(trainer: Trainer) -> VideoVAE:
    """The trained VAE with averaged weights and measured latent statistics, saved as vae.safetensors in the run."""
    if distributed.first():
        vae = VideoVAE(trainer.modules["vae"].config)
        average = checkpoint.load_tensors(checkpoint.newest(trainer.run_folder) / "ema.safetensors")
        vae.load_state_dict({k.removeprefix("vae."): v for k, v in average.items() if k.startswith("vae.")})
        vae.to(trainer.device).eval()
        measure_latents(vae, trainer.batches.frames)
        with distributed.claimed(trainer.run_folder):
            checkpoint.save_tensors(trainer.run_folder / "vae.safetensors", vae.state_dict())
    distributed.barrier()
    return load_vae(str(trainer.run_folder), trainer.device)


def load_vae(run: str, device="cpu") -> VideoVAE:
    """A VideoVAE from a run folder of train-vae (its finished weights, else its newest checkpoint's average).

    ``run`` may also be weights of Wan 2.1's VAE, a file or a folder of diffusers: see ``sora_fast.models.load_vae``.
    """
    folder = Path(run)
    if folder.is_file() or is_published(folder):
        return models.load_vae(folder, device=device, dtype=torch.float32)
    described = checkpoint.description(run, "vae", "sora-fast train-vae")
    vae = VideoVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in described["vae"].items()}))
    if (folder / "vae.safetensors").is_file():
        vae.load_state_dict(checkpoint.load_tensors(folder / "vae.safetensors"))
    else:
        newest = checkpoint.newest(folder)
        print(f"{run}: not trained to its end: taking {newest.name}, whose latents are not normalised; sora-fast train-vae "
              f"--out {quote(run)} --resume finishes it", flush=True)
        ema = checkpoint.load_tensors(newest / "ema.safetensors")
        vae.load_state_dict({k.removeprefix("vae."): v for k, v in ema.items() if k.startswith("vae.")})
    return vae.to(device).eval()
