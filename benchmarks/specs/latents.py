"""kl_sample at the latents of the models' VAEs. B batch, C latent channels."""

from dataclasses import dataclass, replace
from math import prod

import torch

from sora_fast.testing.draw import Draw

from ..case import FORWARD, FULL, QUICK, Case, Provider
from ..providers import backends, compiled
from .shapes import DIT_256, HUNYUAN_720, LTX_480, WAN22_720, WAN_480, latent


@dataclass(frozen=True)
class Latents(Case):
    """``latent``: (B, C, T, H, W) of the sample; moments have 2 C channels."""

    latent: tuple[int, int, int, int, int]

    def shape(self):
        return dict(zip(("batch", "channels", "frames", "height", "width"), self.latent, strict=True))

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        batch, channels, *rest = self.latent
        return dict(moments=draw(batch, 2 * channels, *rest), noise=draw(*self.latent))

    def directions(self):
        return {FORWARD: (), "backward": ("moments",)}  # noise is drawn, not computed

    def least_bytes(self, direction):
        z, kl = prod(self.latent) * self.dtype.itemsize, self.latent[0] * 4
        # Moments are two of z's size. Forward: moments and noise read, z written. Backward: dz, moments and noise read,
        # dmoments written.
        return (4 if direction == FORWARD else 6) * z + kl


def _cases():
    case = Latents("kl_sample", "", torch.bfloat16, FULL, ())
    yield replace(case, label="VideoVAE, small clips", dtype=torch.float32, suites=QUICK, latent=(2, 16, 3, 16, 24))
    yield replace(case, label="Wan, small clip", suites=QUICK, latent=(1, 16, 2, 24, 32))
    yield replace(case, label="Stable Diffusion VAE, 64 images 256px", latent=(64, *latent(4, DIT_256)))
    yield replace(case, label="Wan, 8 clips of 17 frames 256px", latent=(8, 16, 5, 32, 32))
    yield replace(case, label="LTX, 480p", latent=(1, *latent(128, LTX_480, (1, 1, 1))))
    yield replace(case, label="Wan, 480p", latent=(1, *latent(16, WAN_480)))
    yield replace(case, label="Wan2.2 5B, 720p", latent=(1, *latent(48, WAN22_720)))
    yield replace(case, label="Hunyuan, 720p", latent=(1, *latent(16, HUNYUAN_720)))


CASES = tuple(_cases())


def _eager(moments, noise):
    """diffusers' DiagonalGaussianDistribution, in float32: its sum over a sample in 16 bits breaks the error rule."""
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    z = mean + std * noise
    kl = 0.5 * (mean.pow(2) + var - 1.0 - logvar).sum(dim=tuple(range(1, mean.dim())))
    return z.to(moments.dtype), kl


def providers(op: str) -> list[Provider]:
    """Ours, the compiled definition, and the models' composition."""
    return [*backends(op), compiled(op), Provider("eager", _eager)]
