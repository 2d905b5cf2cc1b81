"""The transformer of Wan 2.1 and 2.2, as diffusers has it.

Gated residual, norm and modulation are fused, and so are the norm of queries and keys over all heads and the rotary
embedding. Attention itself runs on the backend that diffusers is set to.

B batch, N tokens of a sample, L text tokens, D width, H heads, E head dim.
"""

import sys

import torch
from torch import nn

from .. import ops
from .known import IDENTITY, ITS_CHILDREN, LAYER_NORM, RMS_NORM, any_of
from .mixin import Fast, Kind, accepts_our_arguments, has_hooks, has_own_forward, is_fast
from .transformer import Positions, affine, are_tables, grid_positions, norm_rotate, rotate_by_tables, rows_of, tables

_MODULE = "diffusers.models.transformers.transformer_wan"
_PROCESSOR = Kind(f"{_MODULE}.WanAttnProcessor")
_BLOCK, _ATTENTION = Kind(f"{_MODULE}.WanTransformerBlock"), Kind(f"{_MODULE}.WanAttention")
_THETA = 1e4


def _diffusers_module():
    return sys.modules[_MODULE]


def _diffusers_tables(positions: Positions):
    """What diffusers' rotary module would return: (1, N, 1, E) each."""
    return tuple(table[None, :, None] for table in tables(positions))


class Rotary(Fast):
    report = "token positions instead of tables: the kernel computes the angles"

    def forward(self, hidden_states):
        axes = (self.t_dim, self.h_dim, self.w_dim)
        if has_hooks(self) or not accepts_our_arguments(self) or not self._has_known_tables(axes) or not all(
                accepts_our_arguments(block) and accepts_our_arguments(block.attn1)
                for blocks in self._sora_fast_readers for block in blocks):
            return super().forward(hidden_states)
        grid = tuple(n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        return grid_positions(grid, axes, _THETA, hidden_states.device)

    def _has_known_tables(self, axes) -> bool:
        """Whether they have theta 10,000; checked again only if they were replaced or written to."""
        cos, sin, *known = self.freqs_cos, self.freqs_sin, *self.__dict__.get("_sora_fast_tables", (None,) * 4)
        if cos is known[0] and sin is known[1] and (cos._version, sin._version) == known[2:4]:
            return True
        if torch.compiler.is_compiling() or not are_tables(cos, sin, axes, _THETA):
            return False
        self._remember_tables()
        return True

    def _remember_tables(self) -> None:
        self._sora_fast_tables = (self.freqs_cos, self.freqs_sin, self.freqs_cos._version, self.freqs_sin._version)

    def _apply(self, fn, recurse=True):
        """Moved to another device or dtype, they are still the same tables."""
        same = self._has_known_tables((self.t_dim, self.h_dim, self.w_dim))
        super()._apply(fn, recurse)
        if same:
            self._remember_tables()
        return self

    @classmethod
    def why_not(cls, module):
        if not module.__dict__.get("_sora_fast_readers"):
            return "a block that reads its tables was not replaced"
        if has_hooks(module):
            return "a hook may read its tables"
        same = are_tables(module.freqs_cos, module.freqs_sin, (module.t_dim, module.h_dim, module.w_dim), _THETA)
        return None if same else "its tables are not those of theta 10,000"


class Attention(Fast):
    report = "qk_norm_rope over all heads; attention on diffusers' own backend"
    absorbs = dict(norm_q=RMS_NORM, norm_k=RMS_NORM)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        if Attention.why_not(self) or kwargs:
            if isinstance(rotary_emb, Positions):
                rotary_emb = _diffusers_tables(rotary_emb)
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        text, image = encoder_hidden_states, None
        if self.add_k_proj is not None:  # diffusers takes the last 512 tokens as text
            image, text = text[:, :-512], text[:, -512:]
        split = lambda x: x.unflatten(2, (self.heads, -1))
        q, k, v = map(split, _diffusers_module()._get_qkv_projections(self, hidden_states, text))
        positions = rotary_emb if isinstance(rotary_emb, Positions) else None
        q, k = norm_rotate(q, k, positions, norm="rms_all", q_weight=self.norm_q.weight, k_weight=self.norm_k.weight,
                           eps=self.norm_q.eps)
        if positions is None and rotary_emb is not None:
            cos, sin = rotary_emb
            q, k = rotate_by_tables(q, cos, sin), rotate_by_tables(k, cos, sin)
        out = self._attend(q, k, v, attention_mask, self.processor._parallel_config if text is None else None)
        if image is not None:
            k, v = _diffusers_module()._get_added_kv_projections(self, image)
            out = out + self._attend(q, split(self.norm_added_k(k)), split(v), None, None)
        return self.to_out[1](self.to_out[0](out))

    def _attend(self, q, k, v, mask, parallel):
        out = _diffusers_module().dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self.processor._attention_backend,
                                                 parallel_config=parallel)
        return out.flatten(2, 3).type_as(q)

    @classmethod
    def why_not(cls, module):
        if not _PROCESSOR.is_exact_type(module.processor):
            return f"its processor is a {type(module.processor).__name__}"
        if changed := super().why_not(module):
            return changed
        return None if module.norm_q.eps == module.norm_k.eps else "its two norms differ in eps"


