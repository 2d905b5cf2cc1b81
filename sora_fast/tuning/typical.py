"""Calls without memory, at common sizes, of this library's own models."""

from collections.abc import Callable

import torch

from ..models.text import Text
from ..pack import Pack

FRAMES, HEIGHT, WIDTH = 17, 480, 832  # a video's; of a DiT on latents behind a VAE of 4 x 8 x 8
IMAGES, SIDE = 32, 32  # of a class-conditional DiT: a batch of 256 x 256


def _vae(model) -> list[Callable]:
    c, dtype = model.config, next(model.parameters()).dtype
    sizes = FRAMES, HEIGHT, WIDTH
    clip = torch.empty(1, c.in_channels, *sizes, device="meta", dtype=dtype)
    small = (1 + (FRAMES - 1) // c.time_factor, HEIGHT // c.space_factor, WIDTH // c.space_factor)
    latents = torch.empty(1, c.latent_channels, *small, device="meta", dtype=dtype)
    return [lambda model: model.encode(clip), lambda model: model.decode(latents)]


def _dit(model) -> list[Callable]:
    c, dtype = model.config, next(model.parameters()).dtype
    samples, size = (IMAGES, (1, SIDE, SIDE)) if c.classes else (2, (1 + (FRAMES - 1) // 4, HEIGHT // 8, WIDTH // 8))
    pack = Pack([tuple(n // p for n, p in zip(size, c.patch, strict=True))] * samples, device="meta",
                text_lengths=(128,) * samples if c.text_width else None)
    empty = lambda *shape, dtype=dtype: torch.empty(shape, device="meta", dtype=dtype)
    flat = empty(samples * c.in_channels * torch.Size(size).numel())
    given = dict(labels=empty(samples, dtype=torch.int64) if c.classes else None)
    if c.text_width:
        given["text"] = Text(empty(128 * samples, c.text_width), empty(samples, c.text_width), (128,) * samples)
    return [lambda model: model(flat, empty(samples, dtype=torch.float32), pack, **given)]


CALLS = {"VideoVAE": _vae, "DiT": _dit}
