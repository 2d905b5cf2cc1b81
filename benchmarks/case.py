"""What is measured: a Case is one op at one shape, a Provider is one way to compute it.

A spec (``specs/<family>.py``) is a list of cases and a list of providers for each op. Cases know nothing of providers and
providers nothing of shapes: a provider takes the op's keyword arguments and returns what the op returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from sora_fast.testing import Truth, truth

FORWARD = "forward"
FULL, QUICK = ("full",), ("quick",)  # suites


def anywhere(case: "Case", direction: str, device: torch.device) -> str:
    return ""


def _unchanged(inputs: dict) -> dict:
    return inputs


@dataclass(frozen=True)
class Subject(ABC):
    """What a row is about, at one size and dtype: an op (Case) or a model's step (ModelCase).

    ``label`` names the size and where it comes from ("Wan 14B, 720p"); it is unique among the op's. ``suites`` says which
    of "quick", "full" and "model" it belongs to.
    """

    op: str
    label: str
    dtype: torch.dtype
    suites: tuple[str, ...]

    @abstractmethod
    def shape(self) -> dict[str, object]:
        """The sizes, as a row shows them: JSON's own types."""

    @abstractmethod
    def directions(self) -> Mapping[str, tuple[str, ...]]:
        """What is timed, each with the inputs whose gradients it computes: of a Case "forward" and each backward."""

    @property
    def id(self) -> str:
        return f"{self.op} / {self.label} / {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Case(Subject):
    """One op; a family's subclass adds its sizes and answers the questions."""

    @abstractmethod
    def inputs(self, device: torch.device, seed: int) -> dict:
        """The op's keyword arguments, random numbers drawn on ``device``; the same for the same seed."""

    def flops(self, direction: str) -> int:
        """Multiplications and additions of matrix products and convolutions; other arithmetic counts as none."""
        return 0

    @abstractmethod
    def least_bytes(self, direction: str) -> int:
        """Bytes of every tensor that must be read and written, once each."""

    def truth(self, inputs: dict, seed: int) -> Truth:
        """What these inputs must give; a family whose reference does not fit at these sizes computes it in pieces."""
        wanted = {name for names in self.directions().values() for name in names}
        return truth(self.op, inputs, grads=bool(wanted), names=wanted, seed=seed)


@dataclass(frozen=True)
class PackCase(Case):
    """One op on a pack of ``grids``, tokens in t, h, w of each sample."""

    grids: tuple[tuple[int, int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(map(prod, self.grids))


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    ``run`` takes the op's keyword arguments, as ``prepare`` returned them, and returns the op's outputs, differentiable
    if a backward is timed. ``prepare`` is done once per set of inputs and not timed: what a user does once per step or
    once at all (memory layouts, block masks). It keeps the names of the inputs, and gradients flow through it.
    ``unavailable`` answers with one sentence where the provider cannot run a case, "" where it can. ``details`` says, after
    a run, what a row should record about it (which kernel ran). ``compiled``: made by torch.compile. ``on_cpu``: its name on
    a CPU, where it calls another library ("": the same).
    """

    name: str
    run: Callable
    prepare: Callable[[dict], dict] = _unchanged
    unavailable: Callable[[Case, str, torch.device], str] = anywhere
    details: Callable[[Case, torch.device], dict] = field(default=lambda case, device: {})
    compiled: bool = False
    on_cpu: str = ""


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
