"""Results of ops that can be differentiated once: kernels have no second derivative, so no backend pretends to have one."""

import torch

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


def first_order(arguments: dict, op: str, plain: bool = False) -> dict:
    """``arguments`` with a second derivative refused to their tensors, and lists of tensors: one node for all of them."""
    tensors = []
    for value in arguments.values():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                tensors.append(each)
    node = _FirstOrder if plain or not transformed() else _FirstOrderTransformed
    once = iter(node.apply(op, *tensors))
    found = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = next(once) if value.requires_grad else value
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            value = type(value)([next(once) if each.requires_grad else each for each in value])
        found[name] = value
    return found
