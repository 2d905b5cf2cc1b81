"""The transformers of HunyuanVideo and CogVideoX, as diffusers has them: joint attention over video and text tokens.

Attention itself runs on the backend that diffusers is set to (CogVideoX: PyTorch's own).

B batch, N tokens of a sample's video, L of its text, D width, H heads, E head dim.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from .known import DIFFUSERS_RMS_NORM, ITS_CHILDREN, LAYER_NORM, QK_LAYER_NORM, RMS_NORM, always, any_of
from .mixin import Fast, Kind, accepts_our_arguments, has_hooks, has_own_forward, is_fast, original_of
from .transformer import (
    Positions,
    add,
    add_norm_modulate,
    grid_positions,
    norm_rotate,
    rotate_by_tables,
    tables,
)

_HUNYUAN = "diffusers.models.transformers.transformer_hunyuan_video"
_COG = "diffusers.models.transformers.cogvideox_transformer_3d"
_PROCESSORS = "diffusers.models.attention_processor"
_ATTENTION = Kind(f"{_PROCESSORS}.Attention")
_HUNYUAN_PROCESSOR = Kind(f"{_HUNYUAN}.HunyuanVideoAttnProcessor2_0")
_COG_PROCESSOR = Kind(f"{_PROCESSORS}.CogVideoXAttnProcessor2_0")
_COG_NORM = Kind("diffusers.models.normalization.CogVideoXLayerNormZero", reads="silu linear norm",
                 rule=lambda module: LAYER_NORM(module.norm))
_HEAD_NORMS = ((any_of(RMS_NORM, DIFFUSERS_RMS_NORM), "rms_head"), (QK_LAYER_NORM, "layer_head"))


def _norm_settings(norm_q, norm_k) -> dict | None:
    """Keywords of ops.qk_norm_rope for a pair of norms per head, or None if they are not supported."""
    if norm_q is None and norm_k is None:
        return dict(norm=None)
    for may_absorb, norm in _HEAD_NORMS:
        if may_absorb(norm_q) and may_absorb(norm_k) and norm_q.eps == norm_k.eps:
            q_bias, k_bias = getattr(norm_q, "bias", None), getattr(norm_k, "bias", None)  # PyTorch's rms norm has none
            return dict(norm=norm, q_weight=norm_q.weight, k_weight=norm_k.weight, q_bias=q_bias, k_bias=k_bias,
                        eps=norm_q.eps)
    return None


class Attention(Fast):
    """diffusers' Attention with the processor of HunyuanVideo or CogVideoX; others are left alone."""

    report = "qk_norm_rope; attention on diffusers' own backend"
    absorbs = dict(norm_q=always, norm_k=always, norm_added_q=always, norm_added_k=always)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        rope = kwargs.pop("image_rotary_emb", None)
        if Attention.why_not(self) or kwargs or encoder_hidden_states is None:
            rope = tables(rope) if isinstance(rope, Positions) else rope
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=rope, **kwargs)
        run = self._hunyuan if _HUNYUAN_PROCESSOR.is_exact_type(self.processor) else self._cogvideox
        return run(hidden_states, encoder_hidden_states, attention_mask, rope)

    def _project(self, x, *layers):
        return [layer(x).unflatten(2, (self.heads, -1)) for layer in layers]

    def _hunyuan(self, video, text, mask, rope):
        """Video first, then text, with its own projections in double-stream blocks, the video's in single-stream blocks."""
        own, length = self.add_q_proj is not None, text.shape[1]
        x = video if own else torch.cat([video, text], dim=1)
        q, k, v = self._project(x, self.to_q, self.to_k, self.to_v)
        q, k = _rotate(q, k, rope, (0, 0 if own else length), _norm_settings(self.norm_q, self.norm_k))
        if own:
            tq, tk, tv = self._project(text, self.add_q_proj, self.add_k_proj, self.add_v_proj)
            tq, tk = norm_rotate(tq, tk, None, **_norm_settings(self.norm_added_q, self.norm_added_k))
            q, k, v = (torch.cat(pair, dim=1) for pair in ((q, tq), (k, tk), (v, tv)))
        out = sys.modules[_HUNYUAN].dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config).flatten(2, 3).to(q.dtype)
        video, text = out[:, :-length], out[:, -length:]
        if self.to_out is not None:
            video = self.to_out[1](self.to_out[0](video))
        return video, text if self.to_add_out is None else self.to_add_out(text)

    def _cogvideox(self, video, text, mask, rope):
        """Text first, then video; the rotation comes as tables from the pipeline."""
        x, length = torch.cat([text, video], dim=1), text.shape[1]
        if mask is not None:
            mask = self.prepare_attention_mask(mask, x.shape[1], x.shape[0]).view(x.shape[0], self.heads, -1, mask.shape[-1])
        q, k, v = self._project(x, self.to_q, self.to_k, self.to_v)
        q, k = _rotate(q, k, rope, (length, 0), _norm_settings(self.norm_q, self.norm_k), self.is_cross_attention)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=mask)
        out = self.to_out[1](self.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, length:], out[:, :length]

    @classmethod
    def why_not(cls, module):
        if not (_HUNYUAN_PROCESSOR.is_exact_type(module.processor) or _COG_PROCESSOR.is_exact_type(module.processor)):
            return f"its processor is a {type(module.processor).__name__}"
        pairs = ((module.norm_q, module.norm_k), (module.norm_added_q, module.norm_added_k))
        changed = any(_norm_settings(*pair) is None for pair in pairs)
        return "a norm was replaced, has a hook, or has settings that are not supported" if changed else None


