"""Launches of attention: head dims of models, each dtype, masks, with each architecture's own tiles."""

from functools import partial

import torch

from ...kernels.arch import SHARED
from ...kernels.attention import backward, forward
from ...kernels.attention_config import HEURISTICS, Launch
from ...records import triton_minor


def both(head_dim, dtype, gpu, group=1, *, queries=300, keys=300, samples=2, heads=4, pitch=None, **mask):
    """Forward and backward on tensors without memory; ``pitch``: elements from one token to the next."""
    pitch = pitch or heads * head_dim
    cut = lambda rows, count: torch.empty_strided((rows, count, head_dim), (pitch, head_dim, 1), dtype=dtype, device="meta")
    q, k, cu = cut(queries, heads), cut(keys, heads // group), torch.empty(samples + 1, dtype=torch.int32, device="meta")
    options = dict(scale=head_dim ** -0.5, causal=False, window=(-1, -1), tf32=False) | mask
    launch = Launch(head_dim, dtype, group, bool(mask))
    config, dq_config, dkdv_config = (HEURISTICS[kernel](launch, gpu) for kernel in ("forward", "dq", "dkdv"))
    out, lse, parts = forward(q, k, k, cu, cu, config=config, **options)
    backward(out, lse, q, k, k, out, lse, parts, cu, cu, dq_config=dq_config, dkdv_config=dkdv_config, **options)


def aot_cases():
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    groups = {"sm80": (80,), "sm89": (89, 86), "sm120": (120,), "sm90": (90,), "sm100": (100,)}
    everywhere = [(64, bf16, {}), (72, bf16, {}), (80, bf16, {}), (96, bf16, {}), (128, bf16, {}),
                  (128, bf16, dict(causal=True))]
    more = [(72, bf16, dict(window=(9, 9))), (128, f16, dict(group=4)), (64, f32, {}), (96, f32, {}), (192, bf16, {}),
            (256, bf16, {})]
    for head_dim, dtype, options in everywhere + more:
        # One wait for each product whose result the next step needs, and one more for each link of a chain of chunks:
        # scores in the forward, scores and dP in the backward.
        links = 1 if head_dim in (64, 128, 256) else 2
        for gpu, ccs in groups.items():
            if (head_dim, dtype, options) in more and gpu in ("sm89", "sm120"):
                continue  # as sm80's
            wants = dict(ccs=ccs, gated=head_dim <= 128, wants_wide=True, schedule_kernel=dict(ccs=()))
            if dtype != f32:
                wants |= dict(wants_matrix=True)
            if dtype != f32 and gpu == "sm90":
                wants |= {name: dict(expected_drains=count * links) for name, count in
                          (("forward_kernel", 1), ("dq_kernel", 2), ("dkdv_kernel", 2))}
            if (head_dim, gpu) == (128, "sm90"):
                # before and behind the main loop (tests/test_machine_code.py; with a group, sora-fast predict says it); with
                # Triton 3.6 some in it, as is predicted to be no slower
                spills = 18 if "group" in options else 2
                wants["dkdv_kernel"] |= dict(allowed_spills=48 if triton_minor() == "3.6" else spills)
            if (head_dim, dtype, gpu) == (64, bf16, "sm80"):
                wants["schedule_kernel"] = dict(ccs=tuple(SHARED), wants_wide=False, wants_matrix=False)
            label = [f"{head_dim} {str(dtype).removeprefix('torch.')}", *(f"{k} {v}" for k, v in options.items()), gpu]
            yield ", ".join(label), partial(both, head_dim, dtype, gpu, **options), wants
