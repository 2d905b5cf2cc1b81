"""The autoencoder of HunyuanVideo, as diffusers has it: replicated borders, group norms over the frames of a tile.

B batch, C channels, T frames, H height, W width.
"""

import torch
import torch.nn.functional as F

from .. import ops
from .known import CONV3D, DROPOUT, GROUP_NORM, ITS_CHILDREN, SILU, any_of, is_none
from .mixin import Fast, Kind, get_member

_MODULE = "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video"
_PADS = {"replicate": "replicate", "constant": "zeros"}


def _settings(conv) -> dict:
    """Keywords of ops.causal_conv3d for a HunyuanVideoCausalConv3d."""
    pad = _PADS[conv.pad_mode]
    return dict(stride=conv.conv.stride, padding=conv.time_causal_padding[:4], time_pad=pad, space_pad=pad)


def _convolve(conv, x, **settings):
    return ops.causal_conv3d(x, conv.conv.weight, conv.conv.bias, **_settings(conv), **settings)


def _norm_act_convolve(norm, conv, x, residual=None):
    return ops.norm_act_conv3d(x, conv.conv.weight, conv.conv.bias, norm_weight=norm.weight, norm_bias=norm.bias,
                               norm="group", groups=norm.num_groups, eps=norm.eps, act="silu", residual=residual,
                               **_settings(conv))


def _is_causal(conv) -> bool:
    """Whether its padding and its nn.Conv3d form a causal convolution whose nn.Conv3d may be absorbed."""
    pad, inner = conv.time_causal_padding, get_member(conv, "conv")
    return (conv.pad_mode in _PADS and CONV3D(inner) and len(pad) == 6
            and tuple(pad[4:]) == (get_member(inner, "weight").shape[2] - 1, 0))


_CONV = Kind(f"{_MODULE}.HunyuanVideoCausalConv3d", reads="conv pad_mode time_causal_padding", rule=_is_causal)
_ATTENTION = Kind("diffusers.models.attention_processor.Attention", methods=("forward", "prepare_attention_mask"),
                  reads="processor heads group_norm to_q to_k to_v to_out rescale_output_factor", spatial_norm=None,
                  norm_q=None, norm_k=None, residual_connection=True,
                  rule=lambda attention: _PROCESSOR.is_exact_type(attention.processor))
_PROCESSOR = Kind("diffusers.models.attention_processor.AttnProcessor2_0", methods=())


class CausalConv(Fast):
    report = "causal_conv3d, its borders by address"
    absorbs = dict(conv=CONV3D)

    def forward(self, hidden_states):
        return _convolve(self, hidden_states) if _CONV.matches_settings(self) else super().forward(hidden_states)

    @classmethod
    def why_not(cls, module):
        if _CONV.matches_settings(module):
            return None
        return super().why_not(module) or "its padding, groups or dilation are not a configuration of HunyuanVideo"


class ResnetBlock(Fast):
    report = "norm_act_conv3d twice, the shortcut added in the second"
    absorbs = dict(norm1=GROUP_NORM, conv1=_CONV, norm2=GROUP_NORM, conv2=_CONV, conv_shortcut=any_of(is_none, _CONV),
                 nonlinearity=SILU, dropout=DROPOUT)

    def forward(self, hidden_states):
        if ResnetBlock.why_not(self):
            return super().forward(hidden_states)
        h = _norm_act_convolve(self.norm1, self.conv1, hidden_states)
        shortcut = hidden_states if self.conv_shortcut is None else _convolve(self.conv_shortcut, hidden_states)
        return _norm_act_convolve(self.norm2, self.conv2, h, shortcut)


class Upsample(Fast):
    report = "causal_conv3d, upsampling in space by address"
    absorbs = dict(conv=_CONV)

    def forward(self, hidden_states):
        if Upsample.why_not(self):
            return super().forward(hidden_states)
        if self.upsample_factor[0] == 2:  # repeat every frame but the first
            first, rest = hidden_states[:, :, :1], hidden_states[:, :, 1:]
            hidden_states = torch.cat([first, rest.repeat_interleave(2, dim=2)], dim=2)
        return _convolve(self.conv, hidden_states, upsample=self.upsample_factor[1])

    @classmethod
    def why_not(cls, module):
        if tuple(module.upsample_factor) not in ((1, 2, 2), (2, 2, 2), (2, 1, 1)):
            return f"it upsamples by {tuple(module.upsample_factor)}"
        return super().why_not(module)


class MidBlock(Fast):
    report = "frame-causal attention one frame at a time, without diffusers' dense mask"

    def forward(self, hidden_states):
        if MidBlock.why_not(self):
            return super().forward(hidden_states)
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        block = self._gradient_checkpointing_func if recompute else lambda layer, x: layer(x)
        x = block(self.resnets[0], hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = x if attention is None else _attend(attention, x)
            x = block(resnet, x)
        return x

    @classmethod
    def why_not(cls, module):
        plain = all(attention is None or _ATTENTION(attention) for attention in module.attentions)
        return None if plain else "its attention has another processor, a norm or a hook"


def _attend(attention, x):
    """Every pixel attends to its own frame and to earlier ones."""
    batch, channels, frames, height, width = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    h = tokens if attention.group_norm is None else attention.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    q, k, v = (layer(h).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
               for layer in (attention.to_q, attention.to_k, attention.to_v))
    size = height * width
    outs = [F.scaled_dot_product_attention(q[:, :, n * size : (n + 1) * size], k[:, :, : (n + 1) * size],
                                           v[:, :, : (n + 1) * size]) for n in range(frames)]
    h = attention.to_out[1](attention.to_out[0](torch.cat(outs, dim=2).transpose(1, 2).flatten(2)))
    h = (h + tokens) / attention.rescale_output_factor
    return h.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)


class Coder(Fast):
    """Encoder and decoder: their last norm, activation and convolution are fused."""

    report = "norm_act_conv3d at its end, its children for the rest"
    absorbs = dict(conv_norm_out=GROUP_NORM, conv_act=SILU, conv_out=_CONV)

    def forward(self, hidden_states):
        if Coder.why_not(self):
            return super().forward(hidden_states)
        x = self.conv_in(hidden_states)
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        encodes = hasattr(self, "down_blocks")
        for layer in (*self.down_blocks, self.mid_block) if encodes else (self.mid_block, *self.up_blocks):
            x = self._gradient_checkpointing_func(layer, x) if recompute else layer(x)
        return _norm_act_convolve(self.conv_norm_out, self.conv_out, x)


SWAPS = {f"{_MODULE}.HunyuanVideo{name}": mixin for name, mixin in {
    "CausalConv3d": CausalConv, "ResnetBlockCausal3D": ResnetBlock, "UpsampleCausal3D": Upsample, "MidBlock3D": MidBlock,
    "Encoder3D": Coder, "Decoder3D": Coder}.items()}
KNOWN = {f"{_MODULE}.{name}": ITS_CHILDREN for name in ("AutoencoderKLHunyuanVideo", "HunyuanVideoDownBlock3D",
                                                "HunyuanVideoUpBlock3D", "HunyuanVideoDownsampleCausal3D")}
