"""The autoencoder of CogVideoX, as diffusers has it: its first frame repeated before the clip, norms over a chunk's frames,
in the decoder scaled and shifted by the latent.

B batch, C channels, T frames, H height, W width. Its caches are dictionaries by name, which are kept.
"""

import torch
import torch.nn.functional as F

from .. import ops
from .known import CONV2D, DROPOUT, GROUP_NORM, ITS_CHILDREN, SILU, STRIDED_CONV2D, anything
from .mixin import Fast, Kind, held

_VAE = "diffusers.models.autoencoders.autoencoder_kl_cogvideox"


def _convolve(conv, x, cache=None, *, norm=None, residual=None):
    """``(y, cache)`` of a CogVideoXCausalConv3d; ``norm``: an nn.GroupNorm and SiLU in front of it."""
    weight, behind = conv.conv.weight, conv.time_kernel_size - 1
    space = "replicate" if conv.pad_mode == "replicate" else "zeros"
    settings = dict(stride=conv.conv.stride, padding=(conv.width_pad,) * 2 + (conv.height_pad,) * 2, time_pad="replicate",
                    space_pad=space, residual=residual)
    op = ops.causal_conv3d
    if norm is not None:
        op = ops.norm_act_conv3d
        settings |= dict(norm_weight=norm.weight, norm_bias=norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps,
                         act="silu")
    if behind == 0 or conv.pad_mode == "replicate":  # without a past
        return op(x, weight, conv.conv.bias, **settings), None
    y, seen = op(x, weight, conv.conv.bias, cache=cache, return_cache=True, **settings)
    if seen.shape[2] < behind:  # a first chunk of one frame: diffusers' cache has its copies too
        seen = torch.cat([seen[:, :, :1]] * (behind - seen.shape[2]) + [seen], dim=2)
    return y, seen


def _reads_as_causal(conv) -> bool:
    """Its convolution pads in space what ours does, and it repeats the frames that its kernel needs in front."""
    inner, space, behind = held(conv, "conv"), (conv.width_pad,) * 2 + (conv.height_pad,) * 2, conv.time_kernel_size - 1
    if conv.pad_mode not in ("first", "constant", "replicate") or not _SAFE(inner):
        return False
    if held(inner, "weight").shape[2] != behind + 1:
        return False
    if conv.pad_mode == "replicate":
        return inner.padding == (0, 0, 0) and tuple(conv.time_causal_padding) == (*space, behind, 0)
    return inner.padding == (0, conv.height_pad, conv.width_pad)


# It cuts what is above 2 GB by its kernel_size.
_SAFE = Kind(f"{_VAE}.CogVideoXSafeConv3d", methods=("forward", "_conv_forward"), read="weight bias stride padding",
             groups=1, dilation=(1, 1, 1), padding_mode="zeros",
             rule=lambda conv: conv.kernel_size == held(conv, "weight").shape[2:])
_POINTS = _SAFE.but(kernel=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0))
_CONV = Kind(f"{_VAE}.CogVideoXCausalConv3d", methods=("forward", "fake_context_parallel_forward"), rule=_reads_as_causal,
             read="conv pad_mode width_pad height_pad time_kernel_size time_causal_padding")
_POINTS_IN_CONV = _CONV.but(time_kernel_size=1, rule=lambda conv: _reads_as_causal(conv) and _POINTS(held(conv, "conv")))


class CausalConv(Fast):
    runs = "causal_conv3d, the first frame repeated by address"
    reads = dict(conv=_SAFE)

    def forward(self, inputs, conv_cache=None):
        if not _CONV.settled(self):
            return super().forward(inputs, conv_cache)
        return _convolve(self, inputs, conv_cache)

    @classmethod
    def unsuited(cls, module):
        if _CONV.settled(module):
            return None
        return super().unsuited(module) or "its padding, groups or dilation are none that CogVideoX has"


class SpatialNorm(Fast):
    runs = "norm_act; its 1x1x1 convolutions see the latent before it is enlarged, which commutes"
    reads = dict(norm_layer=GROUP_NORM, conv_y=_POINTS_IN_CONV, conv_b=_POINTS_IN_CONV)

    def forward(self, f, zq, conv_cache=None):
        if SpatialNorm.unsuited(self):
            return super().forward(f, zq, conv_cache)
        norm = self.norm_layer
        h = ops.norm_act(f, norm.weight, norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps, act=None)
        scale, shift = (_enlarge(_convolve(conv, zq)[0], f.shape) for conv in (self.conv_y, self.conv_b))
        return h * scale + shift, {"conv_y": None, "conv_b": None}


