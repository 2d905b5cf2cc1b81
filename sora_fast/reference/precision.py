"""At least float32 inside, one rounding where a tensor of the contract is produced; whether numbers can be read; and which
dtypes a CPU has no instructions for.
"""

import torch

from ..env import constant_in_graphs


def wide_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any of ``tensors`` is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether there are numbers to read in ``tensor``: not while a graph is traced, nor in fake and meta tensors, nor in
    those of a transform of torch.func.
    """
    return not (torch.compiler.is_compiling() or tensor.device.type == "meta"
                or isinstance(tensor, torch._subclasses.FakeTensor)
                or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is at work, whose tensors stand for others."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def widen(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """``tensors`` in their common wide dtype; None stays None."""
    dtype = wide_dtype(*tensors)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


@constant_in_graphs
def emulated_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN has no products and convolutions in this 16-bit dtype for this CPU: it has them from AVX-512 on, and
    elsewhere PyTorch's own loops take over, ten to forty times slower than float32.
    """
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return supported is not None and torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, supported)()
