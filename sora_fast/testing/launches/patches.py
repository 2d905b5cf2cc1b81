"""Launches of patch embedding and its way back: latents at the widths of models, pixels, float32 and odd sizes."""

from functools import partial
from math import prod

import torch

from ...kernels.patches import embed, embed_latents_gradient, embed_weight_gradient, permute
from ...kernels.patches_config import HEURISTICS, Launch


def _tables(samples):
    return (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((samples, 3), (samples + 1,)))


def embedding(channels, patch, width, dtype, gpu, tokens=4096, samples=3):
    """Forward and backward on tensors without memory."""
    make = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    weight, bias = make(width, channels, *patch), make(width)
    grids, cu_seqlens = _tables(samples)
    launch = Launch(4096, width, prod((channels, *patch[:2])), patch[2], dtype)
    latents = make(tokens * channels * prod(patch))
    out = embed(latents, weight, bias, grids, cu_seqlens, config=HEURISTICS["embed"](launch, gpu))
    embed_latents_gradient(out, weight, grids, cu_seqlens, config=HEURISTICS["latents"](launch, gpu))
    embed_weight_gradient(out, latents, weight, grids, cu_seqlens, want_weight=True, want_bias=True,
                          config=HEURISTICS["weight"](launch, gpu))


def permutations(channels, patch, dtype, tokens=4096, samples=3, ways=(False, True)):
    """There and back, or one of these ``ways``, on tensors without memory."""
    grids, cu_seqlens = _tables(samples)
    given = torch.empty((tokens, channels * prod(patch)), dtype=dtype, device="meta")
    config = HEURISTICS["permute"](Launch(4096, channels, prod(patch[:2]), patch[2], dtype), "sm90")
    for to_tokens in ways:
        permute(given, grids, cu_seqlens, patch, channels, to_tokens=to_tokens, config=config)


def aot_cases():
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for gpu, ccs in (("sm90", (80, 90, 100)), ("sm86", (86, 89, 120))):
        # the buffer's side of d_latents has pw numbers a lane
        wants = dict(wants_matrix=True, wants_wide=True, ccs=ccs, latents_kernel=dict(wants_wide=False))
        for name, *case in (
            ("latents, 1152", 16, (1, 2, 2), 1152, bf16),
            ("latents, 1536", 16, (1, 2, 2), 1536, bf16),
            ("latents, 5120", 16, (1, 2, 2), 5120, bf16),
            ("48 channels, 3072", 48, (1, 2, 2), 3072, bf16),
            ("128 channels, 2048, float16", 128, (1, 1, 1), 2048, f16),
            ("pixels, 1152", 3, (2, 16, 16), 1152, bf16),
        ):
            yield f"{name}, {gpu}", partial(embedding, *case, gpu), wants
        for name, *case in (("latents, 1536, float32", 16, (1, 2, 2), 1536, f32),
                            ("pixels, 1152, float32", 3, (2, 16, 16), 1152, f32)):
            yield f"{name}, {gpu}", partial(embedding, *case, gpu), dict(ccs=ccs)
        yield f"odd, 385, {gpu}", partial(embedding, 3, (1, 3, 3), 385, bf16, gpu), dict(wants_matrix=True, ccs=ccs)
    yield "16 channels", partial(permutations, 16, (1, 2, 2), bf16), {}
    yield "48 channels", partial(permutations, 48, (1, 2, 2), bf16), {}
    yield "8 channels, float32", partial(permutations, 8, (1, 2, 2), f32), {}
    yield "pixels", partial(permutations, 3, (2, 16, 16), bf16), {}
