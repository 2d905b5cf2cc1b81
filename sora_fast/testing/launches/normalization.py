"""Launches of norm and activation: both norms at channels of models, with and without a cache, in the mixes of dtypes."""

from functools import partial

import torch

from ... import ops
from ...kernels.launch import dense
from ...kernels.normalization import backward, forward
from ...kernels.normalization_config import HEURISTICS, Launch


def both(channels, x_dtype, y_dtype, weight_dtype, norm, groups=32, keep=0, bias=False, size=(2, 3, 8, 8), cached=2,
         wanted=(True, True, True), gpu="sm90"):
    """Forward and backward on tensors without memory; ``size``: batch, frames, height, width."""
    batch, frames, height, width = size
    make = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device="meta")
    video = lambda frames, dtype: make(batch, frames, height, width, channels, dtype=dtype).movedim(-1, 1)
    x, weight = video(frames, x_dtype), make(channels, dtype=weight_dtype)
    bias = weight if bias else None
    launch = Launch(channels, 2**24, norm, "silu", x_dtype, y_dtype)
    facts = dict(norm=norm, groups=groups, eps=1e-24, act="silu")
    y, _, stats = forward(x, weight, bias, dtype=y_dtype, config=HEURISTICS["forward"](launch, gpu),
                          cache=video(cached, y_dtype) if keep else None, keep=keep, **facts)
    backward(y, x, weight, bias, stats, wanted=(*wanted[:2], wanted[2] and bias is not None),
             config=HEURISTICS["backward"](launch, gpu), **facts)


def aot_cases():
    f32, bf16 = torch.float32, torch.bfloat16
    wants = dict(wants_wide=True)
    # sums are a thousandth of what is read; the grouped backward stores nothing else in the first of its two launches
    small = dict(wants_wide=False)
    grouped = wants | dict(stats_kernel=small, merge_stats_kernel=small, reduce_sums_kernel=small, backward_kernel=small)
    for gpu, ccs, suffix in (("sm90", (80, 86, 89, 90, 100), ""), ("sm120", (120,), ", sm120")):
        for name, case in (("96, bfloat16, keep 4", partial(both, 96, bf16, bf16, bf16, keep=4)),
                           ("192, bfloat16", partial(both, 192, bf16, bf16, bf16)),
                           ("384, bfloat16", partial(both, 384, bf16, bf16, bf16)),
                           ("160, float32 to bfloat16", partial(both, 160, f32, bf16, f32)),
                           ("2048, float32", partial(both, 2048, f32, f32, f32, bias=True))):
            yield name + suffix, partial(case, norm="rms", gpu=gpu), wants | dict(ccs=ccs)
    yield "128, group", partial(both, 128, bf16, bf16, bf16, "group", bias=True), grouped
    yield "384, group, keep 4", partial(both, 384, bf16, bf16, f32, "group", keep=4, bias=True), grouped


def cuda_cases():
    """Of csrc's kernel: names, and calls on CPU tensors whose numbers are never read."""
    def call(channels, dtype):
        x = torch.empty(1, channels, 4, 32, 32, dtype=dtype, device="cpu")
        ops.norm_act(dense(x), norm="rms", backend="cuda")

    for channels, dtype in ((96, torch.bfloat16), (192, torch.bfloat16), (384, torch.bfloat16), (160, torch.float32)):
        yield f"{channels}, {str(dtype).removeprefix('torch.')}", partial(call, channels, dtype)
