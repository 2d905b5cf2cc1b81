"""Launches as operators of PyTorch, which torch.compile does not look into."""

from collections.abc import Callable

import torch
from torch._library.custom_ops import get_library_allowing_overwrite


def video(like: torch.Tensor, dtype: torch.dtype, batch: int, channels: int, *sizes: int) -> torch.Tensor:
    """An empty (B, C, T, H, W) in channels_last_3d memory."""
    return like.new_empty((batch, *sizes, channels), dtype=dtype).permute(0, 4, 1, 2, 3)


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Make ``torch.ops.sora_fast.<name>``, opaque to torch.compile, of ``run``.

    Defined once more, as by a package that is imported anew, it takes the old one's place. PyTorch keeps it: it does not go
    with the module that made it.

    Args:
        schema: as in ``"scale(Tensor x, float factor) -> Tensor"``; outputs share no memory with inputs.
        run: launches the kernels. The CPU is there for the interpreter and for stand-ins: a backend refuses its tensors
            before. fake: gives outputs of the same shapes and dtypes without numbers.
    """
    name = schema.partition("(")[0]
    library = get_library_allowing_overwrite("sora_fast", name)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"sora_fast::{name}", fake, lib=library)
