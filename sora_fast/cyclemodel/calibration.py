"""Errors of the model on third-party kernels with published times (calibration.json).

The rows are written by tests/cyclemodel_calibration.py, which reads SASS from libraries' wheels; only figures are kept.
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
    """"forward" or "backward" of attention for a loop of MMAs and exp2; None: there are no published times of its like.

    A forward computes an online maximum, which a backward loads.
    """
    if not any(map(flops, path)) or not any(i.opcode == "MUFU.EX2" for i in path):
        return None
    return "forward" if any(i.base in ("FMNMX", "FMNMX3") for i in path) else "backward"


def known_error(kind: str | None, gpu: GPU) -> str:
    """The errors of the rows of this kind, on GPUs of the same architecture if there are any."""
    alike = [row for row in rows() if row["kind"] == kind]
    same = [row for row in alike if row["cc"] == gpu.cc]
    if not alike:
        return "not calibrated: no published time of a kernel like this one"
    errors = [row["error"] for row in same or alike]
    where = f"on sm_{gpu.cc}" if same else "on other architectures, none on this one"
    return f"{min(errors):+.0%} to {max(errors):+.0%} on {len(errors)} published {KINDS[kind]} {where}"
