"""Backend "triton" of norm_act."""

import functools

import torch

from .. import checks, configs
from ..dispatch import Backend
from ..first_order import opaque
from . import operators, triton_backend

MAX_WIDTH = 2048


@functools.cache
def _kernels():
    """Imported at the first launch: they need Triton, which need not be there."""
    from ..kernels import normalization

    return normalization


def config_of_call(direction: str, x, norm, act, y_dtype):
    """The Config of kernels.normalization for "forward" or "backward" of x; ``y_dtype``: of the output or its gradient."""
    batch, channels, frames, height, width = x.shape
    return triton_backend.config("normalization", direction, x.device, channels=channels, norm=norm, act=act,
                                 x_dtype=x.dtype, y_dtype=y_dtype,
                                 pixels=configs.bucket(batch * frames * height * width)).config


def _typical_config(problem) -> configs.Found:
    return triton_backend.config("normalization", "forward", problem.device, channels=problem.channels,
                                 pixels=configs.bucket(4 * 480 * 832), norm=problem.norm, act=problem.act,
                                 x_dtype=problem.dtype, y_dtype=problem.dtype)


def launch_forward(x, weight, bias, norm, groups, eps, act, dtype, cache=None, keep=0):
    """``(y, cache_out, stats)`` of kernels.normalization.forward, with the Config for this call. Outside autograd."""
    return _kernels().forward(x, weight, bias, norm=norm, groups=groups, eps=eps, act=act, dtype=dtype, cache=cache,
                              keep=keep, config=config_of_call("forward", x, norm, act, dtype))


def launch_backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted):
    """``(dx, dweight, dbias)`` of kernels.normalization.backward, with the Config for this call. Outside autograd."""
    return _kernels().backward(dy, x, weight, bias, stats, norm=norm, groups=groups, eps=eps, act=act, wanted=wanted,
                               config=config_of_call("backward", x, norm, act, dy.dtype))


def _forward(x, weight, bias, norm, groups, eps, act):
    y, _, stats = launch_forward(x, weight, bias, norm, groups, eps, act, x.dtype)
    return [y] if stats is None else [y, stats]


def _fake_forward(x, weight, bias, norm, groups, eps, act):
    stats = [x.new_empty((2, x.shape[0], groups), dtype=torch.float32)] if norm == "group" else []
    return [operators.video(x, x.dtype, *x.shape), *stats]


def _backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted):
    return [t for t in launch_backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted) if t is not None]


def _fake_backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted):
    want_x, *others = wanted
    found = [operators.video(x, x.dtype, *x.shape)] if want_x else []
    return found + [t.new_empty(t.shape) for t, want in zip((weight, bias), others, strict=True) if want]


# Forward: y, and the statistics of a group norm. Backward: the wanted gradients of x, weight and bias.
_norm_act_forward = operators.define(
    "norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, str norm, int groups, float eps, str? act) "
    "-> Tensor[]", _forward, _fake_forward)
_norm_act_backward = operators.define(
    "norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? stats, str norm, "
    "int groups, float eps, str? act, bool[] wanted) -> Tensor[]", _backward, _fake_backward)


class _NormAct(torch.autograd.Function):
    """Saves x, weight, bias and the statistics of a group norm; rms recomputes its own."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, groups, eps, act):
        y, *stats = _norm_act_forward(x, weight, bias, norm, groups, eps, act)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.facts = norm, groups, eps, act
        return y

    @staticmethod
    @opaque
    def backward(ctx, dy):
        x, weight, bias, *stats = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            found = iter(_norm_act_backward(dy, x, weight, bias, stats[0] if stats else None, *ctx.facts, wanted))
        return (*(next(found) if want else None for want in wanted), None, None, None, None)


def _run(x, weight=None, bias=None, *, norm, groups, eps, act):
    return triton_backend.apply(_NormAct, *triton_backend.distinct((x, weight, bias)), norm, groups, eps, act)


def _unsupported(problem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    if problem.channels > MAX_WIDTH:
        reasons.append(f"Its kernels hold all channels of a pixel in registers, at most {MAX_WIDTH:,}, and x has "
                       f"{checks.shown(problem.channels)}.")
    return reasons


NORM_ACT = Backend("triton", _run, _unsupported, kernel="normalization", config=_typical_config)
