"""Launches of adaLN: each op, at widths of models, in the mixes of dtypes that they have."""

from functools import partial

import torch

from ...kernels.modulation import backward, forward
from ...kernels.modulation_config import HEURISTICS, Launch


def both(width, x_dtype, y_dtype, table_dtype, norm, affine, tokens=64, count=2, rows=True):
    """Forward and backward on tensors without memory, of ``count`` modulation rows that are parts of one product."""
    make = lambda *shape, dtype: None if dtype is None else torch.empty(*shape, dtype=dtype, device="meta")
    x, y = make(tokens, width, dtype=x_dtype), make(tokens, width, dtype=y_dtype)
    gate, shift, scale = (table if there else None for table, there in zip(
        make(count, 3 * width, dtype=table_dtype).chunk(3, -1), (y_dtype, norm, norm), strict=True))
    weight = bias = make(width, dtype=x_dtype if affine else None)
    rows = make(tokens, dtype=torch.int32) if rows else None
    launch = Launch(width, 64, x_dtype, y_dtype, norm, affine)
    x_new, h, stats = forward(x, y, gate, shift, scale, rows, weight, bias, norm=norm, eps=1e-6, save=True,
                              dtype=y_dtype or x_dtype, config=HEURISTICS["forward"](launch, "sm90"))
    backward(x_new, h, x if norm else None, y, gate, shift, scale, rows, weight, bias, stats, norm=norm,
             wanted=[t is not None for t in (x, y, gate, shift, scale, weight, bias)],
             config=HEURISTICS["backward"](launch, "sm90"))


def aot_cases():
    f32, bf16 = torch.float32, torch.bfloat16
    # the kernel that joins reads and writes a thousandth of what the others do
    wants = dict(wants_wide=True, reduce_slots_kernel=dict(wants_wide=False))
    yield "384, float32", partial(both, 384, f32, f32, f32, "rms", False), wants
    yield "1152, bfloat16", partial(both, 1152, bf16, bf16, bf16, "layer", False), wants
    yield "1536, float32 tables", partial(both, 1536, bf16, None, f32, "layer", False), wants
    yield "3072, affine", partial(both, 3072, bf16, None, bf16, "layer", True), wants
    yield "3072, gate", partial(both, 3072, bf16, bf16, bf16, None, False), wants
    # 254 or 255 registers, and by architecture and Triton version up to 19 spills, whose cost is not measured yet: in the
    # table, not in the verdict
    yield "5120, float32 stream", partial(both, 5120, f32, bf16, f32, "layer", False), wants | dict(
        backward_kernel=dict(gated=False))
