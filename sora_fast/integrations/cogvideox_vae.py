"""The autoencoder of CogVideoX, as diffusers has it: time padding replicates the first frame, and norms are over the frames
of a chunk, in the decoder modulated by the latent.

B batch, C channels, T frames, H height, W width. Its caches are dictionaries by name, as in diffusers.
"""

import torch
import torch.nn.functional as F

from .. import ops
from .known import CONV2D, DROPOUT, GROUP_NORM, ITS_CHILDREN, SILU, STRIDED_CONV2D, always
from .mixin import Fast, Kind, get_member

_VAE = "diffusers.models.autoencoders.autoencoder_kl_cogvideox"


def _convolve(conv, x, cache=None, *, norm=None, residual=None):
    """``(y, cache)`` of a CogVideoXCausalConv3d; ``norm``: an nn.GroupNorm and SiLU in front of it."""
    weight, past_frames = conv.conv.weight, conv.time_kernel_size - 1
    space = "replicate" if conv.pad_mode == "replicate" else "zeros"
    settings = dict(stride=conv.conv.stride, padding=(conv.width_pad,) * 2 + (conv.height_pad,) * 2, time_pad="replicate",
                    space_pad=space, residual=residual)
    op = ops.causal_conv3d
    if norm is not None:
        op = ops.norm_act_conv3d
        settings |= dict(norm_weight=norm.weight, norm_bias=norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps,
                         act="silu")
    if past_frames == 0 or conv.pad_mode == "replicate":  # no cache
        return op(x, weight, conv.conv.bias, **settings), None
    y, cache_out = op(x, weight, conv.conv.bias, cache=cache, return_cache=True, **settings)
    if cache_out.shape[2] < past_frames:  # a first chunk of one frame: diffusers caches copies of it
        cache_out = torch.cat([cache_out[:, :, :1]] * (past_frames - cache_out.shape[2]) + [cache_out], dim=2)
    return y, cache_out


def _is_causal(conv) -> bool:
    """Whether it pads space as ours does, and replicates the first frame as often as its kernel needs."""
    inner, past_frames = get_member(conv, "conv"), conv.time_kernel_size - 1
    space = (conv.width_pad,) * 2 + (conv.height_pad,) * 2
    if conv.pad_mode not in ("first", "constant", "replicate") or not _SAFE_CONV(inner):
        return False
    if get_member(inner, "weight").shape[2] != past_frames + 1:
        return False
    if conv.pad_mode == "replicate":
        return inner.padding == (0, 0, 0) and tuple(conv.time_causal_padding) == (*space, past_frames, 0)
    return inner.padding == (0, conv.height_pad, conv.width_pad)


# It splits inputs above 2 GB by its kernel_size.
_SAFE_CONV = Kind(f"{_VAE}.CogVideoXSafeConv3d", methods=("forward", "_conv_forward"), reads="weight bias stride padding",
                  groups=1, dilation=(1, 1, 1), padding_mode="zeros",
                  rule=lambda conv: conv.kernel_size == get_member(conv, "weight").shape[2:])
_POINTWISE = _SAFE_CONV.with_settings(kernel=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0))
_CONV = Kind(f"{_VAE}.CogVideoXCausalConv3d", methods=("forward", "fake_context_parallel_forward"), rule=_is_causal,
             reads="conv pad_mode width_pad height_pad time_kernel_size time_causal_padding")
_POINTWISE_CAUSAL = _CONV.with_settings(
    time_kernel_size=1, rule=lambda conv: _is_causal(conv) and _POINTWISE(get_member(conv, "conv")))


class CausalConv(Fast):
    report = "causal_conv3d, the first frame repeated by address"
    absorbs = dict(conv=_SAFE_CONV)

    def forward(self, inputs, conv_cache=None):
        if not _CONV.matches_settings(self):
            return super().forward(inputs, conv_cache)
        return _convolve(self, inputs, conv_cache)

    @classmethod
    def why_not(cls, module):
        if _CONV.matches_settings(module):
            return None
        return super().why_not(module) or "its padding, groups or dilation are not a configuration of CogVideoX"


