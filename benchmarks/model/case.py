"""The frame: a ModelCase is a model at one size, a ModelProvider is one way to compute its step.

One step is one timed unit: an inference, or forward, loss and backward. Every provider of a case has the same weights and
the same inputs, drawn from fixed seeds, and returns tensors under the same names. The gate builds the very step that is
timed at a small size of the same configuration, where the model in float64 can be computed beside it.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sora_fast.dispatch import use_backend
from sora_fast.testing import Comparison, compare
from sora_fast.testing.draw import Draw

from ..case import Subject
from ..providers import no_compiler

Tensors = dict[str, torch.Tensor]
WEIGHTS, INPUTS = 0, 1  # seeds
# Gradients of so few numbers are compared together: the largest of a handful of errors says little about their size.
FEW = 64


@dataclass(frozen=True)
class ModelCase(Subject):
    """One step of a model.

    ``suites``: "model" for real sizes, "quick" for those that a CPU core computes in less than a second. Its shape names
    the "tokens" or "frames" of one step.
    """

    def directions(self):
        return {"step": ()}

    @abstractmethod
    def flops(self) -> int:
        """FLOPs of the matrix products and convolutions of one step; what a backward recomputes does not count."""

    @abstractmethod
    def providers(self) -> "list[ModelProvider]":
        """Ours and the peers."""

    @abstractmethod
    def small(self) -> "ModelCase":
        """The same configuration and dtype at the gate's size."""

    @abstractmethod
    def plain_step(self, device: torch.device, dtype: torch.dtype | None) -> Callable[[], Tensors]:
        """The step on the reference: as it is (None), or with its weights and inputs in ``dtype``."""

    def gate(self, provider: "ModelProvider", device: torch.device) -> list[Comparison]:
        """Every output and gradient of a small step against the same step of the reference in float64."""
        small = self.small()
        truth, low = _plain(small, device)
        return compare_all(provider.build(small, device)(), low, truth)

    @abstractmethod
    def scope(self) -> str:
        """What the gate compared, in words."""


@functools.lru_cache(maxsize=1)  # a case's providers come one after the other
def _plain(small: ModelCase, device: torch.device) -> tuple[Tensors, Tensors]:
    """What the reference gives in float64, and as it is."""
    truth, low = (small.plain_step(device, dtype)() for dtype in (torch.float64, None))
    return truth, low


def _anywhere(case: ModelCase, device: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class ModelProvider:
    """One implementation of a step.

    ``build`` returns the step, a function without arguments whose inputs lie on the device; it returns tensors by name.
    ``unavailable`` answers with one sentence where the provider cannot run a case, "" where it can.
    """

    name: str
    unavailable: Callable[[ModelCase, torch.device], str]
    build: Callable[[ModelCase, torch.device], Callable[[], object]]


def anywhere(name: str, build: Callable) -> ModelProvider:
    return ModelProvider(name, _anywhere, build)


def compile_unavailable(case: ModelCase, device: torch.device) -> str:
    if device.type == "cpu" and "quick" in case.suites:
        return "torch.compile takes longer on a CPU than all quick cases together."
    return no_compiler(case, "", device)


# ------------------------------------------------------------------------------------------------ weights and steps
@torch.no_grad()
def model(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, wide: torch.dtype | None = None):
    """A module with random weights rounded to ``dtype``, held in ``wide``.

    Those that start at zero are random too, so that every path is open and an error anywhere reaches the end; features
    stay near 1: matrices have a variance of 1 / inputs, norms' weights are about 1, biases about 0.
    """
    with device:
        module = make()
    draw = Draw(device, WEIGHTS, torch.float32)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.copy_(draw(*p.shape, scale=1 / math.sqrt(p[0].numel())))
        else:
            p.copy_(draw(*p.shape, scale=0.1) + (0 if name.endswith("bias") else 1))
    return nn.Module.to(nn.Module.to(module, dtype), wide or dtype)  # to() of diffusers' models has a warning here


def training_step(forward: Callable[[], tuple[Tensors, torch.Tensor, torch.Tensor | None]],
                  leaves: Mapping[str, torch.Tensor], backend: str) -> Callable[[], Tensors]:
    """Forward, loss and backward, gradients begun anew.

    ``forward`` returns the outputs by name, the tensor to differentiate, and its gradient (None for a loss); ``leaves``
    are the tensors that get a gradient.
    """
    def step() -> Tensors:
        for leaf in leaves.values():
            leaf.grad = None
        with use_backend(backend):
            outputs, root, gradient = forward()
            root.backward(gradient)
        return {name: t.detach() for name, t in outputs.items()} | {f"d {k}": leaf.grad for k, leaf in leaves.items()}
    return step


def inference_step(forward: Callable[[], torch.Tensor], backend: str) -> Callable[[], Tensors]:
    def step() -> Tensors:
        with torch.no_grad(), use_backend(backend):
            return {"output": forward()}
    return step


# ------------------------------------------------------------------------------------------------ comparing
def compare_all(got: Tensors, low: Tensors, truth: Tensors) -> list[Comparison]:
    """The error rule on every tensor; gradients of fewer than FEW numbers count as one tensor, each in its own unit."""
    if set(got) != set(truth):
        odd = ", ".join(sorted(set(got) ^ set(truth)))
        raise AssertionError(f"bench: expected a step that returns the case's outputs and gradients, got others in {odd}; "
                             f"give each the name of our model's parameter")
    few = [name for name, t in truth.items() if name.startswith("d ") and t.numel() < FEW]
    results = [compare(name, got[name], low[name], truth[name]) for name in truth if name not in few]
    if few:
        unit = {name: truth[name].double().square().mean().sqrt().clamp(min=1e-30) for name in few}
        joined = [torch.cat([(values[name].double() / unit[name]).flatten() for name in few]).to(values[few[0]].dtype)
                  for values in (got, low)]
        exact = torch.cat([(truth[name].double() / unit[name]).flatten() for name in few])
        results.append(compare(f"d of the {len(few)} parameters of fewer than {FEW} numbers", *joined, exact))
    return results
