"""VideoVAE: a causal 3-D autoencoder that compresses clips in time and space; an image is a clip of one frame.

The architecture is Wan 2.1's (preset "wan2.1"). The preset "tiny" is a small one with pixel-unshuffled inputs and a linear
codec around the network, which training initialises by PCA: it trains in minutes on a CPU. Convolutions are causal and norms
per pixel or frame, so a clip can be encoded and decoded in chunks of any sizes with the same result, in constant memory.

B batch, C latent channels, D channels of a level, T frames, H height, W width; t, h, w of the latents:
T = 1 + time_factor * (t - 1), H = f * h.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks, ops
from ..nn import CausalConv3d, RMSNorm, StreamState, VectorQuantizer, norm_act_conv
from ..nn.streaming import starts
from ..other_names import Elsewhere, Named, preset
from .linear_path import LinearPath
from .vae_stream import Streaming

# Mean and standard deviation of Wan 2.1's 16 latent channels, as published with the model.
_WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
             0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig(Named):
    """Sizes of a VideoVAE.

    ``in_channels`` of the pixels, ``latent_channels`` C; ``encoder_blocks`` and ``decoder_blocks``: residual blocks of a
    level; ``attention``: within each frame, at the coarsest level; ``latent_mean``, ``latent_std``: of each latent channel.

    ``space_factor`` f = 2^m and ``time_factor`` (1, 2, 4, 8) determine the number of levels; ``multipliers`` of ``width``
    give the channels of each level (the last one is repeated, or the list truncated, to that number).
    ``time_levels``: whether each level but the last halves time, finest first; None: as late as possible.
    ``patch``: pixels per side that are unshuffled into channels first. ``linear_path``: a linear codec of pixel blocks
    around the network. ``linear_heads``: no norm and activation before the last convolution of encoder and decoder.
    ``regularisation`` of the latents: "kl" (posterior close to the unit normal) or "vq" (the decoder gets the nearest of
    ``codes`` learned vectors).

    Raises:
        ValueError: sizes that do not fit each other. TypeError: an unknown field, with the right name.
    """

    in_channels: int = 3
    latent_channels: int = 16
    width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    space_factor: int = 8
    time_factor: int = 4
    patch: int = 1
    linear_path: bool = False
    linear_heads: bool = False
    attention: bool = True
    regularisation: str = "kl"
    codes: int = 8192
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    time_levels: tuple[bool, ...] | None = None

    def __post_init__(self):
        for name in ("in_channels", "latent_channels", "width", "encoder_blocks", "decoder_blocks", "codes"):
            if getattr(self, name) < 1:
                raise ValueError(f"VAEConfig: expected {name} of 1 or more, got {getattr(self, name)}; pass a larger one")
        for name in ("space_factor", "time_factor", "patch"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"VAEConfig: expected {name} to be a power of two, got {value}; use 1, 2, 4, 8, ...")
        if self.time_factor > 8:
            raise ValueError(f"VAEConfig: expected time_factor of 8 or less, got {self.time_factor}; use 1, 2, 4 or 8")
        if self.patch > self.space_factor:
            raise ValueError(f"VAEConfig: expected patch to divide space_factor {self.space_factor}, got {self.patch}; "
                             f"make patch smaller")
        if self.regularisation not in ("kl", "vq"):
            raise ValueError(f"VAEConfig: expected regularisation to be 'kl' or 'vq', got {self.regularisation!r}; choose "
                             f"one of them")
        levels, times = len(self.resamples), int(math.log2(self.time_factor))
        if self.time_levels is not None and (len(self.time_levels) != levels or sum(self.time_levels) != times):
            raise ValueError(f"VAEConfig: expected time_levels of {levels} levels, {times} of which halve time, got "
                             f"{self.time_levels}; name each level but the last")
        for name in ("latent_mean", "latent_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise ValueError(f"VAEConfig: expected {name} of {self.latent_channels} elements, got {len(value)}; "
                                 f"give one per latent channel")

    @property
    def resamples(self) -> tuple[tuple[bool, bool], ...]:
        """(halves space, halves time) after each level but the last."""
        space, time = int(math.log2(self.space_factor // self.patch)), int(math.log2(self.time_factor))
        levels = max(space, time)
        late = tuple(i >= levels - time for i in range(levels))
        return tuple((i < space, *(self.time_levels or late)[i : i + 1]) for i in range(levels))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        count = len(self.resamples) + 1
        multipliers = (self.multipliers + self.multipliers[-1:] * count)[:count]
        return tuple(self.width * m for m in multipliers)


PRESETS = {
    "wan2.1": VAEConfig(latent_mean=_WAN_MEAN, latent_std=_WAN_STD),
    "tiny": VAEConfig(width=32, multipliers=(1, 2, 4), encoder_blocks=1, decoder_blocks=1, patch=2, linear_path=True,
                      linear_heads=True, attention=False),
}


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3x3x3 convolution, plus a shortcut; at initialisation only the shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(inputs, act="silu"), CausalConv3d(inputs, outputs, 3)
        self.norm2, self.conv2 = RMSNorm(outputs, act="silu"), CausalConv3d(outputs, outputs, 3)
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else None
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, state):
        h = norm_act_conv(self.norm1, self.conv1, x, state)  # (B, Din, T, H, W) -> (B, Dout, T, H, W)
        shortcut = x if self.shortcut is None else self.shortcut(x)  # (B, Dout, T, H, W)
        return norm_act_conv(self.norm2, self.conv2, h, state, residual=shortcut)  # (B, Dout, T, H, W)


class FrameAttention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.to_qkv = CausalConv3d(channels, 3 * channels, 1)
        self.proj = CausalConv3d(channels, channels, 1)

    def forward(self, x):
        batch, channels, frames, height, width = x.shape
        qkv = self.to_qkv(self.norm(x))  # (B, 3 D, T, H, W)
        qkv = qkv.permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, 3 * channels)  # (B T, 1, H W, 3 D)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # (B T, 1, H W, D)
        out = out.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)  # (B, D, T, H, W)
        return self.proj(out, residual=x)  # (B, D, T, H, W)


class Downsample(nn.Module):
    """Halves height and width (3x3, stride 2), then the frames: keeps the first and convolves the others with stride 2."""

    def __init__(self, channels: int, space: bool, time: bool):
        super().__init__()
        self.space_conv = CausalConv3d(channels, channels, (1, 3, 3), (1, 2, 2), padding=(0, 1, 0, 1)) if space else None
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), (2, 1, 1), phase=2) if time else None

    def forward(self, x, state):
        if self.space_conv is not None:
            x = self.space_conv(x)  # (B, D, T, H / 2, W / 2)
        if self.time_conv is None:
            return x
        first = x[:, :, :1] if starts(self, x, state) else x[:, :, :0]
        return torch.cat([first, self.time_conv(x, state)], dim=2)  # (B, D, 1 + (T - 1) / 2, H / 2, W / 2)


class Upsample(nn.Module):
    """Doubles the frames except the first, which the others do not depend on, then height and width (3x3)."""

    def __init__(self, inputs: int, outputs: int, space: bool, time: bool):
        super().__init__()
        self.time_conv = CausalConv3d(inputs, 2 * inputs, (3, 1, 1)) if time else None
        self.space_conv = CausalConv3d(inputs, outputs, (1, 3, 3) if space else 1, upsample=2 if space else 1)

    def forward(self, x, state):
        if self.time_conv is not None:
            split = 1 if starts(self, x, state) else 0
            first, rest = x[:, :, :split], x[:, :, split:]
            pairs = self.time_conv(rest, state).unflatten(1, (2, -1))  # (B, 2, D, T - 1, H, W)
            x = torch.cat([first, pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)  # (B, D, 1 + 2 (T - 1), H, W)
        return self.space_conv(x)  # (B, Dout, 1 + 2 (T - 1), 2 H, 2 W)


class Level(nn.Module):
    """Residual blocks, then the resampling."""

    def __init__(self, blocks, resample=None):
        super().__init__()
        self.blocks, self.resample = nn.ModuleList(blocks), resample

    def forward(self, x, state):
        for block in self.blocks:
            x = block(x, state)
        return x if self.resample is None else self.resample(x, state)


class Middle(nn.Module):
    """Residual block, attention within each frame, residual block, at the coarsest level."""

    def __init__(self, channels: int):
        super().__init__()
        self.block1, self.attention, self.block2 = (
            ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels))

    def forward(self, x, state):
        return self.block2(self.attention(self.block1(x, state)), state)


class Encoder(nn.Module):
    """(B, 3 p p, T, H / p, W / p) -> (B, 2 C, t, h, w); p: ``patch``."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, resamples = config.widths, (*config.resamples, None)
        self.stem = CausalConv3d(config.in_channels * config.patch**2, config.width, 3)
        self.levels, channels = nn.ModuleList(), config.width
        for outputs, resample in zip(widths, resamples, strict=True):
            blocks = [ResidualBlock(channels if i == 0 else outputs, outputs) for i in range(config.encoder_blocks)]
            self.levels.append(Level(blocks, Downsample(outputs, *resample) if resample else None))
            channels = outputs
        self.middle = Middle(channels) if config.attention else None
        self.norm = None if config.linear_heads else RMSNorm(channels, act="silu")
        self.head = CausalConv3d(channels, 2 * config.latent_channels, 3)

    def forward(self, x, state=None):
        x = self.stem(x, state)  # (B, 3 p p, T, H / p, W / p) -> (B, width, T, H / p, W / p)
        for level in self.levels:
            x = level(x, state) if x.shape[2] else x  # (B, D, T', H', W') of each level, at last (B, D, t, h, w)
        if x.shape[2] == 0:  # a chunk too short for a latent frame
            return x.new_zeros((x.shape[0], self.head.out_channels, 0, *x.shape[3:]))
        if self.middle is not None:
            x = self.middle(x, state)  # (B, D, t, h, w)
        # (B, 2 C, t, h, w)
        return self.head(x, state) if self.norm is None else norm_act_conv(self.norm, self.head, x, state)


