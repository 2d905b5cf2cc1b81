"""sora-fast validate."""

import importlib
import sys
from pathlib import Path

import torch

from ..explanation import all_ops
from ..testing import validate

# The raw backward has no cases of its own: the attention's gradients cover its formula, and its tests the rest.
WITHOUT_CASES = ("varlen_attention_backward",)


def load_function(path: str):
    """The function ``pkg.mod:fn``, looked for in the working folder too."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"--impl: expected pkg.mod:fn, got {path!r}; put a colon before the function's name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    finally:
        sys.path.pop(0)
    if not callable(getattr(found, name, None)):
        raise ValueError(f"--impl: expected a function {name!r} in {module}, got none; check the name")
    return getattr(found, name)


def run(arguments) -> int:
    """Print one report per op and backend; 0 only if every comparison passed."""
    table = all_ops()
    names = arguments.op or [name for name in table if name not in WITHOUT_CASES]
    unknown = [name for name in names if name not in table or name in WITHOUT_CASES]
    if unknown:
        raise ValueError(f"--op: expected ops among {', '.join(n for n in table if n not in WITHOUT_CASES)}, got "
                         f"{', '.join(unknown)}; check the name")
    if arguments.impl and (len(names) != 1 or not arguments.op):
        raise ValueError(f"--impl: expected exactly one --op to compare it with, got {len(arguments.op or [])}; name the "
                         f"op that your function computes")
    dtypes = [getattr(torch, name) for name in arguments.dtype or ("float32", "bfloat16", "float16")]
    reports = []
    for name in names:
        if arguments.impl:
            reports.append(validate(name, load_function(arguments.impl), device=arguments.device, dtypes=dtypes))
            continue
        for backend in arguments.backend or table[name].backends:
            if backend not in ("auto", *table[name].backends):
                if arguments.op:
                    table[name].choose(table[name].example(arguments.device, dtypes[0], True), backend)
                continue
            reports.append(validate(name, backend=backend, device=arguments.device, dtypes=dtypes))
    for report in reports:
        print(report, flush=True)
    if arguments.jsonl:
        Path(arguments.jsonl).write_text("".join(report.to_jsonl() for report in reports))
        print(f"wrote {arguments.jsonl}")
    passed = bool(reports) and all(report.passed for report in reports)
    print("validate: every comparison passed" if passed else "validate: FAILED")
    return 0 if passed else 1
