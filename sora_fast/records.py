"""Which kernels ``auto`` may take: those that a record says are right, on a real GPU, as they stand now.

A record is a line that ``sora-fast validate`` wrote on a CUDA GPU: op, backend, direction, dtype, architecture, the
environment, the kernel's hash, and whether everything passed. It counts while the kernel has that hash, and for Triton
while the minor version is the same. A Triton kernel needs one from a GPU whose Tensor Cores are told to multiply by the same
instructions, unless a later one from the call's own architecture failed; a CUDA kernel one from its own architecture. They
are read once per process, from ``benchmarks/results/<gpu>/validate.jsonl`` and from the user's cache.
"""

import ast
import functools
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from . import env, environment, files

SCHEMA = 1
generation = 0  # of what has been read: who remembers an answer remembers it with this number
DIRECTIONS = ("forward", "backward")


class _Backend(Protocol):
    name: str
    kernel: str


class _Problem(Protocol):
    device: str
    dtype: torch.dtype
    grad: bool


def why_not(op: str, backend: _Backend, problem: _Problem) -> list[str]:
    """Sentences: why ``auto`` does not take ``backend`` for lack of a record; [] where it may, or needs none."""
    if not backend.kernel:
        return []
    return list(_why_not(op, backend.name, backend.kernel, problem.device, problem.dtype, problem.grad))


def evidence(op: str, backend: _Backend, problem: _Problem) -> str:
    """Where and when the kernel of ``backend`` passed, or "" where no valid record says so."""
    if not backend.kernel or why_not(op, backend, problem):
        return ""
    record, _ = _judge(op, backend.name, backend.kernel, problem.device, _name(problem.dtype), "forward")
    return f"validated on {_place(record)}"


def settled(op: str, backend: _Backend, problem: _Problem) -> bool:
    """Whether its kernel, as it stands, has been judged: it passed, or failed here, and judging it again changes nothing."""
    arch, code, here = problem.device.partition(":")[2], kernel_hash(backend.kernel, backend.name), triton_minor()
    judged = lambda direction: any(
        row["arch"] == arch and row["kernel_hash"] == code
        and (backend.name != "triton" or minor(row["environment"].get("triton")) == here)
        for row in _index().get((op, backend.name, direction, _name(problem.dtype)), []))
    return not why_not(op, backend, problem) or all(map(judged, DIRECTIONS if problem.grad else DIRECTIONS[:1]))


def forget() -> None:
    """Read records and kernels again at the next call; a graph of torch.compile keeps what it was traced with."""
    global generation
    for cached in (_answer, _index, kernel_hash, launch_hash):
        cached.cache_clear()
    generation += 1


# ------------------------------------------------------------------------------------------------------- the answer
@env.constant_in_graphs
def _why_not(op: str, backend: str, kernel: str, device: str, dtype: torch.dtype, grad: bool) -> tuple[str, ...]:
    return _answer(op, backend, kernel, device, dtype, grad)


@functools.cache
def _answer(op: str, backend: str, kernel: str, device: str, dtype: torch.dtype, grad: bool) -> tuple[str, ...]:
    if not device.startswith("cuda"):
        return (f"It is a kernel for CUDA GPUs and auto takes it there only; on {device} ask for it by name, "
                f"backend={backend!r}.",)
    reasons: dict[str, list[str]] = {}
    for direction in DIRECTIONS if grad else DIRECTIONS[:1]:
        _, reason = _judge(op, backend, kernel, device, _name(dtype), direction)
        if reason:
            reasons.setdefault(reason, []).append(direction)
    if not reasons:
        return ()
    told = [f"{' and '.join(where).capitalize()} in {_name(dtype)}: {reason}." for reason, where in reasons.items()]
    return (*told, f"Run sora-fast validate --op {op} --backend {backend} --device cuda on such a GPU, or ask for it by "
                   f"name, backend={backend!r}.")


