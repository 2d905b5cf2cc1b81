"""Generation: a grid of noise patches of any size, several sizes in one pack, denoised together.

S samples; sizes are latent (C, T, H, W).
"""

from collections.abc import Callable, Sequence

import torch

from ..pack import Pack
from .objectives import Objective


@torch.no_grad()
def generate(model: Callable, objective: Objective, sizes: Sequence[tuple[int, int, int, int]], *, patch, steps: int = 25,
             guidance: float = 1.0, condition: Callable[[bool], dict] | None = None,
             generator: torch.Generator | None = None, device: torch.device | str = "cpu",
             progress: Callable[[int, int], None] | None = None) -> list[torch.Tensor]:
    """Latents of the given sizes from noise.

    Args:
        model: ``model(flat, timesteps, pack, **conditions) -> flat``, a DiT.
        objective: what the model was trained on.
        sizes: (C, T, H, W) of each sample's latents; T = 1 is an image. Each side a multiple of the patch's.
        patch: (pt, ph, pw).
        guidance: classifier-free guidance; 1.0 is none and costs half. (arXiv 2207.12598)
        condition: ``condition(null)`` gives the model's keyword arguments for the S samples (``text=``, ``labels=``),
            with null=True those of no condition. Guidance needs it.
        generator: a CPU generator for the noise, which is drawn sample by sample: the first is the same whatever follows.
        progress: called with (step, steps) after each step.

    Returns:
        list of (C, T, H, W) float32 latents.
    """
    _check(sizes, patch, steps, guidance, condition)
    if not sizes:
        return []
    grids = [tuple(n // p for n, p in zip(size[1:], patch, strict=True)) for size in sizes]
    counts = torch.tensor([torch.Size(size).numel() for size in sizes])
    tokens = [t * h * w for t, h, w in grids]
    given = condition(False) if condition else {}
    both = guidance != 1.0
    conditions = _join(given, condition(True)) if both else given
    lengths = getattr(conditions.get("text"), "lengths", None)
    pack = Pack(grids * (2 if both else 1), text_lengths=lengths, device=device)
    schedulers = [objective.scheduler(steps, n) for n in tokens]
    x = torch.cat([torch.randn(size, generator=generator).flatten() for size in sizes]).to(device)
    counts = counts.to(device)
    for step in range(steps):
        timesteps = torch.stack([scheduler.timesteps[step].float() for scheduler in schedulers]).to(device)
        if both:
            predicted = model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), pack, **conditions).float()
            wanted, null = predicted.chunk(2)
            predicted = null + guidance * (wanted - null)
        else:
            predicted = model(x, timesteps, pack, **conditions).float()
        predicted = objective.for_scheduler(predicted, x, timesteps, counts)
        parts = zip(schedulers, predicted.split(counts.tolist()), x.split(counts.tolist()), strict=True)
        x = torch.cat([s.step(p, s.timesteps[step], part, return_dict=False)[0] for s, p, part in parts])
        if progress:
            progress(step + 1, steps)
    return [part.view(size) for part, size in zip(x.split(counts.tolist()), sizes, strict=True)]


def _check(sizes, patch, steps: int, guidance: float, condition) -> None:
    for size in sizes:
        if len(size) != 4 or any(n < p or n % p for n, p in zip(size[1:], patch, strict=True)):
            raise ValueError(f"generate: expected latent sizes (C, T, H, W) with T, H and W multiples of the patch "
                             f"{tuple(patch)}, got {tuple(size)}; round the size up or down to whole patches")
    if steps < 1:
        raise ValueError(f"generate: expected steps of 1 or more, got {steps}; 25 is a usual number")
    if guidance != 1.0 and condition is None:
        raise ValueError(f"generate: expected a condition for guidance {guidance}, got none; pass condition=, or "
                         f"guidance=1.0")


def _join(given: dict, null: dict) -> dict:
    """Conditions of the S samples followed by those of no condition."""
    joined = {}
    for name, value in given.items():
        other = null[name]
        if value is None:
            joined[name] = None
        elif isinstance(value, torch.Tensor):
            joined[name] = torch.cat([value, other])
        else:  # Text
            joined[name] = type(value)(torch.cat([value.tokens, other.tokens]), torch.cat([value.pooled, other.pooled]),
                                       value.lengths + other.lengths)
    return joined
