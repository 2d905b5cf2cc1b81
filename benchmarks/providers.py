"""Providers that every op has: our own backends, and torch.compile of the definition."""

import functools
import importlib.util
import shutil
from functools import partial

import torch

from sora_fast import ops
from sora_fast.dispatch import ORDER
from sora_fast.explanation import all_ops
from sora_fast.ops.attention_peers import installed  # noqa: F401 - for the specs

from .case import Case, Provider


def backends(op: str) -> list[Provider]:
    """One provider per backend of ours, under the backend's name; what one refuses, it refuses itself, in sentences.

    The libraries among the backends are peers: a spec times their own calls, without our copies around them.
    """
    return [Provider(name, partial(getattr(ops, op), backend=name), unavailable=_not_timed_on_a_cpu if backend.kernel else
                     _anywhere) for name, backend in all_ops()[op].backends.items() if name in ORDER]


def _anywhere(case: Case, direction: str, device: torch.device) -> str:
    return ""


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
