"""What is measured, a module per family: ``CASES``, and ``providers(op) -> list[Provider]``."""

import importlib
from types import ModuleType

from sora_fast.ops import FAMILIES


def spec(family: str) -> ModuleType:
    """The module of ``family``: its CASES and its providers(op)."""
    if family not in FAMILIES:
        raise ValueError(f"bench: expected a family among {', '.join(FAMILIES)}, got {family!r}; check the name")
    return importlib.import_module(f"sora_fast.benchmarks.specs.{family}")
