"""The autoencoder of HunyuanVideo, as diffusers has it: replicated borders, group norms over the frames of a tile.

B batch, C channels, T frames, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .swapping import Fast, as_built

_CONV = "HunyuanVideoCausalConv3d"
_PADS = {"replicate": "replicate", "constant": "zeros"}
_CHANGED = "a child was replaced or has a hook"


def _settings(conv) -> dict:
    """Keywords of ops.causal_conv3d for a HunyuanVideoCausalConv3d."""
    pad = _PADS[conv.pad_mode]
    return dict(stride=conv.conv.stride, padding=conv.time_causal_padding[:4], time_pad=pad, space_pad=pad)


def _convolve(conv, x, **more):
    return ops.causal_conv3d(x, conv.conv.weight, conv.conv.bias, **_settings(conv), **more)


def _norm_act_convolve(norm, conv, x, residual=None):
    return ops.norm_act_conv3d(x, conv.conv.weight, conv.conv.bias, norm_weight=norm.weight, norm_bias=norm.bias,
                               norm="group", groups=norm.num_groups, eps=norm.eps, act="silu", residual=residual,
                               **_settings(conv))


def _plain(conv) -> bool:
    """A convolution of that class whose own nn.Conv3d may be read past it."""
    return as_built(conv, _CONV) and as_built(conv.conv, "Conv3d") and CausalConv.unsuited(conv) is None


class CausalConv(Fast):
    runs = "causal_conv3d, its borders by address"
    reads = ("conv",)

    def forward(self, hidden_states):
        return _convolve(self, hidden_states) if as_built(self.conv, "Conv3d") else super().forward(hidden_states)

    @staticmethod
    def unsuited(module):
        conv = module.conv
        causal = module.time_causal_padding[4:] == (conv.kernel_size[0] - 1, 0)
        if not causal or module.pad_mode not in _PADS or conv.padding != (0, 0, 0):
            return "its padding is none that HunyuanVideo has"
        if conv.groups != 1 or conv.dilation != (1, 1, 1):
            return "its groups or dilation are none that HunyuanVideo has"
        return None if as_built(conv, "Conv3d") else _CHANGED


class ResnetBlock(Fast):
    runs = "norm_act_conv3d twice, the shortcut added in the second"
    reads = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity", "dropout")

    def forward(self, hidden_states):
        if not self._intact():
            return super().forward(hidden_states)
        h = _norm_act_convolve(self.norm1, self.conv1, hidden_states)
        shortcut = hidden_states if self.conv_shortcut is None else _convolve(self.conv_shortcut, hidden_states)
        return _norm_act_convolve(self.norm2, self.conv2, h, shortcut)

    def _intact(self) -> bool:
        plain = all(as_built(layer, kind) for layer, kind in (
            (self.norm1, "GroupNorm"), (self.norm2, "GroupNorm"), (self.nonlinearity, "SiLU")))
        return plain and all(conv is None or _plain(conv) for conv in (self.conv1, self.conv2, self.conv_shortcut))

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

    def forward(self, hidden_states):
        if not _plain(self.conv):
            return super().forward(hidden_states)
        if self.upsample_factor[0] == 2:  # every frame but the first twice
            first, rest = hidden_states[:, :, :1], hidden_states[:, :, 1:]
            hidden_states = torch.cat([first, rest.repeat_interleave(2, dim=2)], dim=2)
        return _convolve(self.conv, hidden_states, upsample=self.upsample_factor[1])

    @staticmethod
    def unsuited(module):
        if tuple(module.upsample_factor) not in ((1, 2, 2), (2, 2, 2), (2, 1, 1)):
            return f"it upsamples by {tuple(module.upsample_factor)}"
        return None if _plain(module.conv) else _CHANGED


class MidBlock(Fast):
    runs = "frame by frame over the frames before it, without diffusers' mask of all pixels by all pixels"

    def forward(self, hidden_states):
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        block = self._gradient_checkpointing_func if recompute else lambda layer, x: layer(x)
        x = block(self.resnets[0], hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = x if attention is None else _attend(attention, x)
            x = block(resnet, x)
        return x

    @staticmethod
    def unsuited(module):
        plain = all(attention is None or as_built(attention, "Attention")
                    and type(attention.processor).__name__ == "AttnProcessor2_0" and attention.spatial_norm is None
                    and attention.norm_q is None and attention.norm_k is None and attention.residual_connection
                    for attention in module.attentions)
        return None if plain else "its attention has been given another processor, a norm or a hook"


def _attend(attention, x):
    """Every pixel sees those of its own frame and of the frames before it."""
    batch, channels, frames, height, width = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    h = tokens if attention.group_norm is None else attention.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    q, k, v = (layer(h).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
               for layer in (attention.to_q, attention.to_k, attention.to_v))
    size = height * width
    seen = [F.scaled_dot_product_attention(q[:, :, n * size : (n + 1) * size], k[:, :, : (n + 1) * size],
                                           v[:, :, : (n + 1) * size]) for n in range(frames)]
    h = attention.to_out[1](attention.to_out[0](torch.cat(seen, dim=2).transpose(1, 2).flatten(2)))
    h = (h + tokens) / attention.rescale_output_factor
    return h.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)


class Ends(Fast):
    """Encoder and decoder: their last norm, activation and convolution are one op."""

    runs = "norm_act_conv3d at its end, its children for the rest"
    reads = ("conv_norm_out", "conv_act", "conv_out")

    def forward(self, hidden_states):
        if not self._intact():
            return super().forward(hidden_states)
        x = self.conv_in(hidden_states)
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        encodes = hasattr(self, "down_blocks")
        for layer in (*self.down_blocks, self.mid_block) if encodes else (self.mid_block, *self.up_blocks):
            x = self._gradient_checkpointing_func(layer, x) if recompute else layer(x)
        return _norm_act_convolve(self.conv_norm_out, self.conv_out, x)

    def _intact(self) -> bool:
        return as_built(self.conv_norm_out, "GroupNorm") and as_built(self.conv_act, "SiLU") and _plain(self.conv_out)

    @staticmethod
    def unsuited(module):
        return None if Ends._intact(module) else _CHANGED


_MODULE = "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video"
SWAPS = {f"{_MODULE}.HunyuanVideo{name}": mixin for name, mixin in {
    "CausalConv3d": CausalConv, "ResnetBlockCausal3D": ResnetBlock, "UpsampleCausal3D": Upsample, "MidBlock3D": MidBlock,
    "Encoder3D": Ends, "Decoder3D": Ends}.items()}
_OWN = "diffusers' own; its children are swapped one by one"
KNOWN = {f"{_MODULE}.{name}": _OWN for name in ("AutoencoderKLHunyuanVideo", "HunyuanVideoDownBlock3D",
                                                "HunyuanVideoUpBlock3D", "HunyuanVideoDownsampleCausal3D")}