class Decoder(nn.Module):
    """(B, C, t, h, w) -> (B, 3 p p, T, H / p, W / p); p: ``patch``."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, resamples = config.widths[::-1], (*config.resamples[::-1], None)
        self.stem = CausalConv3d(config.latent_channels, widths[0], 3)
        self.middle = Middle(widths[0]) if config.attention else None
        self.levels, channels = nn.ModuleList(), widths[0]
        for outputs, resample in zip(widths, resamples, strict=True):
            blocks = [ResidualBlock(channels if i == 0 else outputs, outputs) for i in range(config.decoder_blocks)]
            self.levels.append(Level(blocks, Upsample(outputs, outputs // 2, *resample) if resample else None))
            channels = outputs // 2 if resample else outputs  # upsampling halves the channels
        self.norm = None if config.linear_heads else RMSNorm(channels, act="silu")
        self.head = CausalConv3d(channels, config.in_channels * config.patch**2, 3)

    def forward(self, x, state=None):
        x = self.stem(x, state)  # (B, C, t, h, w) -> (B, D, t, h, w)
        if self.middle is not None:
            x = self.middle(x, state)  # (B, D, t, h, w)
        for level in self.levels:
            x = level(x, state)  # (B, D, T', H', W') of each level, at last (B, D, T, H / p, W / p)
        # (B, 3 p p, T, H / p, W / p)
        return self.head(x, state) if self.norm is None else norm_act_conv(self.norm, self.head, x, state)


class VideoVAE(Streaming, Named):
    """Causal video autoencoder with a KL posterior or a codebook. (LDM: arXiv 2112.10752; causal video: arXiv 2310.05737.)

    Pixels are in [-1, 1]. encode normalises latents, ``(z - latent_mean) / latent_std``, and decode reverts it. With "vq"
    the codebook belongs to the decoder, as in LDM: latents are not yet quantised.

    Args:
        config: VAEConfig; ``VideoVAE.preset(name, **changes)`` has the usual ones.

    Raises:
        ValueError, TypeError: when called, a clip of another shape or a length other than 1 + time_factor * k.

    >>> vae = VideoVAE.preset("tiny")
    >>> latents = vae.encode(torch.rand(1, 3, 9, 32, 48) * 2 - 1)       # (1, 16, 3, 4, 6)
    >>> for frames in vae.decode_stream(latents):
    ...     assert frames.shape[3:] == (32, 48)     # constant memory, whatever the length
    >>> video = vae.decode_clip(latents)            # the same as one tensor, with the peak memory of one chunk
    """

    def __init__(self, config: VAEConfig = PRESETS["wan2.1"]):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        vq = config.regularisation == "vq"
        self.to_moments = CausalConv3d(2 * channels, channels if vq else 2 * channels, 1)
        self.quantizer = VectorQuantizer(config.codes, channels) if vq else None
        self.from_latents = CausalConv3d(channels, channels, 1)
        self.linear_path = None
        if config.linear_path:
            self.linear_path = LinearPath(config.in_channels, channels, config.time_factor, config.space_factor)
            for head in (self.encoder.head, self.decoder.head):  # at initialisation only the linear path contributes
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        self.register_buffer("latent_mean", torch.tensor(config.latent_mean or [0.0] * channels))
        self.register_buffer("latent_std", torch.tensor(config.latent_std or [1.0] * channels))
        if not vq:  # small posterior noise at initialisation, so that the decoder sees the signal
            nn.init.constant_(self.to_moments.bias[channels:], -6.0)

    @classmethod
    def preset(cls, name: str, **changes) -> "VideoVAE":
        """``"wan2.1"`` or ``"tiny"``, with fields of VAEConfig changed by keyword."""
        config = preset("VideoVAE", PRESETS, name)
        if {"latent_channels", "regularisation"} & changes.keys():  # the preset's statistics are of other latents
            changes = dict(latent_mean=None, latent_std=None) | changes
        return cls(replace(config, **changes))

    from_pretrained = Elsewhere("sora_fast.models.load_vae(path)")

    # ------------------------------------------------------------------------------------------------ encode
    def encode(self, video, noise=None):
        """Normalised latents (B, C, t, h, w) of pixels (B, 3, T, H, W).

        Args:
            noise: (B, C, t, h, w) standard normal samples to sample the posterior with; None: its mean. "vq" ignores it.

        Raises:
            ValueError: sizes that do not fit, naming the nearest that do.
        """
        self._check_video(video)
        return self._latents(self.moments(video), noise)

    def moments(self, video, state: StreamState | None = None):
        """Mean and log-variance (B, 2 C, t, h, w) before normalisation; ``state`` for a chunk of a stream.

        With "vq" (B, C, t, h, w), before quantisation: the first C channels are the latent in both cases.
        """
        x, p = video, self.config.patch
        if p > 1:
            x = video.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # (B, 3, T, H / p, p, W / p, p)
            x = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # (B, 3 p p, T, H / p, W / p)
        moments = self.to_moments(self.encoder(x, state))  # (B, 2 C, t, h, w), with "vq" (B, C, t, h, w)
        if self.linear_path is not None and video.shape[2]:
            mean = self.linear_path.down(self.linear_path.fold(video, state))  # (B, C, t, h, w)
            if mean.shape[2]:
                moments = moments + F.pad(mean, (0, 0, 0, 0, 0, 0, 0, moments.shape[1] - mean.shape[1]))
        return moments

    # ------------------------------------------------------------------------------------------------ decode
    def decode(self, latents, state: StreamState | None = None):
        """Pixels (B, 3, T, H, W), approximately in [-1, 1], of normalised latents (B, C, t, h, w); ``state`` for a chunk."""
        self._check_latents(latents)
        z = latents * _per_channel(self.latent_std, latents) + _per_channel(self.latent_mean, latents)
        return self._pixels(z if self.quantizer is None else self.quantizer(z).latent, state)

    def _pixels(self, z, state: StreamState | None = None):
        """Pixels of latents that are denormalised and, with "vq", quantised."""
        video = self.decoder(self.from_latents(z), state)  # (B, 3 p p, T, H / p, W / p)
        p = self.config.patch
        if p > 1:
            x = video.unflatten(1, (-1, p, p))  # (B, 3, p, p, T, H / p, W / p)
            video = x.permute(0, 1, 4, 5, 3, 6, 2).flatten(-2).flatten(-3, -2)  # (B, 3, T, H, W)
        if self.linear_path is not None:
            video = video + self.linear_path.unfold(self.linear_path.up(z), state)
        return video

    # ------------------------------------------------------------------------------------------------ training
    def forward(self, video, noise=None):
        """``(reconstruction, kl)``: pixels like ``video`` and the posterior's KL (B,) in nats.

        With "vq" the second is the quantizer's loss (B,), a mean over a sample's elements, to be weighted by about 1.
        """
        self._check_video(video)
        moments = self.moments(video)  # (B, 2 C, t, h, w), with "vq" (B, C, t, h, w)
        if self.quantizer is not None:
            quantized = self.quantizer(moments)  # latent (B, C, t, h, w), loss (B,)
            return self._pixels(quantized.latent), quantized.loss  # (B, 3, T, H, W), (B,)
        z, kl = ops.kl_sample(moments, noise)  # (B, C, t, h, w), (B,)
        return self.decode(self._normalised(z)), kl  # (B, 3, T, H, W), (B,)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip of ``frames`` x ``height`` x ``width`` pixels."""
        f = self.config.space_factor
        return self.config.latent_channels, 1 + (frames - 1) // self.config.time_factor, height // f, width // f

    def _normalised(self, z):
        return (z - _per_channel(self.latent_mean, z)) / _per_channel(self.latent_std, z)

    @torch.no_grad()
    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Store the latents' mean and std (C,), used in both directions from now on."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _latents(self, moments, noise=None):
        return self._normalised(ops.kl_sample(moments, noise)[0] if self.quantizer is None else moments)

    def _check_latents(self, latents) -> None:
        checks.tensor("VideoVAE.decode", "latents", latents)
        channels = self.config.latent_channels
        if latents.dim() != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
            raise ValueError(f"VideoVAE.decode: expected latents (B, {channels}, t, h, w) with t of 1 or more, got "
                             f"{tuple(latents.shape)}; pass what encode gives")

    def _check_video(self, video, length: bool = True) -> None:
        checks.tensor("VideoVAE.encode", "video", video)
        if not video.is_floating_point():
            raise TypeError(f"VideoVAE.encode: expected pixels of a floating dtype in [-1, 1], got {video.dtype}; pass "
                            f"video.float() / 127.5 - 1")
        channels, f = self.config.in_channels, self.config.space_factor
        if video.dim() != 5 or video.shape[1] != channels:
            raise ValueError(f"VideoVAE.encode: expected video (B, {channels}, T, H, W), got {tuple(video.shape)}; an "
                             f"image is a clip of one frame")
        for name, size in (("height", video.shape[3]), ("width", video.shape[4])):
            if size == 0 or size % f:
                low, high = size // f * f, -(-size // f) * f
                near = f"{low} or {high}" if low else f"{high or f}"
                raise ValueError(f"VideoVAE.encode: expected a {name} that is a multiple of {f}, got {size}; crop or "
                                 f"pad to {near}")
        if length:
            self._check_length(video.shape[2])
        if checks.looked_at(video) and video.numel():
            low, high = (float(pixel) for pixel in video.detach().aminmax())
            if low >= 0 and high > 2:
                checks.warn_once(self, "pixels", f"VideoVAE.encode: expected pixels in [-1, 1], got {low:g} to {high:g}; "
                                 f"pass video / 127.5 - 1 where they are 0 to 255")

    def _check_length(self, frames: int) -> None:
        step = self.config.time_factor
        if frames < 1 or (frames - 1) % step:
            low = (frames - 1) // step * step + 1
            near = f"{low} or {low + step}" if frames > 1 else "1"
            raise ValueError(f"VideoVAE.encode: expected 1 + {step} k frames, got {frames}; the nearest lengths are "
                             f"{near}")


def _per_channel(values_C, like):
    return values_C.to(like.dtype)[:, None, None, None]
