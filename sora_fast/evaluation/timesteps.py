"""The diffusion loss as a function of the timestep, on fixed clips, noise and timesteps: two models, or two states of one,
are compared on exactly the same work.

S samples of a pack; B strata of the timesteps; K clips. Latents (C, T, H, W), captions and noise are host data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..data import pack_stream
from ..diffusion import Objective
from ..pack import Pack, token_grid


class Clip(Protocol):
    """One sample: latent (C, T, H, W) float and its caption, "" for none."""

    latent: torch.Tensor
    caption: str


@dataclass(frozen=True)
class TimestepLosses:
    """What ``loss_by_timestep`` measured.

    losses: (B, K) float64, mean over the elements of clip k at its timestep of stratum b. timesteps: (B, K), within
    [1000 b / B, 1000 (b + 1) / B). numbers: (K,), numel of each clip's latent, by which clips are weighted, as in training.
    """

    losses: torch.Tensor
    timesteps: torch.Tensor
    numbers: torch.Tensor

    @property
    def by_timestep(self) -> torch.Tensor:
        """(B,) float64: of all clips, stratum by stratum."""
        return (self.losses * self.numbers).sum(1) / self.numbers.sum()

    @property
    def by_clip(self) -> torch.Tensor:
        """(K,) float64: over all timesteps, clip by clip."""
        return self.losses.mean(0)

    @property
    def mean(self) -> float:
        """Over all timesteps, each stratum the same, and all clips."""
        return float(self.by_timestep.mean())

    @property
    def edges(self) -> list[float]:
        """B + 1 limits of the strata, 0 to 1000."""
        return [1000.0 * b / len(self.losses) for b in range(len(self.losses) + 1)]


def draws(seed: int, clip: int, stratum: int, strata: int, numbers: int, whole: bool) -> tuple[float, torch.Tensor]:
    """The timestep and the noise (numbers,) of a clip in a stratum: a function of these arguments alone, so that neither
    the order of the clips nor how they are packed changes what is asked of the model."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + clip) * 1_009 + stratum)
    t = 1000.0 * (stratum + float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))) / strata
    noise = torch.randn(numbers, generator=generator, dtype=torch.float32, device="cpu")
    return (float(min(int(t), 999)) if whole else t), noise


@torch.no_grad()
def loss_by_timestep(dit, text_encoder, objective: Objective, clips: Sequence[Clip], *, strata: int = 10, seed: int = 0,
                     budget: int = 4096, progress: Callable[[int, int], None] | None = None) -> TimestepLosses:
    """The loss of ``dit`` on every clip at one timestep of each stratum of [0, 1000), in evaluation mode.

    Args:
        dit: a DiT, on any device. Of 2 C channels out, objectives without a learned variance judge the first C.
        text_encoder: captions to ``Text``; None for a DiT without text.
        objective: what it was trained on; its own loss is what is measured.
        clips: K samples of any sizes that the patch divides, at least one.
        strata: B.
        seed: of timesteps and noise. The same seed and clips ask the same of every model.
        budget: tokens of a pack, packed online; a larger clip gets a pack of its own.
        progress: called with (done, how many) after each pack at each stratum.

    Raises:
        ValueError: no clip, no stratum, or a size that the patch does not divide.
    """
    if not clips or strata < 1 or budget < 1:
        raise ValueError(f"loss_by_timestep: expected clips, strata and budget of 1 or more, got {len(clips)}, {strata} and "
                         f"{budget}; pass latents of at least one clip")
    numbers = [clip.latent.numel() for clip in clips]
    whole = hasattr(objective, "alphas")  # DDPM knows whole timesteps only
    grids = [token_grid("DiT", clip.latent.shape[1:], dit.config.patch) for clip in clips]
    tokens = [t * h * w for t, h, w in grids]
    packs = list(pack_stream(range(len(clips)), tokens.__getitem__, max(budget, *tokens)))
    losses = torch.zeros(strata, len(clips), dtype=torch.float64, device="cpu")
    timesteps = torch.zeros(strata, len(clips), dtype=torch.float32, device="cpu")
    device, training = next(dit.parameters()).device, (dit.training, text_encoder is not None and text_encoder.training)
    dit.eval()
    if text_encoder is not None:
        text_encoder.eval()
    try:
        for number, places in enumerate(packs):
            text = None if text_encoder is None else text_encoder([clips[k].caption for k in places])
            pack = Pack([grids[k] for k in places], text_lengths=getattr(text, "lengths", None), device=device)
            x0 = torch.cat([clips[k].latent.reshape(-1).float() for k in places]).to(device)
            counts = torch.tensor([numbers[k] for k in places], device=device)
            for b in range(strata):
                drawn = [draws(seed, k, b, strata, numbers[k], whole) for k in places]
                t = torch.tensor([t for t, _ in drawn], dtype=torch.float32, device=device)
                noise = torch.cat([noise for _, noise in drawn]).to(device)
                noisy = objective.add_noise(x0, noise, t, counts)
                predicted = dit(noisy, t, pack, **({} if text is None else dict(text=text)))
                per_clip = _per_clip(objective, predicted, x0, noise, t, [numbers[k] for k in places])
                losses[b, places], timesteps[b, places] = per_clip, t.cpu()
                if progress:
                    progress(number * strata + b + 1, len(packs) * strata)
    finally:
        dit.train(training[0])
        if text_encoder is not None:
            text_encoder.train(training[1])
    return TimestepLosses(losses, timesteps, torch.tensor(numbers, dtype=torch.float64, device="cpu"))


def _per_clip(objective: Objective, predicted, x0, noise, timesteps, numbers: Sequence[int]) -> torch.Tensor:
    """(S,) float64: the objective's loss of each sample alone."""
    predicted = objective.split(predicted, numbers)
    parts = zip(predicted.split(numbers), x0.split(numbers), noise.split(numbers), timesteps.split(1), strict=True)
    return torch.stack([objective.loss(p, x, n, t, t.new_tensor([x.shape[0]], dtype=torch.int64)).double()
                        for p, x, n, t in parts]).cpu()
