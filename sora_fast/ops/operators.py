"""Kernel launches as PyTorch operators, which are opaque to torch.compile."""

from collections.abc import Callable

import torch
from torch._library.custom_ops import get_library_allowing_overwrite


def video(like: torch.Tensor, dtype: torch.dtype, batch: int, channels: int, *sizes: int) -> torch.Tensor:
    """An empty (B, C, T, H, W) tensor in the channels_last_3d memory format."""
    return like.new_empty((batch, *sizes, channels), dtype=dtype).permute(0, 4, 1, 2, 3)


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Define ``torch.ops.sora_fast.<name>``, opaque to torch.compile, as ``run``.

    A redefinition, as by a re-imported package, replaces the old one. PyTorch keeps operators when the module that defined
    them is gone.

    Args:
        schema: as in ``"scale(Tensor x, float factor) -> Tensor"``; outputs must not alias inputs.
        run: launches the kernels. It is registered for the CPU too, for the interpreter and for tests; otherwise a backend
            rejects CPU tensors before. fake: the fake implementation, outputs of the same shapes and dtypes.
    """
    name = schema.partition("(")[0]
    library = get_library_allowing_overwrite("sora_fast", name)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"sora_fast::{name}", fake, lib=library)
