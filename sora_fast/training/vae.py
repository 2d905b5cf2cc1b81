"""Training a VideoVAE on crops of clips and images.

B batch, T frames, H height, W width.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..data import FitPolicy, MediaItem, to_pixels
from ..data.frames import Frames
from ..models import VAEConfig, VideoVAE
from . import checkpoint
from .config import VAETraining
from .loop import Trainer, pick_device


class CropBatches:
    """Random crops: a batch of clip crops, or (``image_share``) of single frames; mirrored half the time."""

    def __init__(self, frames: Frames, config: VAETraining):
        self.frames, self.config = frames, config
        self.generator = torch.Generator().manual_seed(config.seed)
        crop = config.crop
        # Small frames are turned away and counted by the caller: an enlarged crop would teach a blurred picture.
        self.usable = [i for i in range(len(frames)) if min(frames.size(i)) >= crop]
        self.clips = [i for i in self.usable if frames.frames(i) >= config.frames]
        if not self.usable:
            raise ValueError(f"train-vae: expected media of at least {crop} x {crop} pixels, got none; lower --crop or "
                             f"raise --short-side")

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

    def probe(self) -> tuple[torch.Tensor, float]:
        """One crop, and how many times its pixels the largest batch holds."""
        c = self.config
        per_clip = c.clips * c.frames if self.clips else 0
        return torch.zeros(1, 3, 1, c.crop, c.crop), float(max(per_clip, c.images))

    def state_dict(self) -> dict:
        return dict(generator=self.generator.get_state())

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


def make_trainer(config: VAETraining, items: Sequence[MediaItem], *, span: tuple[float, float] = (0.0, 1.0)) -> Trainer:
    """A Trainer for a new VideoVAE on ``items``; ``span`` is the part of each clip it may see."""
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    vae = VideoVAE.preset(config.preset).to(device)
    f, step = vae.config.space_factor, vae.config.time_factor
    if config.crop % f or (config.frames - 1) % step:
        raise ValueError(f"train-vae: expected --crop a multiple of {f} and --frames 1 + {step} k, got {config.crop} and "
                         f"{config.frames}; for example {f * 8} and {1 + 2 * step}")
    policy = FitPolicy(short_side=config.short_side, fps=config.fps or None, space_multiple=f, time_factor=step)
    batches = CropBatches(Frames(items, policy, span=span, memory_gb=config.memory_gb), config)

    def loss(video, generator):
        video = video.to(device)
        shape = vae.latent_shape(*video.shape[2:])
        noise = torch.randn((video.shape[0], *shape), generator=generator).to(device)
        reconstruction, kl = vae(video, noise)
        total = (reconstruction.float() - video).abs().mean() + config.kl * kl.mean()
        return total, dict(samples=video.shape[0], tokens=video.shape[0] * shape[1] * shape[2] * shape[3], pad=0)

    description = dict(kind="vae", vae=asdict(vae.config), training=asdict(config))
    return Trainer(config, nn.ModuleDict({"vae": vae}), batches, loss, description)


@torch.no_grad()
def measure_latents(vae: VideoVAE, frames: Frames, *, windows: int = 4, length: int = 9) -> None:
    """Set the VAE's latent mean and std from windows of ``frames``."""
    total, count = 0.0, 0
    sums = [0.0, 0.0]
    for index in range(len(frames)):
        have = frames.frames(index)
        take = length if have >= length else 1
        for window in range(windows if take > 1 else 1):
            start = (have - take) * window // max(windows - 1, 1)
            video = to_pixels(frames.window(index, start, take))[None].to(vae.latent_mean.device)
            mean = vae.moments(video).chunk(2, dim=1)[0].double().flatten(2).transpose(0, 1).flatten(1)
            sums = [sums[0] + mean.sum(1), sums[1] + mean.square().sum(1)]
            count += mean.shape[1]
    total = sums[0] / count
    std = (sums[1] / count - total.square()).clamp(min=1e-8).sqrt()
    vae.set_latent_statistics(total.float(), std.float())


def finish(trainer: Trainer) -> VideoVAE:
    """The trained VAE with averaged weights and measured latent statistics, saved as vae.safetensors in the run."""
    vae = trainer.modules["vae"]
    trainer.modules.load_state_dict(trainer.ema, strict=False)
    vae.eval()
    measure_latents(vae, trainer.batches.frames)
    checkpoint.save_tensors(trainer.run_folder / "vae.safetensors", vae.state_dict())
    return vae


def load_vae(run: str, device="cpu") -> VideoVAE:
    """A VideoVAE from a run folder of train-vae (its finished weights, else its newest checkpoint's average)."""
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{run}: expected a run folder of sora-fast train-vae, got no config.json there; pass "
                                f"the folder given as its --out")
    described = json.loads((folder / "config.json").read_text())["vae"]
    vae = VideoVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}))
    if (folder / "vae.safetensors").is_file():
        vae.load_state_dict(checkpoint.load_tensors(folder / "vae.safetensors"))
    else:
        ema = checkpoint.load_tensors(checkpoint.newest(folder) / "ema.safetensors")
        vae.load_state_dict({k.removeprefix("vae."): v for k, v in ema.items()})
    return vae.to(device).eval()
