"""The definition of every op in plain PyTorch: any floating dtype, any device, any number of derivatives.

Everything is computed in at least float32 and rounded once, where a tensor of the contract is produced. On float64
inputs these functions are the truth that every kernel is measured against.
"""

from .attention import merge_attention, varlen_attention, varlen_attention_backward, varlen_attention_forward
from .convolution import causal_conv3d, norm_act_conv3d
from .latents import kl_sample
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from .normalization import norm_act
from .patches import patch_embed, unpatchify
from .rotary import qk_norm_rope

__all__ = ["causal_conv3d", "gate_residual", "gate_residual_norm_modulate", "kl_sample", "merge_attention", "norm_act",
           "norm_act_conv3d", "norm_modulate", "patch_embed", "qk_norm_rope", "unpatchify", "varlen_attention",
           "varlen_attention_backward", "varlen_attention_forward"]
