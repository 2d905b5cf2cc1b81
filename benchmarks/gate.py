"""The gate: what a provider must show before it is timed, and again after.

On the very inputs of the benchmark, in their memory: every output and gradient obeys the error rule; the inputs are left
as they were; no result of an earlier call is written again; the answer to other numbers in the same memory is another
answer; and no element is left unwritten (fresh memory is filled with NaN).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sora_fast.testing import Comparison, Truth
from sora_fast.testing.rule import run, same_bits, tensors

from .case import Case, Provider

_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default,
          torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default}


class _Poisoned(TorchDispatchMode):
    """Fresh memory that Python asks for holds NaN, so that what is never written is not right by luck."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.fill_(float("nan")) if func in _EMPTY and out.is_floating_point() else out


@dataclass(frozen=True)
class Verdict:
    """``reason`` is "" for a pass; ``error`` and ``allowed`` are those of the tensor closest to its limit, or past it."""

    status: str
    reason: str
    error: float | None
    allowed: float | None


def refusal(status: str, reason: str) -> Verdict:
    return Verdict(status, reason, None, None)


def fill(inputs: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Write the numbers of ``values`` into the memory of ``inputs``."""
    with torch.no_grad():
        for target, source in zip(tensors(inputs), tensors(values), strict=True):
            target.copy_(source)


def check(case: Case, provider: Provider, truth: Truth, device: torch.device,
          directions: tuple[str, ...]) -> dict[str, Verdict]:
    """A Verdict for each of ``directions``; exceptions of the provider become ERROR or, if it refuses, UNSUPPORTED."""
    every = case.directions()
    try:
        grads = any(every[direction] for direction in directions)
        plain, comparisons = _examine(provider, truth, case.inputs(device, seed=1), grads)
    except NotImplementedError as error:
        return {direction: refusal("UNSUPPORTED", str(error)) for direction in directions}
    except _Wrong as wrong:
        return {direction: refusal("FAILED", str(wrong)) for direction in directions}
    except Exception as error:
        return {direction: refusal("ERROR", explain(error)) for direction in directions}
    return {direction: _verdict(_of(comparisons, every[direction]) if every[direction] else plain)
            for direction in directions}


def check_model(case, provider, device: torch.device) -> Verdict:
    """The Verdict of a whole model's step, from the comparisons that the ModelCase makes at its gate's size."""
    try:
        return _verdict(case.gate(provider, device))
    except Exception as error:
        return refusal("UNSUPPORTED" if isinstance(error, NotImplementedError) else "ERROR", explain(error))


def check_again(provider: Provider, truth: Truth, used_inputs: Mapping[str, object], names: tuple[str, ...]) -> str:
    """After the timing, in the memory that was timed: a sentence if the call has begun to give something else, or "".

    ``names``: of the inputs whose gradients were timed.
    """
    fill(used_inputs, truth.inputs)
    call = lambda **inputs: provider.run(**provider.prepare(inputs))
    if names:
        comparisons = _of(truth.compare(call, used_inputs), names)
    else:
        with torch.no_grad():
            comparisons = truth.compare(run(call, used_inputs, None)[0])
    return next((f"It passed before the timing and fails after it: {c}." for c in comparisons if not c.passed), "")


def explain(error: Exception) -> str:
    """One line of an exception, with its type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _examine(provider: Provider, truth: Truth, inputs: dict, grads: bool):
    """Call in the same memory, with other numbers first; the comparisons without and with gradients."""
    call: Callable = lambda **given: provider.run(**provider.prepare(given))
    kept = [t.clone() for t in tensors(inputs)]
    with torch.no_grad():
        first, _ = run(call, inputs, None)
    _unchanged(inputs, kept)  # now, before autograd finds out and says so in other words
    if grads:
        first += run(call, inputs, truth.cotangents, truth.names)[0]
    # results that are views of the inputs change with them, as they should
    theirs = {t.untyped_storage().data_ptr() for t in tensors(inputs)}
    first = [t.detach() for t in first if t.untyped_storage().data_ptr() not in theirs]
    copies = [t.clone() for t in first]
    fill(inputs, truth.inputs)
    kept = [t.clone() for t in tensors(inputs)]
    _poison(first)
    with nullcontext() if provider.compiled else _Poisoned():  # torch.compile does not trace under such a mode
        with torch.no_grad():
            plain = truth.compare(run(call, inputs, None)[0])
        _poison(first)
        comparisons = truth.compare(call, inputs) if grads else plain
    _unchanged(inputs, kept)
    if not all(same_bits(t, copy) for t, copy in zip(first, copies, strict=True)):
        raise _Wrong("A later call overwrites the result of an earlier one: it returns the same memory each time.")
    return plain, comparisons


class _Wrong(Exception):
    """What is wrong with a provider beyond its numbers, in a sentence."""


def _unchanged(inputs: dict, kept: list[torch.Tensor]) -> None:
    if not all(same_bits(t, copy) for t, copy in zip(tensors(inputs), kept, strict=True)):
        raise _Wrong("It changes its inputs.")


def _poison(outputs: list[torch.Tensor]) -> None:
    """Leave NaN in the memory that an allocator is likely to hand out next for results like these."""
    held = [torch.full_like(t, float("nan")) for t in outputs if t.is_floating_point() for _ in range(2)]
    del held


def _of(comparisons: list[Comparison], names: tuple[str, ...]) -> list[Comparison]:
    """Those of the outputs, and of the gradients of inputs in ``names``."""
    gradient_of = lambda c: c.name.removeprefix("d ").partition("[")[0]  # a list's are "outs[0]", "outs[1]"
    return [c for c in comparisons if not c.name.startswith("d ") or gradient_of(c) in names]


def _verdict(comparisons: list[Comparison]) -> Verdict:
    worst = max(comparisons, key=lambda c: c.severity)
    return Verdict("PASSED" if worst.passed else "FAILED", "" if worst.passed else f"{worst}.", worst.error_max,
                   worst.allowed_max)
