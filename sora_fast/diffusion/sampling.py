"""Generation: a grid of noise patches of any size, several sizes in one pack, denoised together.

Frames that are known beforehand stay clean, at t = 0, while the others are at t: images and clips as prompts.

S samples; sizes are latent (C, T, H, W); R modulation rows, one per frame of tokens where a frame is known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..pack import Pack
from ..to_device import to_device
from .objectives import Objective

LONGEST = 1000  # steps of a whole schedule: DDPM has no more


@dataclass(frozen=True)
class Known:
    """What is known of one sample's latents before it is sampled.

    Args:
        latents: (C, T, H, W); of the other frames nothing is read, unless ``strength`` is below 1.
        kept: (T,) bools: frames that come out as they went in, bit for bit (float32). The model sees them clean, at t = 0.
        strength: where the other frames begin: at 1 from noise alone, below at ``latents`` noised to the t that leaves
            that share of the schedule's steps to go, about ``1000 strength`` before shifts. (SDEdit: arXiv 2108.01073.)

    The first frame kept is image-to-video, first frames are extension forward, last frames extension backward, both
    interpolation and, with the clip's own beginning at the end, a loop: ``place`` makes them.

    Raises:
        ValueError: latents that are not floating (C, T, H, W), kept of another length, strength outside (0, 1].
    """

    latents: torch.Tensor
    kept: tuple[bool, ...]
    strength: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "kept", tuple(bool(keep) for keep in self.kept))
        if self.latents.dim() != 4 or not self.latents.is_floating_point() or len(self.kept) != self.latents.shape[1]:
            raise ValueError(f"Known: expected floating latents (C, T, H, W) and kept (T,), got {self.latents.dtype} "
                             f"{tuple(self.latents.shape)} and {len(self.kept)} of kept; pass one bool per latent frame")
        if not 0 < self.strength <= 1:
            raise ValueError(f"Known: expected strength above 0 and at most 1, got {self.strength}; 1 begins at noise")


def place(size: Sequence[int], start: torch.Tensor | None = None, end: torch.Tensor | None = None) -> Known:
    """Latents ``start`` (C, a, H, W) as the first frames of a sample of ``size`` and ``end`` (C, b, H, W) as its last.

    Raises:
        ValueError: latents of another height, width or number of channels, or that fill the sample.
    """
    given = [part for part in (start, end) if part is not None]
    wanted = (size[0], *size[2:])
    for part in given:
        if part.dim() != 4 or (part.shape[0], *part.shape[2:]) != wanted:
            raise ValueError(f"place: expected latents of {size[0]} channels and {size[2]} x {size[3]}, as the sample, got "
                             f"{tuple(part.shape)}; encode them at the sample's own height and width")
    a, b = (0 if part is None else part.shape[1] for part in (start, end))
    if not given or a + b > size[1]:
        raise ValueError(f"place: expected 1 to {size[1]} latent frames to place, got {a} and {b}; give fewer, or make the "
                         f"sample longer")
    free = given[0].new_zeros((size[0], size[1] - a - b, *size[2:]))
    parts = [part for part in (start, free, end) if part is not None]
    return Known(torch.cat(parts, dim=1), (True,) * a + (False,) * (size[1] - a - b) + (True,) * b)


@torch.no_grad()
def generate(model: Callable, objective: Objective, sizes: Sequence[tuple[int, int, int, int]], *, patch, steps: int = 25,
             guidance: float = 1.0, guided_channels: int | None = None, condition: Callable[[bool], dict] | None = None,
             known: Sequence[Known | None] | None = None,
             generator: torch.Generator | Sequence[torch.Generator] | None = None, device: torch.device | str = "cpu",
             progress: Callable[[int, int], None] | None = None) -> list[torch.Tensor]:
    """Latents of the given sizes from noise, and from what is known of them.

    Args:
        model: ``model(flat, timesteps, pack, **conditions) -> flat``, a DiT. Timesteps are (S,), or (R,) of a pack with
            ``modulation="frame"`` where any sample has kept frames. A learned variance is used where the objective is a
            LearnedVariance; DDIM and Euler steps need the mean alone.
        objective: what the model was trained on.
        sizes: (C, T, H, W) of each sample's latents; T = 1 is an image. Each side a multiple of the patch's.
        patch: (pt, ph, pw).
        guidance: classifier-free guidance; 1.0 is none and costs half. (arXiv 2207.12598)
        guided_channels: guidance on the first so many channels, the rest as the condition alone predicts it; None: on all.
            The official sampler of the class-conditional DiT guides 3 of 4.
        condition: ``condition(null)`` gives the model's keyword arguments for the S samples (``text=``, ``labels=``),
            with null=True those of no condition. Guidance needs it.
        known: for each sample a ``Known`` or None; any mix in one pack.
        generator: CPU generators for the noise, one per sample; or one for all, drawn from sample by sample: then the
            first is the same whatever follows.
        device: the model's.
        progress: called with (step, steps) after each step.

    Returns:
        list of (C, T, H, W) float32 latents.

    Raises:
        ValueError: sizes, steps, guidance, generators or known latents that do not fit, in one sentence.
    """
    sizes, known = [tuple(size) for size in sizes], [None] * len(sizes) if known is None else list(known)
    _check(sizes, patch, steps, guidance, guided_channels, condition)
    _check_known(sizes, patch, steps, known, generator)
    if not sizes:
        return []
    grids = [tuple(n // p for n, p in zip(size[1:], patch, strict=True)) for size in sizes]
    counts = [prod(size) for size in sizes]
    counts_S = to_device(torch.tensor(counts, device="cpu"), device)
    given = condition(False) if condition else {}
    both = guidance != 1.0
    conditions = _join(given, condition(True)) if both else given
    kept_R = _kept_rows(known, grids, patch[0])
    pack = Pack(grids * (2 if both else 1), modulation="frame" if kept_R.any() else "sample",
                text_lengths=getattr(conditions.get("text"), "lengths", None), device=device)
    kept_R = to_device(kept_R.repeat(2 if both else 1), device)
    guided = to_device(_guided(objective, sizes, guided_channels), device) if both else None
    schedules = [_schedule(objective, steps, t * h * w, k.strength if k else 1.0)
                 for (t, h, w), k in zip(grids, known, strict=True)]
    x, clean, kept = _begin(sizes, known, objective, schedules, generator)
    x, clean, kept = (to_device(values, device) for values in (x, clean, kept))
    for step in range(steps):
        timesteps = to_device(torch.stack([times[step].float() for _, times in schedules]), device)
        of_model = timesteps.repeat(2 if both else 1)
        if pack.modulation == "frame":
            of_model = of_model[pack.row_samples].masked_fill(kept_R, 0.0)
        predicted = model(torch.cat([x, x]) if both else x, of_model, pack, **conditions).float()
        predicted = objective.split(predicted, counts * (2 if both else 1))
        if both:
            wanted, null = predicted.chunk(2)
            predicted = null + guidance * (wanted - null)
            predicted = torch.where(guided, predicted, wanted)
        predicted = objective.for_scheduler(predicted, x, timesteps, counts_S)
        parts = zip(schedules, predicted.split(counts), x.split(counts), strict=True)
        x = torch.cat([s.step(p, times[step], part, return_dict=False)[0] for (s, times), p, part in parts])
        x = torch.where(kept, clean, x)
        if progress:
            progress(step + 1, steps)
    return [part.view(size) for part, size in zip(x.split(counts), sizes, strict=True)]


def _schedule(objective: Objective, steps: int, tokens: int, strength: float):
    """A scheduler and the timesteps to go: the last ``steps`` of a schedule so long that ``strength`` of it is left."""
    whole = max(steps, round(steps / strength))
    scheduler = objective.scheduler(whole, tokens)
    return scheduler, scheduler.timesteps[whole - steps :]


def _begin(sizes, known, objective, schedules, generator):
    """The first x, the known latents, and the mask of elements to keep, as flat buffers."""
    x, clean, kept = [], [], []
    for index, (size, k, (scheduler, times)) in enumerate(zip(sizes, known, schedules, strict=True)):
        own = generator[index] if isinstance(generator, Sequence) else generator
        # all of it, whatever is known: others draw the same
        noise = torch.randn(size, generator=own, dtype=torch.float32, device="cpu")
        if hasattr(scheduler, "generator"):  # steps draw too: from one of the sample's own, whatever others draw
            seed = int(torch.randint(2**62, (), generator=own, device="cpu"))
            scheduler.generator = torch.Generator().manual_seed(seed)
        if k is None:
            x0, stay = torch.zeros_like(noise), torch.zeros_like(noise, dtype=torch.bool)
        else:
            x0 = k.latents.detach().to("cpu", torch.float32)
            stay = torch.tensor(k.kept, device="cpu")[None, :, None, None].expand(size)
            if k.strength < 1:
                noise = objective.add_noise(x0.flatten(), noise.flatten(), times[:1].float(),
                                            torch.tensor([noise.numel()], device="cpu")).view(size)
        x.append(torch.where(stay, x0, noise).flatten())
        clean.append(x0.flatten())
        kept.append(stay.flatten())
    return torch.cat(x), torch.cat(clean), torch.cat(kept)


def _kept_rows(known, grids, pt: int) -> torch.Tensor:
    """(R,) bools: frames of tokens that are kept."""
    rows = [torch.tensor(k.kept[::pt], device="cpu") if k else torch.zeros(grid[0], dtype=torch.bool, device="cpu")
            for k, grid in zip(known, grids, strict=True)]
    return torch.cat(rows)


def _guided(objective: Objective, sizes, channels: int | None) -> torch.Tensor:
    """Which elements are guided: those of the first ``channels`` (None: all) of their sample; a variance never is."""
    guided = lambda size: torch.arange(2 * size[0], device="cpu") < (channels or size[0])
    mask = torch.cat([guided(size).repeat_interleave(prod(size[1:])) for size in sizes])
    return objective.split(mask, [prod(size) for size in sizes])


def _check(sizes, patch, steps: int, guidance: float, guided_channels, condition) -> None:
    for size in sizes:
        if len(size) != 4 or any(n < p or n % p for n, p in zip(size[1:], patch, strict=True)):
            raise ValueError(f"generate: expected latent sizes (C, T, H, W) with T, H and W multiples of the patch "
                             f"{tuple(patch)}, got {tuple(size)}; round the size up or down to whole patches")
        if guided_channels is not None and not 1 <= guided_channels <= size[0]:
            raise ValueError(f"generate: expected guided_channels of 1 to {size[0]}, got {guided_channels}; None guides all")
    if steps < 1:
        raise ValueError(f"generate: expected steps of 1 or more, got {steps}; 25 is a usual number")
    if guidance != 1.0 and condition is None:
        raise ValueError(f"generate: expected a condition for guidance {guidance}, got none; pass condition=, or "
                         f"guidance=1.0")


def _check_known(sizes, patch, steps: int, known, generator) -> None:
    if isinstance(generator, Sequence) and len(generator) != len(sizes):
        raise ValueError(f"generate: expected one generator, or one per sample ({len(sizes)}), got {len(generator)}; give "
                         f"as many as sizes")
    if len(known) != len(sizes):
        raise ValueError(f"generate: expected known for {len(sizes)} samples, got {len(known)}; use None for a sample of "
                         f"which nothing is known")
    for size, k in zip(sizes, known, strict=True):
        if k is None:
            continue
        if tuple(k.latents.shape) != tuple(size):
            raise ValueError(f"generate: expected known latents of the sample's size {tuple(size)}, got "
                             f"{tuple(k.latents.shape)}; place() fills them up")
        if any(len(set(k.kept[i : i + patch[0]])) > 1 for i in range(0, size[1], patch[0])):
            raise ValueError(f"generate: expected kept frames in whole patches of {patch[0]}, got {k.kept}; a token has one "
                             f"timestep")
        if round(steps / k.strength) > LONGEST:
            raise ValueError(f"generate: expected steps / strength of at most {LONGEST:,}, got {steps} / {k.strength}; take "
                             f"fewer steps, or a higher strength")


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
