"""Inputs at the sizes of real models, for kernels/PROOF.md: what tests/proof.py runs besides the cases of
sora_fast.testing."""

import torch

from sora_fast import Pack


def _draw(dtype):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, to=dtype: torch.randn(shape, generator=generator).to(to)


def _attention(draw):
    def make(label, lens_q, lens_k, heads, key_heads, head_dim, **options):
        ends = lambda lens: torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
        return label, dict(q=draw(sum(lens_q), heads, head_dim), k=draw(sum(lens_k), key_heads, head_dim),
                           v=draw(sum(lens_k), key_heads, head_dim), cu_seqlens_q=ends(lens_q), cu_seqlens_k=ends(lens_k),
                           **options)

    for head_dim in (64, 72, 96, 128, 256):
        yield make(f"E = {head_dim}, 1,037 rows", (700, 0, 337), (700, 5, 337), 1, 1, head_dim)
        yield make(f"E = {head_dim}, 1,037 rows, GQA, window", (1037,), (1037,), 2, 1, head_dim, window=(200, 50))
        yield make(f"E = {head_dim}, 1,037 rows, GQA, causal", (900, 137), (950, 137), 2, 1, head_dim, causal=True)


def _modulation(op, draw):
    rows = Pack([(2, 3, 4), (1, 5, 5)], modulation="frame").pad_to(53).rows
    for width in (1152, 1536, 3072, 5120):
        table = draw(3, 3 * width)
        gate, shift, scale = table.chunk(3, -1)
        inputs = dict(x=draw(53, width), rows=rows)
        if op != "norm_modulate":
            inputs |= dict(y=draw(53, width), gate=gate)
        if op != "gate_residual":
            inputs |= dict(shift=shift, scale=scale)
        yield f"D = {width}", inputs


def _rotary(draw):
    pack = Pack([(2, 3, 4), (1, 5, 5)]).pad_to(53)
    for heads, head_dim, axes in ((16, 72, (24, 24, 24)), (24, 128, (44, 42, 42)), (40, 128, (44, 42, 42))):
        for norm in ("rms_head", "rms_all"):
            weight = draw(heads * head_dim if norm == "rms_all" else head_dim)
            yield f"{heads} x {head_dim}, {norm}", dict(
                q=draw(53, heads, head_dim), k=draw(53, heads, head_dim), coords=pack.coords, axes=axes, norm=norm,
                q_weight=weight, k_weight=weight, rows=pack.rows)


def _patches(op, draw):
    grids = ((2, 5, 7), (0, 3, 3), (1, 11, 6))  # 136 tokens
    if op == "patch_embed":
        for channels, width in ((16, 1152), (16, 5120), (48, 384)):  # 48 channels: a patch in two pieces
            yield f"D = {width}", dict(latents=draw(136 * 4 * channels), weight=draw(width, channels, 1, 2, 2),
                                       bias=draw(width), grids=grids)
    if op == "unpatchify":
        yield "16 channels", dict(tokens=draw(136, 64), grids=grids, patch=(1, 2, 2), channels=16, flat=True)


def wide_cases(op: str, dtype: torch.dtype):
    """(label, keyword arguments) for ``op``; convolutions at 96 to 384 channels are among those of sora_fast.testing."""
    draw = _draw(dtype)
    if op == "varlen_attention":
        yield from _attention(draw)
    elif op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        yield from _modulation(op, draw)
    elif op == "qk_norm_rope":
        yield from _rotary(draw)
    elif op in ("patch_embed", "unpatchify"):
        yield from _patches(op, draw)
