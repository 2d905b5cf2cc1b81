"""sora-fast validate."""

import importlib
import sys
import traceback
from pathlib import Path

import torch

from ..dispatch import ORDER
from ..explanation import all_ops
from ..testing import Report, validate
from ..training.checkpoint import save_text
from ..training.loop import pick_device

# The raw backward has no cases of its own: the attention's gradients cover its formula, and its tests the rest.
WITHOUT_CASES = ("varlen_attention_backward",)


def load_function(path: str):
    """The function ``pkg.mod:fn``, looked for in the working folder too."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"--impl: expected pkg.mod:fn, got {path!r}; put a colon before the function's name")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"--impl: expected to import {module} from here or from what is installed, got: {error}; check "
                          f"the name, or run in its folder") from error
    if not callable(getattr(found, name, None)):
        raise ValueError(f"--impl: expected a function {name!r} in {module}, got none; check the name")
    return getattr(found, name)


def run(arguments) -> int:
    """Print one report per op and backend; 0 only if every comparison passed, 1 if not, ValueError for wrong flags."""
    table = all_ops()
    names = arguments.op or [name for name in table if name not in WITHOUT_CASES]
    unknown = [name for name in names if name not in table or name in WITHOUT_CASES]
    if unknown:
        raise ValueError(f"--op: expected ops among {', '.join(n for n in table if n not in WITHOUT_CASES)}, got "
                         f"{', '.join(unknown)}; check the name")
    if arguments.impl and (len(names) != 1 or not arguments.op):
        raise ValueError(f"--impl: expected exactly one --op to compare it with, got {len(arguments.op or [])}; name the "
                         f"op that your function computes")
    if arguments.impl and arguments.backend:
        raise ValueError("--impl: expected no --backend beside it, got one; a function of yours has no backend of ours")
    for backend in arguments.backend or ():
        if backend not in ("auto", *ORDER):
            raise ValueError(f"--backend: expected one of auto, {', '.join(ORDER)}, got {backend!r}; choose one of them")
    pick_device(arguments.device)
    dtypes = [getattr(torch, name) for name in arguments.dtype or ("float32", "bfloat16", "float16")]
    function = load_function(arguments.impl) if arguments.impl else None
    reports, broken = [], False
    for name in names:
        if function is not None:
            report = _check_function(name, function, arguments.device, dtypes)
            reports, broken = [report] if report else [], report is None
            continue
        for backend in arguments.backend or table[name].backends:
            if backend not in ("auto", *table[name].backends):
                if arguments.op:  # says what the op has
                    table[name].choose(table[name].example(arguments.device, dtypes[0], True), backend)
                print(f"not run: {name} has no {backend} backend", flush=True)
                continue
            reports.append(validate(name, backend=backend, device=arguments.device, dtypes=dtypes))
            print(reports[-1], flush=True)
    if arguments.jsonl:
        path = Path(arguments.jsonl)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_text(path, "".join(report.to_jsonl() for report in reports))
        print(f"wrote {path}")
    passed = bool(reports) and not broken and all(report.passed for report in reports)
    print("validate: every comparison passed" if passed else "validate: FAILED")
    return 0 if passed else 1


def _check_function(op: str, function, device: str, dtypes) -> Report | None:
    """The printed report of a function of the user's, or None, with the traceback, where it raises."""
    try:
        report = validate(op, function, device=device, dtypes=dtypes)
    except Exception as error:
        traceback.print_exc()
        name = getattr(function, "__name__", type(function).__name__)
        print(f"{name} raised {type(error).__name__} where {op} does not: {error}", flush=True)
        return None
    print(report, flush=True)
    return report
