"""At least float32 inside, one rounding where a tensor of the contract is produced; what torch.autocast asks for; whether
numbers can be read; and which dtypes a CPU has no instructions for.
"""

from contextlib import nullcontext

import torch

from .env import constant_in_graphs


def wide_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any of ``tensors`` is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``tensor`` in ``dtype``; None stays None. ``Tensor.to`` costs its microsecond also where there is nothing to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def widen(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """``tensors`` in their common wide dtype; None stays None."""
    dtype = wide_dtype(*tensors)
    return tuple([cast(t, dtype) for t in tensors])


def autocasts(kind: str) -> bool:
    """Whether torch.autocast is on for devices of ``kind``; the meta device has no autocast."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def no_autocast(kind: str):
    """A context without torch.autocast for devices of ``kind`` (under it even torch.cat refuses some dtypes)."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that F.linear would compute in here, or None outside torch.autocast."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if autocasts(kind) else None


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast as F.linear does under torch.autocast: floating tensors other than float64; else leave all alone."""
    dtype = None
    for tensor in tensors:
        if tensor is not None:
            dtype = autocast_dtype(tensor)
            break
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has values to read: not while a graph is traced, nor in fake and meta tensors, nor in
    those of a transform of torch.func.
    """
    return not (torch.compiler.is_compiling() or tensor.device.type == "meta"
                or isinstance(tensor, torch._subclasses.FakeTensor)
                or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is at work, whose tensors stand for others."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@constant_in_graphs
def emulated_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN has no products and convolutions in this 16-bit dtype for this CPU: it has them from AVX-512 on, and
    elsewhere PyTorch's own loops take over, ten to forty times slower than float32.
    """
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return supported is not None and torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, supported)()