def _rotate(q, k, rope, text: tuple[int, int], norm: dict, only_q: bool = False):
    """Norm, and rotation of the video tokens by Positions or tables; ``text``: numbers of text tokens before and after."""
    if rope is None or isinstance(rope, Positions):
        return norm_rotate(q, k, rope, text_before=text[0], **norm)
    q, k = norm_rotate(q, k, None, **norm)
    cos, sin = (F.pad(table.to(q.device)[:, None], (0, 0, 0, 0, *text), value=value)
                for table, value in zip(rope, (1.0, 0.0), strict=True))  # text is not rotated
    return rotate_by_tables(q, cos, sin), k if only_q else rotate_by_tables(k, cos, sin)


class HunyuanRotary(Fast):
    report = "places of tokens instead of tables: angles are made in the kernel"

    def forward(self, hidden_states):
        if has_hooks(self) or not accepts_our_arguments(self) or not all(
                accepts_our_arguments(block.attn) for blocks in self._sora_fast_readers for block in blocks):
            return super().forward(hidden_states)
        _, _, frames, height, width = hidden_states.shape
        grid = (frames // self.patch_size_t, height // self.patch_size, width // self.patch_size)
        return grid_positions(grid, self.rope_dim, self.theta, hidden_states.device)

    @classmethod
    def why_not(cls, module):
        if has_hooks(module):
            return "a hook may read its tables"
        return None if module.__dict__.get("_sora_fast_readers") else "an attention that reads its tables was not replaced"


class HunyuanBlock(Fast):
    report = "gate_residual_norm_modulate and gate_residual, for video and text"
    absorbs = dict(norm2=LAYER_NORM, norm2_context=LAYER_NORM)

    def forward(self, hidden_states, encoder_hidden_states, temb, attention_mask=None, freqs_cis=None, *args, **kwargs):
        if HunyuanBlock.why_not(self):
            return super().forward(hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, *args, **kwargs)
        video, gate, shift, scale, ff_gate = self.norm1(hidden_states, emb=temb)
        text, text_gate, text_shift, text_scale, text_ff_gate = self.norm1_context(encoder_hidden_states, emb=temb)
        video, text = self.attn(hidden_states=video, encoder_hidden_states=text, attention_mask=attention_mask,
                                image_rotary_emb=freqs_cis)
        x, h = add_norm_modulate(self.norm2, hidden_states, video, gate, shift, scale)
        t, th = add_norm_modulate(self.norm2_context, encoder_hidden_states, text, text_gate, text_shift, text_scale)
        return add(x, self.ff(h), ff_gate), add(t, self.ff_context(th), text_ff_gate)


class HunyuanSingleBlock(Fast):
    report = "gate_residual"

    def forward(self, hidden_states, encoder_hidden_states, temb, attention_mask=None, image_rotary_emb=None,
                *args, **kwargs):
        length = encoder_hidden_states.shape[1]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        h, gate = self.norm(x, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(h))
        attended = self.attn(hidden_states=h[:, :-length], encoder_hidden_states=h[:, -length:],
                             attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        x = add(x, self.proj_out(torch.cat([torch.cat(attended, dim=1), mlp], dim=2)), gate)
        return x[:, :-length], x[:, -length:]


class CogVideoXBlock(Fast):
    report = "gate_residual_norm_modulate and gate_residual, for video and text"
    absorbs = dict(norm2=_COG_NORM)

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
        if CogVideoXBlock.why_not(self):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
        length = encoder_hidden_states.shape[1]
        h, th, gate, text_gate = self.norm1(hidden_states, encoder_hidden_states, temb)
        h, th = self.attn1(hidden_states=h, encoder_hidden_states=th, image_rotary_emb=image_rotary_emb,
                           **(attention_kwargs or {}))
        norm = self.norm2
        shift, scale, ff_gate, text_shift, text_scale, text_ff_gate = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        x, h = add_norm_modulate(norm.norm, hidden_states, h, gate.squeeze(1), shift, scale)
        t, th = add_norm_modulate(norm.norm, encoder_hidden_states, th, text_gate.squeeze(1), text_shift, text_scale)
        y = self.ff(torch.cat([th, h], dim=1))
        return add(x, y[:, length:], ff_gate), add(t, y[:, :length], text_ff_gate)


def _mark_readers(model: nn.Module) -> None:
    """Let the rotary embedding return Positions, not tables, if all attentions that read them can be swapped."""
    lists = [model.transformer_blocks, model.single_transformer_blocks]
    suited = all(original_of(type(block)).__module__ == _HUNYUAN and _ATTENTION.is_exact_instance(block.attn)
                 and (is_fast(block.attn) or not has_own_forward(block.attn)) and Attention.why_not(block.attn) is None
                 for blocks in lists for block in blocks)
    model.rope._sora_fast_readers = lists if suited else None


SWAPS = {"diffusers.models.attention_processor.Attention": Attention,
         f"{_HUNYUAN}.HunyuanVideoRotaryPosEmbed": HunyuanRotary,
         f"{_HUNYUAN}.HunyuanVideoTransformerBlock": HunyuanBlock,
         f"{_HUNYUAN}.HunyuanVideoSingleTransformerBlock": HunyuanSingleBlock,
         f"{_COG}.CogVideoXBlock": CogVideoXBlock}
PREPARES = {f"{_HUNYUAN}.HunyuanVideoTransformer3DModel": _mark_readers}
_REPLACE = "its first frame has its own modulation; its children are replaced one by one"
KNOWN = {f"{_HUNYUAN}.HunyuanVideoTransformer3DModel": ITS_CHILDREN, f"{_COG}.CogVideoXTransformer3DModel": ITS_CHILDREN,
         f"{_HUNYUAN}.HunyuanVideoTokenReplaceTransformerBlock": _REPLACE,
         f"{_HUNYUAN}.HunyuanVideoTokenReplaceSingleTransformerBlock": _REPLACE}
