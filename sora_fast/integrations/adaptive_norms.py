"""adaLN of diffusers, which many of its models share, and the block of its DiT.

B batch, N tokens of a sample, D width.
"""

from .known import ITS_CHILDREN, LAYER_NORM
from .mixin import Fast
from .transformer import add, add_norm_modulate, norm_modulate


class AdaNorm(Fast):
    report = "norm_modulate"
    absorbs = dict(norm=LAYER_NORM)


class AdaLayerNormZero(AdaNorm):
    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if AdaLayerNormZero.why_not(self):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        gate, *mlp = rest
        return norm_modulate(self.norm, x, shift, scale), gate, *mlp


class AdaLayerNormZeroSingle(AdaNorm):
    def forward(self, x, emb=None):
        if AdaLayerNormZeroSingle.why_not(self):
            return super().forward(x, emb)
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return norm_modulate(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous(AdaNorm):
    def forward(self, x, conditioning_embedding):
        if AdaLayerNormContinuous.why_not(self):
            return super().forward(x, conditioning_embedding)
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return norm_modulate(self.norm, x, shift, scale)


class CogVideoXLayerNormZero(AdaNorm):
    def forward(self, hidden_states, encoder_hidden_states, temb):
        if CogVideoXLayerNormZero.why_not(self):
            return super().forward(hidden_states, encoder_hidden_states, temb)
        shift, scale, gate, text_shift, text_scale, text_gate = self.linear(self.silu(temb)).chunk(6, dim=1)
        return (norm_modulate(self.norm, hidden_states, shift, scale),
                norm_modulate(self.norm, encoder_hidden_states, text_shift, text_scale), gate[:, None], text_gate[:, None])


class DiTBlock(Fast):
    """BasicTransformerBlock as DiTTransformer2DModel configures it; other configurations are left alone."""

    report = "gate_residual_norm_modulate, gate_residual"
    absorbs = dict(norm3=LAYER_NORM)

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                timestep=None, cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None):
        if DiTBlock.why_not(self) or (cross_attention_kwargs or {}).get("gligen") is not None:
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                                   cross_attention_kwargs, class_labels, added_cond_kwargs)
        h, gate, shift, scale, ff_gate = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
        y = self.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask, **(cross_attention_kwargs or {}))
        x, h = add_norm_modulate(self.norm3, hidden_states, y, gate, shift, scale)
        return add(x, self.ff(h), ff_gate)

    @classmethod
    def why_not(cls, module):
        plain = (module.norm_type == "ada_norm_zero" and module.attn2 is None and module.pos_embed is None
                 and not module.only_cross_attention and module._chunk_size is None)
        if not plain:
            return "it is not configured as in DiT"
        return super().why_not(module)


_NORMS = "diffusers.models.normalization"
SWAPS = {f"{_NORMS}.{mixin.__name__}": mixin for mixin in (
    AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous, CogVideoXLayerNormZero)}
SWAPS["diffusers.models.attention.BasicTransformerBlock"] = DiTBlock
KNOWN = {"diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel": ITS_CHILDREN}
