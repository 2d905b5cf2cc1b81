"""Results of ops that can be differentiated once: kernels have no second derivative, so no backend pretends to have one.

A backend's gradient may look constant to autograd, which would then say no more than that nothing requires a gradient, or
nothing at all. So, where create_graph=True keeps a graph of the backward, every gradient leads back to all inputs of its op
through a node that raises. Without create_graph a hook on each output is all that runs: an identity of the inputs, a node
in Python, takes some 30 us longer on a slow core.
"""

import functools
from collections.abc import Callable

import torch
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead

from .precision import transformed

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # the types of tensors that are no subclass's
_NOTHING = torch.empty(0, device="cpu", dtype=torch.float32)


def _sentence(op: str) -> str:
    return (f"{op}: expected to be differentiated once, got a second backward through its gradient; "
            f"use sora_fast.reference.{op}, which is plain PyTorch, where second derivatives are needed")


class _NoSecond(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, tie, op):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[2]

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(_sentence(ctx.op))


def _follow(tie: torch.Tensor, op: str, grads: tuple, _=None):
    """Before the backward of the last node of ``op``, or after that of a node of others: ``grads`` follow from ``tie``,
    which leads to the inputs.
    """
    if torch.is_grad_enabled():  # create_graph=True
        return tuple(None if grad is None else _NoSecond.apply(grad, tie, op) for grad in grads)


class _Follows(torch.autograd.Function):
    """The first ``count`` of ``tensors``, as functions of the others to autograd alone."""

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        return (None, *grads, *map(torch.zeros_like, ctx.saved_tensors))


def opaque(backward: Callable) -> Callable:
    """For the backward of an autograd.Function that autograd cannot see through: its results follow from its cotangents."""

    @functools.wraps(backward)
    def wrapped(ctx, *cotangents):
        grads = backward(ctx, *cotangents)
        if torch.is_grad_enabled():  # create_graph=True
            grads = grads if isinstance(grads, tuple) else (grads,)
            made = [grad for grad in grads if grad is not None]
            by = [each for each in cotangents if each is not None and each.requires_grad]
            if made and by:
                made = iter(_Follows.apply(len(made), *made, *by))
                return tuple(None if grad is None else next(made) for grad in grads)
        return grads

    return wrapped


class _FirstOrder(torch.autograd.Function):
    """The identity of tensors, differentiable once; the last output, which holds nothing, ties gradients to the inputs."""

    @staticmethod
    def forward(ctx, op, *tensors):
        tie = tensors[0].new_empty(())
        ctx.op = op
        ctx.save_for_backward(tie)
        ctx.set_materialize_grads(False)
        return (*tensors, tie)

    @staticmethod
    def backward(ctx, *grads):
        grads = grads[:-1]
        if torch.is_grad_enabled():  # create_graph=True
            (tie,) = ctx.saved_tensors
            grads = [None if grad is None else _NoSecond.apply(grad, tie, ctx.op) for grad in grads]
        return (None, *grads)


class _FirstOrderTransformed(_FirstOrder):
    """The same as torch.func's transforms want it, at a price: PyTorch binds its arguments by their names."""

    generate_vmap_rule = True  # of the backward, for torch.func.jacrev

    @staticmethod
    def forward(op, *tensors):
        return (*(tensor.view_as(tensor) for tensor in tensors), tensors[0].new_empty(()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]
        ctx.save_for_backward(output[-1])
        ctx.set_materialize_grads(False)


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply`` where neither a graph nor a transform of torch.func is at work: PyTorch's looks for those."""
    return super(torch.autograd.Function, function).apply(*arguments)


@functools.cache
def _error(op: str, count: int):
    """The node behind a second derivative, of ``count`` tensors."""
    return torch._C._functions.DelayedError(_sentence(op), count)


def tied(op: str, arguments: dict) -> tuple[Callable, list[torch.Tensor]]:
    """A hook that refuses a second derivative of ``op``, and those of ``arguments`` that require a gradient.

    It is for ``register_prehook`` of the op's last nodes, or ``register_hook`` of each that is others': with
    create_graph=True, what comes there leads to a node that raises, and on to the tensors. No transform of torch.func is
    at work.
    """
    tensors = []
    for value in arguments.values():
        kind = type(value)
        if kind in PLAIN:
            if value.requires_grad:
                tensors.append(value)
        elif (kind is list or kind is tuple) and value and isinstance(value[0], torch.Tensor):
            tensors += [each for each in value if each.requires_grad]
    tie = _error(op, len(tensors))(*tensors)
    if is_functorch_wrapped_tensor(tie if len(tensors) == 1 else tie[0]):  # left of a transform that has ended
        tie = _error(op, len(tensors))(*map(unwrap_if_dead, tensors))
    tie = tie if len(tensors) == 1 else tie[0]
    tie.data = _NOTHING if tie.is_cpu else tie.new_empty(0)  # it holds the tensors' nodes, and none of their data
    return functools.partial(_follow, tie, op), tensors


def run_once(op: str, run: Callable, arguments: dict):
    """``run(**arguments)`` where no transform of torch.func is at work; a second derivative is refused."""
    hook, tensors = tied(op, arguments)
    outputs = run(**arguments)
    alone = type(outputs) in PLAIN
    hooked = []
    for output in (outputs,) if alone else outputs:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            # A view that is changed in place gets another node, but what it is a view of keeps its own.
            whole = output._base
            if whole is None or whole.grad_fn is None:
                whole = output
            for each in tensors:
                if whole is each or whole is each._base:  # its node is not the op's
                    whole = output = output.view_as(output)
                    break
            whole.grad_fn.register_prehook(hook)
        hooked.append(output)
    return hooked[0] if alone else type(outputs)(hooked)


def first_order(arguments: dict, op: str) -> dict:
    """``arguments`` with a second derivative refused to their tensors, and lists of tensors: one node for all of them.

    For transforms of torch.func, for subclasses of tensors, and for backwards of others' kernels (``Backend.foreign``).
    """
    names, tensors, lists = [], [], {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                names.append(name)
                tensors.append(unwrap_if_dead(value))
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            lists[name] = value
    for value in lists.values():
        tensors += [unwrap_if_dead(each) for each in value if each.requires_grad]
    once = iter(_FirstOrderTransformed.apply(op, *tensors) if transformed() else apply(_FirstOrder, op, *tensors))
    found = arguments | dict(zip(names, once))  # noqa: B905 (the rest are those of lists, and the tie)
    for name, value in lists.items():
        found[name] = type(value)([next(once) if each.requires_grad else each for each in value])
    return found
