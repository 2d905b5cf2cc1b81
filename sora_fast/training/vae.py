"""Training a VideoVAE on crops of clips and images.

B batch, T frames, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from .. import models
from ..data import FitPolicy, MediaItem, to_pixels
from ..data.frames import Frames, bar
from ..models import VAEConfig, VideoVAE
from ..models.weights import is_published
from . import checkpoint
from .config import VAETraining
from .loop import Trainer, check_start, pick_device


class CropBatches:
    """Random crops: a batch of clip crops, or (``image_share``) of single frames; mirrored half the time."""

    def __init__(self, frames: Frames, config: VAETraining):
        self.frames, self.config = frames, config
        self.generator = torch.Generator().manual_seed(config.seed)
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

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self.generator))

    def next(self) -> torch.Tensor:
        """(B, 3, T, crop, crop) float32 in [-1, 1]."""
        c = self.config
        as_images = not self.clips or float(torch.rand(1, generator=self.generator)) < c.image_share
        count, length = (c.images, 1) if as_images else (c.clips, c.frames)
        crops = []
        for _ in range(count):
            index = (self.usable if as_images else self.clips)[self._below(len(self.usable if as_images else self.clips))]
            window = self.frames.window(index, self._below(self.frames.frames(index) - length + 1), length)
            top, left = (self._below(size - c.crop + 1) for size in window.shape[1:3])
            crop = to_pixels(window[:, top : top + c.crop, left : left + c.crop])
            crops.append(crop.flip(-1) if self._below(2) else crop)
        return torch.stack(crops)

    def probe(self, copies: int) -> tuple[torch.Tensor, float]:
        """A batch of ``copies`` crops, and how many crops the largest batch holds."""
        c = self.config
        clips = bool(self.clips) and c.clips * c.frames >= c.images
        return torch.zeros(copies, 3, c.frames if clips else 1, c.crop, c.crop), float(c.clips if clips else c.images)

    def state_dict(self) -> dict:
        return dict(generator=self.generator.get_state())

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


def make_trainer(config: VAETraining, items: Sequence[MediaItem], *, span: tuple[float, float] = (0.0, 1.0)) -> Trainer:
    """A Trainer for a new VideoVAE on ``items``; ``span`` is the part of each clip it may see."""
    check_start(config)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    vae = VideoVAE.preset(config.preset).to(device)
    f, step = vae.config.space_factor, vae.config.time_factor
    if config.crop % f or (config.frames - 1) % step:
        raise ValueError(f"train-vae: expected --crop a multiple of {f} and --frames 1 + {step} k, got {config.crop} and "
                         f"{config.frames}; for example {f * 8} and {1 + 2 * step}")
    policy = FitPolicy(short_side=config.short_side, fps=config.fps or None, space_multiple=f, time_factor=step)
    batches = CropBatches(Frames(items, policy, span=span, memory_gb=config.memory_gb), config)
    if vae.linear_path is not None and not config.resume:
        vae.linear_path.start(batches.next().to(device) for _ in range(200))

    def loss(video, generator):
        video = video.to(device)
        shape = vae.latent_shape(*video.shape[2:])
        noise = torch.randn((video.shape[0], *shape), generator=generator).to(device)
        reconstruction, kl = vae(video, noise)
        total = (reconstruction.float() - video).abs().mean() + config.kl * kl.mean()
        return total, dict(samples=video.shape[0], tokens=video.shape[0] * shape[1] * shape[2] * shape[3], pad=0)

    description = dict(kind="vae", vae=asdict(vae.config))
    return Trainer(config, nn.ModuleDict({"vae": vae}), batches, loss, description)


@torch.no_grad()
def measure_latents(vae: VideoVAE, frames: Frames, *, windows: int = 4, length: int = 9) -> None:
    """Set the VAE's latent mean and std from windows of ``frames``."""
    sums, count = [0.0, 0.0], 0
    for index in bar(range(len(frames)), "latent statistics"):
        have = frames.frames(index)
        take = length if have >= length else 1
        for window in range(windows if take > 1 else 1):
            start = (have - take) * window // max(windows - 1, 1)
            video = to_pixels(frames.window(index, start, take))[None].to(vae.latent_mean.device)
            mean = vae.moments(video).chunk(2, dim=1)[0].double().flatten(2).transpose(0, 1).flatten(1)
            sums = [sums[0] + mean.sum(1), sums[1] + mean.square().sum(1)]
            count += mean.shape[1]
    mean = sums[0] / count
    std = (sums[1] / count - mean.square()).clamp(min=1e-8).sqrt()
    vae.set_latent_statistics(mean.float(), std.float())


def finish(trainer: Trainer) -> VideoVAE:
    """The trained VAE with averaged weights and measured latent statistics, saved as vae.safetensors in the run."""
    vae = trainer.modules["vae"]
    trainer.modules.load_state_dict(trainer.ema, strict=False)
    vae.eval()
    measure_latents(vae, trainer.batches.frames)
    checkpoint.save_tensors(trainer.run_folder / "vae.safetensors", vae.state_dict())
    return vae


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
              f"--out {run} --resume finishes it", flush=True)
        ema = checkpoint.load_tensors(newest / "ema.safetensors")
        vae.load_state_dict({k.removeprefix("vae."): v for k, v in ema.items()})
    return vae.to(device).eval()
