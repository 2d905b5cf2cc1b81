"""Calls at the sizes of models, a few per op: other tiles, loops and kernels than the small cases take. For a GPU.

Heads of 64 to 256, 16 to 56 of them, rows in the thousands, widths of 1152 to 5376; one of each, not all with all.
"""

from collections.abc import Iterator

import torch

from ..pack import Pack
from .draw import Draw

# 1,170 + 0 + 64 + 1 = 1,235 tokens in unequal samples
GRIDS = [(3, 15, 26), (0, 4, 4), (1, 8, 8), (1, 1, 1)]
WIDTHS = (1152, 1536, 1920, 3072, 5120, 5376)


def attention(op: str, draw: Draw) -> Iterator[tuple[str, dict]]:
    def make(label, lens_q, lens_k, heads, key_heads, head_dim, **options):
        ends = lambda lens: torch.tensor([0, *lens], device="cpu").cumsum(0).to(draw.device, torch.int32)
        queries, keys = sum(lens_q), sum(lens_k)
        return label, dict(q=draw(queries, heads, head_dim), k=draw(keys, key_heads, head_dim),
                           v=draw(keys, key_heads, head_dim), cu_seqlens_q=ends(lens_q), cu_seqlens_k=ends(lens_k),
                           max_seqlen_q=max(lens_q), max_seqlen_k=max(lens_k), **options)

    ragged = (700, 0, 431, 1)
    yield make("16 heads of 72, 1,132 rows", ragged, ragged, 16, 16, 72)
    yield make("24 heads of 64, GQA, causal, 1,132 rows", ragged, ragged, 24, 6, 64, causal=True)
    yield make("12 heads of 128, window, 1,300 rows", (1037, 263), (1037, 263), 12, 12, 128, window=(200, 50))
    yield make("40 heads of 128 to text", (513, 77), (512, 0), 40, 40, 128)
    yield make("56 heads of 128, GQA, 257 rows", (257,), (257,), 56, 8, 128)
    yield make("16 heads of 96, more queries than keys, causal", (700, 337), (650, 400), 16, 16, 96, causal=True)
    yield make("8 heads of 256, GQA, 1,100 rows", (1029, 71), (1029, 71), 8, 2, 256)


def _merge(op: str, draw: Draw) -> Iterator[tuple[str, dict]]:
    lses = [draw(40, 1100, dtype=torch.promote_types(draw.dtype, torch.float32)) for _ in range(2)]
    yield "40 heads of 128, 1,100 rows", dict(outs=[draw(1100, 40, 128) for _ in range(2)], lses=lses)


def _modulation(op: str, draw: Draw) -> Iterator[tuple[str, dict]]:
    samples, frames = Pack(GRIDS, device=draw.device), Pack(GRIDS, modulation="frame", device=draw.device).pad_to(1300)
    for width in WIDTHS:
        rms, pack = width % 1024 == 0, frames if width % 512 == 0 else samples
        gate, shift, scale = draw(pack.num_rows, 3 * width).chunk(3, -1)
        inputs = dict(x=draw(pack.num_tokens, width), rows=pack.rows)
        if op != "norm_modulate":
            inputs |= dict(y=draw(pack.num_tokens, width), gate=gate)
        if op != "gate_residual":
            inputs |= dict(shift=shift, scale=scale, norm="rms" if rms else "layer", weight=draw(width) if rms else None)
        yield f"width {width}, 1,235 tokens{', per frame, tail' if pack is frames else ''}", inputs


def _rotary(op: str, draw: Draw) -> Iterator[tuple[str, dict]]:
    pack = Pack(GRIDS, device=draw.device).pad_to(1300)
    for heads, key_heads, head_dim, axes, norm in (
            (16, 16, 72, (24, 24, 24), "rms_head"), (24, 24, 64, (16, 24, 24), "layer_head"),
            (24, 24, 128, (16, 56, 56), "rms_head"), (40, 40, 128, (44, 42, 42), "rms_all"),
            (56, 8, 128, (44, 42, 42), "rms_head")):
        width = lambda count, norm=norm, head_dim=head_dim: count * head_dim if norm == "rms_all" else head_dim
        yield f"{heads} heads of {head_dim}, {norm}, 1,235 tokens, tail", dict(
            q=draw(1300, heads, head_dim), k=draw(1300, key_heads, head_dim), coords=pack.coords, axes=axes, norm=norm,
            q_weight=draw(width(heads)), k_weight=draw(width(key_heads)), rows=pack.rows)


def _patches(op: str, draw: Draw) -> Iterator[tuple[str, dict]]:
    grids = tuple(GRIDS)
    if op == "unpatchify":
        yield "16 channels, 1,235 tokens", dict(tokens=draw(1235, 64), grids=grids, patch=(1, 2, 2), channels=16, flat=True)
        yield "48 channels, 1,235 tokens", dict(tokens=draw(1235, 192), grids=grids, patch=(1, 2, 2), channels=48, flat=True)
        return
    for channels, width in ((4, 1152), (16, 1536), (16, 3072), (48, 3072), (16, 5120)):
        yield f"{channels} channels to width {width}, 1,235 tokens", dict(
            latents=draw(1235 * 4 * channels), weight=draw(width, channels, 1, 2, 2), bias=draw(width), grids=grids)


MAKERS = {  # of the ops; the others' small cases on a GPU have the channels of models
    "patch_embed": _patches, "unpatchify": _patches, "norm_modulate": _modulation, "gate_residual": _modulation,
    "gate_residual_norm_modulate": _modulation, "qk_norm_rope": _rotary, "varlen_attention": attention,
    "varlen_attention_forward": attention, "merge_attention": _merge}