class Block(Fast):
    report = "norm_modulate, gate_residual_norm_modulate twice, gate_residual"
    absorbs = dict(norm1=LAYER_NORM, norm2=any_of(IDENTITY, LAYER_NORM), norm3=LAYER_NORM)

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        if Block.why_not(self):
            if isinstance(rotary_emb, Positions) and not isinstance(self.attn1, Fast):
                rotary_emb = _diffusers_tables(rotary_emb)
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        batch, tokens, width = hidden_states.shape
        of_token = temb.ndim == 4  # (B, N, 6, D): Wan 2.2's timestep per token, else (B, 6, D)
        modulation = (self.scale_shift_table + temb.float()).reshape(-1, 6, width).unbind(1)
        rows = None if of_token else rows_of(modulation[0], tokens)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
        flat = lambda x: x.reshape(batch * tokens, width)
        per_sample = lambda x: x.view(batch, tokens, width)

        x = flat(hidden_states)
        h = ops.norm_modulate(x, shift, scale, rows, **affine(self.norm1, width))
        y = flat(self.attn1(per_sample(h), None, None, rotary_emb))
        if isinstance(self.norm2, nn.Identity):
            x = ops.gate_residual(x, y, gate, rows)
            h = x
        else:
            x, h = ops.gate_residual_norm_modulate(x, y, gate, None, None, rows, **affine(self.norm2, width))
        y, one = flat(self.attn2(per_sample(h), encoder_hidden_states, None, None)), torch.ones_like(gate)
        x, h = ops.gate_residual_norm_modulate(x, y, one, ff_shift, ff_scale, rows, **affine(self.norm3, width))
        return per_sample(ops.gate_residual(x, flat(self.ffn(per_sample(h))), ff_gate, rows))


def _mark_readers(model) -> None:
    """Drop the tables if no block will read them."""
    suited = all(_BLOCK.is_exact_instance(block) and _ATTENTION.is_exact_instance(block.attn1)
                 and (is_fast(block.attn1) or not has_own_forward(block.attn1)) for block in model.blocks)
    model.rope._sora_fast_readers = [model.blocks] if suited else None


SWAPS = {f"{_MODULE}.Wan{name}": mixin for name, mixin in {
    "RotaryPosEmbed": Rotary, "Attention": Attention, "TransformerBlock": Block}.items()}
PREPARES = {f"{_MODULE}.WanTransformer3DModel": _mark_readers}
KNOWN = {f"{_MODULE}.Wan{name}": ITS_CHILDREN for name in ("Transformer3DModel", "TimeTextImageEmbedding", "ImageEmbedding")}