def _judge(op: str, backend: str, kernel: str, device: str, dtype: str, direction: str) -> tuple[dict | None, str]:
    """The record that lets auto take a kernel in one direction and "", or None and why there is none."""
    arch = device.partition(":")[2]
    found = _index().get((op, backend, direction, dtype), [])
    if backend == "cuda":
        mine = [r for r in found if r["arch"] == arch]
        if found and not mine:
            return None, (f"a CUDA kernel needs a validation record of its own architecture, {arch or 'not known here'}, "
                          f"and the last is of {_place(found[-1])}")
        found = mine
    elif arch and found:  # what Triton makes of one kernel for others differs in its layouts, copies and barriers
        last, units = found[-1], tensor_cores(arch)
        found = [r for r in found if tensor_cores(r["arch"]) == units]
        if not found:
            return None, (f"a Triton kernel needs a validation record of a GPU with {units}, as {arch} has it, and the last "
                          f"is of {_place(last)}, which has {tensor_cores(last['arch'])}")
    if not found:
        return None, f"there is no validation record of {arch if backend == 'cuda' and arch else 'any NVIDIA GPU'}"
    code = kernel_hash(kernel, backend)
    if code is None:
        missing = (f"the CUDA kernel {kernel} is not in this build" if backend == "cuda" else
                   f"the source of sora_fast.kernels.{kernel} cannot be read")
        return None, f"{missing}, and no record be matched with it"
    same = [r for r in found if r["kernel_hash"] == code]
    if not same:
        return None, (f"the kernel{', or the nvcc that builds it,' if backend == 'cuda' else ''} has changed since it was "
                      f"validated on {_place(found[-1])}")
    if backend == "triton":
        here, validated = triton_minor(), minor(same[-1]["environment"].get("triton"))
        current = [r for r in same if minor(r["environment"].get("triton")) == here]
        if not current:
            return None, (f"it was validated on {_place(same[-1])} with Triton {validated}, and here is "
                          f"{f'Triton {here}' if here else 'no Triton'}")
        same = current
    newest = {r["arch"]: r for r in same}  # of each architecture
    best = newest.get(arch) or next((r for r in reversed(same) if newest[r["arch"]]["passed"]), same[-1])
    if not best["passed"]:
        return None, f"it failed on {_place(best)}{_failure(best)}"
    return best, ""


def tensor_cores(arch: str) -> str:
    """How Triton has the Tensor Cores of "sm90" multiply: mma.sync, wgmma or tcgen05."""
    digits = arch.removeprefix("sm")
    number = int(digits) if digits.isdigit() else 0
    return "wgmma" if number == 90 else "tcgen05" if 100 <= number < 120 else "mma.sync"


def _failure(record: Mapping) -> str:
    if record.get("case") is None or record.get("error") is None:
        return ""
    return (f" (case {record['case']!r}, {record.get('tensor')}: error {record['error']:.2e}, allowed "
            f"{record['allowed']:.2e})")


def _place(record: Mapping) -> str:
    found = record["environment"]
    return f"{found.get('device', 'a GPU')} ({record['arch']}), {str(found.get('time', 'no date'))[:10]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------- records
def user_file() -> Path:
    """Where this user's records are."""
    return env.cache() / "validate.jsonl"


def save(rows: Iterable[Mapping]) -> Path | None:
    """Merge those of a report's rows that are records into the user's cache; its path, or None where none is one.

    A new record takes the place of the one with the same op, backend, direction, dtype, GPU, Triton and kernel.
    """
    # a row that compared nothing, all its cases refused, says nothing of the kernel
    new = {_key(row): dict(row) for row in rows if _is_record(row) and (row.get("comparisons") or row.get("raised"))}
    if not new:
        return None

    def merged(text: str) -> str:
        old = {_key(row): row for row in files.json_lines(text) if _is_record(row)}
        for key in new:
            old.pop(key, None)  # so that the newest stands last
        return "".join(json.dumps(row) + "\n" for row in (old | new).values())

    files.edit(user_file(), merged)
    forget()
    return user_file()


def _key(record: Mapping) -> tuple:
    found = record["environment"]
    return (*(record[name] for name in ("op", "backend", "direction", "dtype", "arch", "kernel_hash")),
            found.get("device"), minor(found.get("triton")))


def _is_record(row: Mapping) -> bool:
    """Whether a row of validate's is one of a kernel on a CUDA GPU, and whole."""
    return (row.get("schema") == SCHEMA and row.get("row") == "validate" and isinstance(row.get("passed"), bool)
            and not row.get("emulated") and isinstance(row.get("environment"), dict)
            and all(isinstance(row.get(name), str) and row[name]
                    for name in ("op", "backend", "direction", "dtype", "arch", "kernel_hash")))


