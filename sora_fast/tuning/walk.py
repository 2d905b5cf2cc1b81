"""Which calls of ops a model makes: it is gone through once without memory, at common sizes, or as its owner calls it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import nn

from .. import ops
from ..benchmarks.specs import spec
from ..integrations.mixin import original_of
from ..integrations.recipes import RECIPES
from ..ops import FAMILIES
from ..testing.cases import cases
from . import typical
from .recorded import Recorded, Seen, recording


def of_model(model: nn.Module, device: str, call: Callable | None = None) -> list[Recorded]:
    """Calls of ``model`` on ``device``, "cuda:sm90": without gradients and, in training mode, with them.

    Args:
        call: runs the model once, on its own device, as it is used; None: a copy without memory runs at the common sizes of
            its class, in seconds and without the GPU.

    Raises:
        ValueError: no ``call`` for a class whose inputs are not known.
    """
    if call is None:
        call, model = _common(model), hollow(model)
    with recording(device) as found:
        for grad in (False, True) if model.training else (False,):
            with torch.set_grad_enabled(grad):
                call(model)
    return found


def _common(model: nn.Module) -> Callable:
    name = original_of(type(model)).__name__
    if name in typical.CALLS:
        return lambda hollow: [run(hollow) for run in typical.CALLS[name](hollow)]
    if name not in RECIPES:
        raise ValueError(f"setup: expected call=, a function of the model that runs it once, got none, and the inputs of a "
                         f"{name} are not known; pass call=lambda model: model(...) with what it takes")
    draw = lambda *shape: torch.empty(shape, device="meta", dtype=torch.float64)
    cast = lambda x: x.to("meta", next(model.parameters()).dtype)
    return lambda hollow: [run(hollow, cast) for _, run in RECIPES[name].common(hollow, draw)]


def hollow(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no memory; ``model`` stays as it is."""
    memo: dict[int, torch.Tensor] = {}
    for t in (*model.parameters(), *model.buffers()):
        without = t.detach().to("meta")
        memo[id(t)] = nn.Parameter(without, t.requires_grad) if isinstance(t, nn.Parameter) else without
    return copy.deepcopy(model, memo)


def common(device: str, suite: str) -> list[Recorded]:
    """Calls of the benchmark's ``suite``, the sizes of published models, without and with gradients."""
    with recording(device, run=False) as found:
        for case, given in _cases(suite):
            for names in case.directions().values():
                arguments = {name: _leaf(value, name in names) for name, value in given.items()}
                with torch.set_grad_enabled(bool(names)), suppress(Seen):
                    getattr(ops, case.op)(**arguments)
    return found


def of_validation(op: str, dtype: torch.dtype, device: str) -> list[Recorded]:
    """The calls that ``validate`` makes of an op on a GPU, in one dtype."""
    with recording(device, run=False) as found:
        for _, given in cases(op, dtype, "meta", models=True):
            for grad in (False, True):
                with torch.set_grad_enabled(grad), suppress(Seen):
                    getattr(ops, op)(**{name: _leaf(value, grad) for name, value in given.items()})
    return found


def _cases(suite: str) -> Iterator[tuple]:
    for family in FAMILIES:
        for case in spec(family).CASES:
            if suite in case.suites and not case.op.startswith("varlen_attention_"):
                yield case, case.inputs(torch.device("meta"), 0)


def _leaf(value, wanted: bool):
    if isinstance(value, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in value):
        return [_leaf(each, wanted) for each in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(wanted)
    return value