def _enlarge(z, shape):
    """Nearest neighbour to (T, H, W) of ``shape``; of an odd number of frames the first is one by itself."""
    if shape[2] > 1 and shape[2] % 2 == 1:
        first, rest = (1, *shape[3:]), (shape[2] - 1, *shape[3:])
        return torch.cat([F.interpolate(z[:, :, :1], size=first), F.interpolate(z[:, :, 1:], size=rest)], dim=2)
    return F.interpolate(z, size=shape[2:])


class ResnetBlock(Fast):
    runs = "norm_act_conv3d twice (causal_conv3d behind a spatial norm), the shortcut added in the second"
    reads = dict(conv1=_CONV, conv2=_CONV, conv_shortcut=anything, nonlinearity=anything, dropout=DROPOUT)

    def forward(self, inputs, temb=None, zq=None, conv_cache=None):
        if temb is not None or ResnetBlock.unsuited(self):
            return super().forward(inputs, temb, zq, conv_cache)
        past, now = conv_cache or {}, {}
        h = self._half(1, inputs, zq, past, now)
        if self.in_channels == self.out_channels:
            shortcut = inputs
        elif self.use_conv_shortcut:
            shortcut, now["conv_shortcut"] = _convolve(self.conv_shortcut, inputs, past.get("conv_shortcut"))
        else:
            shortcut = ops.causal_conv3d(inputs, self.conv_shortcut.weight, self.conv_shortcut.bias)
        return self._half(2, h, zq, past, now, shortcut), now

    def _half(self, place, x, zq, past, now, residual=None):
        """Norm, SiLU and convolution ``place``; its cache goes into ``now``."""
        norm, conv = getattr(self, f"norm{place}"), getattr(self, f"conv{place}")
        name = f"conv{place}"
        if zq is None and GROUP_NORM(norm) and SILU(self.nonlinearity):
            y, now[name] = _convolve(conv, x, past.get(name), norm=norm, residual=residual)
            return y
        if zq is None:
            x = norm(x)
        else:
            x, now[f"norm{place}"] = norm(x, zq, conv_cache=past.get(f"norm{place}"))
        y, now[name] = _convolve(conv, self.nonlinearity(x), past.get(name), residual=residual)
        return y

    @classmethod
    def unsuited(cls, module):
        if module.in_channels != module.out_channels:
            may_be_read = _CONV if module.use_conv_shortcut else _POINTS
            if not may_be_read(module.conv_shortcut):
                return "its conv_shortcut was replaced, has a hook, or is set to what is not read past it"
        return super().unsuited(module)


class Upsample(Fast):
    runs = "causal_conv3d, upsampling in space by address"
    reads = dict(conv=CONV2D)

    def forward(self, inputs):
        if Upsample.unsuited(self):
            return super().forward(inputs)
        if self.compress_time and inputs.shape[2] > 1:
            odd = inputs.shape[2] % 2
            inputs = torch.cat([inputs[:, :, :odd], inputs[:, :, odd:].repeat_interleave(2, dim=2)], dim=2)
        return ops.causal_conv3d(inputs, self.conv.weight[:, :, None], self.conv.bias, padding=(1, 1, 1, 1), upsample=2)


class Downsample(Fast):
    runs = "causal_conv3d with stride"
    reads = dict(conv=STRIDED_CONV2D)

    def forward(self, x):
        if Downsample.unsuited(self):
            return super().forward(x)
        if self.compress_time:
            odd = x.shape[2] % 2
            x = torch.cat([x[:, :, :odd], (x[:, :, odd::2] + x[:, :, odd + 1 :: 2]) / 2], dim=2)
        return ops.causal_conv3d(x, self.conv.weight[:, :, None], self.conv.bias, stride=(1, 2, 2), padding=(0, 1, 0, 1))


SWAPS = {f"{_VAE}.CogVideoX{name}": mixin for name, mixin in {
    "CausalConv3d": CausalConv, "SpatialNorm3D": SpatialNorm, "ResnetBlock3D": ResnetBlock}.items()}
SWAPS |= {"diffusers.models.upsampling.CogVideoXUpsample3D": Upsample,
          "diffusers.models.downsampling.CogVideoXDownsample3D": Downsample}
KNOWN = {f"{_VAE}.{name}": ITS_CHILDREN for name in (
    "AutoencoderKLCogVideoX", "CogVideoXEncoder3D", "CogVideoXDecoder3D", "CogVideoXDownBlock3D", "CogVideoXMidBlock3D",
    "CogVideoXUpBlock3D")}
KNOWN[f"{_VAE}.CogVideoXSafeConv3d"] = "a convolution that diffusers cuts in time above 2 GB"
