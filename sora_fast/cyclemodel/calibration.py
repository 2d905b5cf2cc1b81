"""How far the model was off on kernels with published times that nobody here wrote (calibration.json).

The rows are written by tests/cyclemodel_calibration.py, which reads machine code out of libraries' wheels; what is kept of
those are figures alone.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .gpus import GPU
from .sass import Instruction
from .units import flops

FILE = Path(__file__).with_name("calibration.json")
KINDS = {"forward": "attention forwards", "backward": "attention backwards"}


@cache
def rows() -> tuple[dict, ...]:
    return tuple(json.loads(FILE.read_text(encoding="utf-8"))["rows"])


def kind_of(path: Sequence[Instruction]) -> str | None:
    """"forward" or "backward" of attention for a loop of products and powers of 2; None: nothing like it was published.

    A forward has an online maximum, which a backward reads back.
    """
    if not any(map(flops, path)) or not any(i.opcode == "MUFU.EX2" for i in path):
        return None
    return "forward" if any(i.base in ("FMNMX", "FMNMX3") for i in path) else "backward"


def known_error(kind: str | None, gpu: GPU) -> str:
    """The errors of the rows of this kind, on GPUs of the same architecture where there are any."""
    alike = [row for row in rows() if row["kind"] == kind]
    same = [row for row in alike if row["cc"] == gpu.cc]
    if not alike:
        return "not calibrated: no published time of a kernel like this one"
    errors = [row["error"] for row in same or alike]
    where = f"on sm_{gpu.cc}" if same else "on other architectures, none on this one"
    return f"{min(errors):+.0%} to {max(errors):+.0%} on {len(errors)} published {KINDS[kind]} {where}"