@functools.cache
def _index() -> dict[tuple[str, str, str, str], list[dict]]:
    """Records by (op, backend, direction, dtype), oldest first."""
    paths = [path for folder in _room("benchmarks") for path in sorted((folder / "results").glob("*/validate.jsonl"))]
    rows = [row for path in [*paths, user_file()] for row in _read(path) if _is_record(row)]
    found: dict[tuple[str, str, str, str], list[dict]] = {}
    for row in sorted(rows, key=lambda row: str(row["environment"].get("time", ""))):
        found.setdefault((row["op"], row["backend"], row["direction"], row["dtype"]), []).append(row)
    return found


def _read(path: Path) -> list[dict]:
    try:
        return list(files.json_lines(files.read_text(path)))
    except OSError:  # a file that this user may not read holds no records
        return []


def _room(name: str) -> Iterator[Path]:
    """The folder of sora_fast.kernels or sora_fast.benchmarks, for its files: nothing of it is imported but its place."""
    try:
        yield Path(importlib.import_module(f"{__package__}.{name}").__path__[0])
    except ImportError:  # a copy installed without it
        return


# ------------------------------------------------------------------------------------------------- kernels and Triton
def minor(version: str | None) -> str | None:
    """"3.6" of "3.6.0"."""
    return ".".join(version.split(".")[:2]) if isinstance(version, str) else None


@functools.cache
def triton_minor() -> str | None:
    """Minor version of the Triton that is installed, read without importing it, or None."""
    return minor(environment.version("triton"))


@functools.cache
def kernel_hash(module: str, backend: str = "triton") -> str | None:
    """Hash of what ``sora_fast.kernels.<module>`` and the kernel modules it imports say: kernels, launchers and heuristics.

    Comments and docstrings aside, and the same for every Python version that parses the source alike. None: there is no
    such file, or no reading it. Of backend "cuda" it is what setup.py took of the sources that it compiled.
    """
    if backend == "cuda":
        return environment.build_info().get("kernels", {}).get(module)
    return _hash(_trees(module))


@functools.cache
def launch_hash(module: str) -> str | None:
    """The same without heuristics: what a tuned Config belongs to, which takes their place."""
    trees = _trees(module)
    return _hash(trees and {name: tree for name, tree in trees.items() if not name.endswith("_config")})


def _hash(trees: dict[str, ast.AST] | None) -> str | None:
    if trees is None:
        return None
    said = [(name, _canonical(trees[name])) for name in sorted(trees)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _trees(module: str) -> dict[str, ast.AST] | None:
    """The syntax tree of a kernel module and of all that it imports, by name; None where one cannot be read."""
    found: dict[str, ast.AST] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _source(name)
        if path is None:
            return None
        try:
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return None
        waiting += [other for other in _imported(name, found[name]) if _source(other)]
    return found


def _source(module: str) -> Path | None:
    parts = module.split(".")
    candidates = [place for folder in _room("kernels")
                  for place in (folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py"))]
    return next((path for path in candidates if path.is_file()), None)


def _imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Names below sora_fast.kernels that a kernel module may import; some are functions, not modules."""
    room = f"{__package__}.kernels"
    package = f"{room}.{module}".split(".")[:-1]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            names = [home, *(f"{home}.{alias.name}" for alias in node.names)]
        yield from (name.removeprefix(f"{room}.") for name in names if name.startswith(f"{room}."))


def _canonical(node) -> str:
    """A syntax tree as text, without positions, comments, docstrings and the fields that only some Pythons have.

    ast.dump and ast.unparse write one tree differently from version to version, and a record would be void with them.
    """
    if isinstance(node, list):
        return f"[{','.join(_canonical(item) for item in node if not _is_text(item))}]"
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name)) for name in node._fields if name not in ("kind", "ctx", "type_comment"))
        return f"{type(node).__name__}({','.join(f'{n}={_canonical(v)}' for n, v in fields if v is not None and v != [])})"
    return repr(node)


def _is_text(node) -> bool:
    """A string that stands alone: a docstring, or one used as a comment."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
