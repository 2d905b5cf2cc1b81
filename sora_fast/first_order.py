"""Results of ops that can be differentiated once: kernels have no second derivative, so no backend pretends to have one."""

import torch
from torch._C._functorch import unwrap_if_dead

from .precision import transformed


class _FirstOrder(torch.autograd.Function):
    """The identity of tensors, differentiable once.

    The last output, which holds nothing, ties gradients to the inputs: a backend's gradient may look constant to
    autograd, which would then say no more than that nothing requires a gradient.
    """

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
        raise RuntimeError(
            f"{ctx.op}: expected to be differentiated once, got a second backward through its gradient; "
            f"use sora_fast.reference.{ctx.op}, which is plain PyTorch, where second derivatives are needed"
        )


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply`` where neither a graph nor a transform of torch.func is at work: PyTorch's looks for those."""
    return super(torch.autograd.Function, function).apply(*arguments)


def first_order(arguments: dict, op: str, plain: bool = False) -> dict:
    """``arguments`` with a second derivative refused to their tensors, and lists of tensors: one node for all of them.

    ``plain``: no transform of torch.func is at work.
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
    if plain:
        once = apply(_FirstOrder, op, *tensors)
    else:
        once = (_FirstOrderTransformed if transformed() else _FirstOrder).apply(op, *tensors)
    once = iter(once)
    found = arguments | dict(zip(names, once))  # noqa: B905 (the rest are those of lists, and the tie)
    for name, value in lists.items():
        found[name] = type(value)([next(once) if each.requires_grad else each for each in value])
    return found
