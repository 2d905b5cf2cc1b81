"""How long the demo trains: a number of steps, chosen from the measured time of a step before training begins.

No clock cuts training short: a slow machine takes longer, and reaches the same quality.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..models import VideoVAE
from ..named import pick_device
from ..training import dit as dit_task
from ..training.config import DiTTraining, VAETraining
from ..training.latents import LatentClip
from ..training.vae_loss import VAELoss, modules_of

# Fewest and most steps. With the fewest the VAE is 2.5 dB or more above interpolation on every clip's held-out end, and the
# DiT's samples are recognisable; more than the most is not seen.
VAE_STEPS, DIT_STEPS = (60, 300), (300, 600)
VAE_SHARE = 0.25  # of the time: the VAE begins from principal components, the DiT from nothing
UNTIMED = 1.15  # a step over its forward and backward: reading the batch, the optimiser, the averaged weights
OTHER_STAGES = 80  # everything but training takes as long as about so many steps of the VAE


@dataclass(frozen=True)
class Plan:
    """Steps of both trainings, and how many seconds the trainings and the whole demo should take."""

    vae_steps: int
    dit_steps: int
    training: float
    total: float

    def sentence(self) -> str:
        return (f"{self.vae_steps:,} steps of the VAE and {self.dit_steps:,} of the DiT: about {self.training / 60:.1f} "
                f"minutes of training, {self.total / 60:.1f} minutes in all at this speed")


def plan(vae_second: float, dit_second: float, minutes: float, vae_steps: int = 0, dit_steps: int = 0) -> Plan:
    """Steps for about ``minutes`` of training, within the limits above.

    Args:
        vae_second, dit_second: seconds per step. minutes: 0 takes the most steps.
        vae_steps, dit_steps: taken as they are; 0: chosen.
    """
    seconds = 60 * minutes or float("inf")
    vae = vae_steps or _within(VAE_SHARE * seconds / vae_second, *VAE_STEPS)
    dit = dit_steps or _within((seconds - vae * vae_second) / dit_second, *DIT_STEPS)
    training = vae * vae_second + dit * dit_second
    return Plan(vae, dit, training, training + OTHER_STAGES * vae_second)


def _within(steps: float, least: int, most: int) -> int:
    return int(min(max(steps, least), most))


def seconds_per_step(vae: VAETraining, dit: DiTTraining, windows: Sequence[tuple[str, tuple[int, int, int]]]
                     ) -> tuple[float, float]:
    """Measured seconds per step of the VAE and of the DiT.

    ``windows``: caption and size (T, H, W) in pixels of what the DiT will learn; the latents are random here.
    """
    device = pick_device(vae.device)
    fresh = VideoVAE.preset(vae.preset).to(device)
    video = torch.rand(vae.clips, 3, vae.frames, vae.crop, vae.crop, device=device) * 2 - 1
    noise = torch.randn(vae.clips, *fresh.latent_shape(*video.shape[2:]), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=vae.precision == "bf16")
    of_vae = VAELoss(modules_of(fresh, 0.0))
    of_images = vae.images / (vae.clips * vae.frames)  # pixels of a batch of images over those of a batch of clips
    vae_second = _time(lambda: of_vae(video, noise), autocast) * (1 - vae.image_share * (1 - of_images))
    clips = [LatentClip(torch.randn(fresh.latent_shape(*size)), caption, str(i), 0, size[0], dit.fps)
             for i, (caption, size) in enumerate(windows)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = dit_task.make_trainer(replace(dit, out=folder), fresh, clips)
        batch = trainer.drawn(trainer.batches.next())
        return vae_second, _time(lambda: trainer.loss(batch)[0], autocast)


def _time(loss: Callable[[], torch.Tensor], autocast, steps: int = 4) -> float:
    """Seconds of a step with this loss, without the first, which also sets things up."""
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        with autocast:
            value = loss()
        value.backward()
        float(value.detach())  # waits for a GPU
    return UNTIMED * (time.perf_counter() - start) / steps
