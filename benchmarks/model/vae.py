"""Wan 2.1's VAE: decode and encode of a clip, and a training step, beside diffusers' AutoencoderKLWan.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

import functools
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sora_fast import ops
from sora_fast.dispatch import use_backend
from sora_fast.models import VAEConfig, VideoVAE
from sora_fast.models.vae import PRESETS
from sora_fast.precision import wide_dtype
from sora_fast.testing.draw import Draw

from ..providers import installed
from .case import (
    INPUTS,
    ModelCase,
    ModelProvider,
    anywhere,
    compile_unavailable,
    inference_step,
    model,
    training_step,
)
from .wan import copy_weights, make_wan, wan_parameters

KL_WEIGHT = 1e-6  # of a latent diffusion autoencoder (arXiv 2112.10752, appendix G)
# diffusers clamps pixels to [-1, 1] and we do not: random weights are made so small at the end that no pixel gets there
# (a standard deviation of 0.12, so that 1 is eight of them).
LAST_SCALE = 0.2


@dataclass(frozen=True)
class VAECase(ModelCase):
    """``op``: "wan_vae_decode", "wan_vae_encode" (posterior means), or "vae_training_step" on one clip."""

    config: VAEConfig
    frames: int
    height: int
    width: int

    def shape(self):
        return dict(frames=self.frames, height=self.height, width=self.width, base=self.config.width,
                    latent_channels=self.config.latent_channels)

    def flops(self):
        """Of the convolutions; attention within frames adds 0.5 % to a decode of 480x832 and is left out."""
        return _convolution_flops(self.op, self.config, self.frames, self.height, self.width)

    def providers(self):
        chunks = {"wan_vae_decode": (1, 4), "wan_vae_encode": (4, 16)}.get(self.op, ())
        return [
            anywhere("auto", partial(_ours, backend="auto")), anywhere("torch", partial(_ours, backend="torch")),
            *(anywhere(f"auto_chunk{chunk}", partial(_ours, backend="auto", chunk=chunk)) for chunk in chunks),
            ModelProvider("compile", compile_unavailable, partial(_ours, backend="torch", compiled=True)),
            ModelProvider("diffusers", _no_diffusers, _theirs),
            ModelProvider("diffusers_channels_last", _no_diffusers, partial(_theirs, channels_last=True)),
            ModelProvider("diffusers_compile", lambda case, device: _no_diffusers(case, device)
                          or compile_unavailable(case, device), partial(_theirs, channels_last=True, compiled=True)),
        ]

    def small(self):
        f = self.config.space_factor
        return replace(self, frames=1 + 2 * self.config.time_factor, height=6 * f, width=8 * f)

    def plain_step(self, device, dtype):
        vae = _vae(self, device, dtype)
        return _step(self, _Ours(vae, None, ""), _inputs(self, device, dtype), "reference")

    def scope(self):
        small = self.small()
        what = ("the reconstruction and the gradient of every parameter" if self.op == "vae_training_step"
                else "every pixel" if self.op == "wan_vae_decode" else "every latent")
        return (f"{what} of a clip of {small.frames}x{small.height}x{small.width}, the model and its weights unchanged, "
                f"against the reference in float64")


# ------------------------------------------------------------------------------------------------ FLOPs
@functools.cache
def _convolution_flops(op: str, config: VAEConfig, frames: int, height: int, width: int) -> int:
    """Counted on the meta device, where a step of any size takes a second or less."""
    with torch.device("meta"):
        vae = VideoVAE(config)
        video = torch.empty(1, config.in_channels, frames, height, width)
        latents = torch.empty(1, *vae.latent_shape(frames, height, width))
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        if op == "vae_training_step":
            reconstruction, kl = vae(video, latents)
            (reconstruction.mean() + kl.mean()).backward()
        else:
            with torch.no_grad():
                vae.decode(latents) if op == "wan_vae_decode" else vae.encode(video)
    found = counter.get_flop_counts()["Global"]
    return int(sum(count for name, count in found.items() if "convolution" in str(name)))


# ------------------------------------------------------------------------------------------------ steps
def _vae(case: VAECase, device, dtype=None) -> VideoVAE:
    vae = model(lambda: VideoVAE(case.config), device, case.dtype, dtype)
    with torch.no_grad():
        for parameter in vae.decoder.head.parameters():
            parameter *= LAST_SCALE
    return vae


def _inputs(case: VAECase, device, dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip (1, 3, T, H, W) of random numbers in [-1, 1], and normal latents (1, C, t, h, w)."""
    draw, config = Draw(device, INPUTS, case.dtype), case.config
    small = (1 + (case.frames - 1) // config.time_factor, case.height // config.space_factor,
             case.width // config.space_factor)
    video = draw(1, config.in_channels, case.frames, case.height, case.width).tanh()
    return video.to(dtype or case.dtype), draw(1, config.latent_channels, *small).to(dtype or case.dtype)


def _step(case: VAECase, codec, inputs, backend: str):
    video, latents = inputs
    if case.op == "wan_vae_decode":
        return inference_step(lambda: codec.decode(latents), backend)
    if case.op == "wan_vae_encode":
        return inference_step(lambda: codec.encode(video), backend)

    def forward():
        reconstruction, kl = codec.train(video, latents)  # the latents' numbers serve as the posterior's noise
        wide = wide_dtype(video)
        loss = (reconstruction.to(wide) - video.to(wide)).square().mean() + KL_WEIGHT * kl.mean()
        return {"reconstruction": reconstruction}, loss, None
    return training_step(forward, codec.leaves, backend)


class _Ours:
    """VideoVAE. Inference takes the clip in chunks of so many frames (decode: latent frames), training has it whole.

    Chunk None is the library's own choice. No CUDA graph is made of what is compiled.
    """

    def __init__(self, vae: VideoVAE, chunk: int | None, compiled: str):
        self.vae, self.chunk = vae, chunk
        self.graph = not compiled
        if compiled:  # this method alone, which streams call once per chunk
            setattr(vae, compiled, torch.compile(getattr(vae, compiled), dynamic=False))
        self.train, self.leaves = vae, dict(vae.named_parameters())

    def decode(self, latents):
        return self.vae.decode_clip(latents, chunk=self.chunk, graph=self.graph)

    def encode(self, video):
        if self.chunk is None:
            return self.vae.encode_clip(video, graph=self.graph)
        # the first frame alone, so that every later chunk has one shape
        parts = [video[:, :, :1], *video[:, :, 1:].split(self.chunk, dim=2)]
        return torch.cat(list(self.vae.encode_stream(parts, graph=self.graph)), dim=2)


class _Wan:
    """diffusers' AutoencoderKLWan with our weights; its latents are normalised as ours, outside, as its pipelines do."""

    def __init__(self, vae: VideoVAE, channels_last: bool, compiled: bool):
        weight = vae.to_moments.weight
        self.wan = nn.Module.to(make_wan(vae.config), weight.device, weight.dtype)  # its own to() has a warning here
        copy_weights(vae, self.wan)
        self.ours = {name: p.shape for name, p in vae.named_parameters()}
        self.leaves = wan_parameters(vae, self.wan)
        self.mean, self.std = (t[:, None, None, None] for t in (vae.latent_mean, vae.latent_std))
        self.layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        if channels_last:
            for module in self.wan.modules():
                if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                    module.to(memory_format=torch.channels_last if isinstance(module, nn.Conv2d) else self.layout)
        if compiled:  # decode() and encode() are Python around these two, called once per chunk
            for part in (self.wan.decoder, self.wan.encoder):
                part.forward = torch.compile(part.forward, dynamic=False)

    def decode(self, latents):
        return self.wan.decode(latents * self.std + self.mean, return_dict=False)[0]

    def encode(self, video):
        return (self.wan.encode(video, return_dict=False)[0].mode() - self.mean) / self.std

    def train(self, video, noise):
        moments = self.wan.encode(video, return_dict=False)[0].parameters
        z, kl = ops.kl_sample(moments, noise)
        return self.wan.decode(z, return_dict=False)[0], kl

    def ours_step(self, step):
        """``step`` with its gradients in our parameters' shapes."""
        def reshaped():
            return {name: t.reshape(self.ours.get(name.removeprefix("d "), t.shape)) for name, t in step().items()}
        return reshaped


def _ours(case: VAECase, device, *, backend: str, chunk: int | None = None, compiled: bool = False):
    method = {"wan_vae_decode": "decode", "wan_vae_encode": "moments", "vae_training_step": "forward"}[case.op]
    return _step(case, _Ours(_vae(case, device), chunk, method if compiled else ""), _inputs(case, device), backend)


def _theirs(case: VAECase, device, *, channels_last: bool = False, compiled: bool = False):
    wan = _Wan(_vae(case, device), channels_last, compiled)
    inputs = tuple(t.contiguous(memory_format=wan.layout) for t in _inputs(case, device))
    return wan.ours_step(_step(case, wan, inputs, "torch"))


def _no_diffusers(case: VAECase, device: torch.device) -> str:
    return installed("diffusers")


# ------------------------------------------------------------------------------------------------ cases
_WAN = PRESETS["wan2.1"]
_TINY = replace(_WAN, width=8, latent_channels=4, latent_mean=None, latent_std=None, encoder_blocks=1, decoder_blocks=2)

CASES = [
    VAECase("wan_vae_decode", "Wan 2.1, 81x480x832", torch.bfloat16, ("model",), _WAN, 81, 480, 832),
    VAECase("wan_vae_encode", "Wan 2.1, 81x480x832", torch.bfloat16, ("model",), _WAN, 81, 480, 832),
    VAECase("wan_vae_decode", "Wan 2.1, 81x720x1280", torch.bfloat16, ("model",), _WAN, 81, 720, 1280),
    VAECase("wan_vae_encode", "Wan 2.1, 81x720x1280", torch.bfloat16, ("model",), _WAN, 81, 720, 1280),
    VAECase("vae_training_step", "Wan 2.1, 17x256x256", torch.bfloat16, ("model",), _WAN, 17, 256, 256),
    *(VAECase(op, "width 8, 5x48x64", torch.float32, ("quick",), _TINY, 5, 48, 64)
      for op in ("wan_vae_decode", "wan_vae_encode")),
    VAECase("vae_training_step", "width 8, 5x16x16", torch.bfloat16, ("quick",), _TINY, 5, 16, 16),
]
