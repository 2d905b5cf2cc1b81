"""What people name in words: a device, a size, a function of theirs. Each has one sentence for a name that is none."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name, "auto" for a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, no such GPU, a build without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device: expected auto, cpu, cuda or another device of this machine, got {name!r} ({reason}); "
                         f"sora-fast info shows what there is") from error
    return device


def parse_size(text: str, vae, patch) -> tuple[int, int, int]:
    """``TxHxW`` in pixels, checked against what ``vae``, a VideoVAE, and the patch take."""
    try:
        frames, height, width = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--size: expected TxHxW such as 9x96x160, got {text!r}; give frames, lines, columns") from None
    f, step = vae.config.space_factor, vae.config.time_factor
    for name, size, unit, first in (("frames", frames, step * patch[0], 1), ("lines", height, f * patch[1], 0),
                                    ("columns", width, f * patch[2], 0)):
        if size < 1 or (size - first) % unit:
            low = (max(size, 1) - first) // unit * unit + first
            near = f"{low} or {low + unit}" if low > 0 else f"{low + unit}"
            raise ValueError(f"--size: expected {name} as {f'1 + {unit} k' if first else f'a multiple of {unit}'}, got "
                             f"{size}; the nearest are {near}")
    return frames, height, width


def load_function(path: str, flag: str) -> Callable:
    """The function ``pkg.mod:fn`` that ``flag`` names, looked for in the working folder too."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{flag}: expected pkg.mod:fn, got {path!r}; put a colon before the function's name")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{flag}: expected pkg.mod:fn with the name of a module, got {module!r}; write it as an import "
                         f"does, and run in its folder")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ImportError(f"{flag}: expected to import {module} from here or from what is installed, got: {error}; check "
                          f"the name, or run in its folder") from error
    if not callable(found):
        raise ValueError(f"{flag}: expected a function {name!r} in {module}, got none; check the name")
    return found
