"""Kernel launches as PyTorch operators, which are opaque to torch.compile."""

from collections.abc import Callable

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowADInplaceOrView,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._library.custom_ops import get_library_allowing_overwrite
from torch.compiler import is_dynamo_compiling

from ..first_order import PLAIN


def video(like: torch.Tensor, dtype: torch.dtype, batch: int, channels: int, *sizes: int) -> torch.Tensor:
    """An empty (B, C, T, H, W) tensor in the channels_last_3d memory format."""
    return like.new_empty((batch, *sizes, channels), dtype=dtype).permute(0, 4, 1, 2, 3)


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Define ``torch.ops.sora_fast.<name>``, opaque to torch.compile, as ``run``.

    A redefinition, as by a re-imported package, replaces the old one. PyTorch keeps operators when the module that defined
    them is gone.

    Args:
        schema: as in ``"scale(Tensor x, float factor) -> Tensor"``; outputs must not alias inputs.
        run: launches the kernels. It is registered for the CPU too, for the interpreter and for tests; otherwise a backend
            rejects CPU tensors before. fake: the fake implementation, outputs of the same shapes and dtypes.

    Returns:
        What calls the operator.
    """
    name = schema.partition("(")[0]
    library = get_library_allowing_overwrite("sora_fast", name)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"sora_fast::{name}", fake, lib=library)
    return _caller(name, schema, run)


# The types that PyTorch hands on unchanged, by what a schema calls them.
_UNCHANGED = {"Tensor": PLAIN, "float": {float}, "int": {int}, "SymInt": {int}, "bool": {bool}, "str": {str},
              "ScalarType": {torch.dtype}}


def _caller(name: str, schema: str, run: Callable) -> Callable:
    """Calls ``run`` itself, in the state in which PyTorch's dispatcher calls it, where that would do nothing else.

    On a slow core it takes 20 to 30 us, more than all other Python before a launch. It is needed where somebody sees what
    goes through it (a graph that is traced, a mode, a transform, the profiler), and where it converts arguments.
    """
    expected = [part.partition(" ")[0] for part in schema.partition("(")[2].partition(")")[0].split(", ")]
    single = [{tuple, list} if kind.endswith("[]") else _UNCHANGED[kind.removesuffix("?")] |
              ({type(None)} if kind.endswith("?") else set()) for kind in expected]
    several = [(place, _UNCHANGED[kind.removesuffix("[]")]) for place, kind in enumerate(expected) if kind.endswith("[]")]
    fit = set()  # types of arguments that are as expected

    def call(*arguments):
        if (is_dynamo_compiling() or _len_torch_dispatch_stack() or _len_torch_function_stack() or _profiler_enabled()
                or _are_functorch_transforms_active() or _is_tracing()):
            return getattr(torch.ops.sora_fast, name)(*arguments)
        kinds = tuple(map(type, arguments))
        if kinds not in fit:
            if len(kinds) != len(single) or not all(kind in allowed for kind, allowed in zip(kinds, single, strict=True)):
                return getattr(torch.ops.sora_fast, name)(*arguments)
            fit.add(kinds)
        for place, allowed in several:
            if not allowed.issuperset(map(type, arguments[place])):
                return getattr(torch.ops.sora_fast, name)(*arguments)
        with _AutoDispatchBelowADInplaceOrView():
            return run(*arguments)

    return call
