"""What all Triton backends share: the devices and dtypes they support, config look-up, and autograd helpers."""

import functools
import importlib
import importlib.util

import torch

from .. import configs, env
from ..dispatch import Problem, emulated_gpu, remember, remembered
from ..first_order import apply as apply_plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unsupported(problem: Problem, wide: torch.dtype) -> list[str]:
    """Reasons why no Triton kernel supports ``problem``. ``wide``: the dtype of the arithmetic."""
    return list(_reasons(problem.device, problem.dtype, wide))


@env.constant_in_graphs
def _reasons(device: str, dtype: torch.dtype, wide: torch.dtype) -> tuple[str, ...]:
    reasons = []
    if not _installed():
        reasons.append("Triton is not installed; install it with pip install triton.")
    kind, _, architecture = device.partition(":")
    if kind in ("cuda", "emulated"):
        if env.interpreted():
            reasons.append("With TRITON_INTERPRET=1 kernels take CPU tensors and no others; unset it to run on the GPU.")
        if architecture and int(architecture.removeprefix("sm")) < 80:
            reasons.append(f"Its kernels are proven for sm80 and newer, and this GPU is {architecture}.")
    elif kind != "cpu":
        reasons.append(f"Its kernels run on CUDA GPUs, and these tensors are on {kind}.")
    elif not env.interpreted():
        reasons.append("Its kernels run on CUDA GPUs; on a CPU only in sora_fast.testing.emulated_gpu, or in Triton's "
                       "interpreter, with TRITON_INTERPRET=1.")
    if wide == torch.float64:
        reasons.append("Its kernels compute in float32, and float64 tensors ask for more.")
    elif dtype not in DTYPES:
        reasons.append(f"Its kernels take float32, bfloat16 and float16, and not {str(dtype).removeprefix('torch.')}.")
    return tuple(reasons)


def config(family: str, kernel: str, device: torch.device | str, *launch, **named) -> configs.Found:
    """The Config of one launch of ``kernel`` of sora_fast.kernels.<family>, for the fields of its Launch.

    ``device``: of tensors, or of a Problem.
    """
    gpu = _gpu_name(device)
    key = (config, configs.generation, family, kernel, gpu, *launch, *named, *named.values())
    found = remembered(key)
    if found is None:
        rules = importlib.import_module(f"..kernels.{family}_config", __package__)  # needs Triton, which need not be there
        found = remember(key, configs.lookup(family, kernel, rules.Launch(*launch, **named), gpu, rules.HEURISTICS[kernel]))
    return found


@functools.cache
def _kind(device: torch.device) -> str:
    """``device.type``, which PyTorch prints anew every time."""
    return device.type


def _gpu_name(device: torch.device | str) -> str:
    """The GPU name for config look-up; "cpu" in the interpreter, "sm90" if one is emulated, or asked about by tensors of
    the device meta."""
    if isinstance(device, str):
        return configs.gpu_name(device) if device.startswith("cuda") else "cpu"
    if _kind(device) in ("cpu", "meta"):
        gpu = emulated_gpu()
        return "cpu" if gpu is None else gpu.arch
    return configs.gpu_name(device)


class _NoNode:
    """A replacement for an autograd context that saves nothing."""

    def save_for_backward(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply``, or its forward alone if no gradient is needed, which avoids the cost of an autograd node."""
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        for each in arguments:
            if isinstance(each, torch.Tensor) and each.requires_grad:
                return apply_plain(function, *arguments)
    return function.forward(_NoNode(), *arguments)


def distinct(tensors):
    """The inputs of an autograd.Function, with repeated tensors as views: torch.compile would trace them as one."""
    if not torch.compiler.is_compiling():
        return tensors
    given = []
    for tensor in tensors:
        twice = tensor is not None and any(tensor is other for other in given)
        given.append(tensor.view_as(tensor) if twice else tensor)
    return given
