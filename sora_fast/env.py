"""Every environment variable the library reads, and nothing else.

====================  ===================================================================================
SORA_FAST_BACKEND     name of the backend every op must use; same meaning as ``sora_fast.use_backend``
SORA_FAST_ACCELERATE  0: ``sora_fast.accelerate`` swaps nothing
SORA_FAST_CHECK       1: check the values of CUDA index tensors too (each check waits for the GPU)
SORA_FAST_CACHE       folder of this user's validation records, tuned configs, latents of media, emulated PTX and the machine
                      code that predict reads, default ~/.cache/sora_fast (XDG_CACHE_HOME/sora_fast where that is set); on
                      every system the same
SORA_FAST_COMMIT      the commit of a copy of the sources that has no .git, for the rows that a benchmark writes
TRITON_INTERPRET      1: Triton's own; kernels run on CPU tensors, slowly, to be tried and debugged (set it before the
                      start)
====================  ===================================================================================

Values are read at the call, not at import; a graph made by torch.compile keeps the value it was traced with, and a process
the records and configs of the folder it has once read.
"""

import os
from pathlib import Path


def constant_in_graphs(fn):
    """torch.compiler.assume_constant_result without its import of the whole compiler, a second of every start."""
    fn._dynamo_marked_constant = True
    return fn


@constant_in_graphs
def backend() -> str | None:
    """The backend that SORA_FAST_BACKEND names, or None."""
    return os.environ.get("SORA_FAST_BACKEND") or None


def accelerate() -> bool:
    """Whether ``sora_fast.accelerate`` may swap layers: not with SORA_FAST_ACCELERATE=0."""
    return os.environ.get("SORA_FAST_ACCELERATE", "1") != "0"


@constant_in_graphs
def check_cuda_values() -> bool:
    """Whether SORA_FAST_CHECK=1 asks for value checks that synchronise with the GPU."""
    return os.environ.get("SORA_FAST_CHECK", "0") == "1"


_BACKEND, _INTERPRET = map(os.environ.encodekey, ("SORA_FAST_BACKEND", "TRITON_INTERPRET"))


def choices() -> tuple:
    """``backend()`` and ``interpreted()`` unread, to see whether they are as before: os.environ takes ten times as long."""
    table = os.environ._data
    return table.get(_BACKEND), table.get(_INTERPRET)


@constant_in_graphs
def interpreted() -> bool:
    """Whether TRITON_INTERPRET has Triton's kernels interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def cache() -> Path:
    """The folder of the user's cache; it need not exist."""
    named = os.environ.get("SORA_FAST_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # its specification has relative ones ignored
        shared = os.path.expanduser("~/.cache")
    return Path(shared) / "sora_fast"


def settings() -> dict[str, str]:
    """Every SORA_FAST_ variable that is set and may change a figure, for records of what one was measured under."""
    places = ("SORA_FAST_CACHE", "SORA_FAST_COMMIT")
    return {name: value for name, value in sorted(os.environ.items())
            if name.startswith("SORA_FAST_") and name not in places}


def commit() -> str | None:
    """The commit that SORA_FAST_COMMIT names, or None."""
    return os.environ.get("SORA_FAST_COMMIT") or None
