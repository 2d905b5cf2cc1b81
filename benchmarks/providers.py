"""Providers that every op has, our own backends and torch.compile of the definition, and what several specs' peers share."""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from sora_fast import ops
from sora_fast.dispatch import ORDER
from sora_fast.explanation import all_ops
from sora_fast.ops.attention_peers import installed

from .case import Case, Provider, anywhere


def backends(op: str) -> list[Provider]:
    """One provider per backend of ours, under the backend's name; what one refuses, it refuses itself, in sentences.

    The libraries among the backends are peers: a spec times their own calls, without our copies around them.
    """
    return [Provider(name, partial(getattr(ops, op), backend=name), unavailable=_not_timed_on_a_cpu if backend.kernel else
                     anywhere) for name, backend in all_ops()[op].backends.items() if name in ORDER]


def _not_timed_on_a_cpu(case: Case, direction: str, device: torch.device) -> str:
    return "It is a kernel for CUDA GPUs; a time from Triton's interpreter says nothing." if device.type == "cpu" else ""


def compiled(op: str, **options) -> Provider:
    """torch.compile of the reference, the peer that fuses by itself; ``options`` go to torch.compile."""
    run = functools.cache(lambda: torch.compile(partial(getattr(ops, op), backend="reference"), dynamic=False,
                                                fullgraph=True, **options))
    return Provider("compile", lambda **inputs: run()(**inputs), unavailable=no_compiler, compiled=True)


def no_compiler(case: Case, direction: str, device: torch.device) -> str:
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "torch.compile needs a C++ compiler for the CPU, and there is none on the PATH."
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton for a GPU, and it is not installed."
    return ""


# ------------------------------------------------------------------------------------------------ compositions of models
def eager_norm(x, norm, weight, bias, eps):
    """PyTorch's norm over the last dimension, in x's dtype, weight and bias inside it."""
    # on a CPU layer_norm with 16-bit weights gives gradients of them that break the error rule from some 50 tokens on
    dtype = torch.float32 if x.device.type == "cpu" and weight is not None else x.dtype
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    if norm == "layer":
        return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
    h = F.rms_norm(x.to(dtype), x.shape[-1:], weight, eps)
    return (h if bias is None else h + bias).to(x.dtype)


def compiled_eager(op: str, eager: Callable, prepare: Callable, also: Callable = lambda case: "") -> Provider:
    """torch.compile of a model's composition; ``also`` adds a reason, of the case alone, why there is none."""
    usual = compiled(op)
    made = functools.cache(lambda: torch.compile(eager, dynamic=False, fullgraph=True))
    return replace(usual, name="compile_eager", run=lambda **inputs: made()(**inputs), prepare=prepare,
                   unavailable=lambda case, *where: also(case) or usual.unavailable(case, *where))


# ------------------------------------------------------------------------------------------------------------ Liger
def liger_missing(name: str, device: torch.device) -> str:
    """"" where Liger's autograd function ``name`` can be used, else one sentence."""
    if device.type != "cuda":
        return "Liger's kernels are Triton and need a GPU."
    reason = installed("liger_kernel")
    if not reason and not hasattr(liger_ops(), name):
        reason = f"The installed liger_kernel has no {name}."
    return reason


def liger_ops():
    import liger_kernel.ops

    return liger_kernel.ops
