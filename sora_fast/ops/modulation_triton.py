"""Backend "triton" of norm_modulate, gate_residual and gate_residual_norm_modulate."""

import functools
from functools import partial

import torch

from .. import checks, configs
from ..dispatch import Backend, needs_grad
from ..first_order import opaque
from . import operators, triton_backend

MAX_WIDTH = 8192


@functools.cache
def _kernels():
    """Imported at the first launch: they need Triton, which need not be there."""
    from ..kernels import modulation

    return modulation


def _config_of_call(direction, x, y, norm, affine):
    return triton_backend.config("modulation", direction, x.device, width=x.shape[1], tokens=configs.bucket(x.shape[0]),
                                 x_dtype=x.dtype, y_dtype=None if y is None else y.dtype, norm=norm, affine=affine).config


def _typical_config(problem, gated: bool) -> configs.Found:
    return triton_backend.config("modulation", "forward", problem.device, width=problem.width, tokens=32768,
                                 x_dtype=problem.dtype, y_dtype=problem.dtype if gated else None, norm=problem.norm,
                                 affine=problem.affine)


def _forward(x, y, gate, shift, scale, rows, weight, bias, norm, eps, save, dtype):
    config = _config_of_call("forward", x, y, norm, weight is not None or bias is not None)
    outputs = _kernels().forward(x, y, gate, shift, scale, rows, weight, bias, norm=norm, eps=eps, save=save, dtype=dtype,
                                 config=config)
    return [t for t in outputs if t is not None]


def _fake_forward(x, y, gate, shift, scale, rows, weight, bias, norm, eps, save, dtype):
    outputs = [] if gate is None else [x.new_empty(x.shape)]
    if norm is not None:
        outputs.append(x.new_empty(x.shape, dtype=dtype))
        if save:
            outputs.append(x.new_empty((2 if norm == "layer" else 1, x.shape[0]), dtype=torch.float32))
    return outputs


def _backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, norm, wanted):
    config = _config_of_call("backward", x if dx_new is None else dx_new, y, norm,
                             weight is not None or bias is not None)
    found = _kernels().backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, norm=norm, wanted=wanted,
                                config=config)
    return [t for t in found if t is not None]


def _fake_backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, norm, wanted):
    inputs = (x if dx_new is None else dx_new, y, gate, shift, scale, weight, bias)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want]


# Forward: those of x_new, h and stats that exist. Backward: the wanted gradients of x, y, gate, shift, scale, weight, bias.
_modulation_forward = operators.define(
    "modulation_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? rows, "
    "Tensor? weight, Tensor? bias, str? norm, float eps, bool save, ScalarType dtype) -> Tensor[]",
    _forward, _fake_forward)
_modulation_backward = operators.define(
    "modulation_backward(Tensor? dx_new, Tensor? dh, Tensor? x, Tensor? y, Tensor? gate, Tensor? shift, "
    "Tensor? scale, Tensor? rows, Tensor? weight, Tensor? bias, Tensor? stats, str? norm, bool[] wanted) "
    "-> Tensor[]", _backward, _fake_backward)


class _Modulation(torch.autograd.Function):
    """Saves the norm's input, its statistics (8 bytes per token) and the other inputs; with a gate, not x."""

    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, weight, bias, rows, norm, eps, save, dtype):
        outputs = _modulation_forward(x, y, gate, shift, scale, rows, weight, bias, norm, eps, save, dtype)
        if save:
            normed = (x if gate is None else outputs[0]) if norm else None
            ctx.save_for_backward(normed, y, gate, shift, scale, rows, weight, bias, outputs[-1] if norm else None)
        ctx.norm = norm
        return tuple(outputs[:len(outputs) - bool(norm and save)])

    @staticmethod
    @opaque
    def backward(ctx, *grads):
        x, y, gate, shift, scale, rows, weight, bias, stats = ctx.saved_tensors
        dx_new = None if gate is None else grads[0]
        dh = grads[-1] if ctx.norm else None
        wanted = list(ctx.needs_input_grad[:7])
        # x + gate * y: dx is the incoming gradient itself, except for tokens of no sample, where it is 0
        same = wanted[0] and not ctx.norm and rows is None
        wanted[0] = wanted[0] and not same
        with torch.no_grad():
            found = iter(_modulation_backward(
                dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, ctx.norm, wanted))
        gradients = [next(found) if want else None for want in wanted]
        if same:
            gradients[0] = dx_new
        return (*gradients, None, None, None, None, None)


def _run(x, y=None, gate=None, shift=None, scale=None, rows=None, *, tail, even, norm=None, weight=None, bias=None, eps=0.0,
         dtype=None):
    save = needs_grad(x, y, gate, shift, scale, weight, bias)
    tensors = triton_backend.distinct((x, y, gate, shift, scale, weight, bias))
    outputs = triton_backend.apply(_Modulation, *tensors, rows, norm, eps, save, dtype or (x if y is None else y).dtype)
    return outputs if len(outputs) > 1 else outputs[0]


def _unsupported(problem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    if problem.width > MAX_WIDTH:
        reasons.append(f"Its kernels hold a whole row in registers, at most {MAX_WIDTH:,} elements, and x has "
                       f"{checks.shown(problem.width)} columns.")
    return reasons


NORM_MODULATE, GATE_RESIDUAL, GATE_RESIDUAL_NORM_MODULATE = (
    Backend("triton", _run, _unsupported, kernel="modulation", config=partial(_typical_config, gated=gated))
    for gated in (False, True, True))
