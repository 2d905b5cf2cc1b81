"""What all launchers share: the device that kernels run on, tensors as they take them, and a program's share of it."""

from contextlib import nullcontext

import torch

from .arch import REGISTERS, REGISTERS_OF_THREAD

# Products of float32: three of 10 bits each, exact to the rounding of float32. "ieee" is on no matrix unit, and its unrolled
# products over a head of 128 spill by the thousand.
TF32X3 = "tf32x3"
# maxnreg of kernels that fill the registers: where nothing is said, ptxas spills to stay within 80, 128 or 168.
MAXNREG = REGISTERS_OF_THREAD


def on(device: torch.device):
    """Kernels run on their tensors' device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def registers(warps: int, programs: int, multiple_of: int = 1) -> int:
    """maxnreg with which ``programs`` of ``warps`` are on a multiprocessor at once."""
    return min(REGISTERS // (32 * warps * programs) // multiple_of * multiple_of, MAXNREG)


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """input_precision of products; ``tf32``: may those of float32 drop 13 bits of their factors."""
    return ("tf32" if tf32 else TF32X3) if dtype == torch.float32 else "ieee"


def contiguous(*tensors) -> list:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def rows_dense(tensor):
    """``tensor``, its last axis side by side in memory (a copy where it is not), any strides before."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def channels_last(tensor):
    """``tensor`` (B, C, T, H, W) in channels_last_3d memory; None stays None."""
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last_3d)


def aligned(tensor):
    """``tensor`` from a multiple of 16 bytes on, copied where it is not; None stays None."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % 16 else tensor


def dense(tensor):
    """``tensor`` (B, C, T, H, W) in channels_last_3d memory, aligned."""
    return aligned(channels_last(tensor))
