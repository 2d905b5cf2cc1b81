"""Launches of QK-norm and rotation: heads, norms and pairings of models."""

from functools import partial

import torch

from ...kernels.rotary import backward, forward
from ...kernels.rotary_config import HEURISTICS, Launch


def both(heads, key_heads, head_dim, dtype, norm, pairing, freqs, affine, fused=True, tokens=64, rows=True):
    """Forward and backward on tensors without memory; ``fused``: q and k are parts of one product, else heads come first."""
    make = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")
    qkv = make(tokens, heads + 2 * key_heads, head_dim)
    q, k = qkv[:, :heads], qkv[:, heads:heads + key_heads]
    if not fused:
        q, k = (make(count, tokens, head_dim).transpose(0, 1) for count in (heads, key_heads))
    vector = lambda count, there: make(count * head_dim if norm == "rms_all" else head_dim) if there else None
    affines = [vector(count, name in affine) for name in ("weight", "bias") for count in (heads, key_heads)]
    coords = make(tokens, 3, dtype=torch.int32)
    table = make(3, *([heads] if freqs == "learned" else []), head_dim // 2, dtype=torch.float32)
    rows = make(tokens, dtype=torch.int32) if rows else None
    launch = Launch(heads, key_heads, head_dim, 64, dtype, norm, bool(affine), freqs, pairing)
    settings = dict(norm=norm, pairing=pairing, eps=1e-6)
    q_out, k_out = forward(q, k, coords, *affines, table, rows, **settings, config=HEURISTICS["forward"](launch, "sm90"))
    backward(q_out, k_out, q, k, coords, *affines, table, rows, **settings, config=HEURISTICS["backward"](launch, "sm90"),
             wanted=[True, True, *(t is not None for t in affines), freqs == "learned"])


def aot_cases():
    f32, bf16 = torch.float32, torch.bfloat16
    wants = dict(wants_wide=True)
    # 8 bytes a thread of a piece of heads, or of each half of one: with 16 it would hold 40 numbers and sums, and spill
    narrow = wants | dict(backward_kernel=dict(wants_wide=False))
    yield "Wan 1.3B", partial(both, 12, 12, 128, bf16, "rms_all", "interleaved", "fixed", ("weight",)), narrow
    yield "Wan 14B", partial(both, 40, 40, 128, bf16, "rms_all", "interleaved", "fixed", ("weight",), fused=False), narrow
    yield "Hunyuan", partial(both, 24, 24, 128, bf16, "rms_head", "interleaved", "fixed", ("weight",)), wants
    yield "Open-Sora 2", partial(both, 24, 24, 128, bf16, "rms_head", "half", "fixed", ("weight",)), narrow
    yield "CogVideoX 5B", partial(both, 48, 48, 64, bf16, "layer_head", "interleaved", "fixed", ("weight", "bias")), wants
    yield "16 x 72", partial(both, 16, 16, 72, bf16, "layer_head", "interleaved", "fixed", ("weight", "bias")), wants
    yield "Mochi", partial(both, 24, 24, 128, bf16, "rms_head", "interleaved", "learned", ("weight",)), wants
    yield "GQA", partial(both, 32, 8, 128, bf16, "rms_head", "half", "fixed", ("weight",)), narrow | dict(ccs=(90,))
    yield "no norm", partial(both, 24, 24, 128, bf16, None, "interleaved", "fixed", ()), wants | dict(ccs=(90,))
    yield "DiT-S, float32", partial(both, 6, 6, 64, f32, "rms_head", "interleaved", "fixed", ("weight",)), wants
