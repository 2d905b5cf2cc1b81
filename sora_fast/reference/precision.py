"""At least float32 inside, one rounding where a tensor of the contract is produced."""

import torch


def wide_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any of ``tensors`` is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def widen(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """``tensors`` in their common wide dtype; None stays None."""
    dtype = wide_dtype(*tensors)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
