"""One training loss of a model on latents of mixed sizes: noise is drawn, added, and predicted, all samples in one pack."""

from collections.abc import Callable, Sequence
from math import prod

import torch

from .. import checks
from ..pack import Pack
from ..to_device import to_device
from .objectives import Objective


def training_loss(model: Callable, objective: Objective, latents: Sequence[torch.Tensor], *, patch=None,
                  generator: torch.Generator | None = None, **conditions) -> torch.Tensor:
    """The objective's loss, a float32 scalar, of clips and images packed without padding.

    Args:
        model: ``model(flat, timesteps, pack, **conditions) -> flat``, a DiT.
        objective: FlowMatching, DDPM, ...
        latents: clean, (C, T, H, W) each, of any sizes that the patch divides, on the model's device.
        patch: (pt, ph, pw); None: ``model.config.patch``.
        generator: CPU generator of timesteps and noise; None: PyTorch's own.
        conditions: further arguments of the model for these samples, such as ``text=`` or ``labels=``.

    Raises:
        ValueError, TypeError: latents that are no clips, or sizes that the patch does not divide.

    >>> dit, encoder = DiT.preset("tiny", depth=1), ByteTextEncoder(128)
    >>> clip, image = torch.randn(16, 2, 4, 4), torch.randn(16, 1, 4, 6)
    >>> loss = training_loss(dit, FlowMatching(), [clip, image], text=encoder(["a rabbit", "a cat"]))
    >>> loss.backward()
    """
    checks.sequence("training_loss", "latents", latents, "clips (C, T, H, W)")
    patch = model.config.patch if patch is None else patch
    pack = Pack.of(latents, patch, text_lengths=getattr(conditions.get("text"), "lengths", None))
    if not pack.num_samples:
        raise ValueError("training_loss: expected at least one clip, got none; pass latents (C, T, H, W)")
    device = latents[0].device
    counts = [clip.numel() for clip in latents]
    counts_S = to_device(torch.tensor(counts, device="cpu"), device)
    x0 = torch.cat([clip.reshape(-1) for clip in latents]).float()
    generator = torch.default_generator if generator is None else generator
    tokens = torch.tensor([prod(grid) for grid in pack.grids], device="cpu")
    timesteps = to_device(objective.draw_timesteps(tokens, generator), device)
    noise = to_device(torch.randn(x0.shape, generator=generator, dtype=torch.float32, device="cpu"), device)
    predicted = model(objective.add_noise(x0, noise, timesteps, counts_S), timesteps, pack, **conditions)
    return objective.loss(objective.split(predicted, counts), x0, noise, timesteps, counts_S)
