"""What all launches share: the device guard, the layouts kernels take, and the register budget of a program."""

from contextlib import nullcontext

import torch

from .arch import REGISTERS, REGISTERS_OF_THREAD

# float32 MMAs as three TF32 MMAs, accurate to float32 rounding. "ieee" does not use Tensor Cores, and its unrolled FMAs over
# a head dim of 128 spill thousands of registers.
TF32X3 = "tf32x3"
# maxnreg for kernels that need all registers: without it ptxas spills to stay within 80, 128 or 168 per thread.
MAXNREG = REGISTERS_OF_THREAD


def on(device: torch.device):
    """Make ``device`` current for a launch: tensors need not be on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def registers(warps: int, programs: int, multiple_of: int = 1) -> int:
    """maxnreg with which ``programs`` of ``warps`` warps each are resident per SM, rounded down to ``multiple_of``."""
    return min(REGISTERS // (32 * warps * programs) // multiple_of * multiple_of, MAXNREG)


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """input_precision for tl.dot; ``tf32``: whether float32 operands may be rounded to TF32."""
    return ("tf32" if tf32 else TF32X3) if dtype == torch.float32 else "ieee"


def contiguous(*tensors) -> list:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def rows_dense(tensor):
    """``tensor`` with unit stride in its last axis (copied if it has another), any strides in the others."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def channels_last(tensor):
    """``tensor`` (B, C, T, H, W) in the channels_last_3d memory format; None stays None."""
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last_3d)


def aligned(tensor):
    """``tensor``, copied if its address is not a multiple of 16 bytes; None stays None."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % 16 else tensor


def dense(tensor):
    """``tensor`` (B, C, T, H, W) in the channels_last_3d memory format, aligned to 16 bytes."""
    return aligned(channels_last(tensor))
