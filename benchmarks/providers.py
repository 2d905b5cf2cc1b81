"""Providers that every op has: our own backends, and torch.compile of the definition."""

import functools
import importlib
import importlib.util
import shutil
from functools import partial

import torch

from sora_fast import ops
from sora_fast.explanation import all_ops

from .case import Case, Provider


def backends(op: str) -> list[Provider]:
    """One provider per backend of ours, under the backend's name; what one refuses, it refuses itself, in sentences."""
    return [Provider(name, partial(getattr(ops, op), backend=name), unavailable=_not_timed_on_a_cpu if backend.kernel else
                     _anywhere) for name, backend in all_ops()[op].backends.items()]


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


def installed(module: str) -> str:
    """"" if ``module`` can be imported, else one sentence with the reason."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"The package {error.name} is not installed."
        return f"The package {module} is installed and cannot be imported: {error}."
    except Exception as error:  # a package built for another CUDA or torch fails in many ways
        return f"The package {module} is installed and cannot be imported: {type(error).__name__}: {error}".strip()
    return ""