class SpatialNorm(Fast):
    report = "norm_act; its 1x1x1 convolutions run before the latent is upsampled, which commutes"
    absorbs = dict(norm_layer=GROUP_NORM, conv_y=_POINTWISE_CAUSAL, conv_b=_POINTWISE_CAUSAL)

    def forward(self, f, zq, conv_cache=None):
        if SpatialNorm.why_not(self):
            return super().forward(f, zq, conv_cache)
        norm = self.norm_layer
        h = ops.norm_act(f, norm.weight, norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps, act=None)
        scale, shift = (_upsample_to(_convolve(conv, zq)[0], f.shape) for conv in (self.conv_y, self.conv_b))
        return h * scale + shift, {"conv_y": None, "conv_b": None}


def _upsample_to(z, shape):
    """Nearest-neighbour upsampling to (T, H, W) of ``shape``; the first of an odd number of frames is done separately."""
    if shape[2] > 1 and shape[2] % 2 == 1:
        first, rest = (1, *shape[3:]), (shape[2] - 1, *shape[3:])
        return torch.cat([F.interpolate(z[:, :, :1], size=first), F.interpolate(z[:, :, 1:], size=rest)], dim=2)
    return F.interpolate(z, size=shape[2:])


class ResnetBlock(Fast):
    report = "norm_act_conv3d twice (causal_conv3d after a spatial norm), the shortcut added in the second"
    absorbs = dict(conv1=_CONV, conv2=_CONV, conv_shortcut=always, nonlinearity=always, dropout=DROPOUT)

    def forward(self, inputs, temb=None, zq=None, conv_cache=None):
        if temb is not None or ResnetBlock.why_not(self):
            return super().forward(inputs, temb, zq, conv_cache)
        caches_in, caches_out = conv_cache or {}, {}
        h = self._half(1, inputs, zq, caches_in, caches_out)
        if self.in_channels == self.out_channels:
            shortcut = inputs
        elif self.use_conv_shortcut:
            shortcut, caches_out["conv_shortcut"] = _convolve(self.conv_shortcut, inputs, caches_in.get("conv_shortcut"))
        else:
            shortcut = ops.causal_conv3d(inputs, self.conv_shortcut.weight, self.conv_shortcut.bias)
        return self._half(2, h, zq, caches_in, caches_out, shortcut), caches_out

    def _half(self, place, x, zq, caches_in, caches_out, residual=None):
        """Norm, SiLU and convolution number ``place``; its cache is stored in ``caches_out``."""
        norm, conv = getattr(self, f"norm{place}"), getattr(self, f"conv{place}")
        name = f"conv{place}"
        if zq is None and GROUP_NORM(norm) and SILU(self.nonlinearity):
            y, caches_out[name] = _convolve(conv, x, caches_in.get(name), norm=norm, residual=residual)
            return y
        if zq is None:
            x = norm(x)
        else:
            x, caches_out[f"norm{place}"] = norm(x, zq, conv_cache=caches_in.get(f"norm{place}"))
        y, caches_out[name] = _convolve(conv, self.nonlinearity(x), caches_in.get(name), residual=residual)
        return y

    @classmethod
    def why_not(cls, module):
        if module.in_channels != module.out_channels:
            may_absorb = _CONV if module.use_conv_shortcut else _POINTWISE
            if not may_absorb(module.conv_shortcut):
                return "its conv_shortcut was replaced, has a hook, or has settings that are not supported"
        return super().why_not(module)


class Upsample(Fast):
    report = "causal_conv3d, upsampling in space by address"
    absorbs = dict(conv=CONV2D)

    def forward(self, inputs):
        if Upsample.why_not(self):
            return super().forward(inputs)
        if self.compress_time and inputs.shape[2] > 1:
            odd = inputs.shape[2] % 2
            inputs = torch.cat([inputs[:, :, :odd], inputs[:, :, odd:].repeat_interleave(2, dim=2)], dim=2)
        return ops.causal_conv3d(inputs, self.conv.weight[:, :, None], self.conv.bias, padding=(1, 1, 1, 1), upsample=2)


class Downsample(Fast):
    report = "causal_conv3d with stride"
    absorbs = dict(conv=STRIDED_CONV2D)

    def forward(self, x):
        if Downsample.why_not(self):
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
KNOWN[f"{_VAE}.CogVideoXSafeConv3d"] = "a convolution that diffusers splits in time above 2 GB"
