"""What each backend took on this user's GPU, and so the order in which ``auto`` tries them.

``sora-fast setup`` writes ``<SORA_FAST_CACHE>/measured.jsonl``: a line per op, problem, bucket of sizes and GPU, with the
milliseconds of each backend that passed its gate there, and why the others did not. A line counts for exactly this GPU,
these kernels, this PyTorch, this Triton and these installed peers, or it is not used: nothing is taken from the nearest.
The file is read once per process.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from . import configs, env, environment, files, records

SCHEMA = 1
HIDDEN = ("device", "size")  # fields of a Problem that its text leaves out: keys of their own


class _Op(Protocol):
    name: str
    backends: Mapping


def text(problem) -> str:
    """"dtype=bfloat16, grad=False, width=1536, ..." of a Problem: all but where it runs and how large it is."""
    plain = lambda value: str(value).removeprefix("torch.")
    return ", ".join(f"{field.name}={plain(getattr(problem, field.name))}" for field in fields(problem)
                     if field.name not in HIDDEN)


def sizes(*shapes: tuple[int, ...], samples: int = 1) -> tuple[int, ...]:
    """The bucket of what each of a call's ``shapes`` holds, the last over ``samples``; () in a graph, which is for any.

    A bucket is named by the power of four that none in it exceeds.
    """
    if torch.compiler.is_compiling():
        return ()
    buckets = ()
    for place, shape in enumerate(shapes, start=1 - len(shapes)):  # no comprehension: that is a call, before each launch
        count = int(prod(shape)) // (samples or 1) if place == 0 else int(prod(shape))
        buckets += (4 ** ((max(count - 1, 0).bit_length() + 1) // 2),)
    return buckets


def find(op: _Op, problem) -> dict | None:
    """What was measured of this very problem here, in its bucket of sizes; of one without sizes, the largest."""
    if not problem.device.startswith("cuda"):
        return None
    found = _index(configs.gpu_name(problem.device)).get((op.name, text(problem)), {})
    size = getattr(problem, "size", ())
    row = found.get(size) if size or () in found else found[max(found)] if found else None
    return row if row is not None and _current(row, kernels(op)) else None


def every(op: _Op, device: str) -> list[dict]:
    """All that was measured of an op on this GPU and still counts."""
    return _every(op.name, kernels(op), device)


def _every(op: str, kernels: tuple, device: str) -> list[dict]:
    of_gpu = _index(configs.gpu_name(device)) if device.startswith("cuda") else {}
    return [row for (name, _), rows in of_gpu.items() if name == op for row in rows.values() if _current(row, kernels)]


def order(op: _Op, problem) -> tuple[tuple[str, ...], frozenset[str]]:
    """Backends by their measured time, the fastest first, and those that were wrong, or could not run, when it was measured.

    In a graph, which is one for all sizes, and may not ask for its own, over all that was measured in the dtype.
    """
    if torch.compiler.is_compiling():
        return _order_in_graph(op.name, kernels(op), problem.device, problem.dtype, problem.grad)
    row = find(op, problem)
    if row is None:
        return (), frozenset()
    return tuple(sorted(row["ms"], key=row["ms"].get)), frozenset(row["refused"])


@env.constant_in_graphs
def _order_in_graph(op: str, kernels: tuple, device: str, dtype: torch.dtype, grad: bool):
    """Those that ran all, by their time for all of it."""
    begins = f"dtype={str(dtype).removeprefix('torch.')}, grad={grad}"
    rows = [row for row in _every(op, kernels, device) if row["problem"].startswith(begins)]
    everywhere = set.intersection(*(set(row["ms"]) for row in rows)) if rows else set()
    total = {name: sum(row["ms"][name] for row in rows) for name in everywhere}
    return tuple(sorted(total, key=total.get)), frozenset(name for row in rows for name in row["refused"])


def kernels(op: _Op) -> tuple[tuple[str, str], ...]:
    return tuple((name, backend.kernel) for name, backend in op.backends.items() if backend.kernel)


def conditions(kernels: tuple[tuple[str, str], ...]) -> dict:
    """What a line depends on beside its problem and its GPU."""
    return dict(kernels={name: records.kernel_hash(kernel, name) for name, kernel in kernels}, torch=torch.__version__,
                triton=records.triton_minor(), packages=dict(_packages()))


def _current(row: Mapping, kernels: tuple[tuple[str, str], ...]) -> bool:
    """Whether a line was measured with what is here now."""
    return all(row.get(name) == value for name, value in conditions(kernels).items())


@functools.cache
def _packages() -> tuple[tuple[str, str], ...]:
    return tuple((name, version) for name in environment.PEERS.values() if (version := environment.version(name)))


def user_file() -> Path:
    """Where this user's measured times are."""
    return env.cache() / "measured.jsonl"


def save(rows: Iterable[Mapping]) -> Path:
    """Merge lines into the user's cache, each in the place of the one of the same op, problem, size and GPU.

    Raises:
        OSError: a folder that cannot be written, a full disk; the file is as it was.
    """
    new = {_key(row): dict(row) for row in rows}

    def merged(text: str) -> str:
        old = {_key(row): row for row in files.json_lines(text) if _is_row(row)}
        return "".join(json.dumps(row) + "\n" for row in (old | new).values())

    files.edit(user_file(), merged)
    forget()
    return user_file()


def forget() -> None:
    """Read the file again at the next call."""
    _index.cache_clear()
    records.forget()  # whoever remembers a choice remembers it with the records' number


def _key(row: Mapping) -> tuple:
    return row["op"], row["problem"], tuple(row["size"]), row["gpu"]


def _is_row(row: Mapping) -> bool:
    return (row.get("schema") == SCHEMA and row.get("row") == "measured" and isinstance(row.get("size"), list)
            and all(isinstance(row.get(name), str) for name in ("op", "problem", "gpu"))
            and isinstance(row.get("refused"), dict) and isinstance(row.get("ms"), dict)
            and all(isinstance(ms, (int, float)) for ms in row["ms"].values()))


@functools.cache
def _index(gpu: str) -> dict[tuple[str, str], dict[tuple[int, ...], dict]]:
    """Lines of a GPU by (op, problem), and those by size."""
    try:
        rows = list(files.json_lines(files.read_text(user_file())))
    except OSError:  # a file that this user may not read holds nothing
        rows = []
    found: dict[tuple[str, str], dict[tuple[int, ...], dict]] = {}
    for row in rows:
        if _is_row(row) and row["gpu"] == gpu:
            found.setdefault((row["op"], row["problem"]), {})[tuple(row["size"])] = row
    return found
