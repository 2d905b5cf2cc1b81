"""At least float32 inside, one rounding where a tensor of the contract is produced; what torch.autocast asks for; whether
numbers can be read; whether products of float32 keep their bits; and which dtypes a CPU has no instructions for.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch._C import _is_any_autocast_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_dynamo_compiling

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
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not torch.float32:
            break
    else:
        return tensors
    dtype = wide_dtype(*tensors)
    return tuple([t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors])


def autocasts(kind: str) -> bool:
    """Whether torch.autocast is on for devices of ``kind``; the meta device has no autocast."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def no_autocast(kind: str):
    """A context without torch.autocast for devices of ``kind`` (under it even torch.cat refuses some dtypes)."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that F.linear would compute in here, or None outside torch.autocast."""
    if not _is_any_autocast_enabled():  # before ``device.type``, which is printed anew: 5 us on a slow core
        return None
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


def has_data(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has values to read: not while a graph is traced, nor in fake and meta tensors, nor in
    those of a transform of torch.func.
    """
    return not (is_dynamo_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor)
                or is_functorch_wrapped_tensor(tensor))


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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear; in float32 on a CPU that has no products in x's dtype."""
    if x.dtype.itemsize > 2 or not (x.is_cpu and emulated_on_cpu(x.dtype)):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- TF32
# PyTorch has two sets of switches. The new ones, fp32_precision, can always be read. The old ones (allow_tf32,
# float32_matmul_precision) set the new ones too, and raise when they are read after a new one was set otherwise.
def tf32_products() -> bool:
    """Whether products of float32 may drop 13 bits of their factors on CUDA."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tf32_convolutions() -> bool:
    """The same of cuDNN's convolutions, where it is PyTorch's default."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def keep_float32() -> None:
    """From now on float32 is float32 in products and convolutions, on every device."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for switch in _switches():
        switch.fp32_precision = "ieee"


@contextmanager
def float32_kept():
    """``keep_float32`` inside alone."""
    with switches_restored():
        keep_float32()
        yield


@contextmanager
def switches_restored():
    """All of these switches are afterwards as before."""
    old = _readable(lambda: torch.backends.cudnn.allow_tf32), _readable(torch.get_float32_matmul_precision)
    before = [(switch, switch.fp32_precision) for switch in _switches()]
    try:
        yield
    finally:
        if old[0] is not None:
            torch.backends.cudnn.allow_tf32 = old[0]
        if old[1] is not None:
            torch.set_float32_matmul_precision(old[1])
        for switch, value in before:
            switch.fp32_precision = value


def _switches() -> tuple:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _readable(read):
    """``read()``, or None where an old switch contradicts the new ones."""
    try:
        return read()
    except RuntimeError:
        return None
