"""The public ops. Each has a reference, backends, a backward, and one sentence for each kind of bad input."""

from .attention import merge_attention, varlen_attention, varlen_attention_backward, varlen_attention_forward
from .convolution import causal_conv3d, norm_act_conv3d
from .latents import kl_sample
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from .normalization import norm_act
from .patches import patch_embed, unpatchify
from .rotary import qk_norm_rope

FAMILIES = ("patches", "modulation", "rotary", "attention", "convolution", "normalization", "latents")

__all__ = [
    "causal_conv3d",
    "gate_residual",
    "gate_residual_norm_modulate",
    "kl_sample",
    "merge_attention",
    "norm_act",
    "norm_act_conv3d",
    "norm_modulate",
    "patch_embed",
    "qk_norm_rope",
    "unpatchify",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_forward",
]
