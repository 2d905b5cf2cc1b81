"""Kernels on CudaTensors: their host code sees cuda:0, and the emulator runs what it launches on the memory behind."""

import contextlib
import dataclasses

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sora_fast.emulator import csrc_launch, triton_launch
from sora_fast.testing import emulated_gpu

from . import waits
from .tensors import CudaTensor

_run, _launch = triton_launch._run, csrc_launch.launch


def _held(kernel: str, name: str, value):
    """The memory of a launch's argument; on a GPU a CPU tensor is an address that no kernel can read."""
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_held(kernel, name, value.base))
    if isinstance(value, (tuple, list)):
        return type(value)(_held(kernel, name, each) for each in value)
    if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor):
        raise RuntimeError(waits.here(f"{kernel}: expected tensors on cuda:0, got {name} on the CPU"))
    return value.held if isinstance(value, CudaTensor) else value


def _run_on_memory(self, *args, **options):
    held = lambda name, value: _held(self.__name__, name, value)
    args = [held(name, value) for name, value in zip(self.arg_names, args, strict=False)]
    return _run(self, *args, **{name: held(name, value) for name, value in options.items()})


def _launch_on_memory(emulator, extension, op, tensors, arguments):
    held = {name: _held(op, name, value) for name, value in tensors.items()}
    return _launch(emulator, extension, op, held, arguments)


@contextlib.contextmanager
def emulated(arch: str = "sm90"):
    """Inside, Triton's and our CUDA kernels run on CudaTensors; yields the Emulator."""
    triton_launch._run, csrc_launch.launch = _run_on_memory, _launch_on_memory
    try:
        with emulated_gpu(arch) as emulator:
            yield emulator
    finally:
        triton_launch._run, csrc_launch.launch = _run, _launch
