"""patch_embed and unpatchify at the models' sizes.

N tokens, C channels, D width, K = C * pt * ph * pw numbers of a patch.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F

from sora_fast.testing.draw import Draw

from ..case import FORWARD, FULL, QUICK, PackCase, Provider
from ..providers import backends, compiled
from . import shapes


@dataclass(frozen=True)
class Patches(PackCase):
    """A pack of samples in one flat buffer; ``width`` D is unused by unpatchify."""

    channels: int
    width: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def numbers(self) -> int:
        return self.channels * prod(self.patch)

    def shape(self):
        sizes = dict(tokens=self.tokens, samples=len(self.grids), channels=self.channels, patch=list(self.patch))
        return sizes | dict(width=self.width) if self.op == "patch_embed" else sizes

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        if self.op == "unpatchify":  # flat: clips cut out inside the call would each fill a whole buffer in the backward
            return dict(tokens=draw(self.tokens, self.numbers), grids=self.grids, patch=self.patch,
                        channels=self.channels, flat=True)
        return dict(latents=draw(self.tokens * self.numbers), grids=self.grids, bias=draw(self.width),
                    weight=draw(self.width, self.channels, *self.patch, scale=self.numbers**-0.5))

    def directions(self):
        if self.op == "unpatchify":
            return {FORWARD: (), "backward": ("tokens",)}
        # Latents come from the data: a training step needs no gradient of them. "dgrad" is for those who train the VAE
        # along, or guide the sampling by a gradient.
        return {FORWARD: (), "backward": ("weight", "bias"), "dgrad": ("latents",)}

    def flops(self, direction):
        return 2 * self.tokens * self.numbers * self.width if self.op == "patch_embed" else 0

    def least_bytes(self, direction):
        flat, out = self.tokens * self.numbers, self.tokens * self.width
        if self.op == "unpatchify":
            return 2 * flat * self.dtype.itemsize
        weight = self.numbers * self.width
        bias = 0 if direction == "dgrad" else self.width
        return (flat + weight + bias + out) * self.dtype.itemsize


def _cases():
    embed = Patches("patch_embed", "", torch.bfloat16, FULL, (), 0)
    # Short in float32: torch.compile sums on a CPU one number after the other, which breaks the rule on MIXED_SMALL's 905.
    yield replace(embed, label="Wan 1.3B, small clip", dtype=torch.float32, suites=QUICK, grids=((2, 4, 6),), channels=16,
                  width=1536)
    yield replace(embed, label="DiT-S, small pack", suites=QUICK, grids=shapes.MIXED_SMALL, channels=4, width=384)
    yield replace(embed, label="DiT-XL/2, 64 images 256px", grids=(shapes.DIT_256,) * 64, channels=4, width=1152)
    yield replace(embed, label="DiT-B/2, mixed pack 256px", grids=shapes.MIXED_256, channels=16, width=768)
    yield replace(embed, label="LTX 2B, 480p", grids=(shapes.LTX_480,), channels=128, width=2048, patch=(1, 1, 1))
    yield replace(embed, label="Wan 1.3B, mixed pack 480p", grids=shapes.MIXED_480, channels=16, width=1536)
    yield replace(embed, label="Wan2.2 5B, 720p", grids=(shapes.WAN22_720,), channels=48, width=3072)
    yield replace(embed, label="Wan 14B, 720p", grids=(shapes.WAN_720,), channels=16, width=5120)
    yield replace(embed, label="Hunyuan, 720p", grids=(shapes.HUNYUAN_720,), channels=16, width=3072)
    clips = Patches("unpatchify", "", torch.bfloat16, FULL, (), 0)
    yield replace(clips, label="DiT-S, small pack", dtype=torch.float32, suites=QUICK, grids=shapes.MIXED_SMALL, channels=8)
    # 8 channels: the official DiT predicts a variance beside each of its 4
    yield replace(clips, label="DiT-XL/2, 64 images 256px", grids=(shapes.DIT_256,) * 64, channels=8)
    yield replace(clips, label="DiT-B/2, mixed pack 256px", grids=shapes.MIXED_256, channels=16)
    yield replace(clips, label="Wan 1.3B, mixed pack 480p", grids=shapes.MIXED_480, channels=16)
    yield replace(clips, label="Wan2.2 5B, 720p", grids=(shapes.WAN22_720,), channels=48)
    yield replace(clips, label="Mochi, 480p", grids=(shapes.MOCHI_480,), channels=12)
    yield replace(clips, label="Hunyuan, 720p", grids=(shapes.HUNYUAN_720,), channels=16)


CASES = tuple(_cases())


def _conv3d(latents, weight, bias, *, grids):
    """The models' own PatchEmbed: a Conv3d whose kernel is its stride, on one batch where it can be, else per sample."""
    channels, *patch = weight.shape[1:]
    size = lambda grid: [n * step for n, step in zip(grid, patch, strict=True)]
    if len(set(grids)) == 1:
        batches = [latents.reshape(len(grids), channels, *size(grids[0]))]
    else:
        pieces = latents.split([channels * prod(size(grid)) for grid in grids])
        batches = [piece.reshape(1, channels, *size(grid)) for piece, grid in zip(pieces, grids, strict=True)]
    tokens = [F.conv3d(x_BCTHW, weight, bias, stride=tuple(patch)).flatten(2).transpose(1, 2) for x_BCTHW in batches]
    tokens = [x_BND.flatten(0, 1) for x_BND in tokens]
    return torch.cat(tokens) if len(tokens) > 1 else tokens[0]


def providers(op: str) -> list[Provider]:
    """Ours, the compiled definition, and for patch_embed the convolution; unpatchify has no other usual form."""
    peers = [Provider("conv3d", _conv3d)] if op == "patch_embed" else []
    return [*backends(op), compiled(op), *peers]
