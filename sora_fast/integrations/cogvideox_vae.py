"""The autoencoder of CogVideoX, as diffusers has it: its first frame repeated before the clip, norms over a chunk's frames,
in the decoder scaled and shifted by the latent.

B batch, C channels, T frames, H height, W width. Its caches are dictionaries by name, which are kept.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .swapping import Fast, as_built

_CONV = "CogVideoXCausalConv3d"
_CHANGED = "a child was replaced or has a hook"


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


def _plain(conv) -> bool:
    return as_built(conv, _CONV) and CausalConv.unsuited(conv) is None


class CausalConv(Fast):
    runs = "causal_conv3d, the first frame repeated by address"
    reads = ("conv",)

    def forward(self, inputs, conv_cache=None):
        if not as_built(self.conv, "CogVideoXSafeConv3d"):
            return super().forward(inputs, conv_cache)
        return _convolve(self, inputs, conv_cache)

    @staticmethod
    def unsuited(module):
        conv = module.conv
        if module.pad_mode not in ("first", "constant", "replicate") or conv.dilation != (1, 1, 1) or conv.groups != 1:
            return "its padding, groups or dilation are none that CogVideoX has"
        return None if as_built(conv, "CogVideoXSafeConv3d") else _CHANGED


class SpatialNorm(Fast):
    runs = "norm_act; its 1x1x1 convolutions see the latent before it is enlarged, which commutes"
    reads = ("norm_layer", "conv_y", "conv_b")

    def forward(self, f, zq, conv_cache=None):
        if SpatialNorm.unsuited(self) is not None:
            return super().forward(f, zq, conv_cache)
        norm = self.norm_layer
        h = ops.norm_act(f, norm.weight, norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps, act=None)
        scale, shift = (_enlarge(_convolve(conv, zq)[0], f.shape) for conv in (self.conv_y, self.conv_b))
        return h * scale + shift, {"conv_y": None, "conv_b": None}

    @staticmethod
    def unsuited(module):
        plain = as_built(module.norm_layer, "GroupNorm") and _plain(module.conv_y) and _plain(module.conv_b)
        return None if plain else _CHANGED


def _enlarge(z, shape):
    """Nearest neighbour to (T, H, W) of ``shape``; of an odd number of frames the first is one by itself."""
    if shape[2] > 1 and shape[2] % 2 == 1:
        first, rest = (1, *shape[3:]), (shape[2] - 1, *shape[3:])
        return torch.cat([F.interpolate(z[:, :, :1], size=first), F.interpolate(z[:, :, 1:], size=rest)], dim=2)
    return F.interpolate(z, size=shape[2:])


class ResnetBlock(Fast):
    runs = "norm_act_conv3d twice (causal_conv3d behind a spatial norm), the shortcut added in the second"
    reads = ("conv1", "conv2", "conv_shortcut", "nonlinearity", "dropout")

    def forward(self, inputs, temb=None, zq=None, conv_cache=None):
        if temb is not None or not self._intact():
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
        if zq is None and as_built(norm, "GroupNorm") and as_built(self.nonlinearity, "SiLU"):
            y, now[name] = _convolve(conv, x, past.get(name), norm=norm, residual=residual)
            return y
        if zq is None:
            x = norm(x)
        else:
            x, now[f"norm{place}"] = norm(x, zq, conv_cache=past.get(f"norm{place}"))
        y, now[name] = _convolve(conv, self.nonlinearity(x), past.get(name), residual=residual)
        return y

    def _intact(self) -> bool:
        shortcut = getattr(self, "conv_shortcut", None)
        kind = _plain if self.use_conv_shortcut else lambda conv: as_built(conv, "CogVideoXSafeConv3d")
        return (shortcut is None or kind(shortcut)) and _plain(self.conv1) and _plain(self.conv2)

    @staticmethod
    def unsuited(module):
        if type(module.nonlinearity) is not nn.SiLU:
            return "its activation is not SiLU"
        if module.dropout.p:
            return f"dropout of {module.dropout.p:g} stands between norm and convolution"
        return None if ResnetBlock._intact(module) else _CHANGED


class Upsample(Fast):
    runs = "causal_conv3d, upsampling in space by address"
    reads = ("conv",)

    def forward(self, inputs):
        if not as_built(self.conv, "Conv2d"):
            return super().forward(inputs)
        if self.compress_time and inputs.shape[2] > 1:
            odd = inputs.shape[2] % 2
            inputs = torch.cat([inputs[:, :, :odd], inputs[:, :, odd:].repeat_interleave(2, dim=2)], dim=2)
        return ops.causal_conv3d(inputs, self.conv.weight[:, :, None], self.conv.bias, padding=(1, 1, 1, 1), upsample=2)

    @staticmethod
    def unsuited(module):
        conv = module.conv
        if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or conv.padding != (1, 1):
            return "its convolution is none that CogVideoX has"
        return None if as_built(conv, "Conv2d") else _CHANGED


class Downsample(Fast):
    runs = "causal_conv3d with stride"
    reads = ("conv",)

    def forward(self, x):
        if not as_built(self.conv, "Conv2d"):
            return super().forward(x)
        if self.compress_time:
            odd = x.shape[2] % 2
            x = torch.cat([x[:, :, :odd], (x[:, :, odd::2] + x[:, :, odd + 1 :: 2]) / 2], dim=2)
        return ops.causal_conv3d(x, self.conv.weight[:, :, None], self.conv.bias, stride=(1, 2, 2), padding=(0, 1, 0, 1))

    @staticmethod
    def unsuited(module):
        conv = module.conv
        if conv.kernel_size != (3, 3) or conv.stride != (2, 2) or conv.padding != (0, 0):
            return "its convolution is none that CogVideoX has"
        return None if as_built(conv, "Conv2d") else _CHANGED


_VAE = "diffusers.models.autoencoders.autoencoder_kl_cogvideox"
SWAPS = {f"{_VAE}.CogVideoX{name}": mixin for name, mixin in {
    "CausalConv3d": CausalConv, "SpatialNorm3D": SpatialNorm, "ResnetBlock3D": ResnetBlock}.items()}
SWAPS |= {"diffusers.models.upsampling.CogVideoXUpsample3D": Upsample,
          "diffusers.models.downsampling.CogVideoXDownsample3D": Downsample}
_OWN = "diffusers' own; its children are swapped one by one"
KNOWN = {f"{_VAE}.{name}": _OWN for name in (
    "AutoencoderKLCogVideoX", "CogVideoXEncoder3D", "CogVideoXDecoder3D", "CogVideoXDownBlock3D", "CogVideoXMidBlock3D",
    "CogVideoXUpBlock3D")}
KNOWN[f"{_VAE}.CogVideoXSafeConv3d"] = "a convolution that diffusers cuts in time above 2 GB"
