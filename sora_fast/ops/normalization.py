"""norm_act: norm and activation of video features in one pass. B batch, C channels, T frames, H height, W width."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import checks, configs
from ..dispatch import Backend, Op, Problem, device_name, needs_grad
from ..reference import normalization as reference
from ..reference.precision import wide_dtype, widen
from . import normalization_cuda, operators, triton_backend

ACTS = ("silu", None)


@dataclass(frozen=True)
class NormalizationProblem(Problem):
    """``wide``: what the call is computed in, float64 if any tensor is float64, else float32."""

    channels: int
    norm: str
    act: str | None
    wide: torch.dtype


def _example(device: str, dtype: torch.dtype, grad: bool) -> NormalizationProblem:
    wide = torch.promote_types(dtype, torch.float32)
    return NormalizationProblem(device, dtype, grad, channels=96, norm="rms", act="silu", wide=wide)


# ---------------------------------------------------------------------------------------------- backend "torch"
def torch_norm_act(x, weight=None, bias=None, *, norm, groups, eps, act):
    """PyTorch's own composition; the convolution family recomputes with it in its backward."""
    if x.numel() == 0:  # F.group_norm's gradient of the weight is NaN where there is nothing to sum
        return reference.norm_act(x, weight, bias, norm=norm, groups=groups, eps=eps, act=act)
    dtype = x.dtype
    x_BCTHW, weight_C, bias_C = widen(x, weight, bias)
    if norm == "group":
        x_BCTHW = F.group_norm(x_BCTHW, groups, weight_C, None if weight_C is None else bias_C, eps)
        if weight_C is None and bias_C is not None:
            x_BCTHW = x_BCTHW + bias_C[:, None, None, None]
    else:
        # F.rms_norm works on the last dimension; over channels the plain formula needs no transpose
        inverse = torch.rsqrt(x_BCTHW.square().mean(dim=1, keepdim=True) + eps)
        x_BCTHW = x_BCTHW * inverse if weight_C is None else x_BCTHW * inverse * weight_C[:, None, None, None]
        if bias_C is not None:
            x_BCTHW = x_BCTHW + bias_C[:, None, None, None]
    return (F.silu(x_BCTHW) if act == "silu" else x_BCTHW).to(dtype)


# --------------------------------------------------------------------------------------------- backend "triton"
WIDEST = 2048


def config_of_call(direction: str, x, norm, act, y_dtype):
    """The Config of kernels.normalization for "forward" or "backward" on x; ``y_dtype``: of the output or its gradient."""
    batch, channels, frames, height, width = x.shape
    return triton_backend.config("normalization", direction, x.device, channels=channels, norm=norm, act=act,
                                 x_dtype=x.dtype, y_dtype=y_dtype,
                                 pixels=configs.bucket(batch * frames * height * width)).config


def _typical_config(problem: NormalizationProblem) -> configs.Found:
    return triton_backend.config("normalization", "forward", problem.device, channels=problem.channels,
                                 pixels=configs.bucket(4 * 480 * 832), norm=problem.norm, act=problem.act,
                                 x_dtype=problem.dtype, y_dtype=problem.dtype)


def launch_forward(x, weight, bias, norm, groups, eps, act, dtype, cache=None, keep=0):
    """``(y, cache_out, stats)`` of kernels.normalization.forward, with the Config for this call. Outside autograd."""
    from ..kernels import normalization as kernels

    return kernels.forward(x, weight, bias, norm=norm, groups=groups, eps=eps, act=act, dtype=dtype, cache=cache, keep=keep,
                           config=config_of_call("forward", x, norm, act, dtype))


def launch_backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted):
    """``(dx, dweight, dbias)`` of kernels.normalization.backward, with the Config for this call. Outside autograd."""
    from ..kernels import normalization as kernels

    return kernels.backward(dy, x, weight, bias, stats, norm=norm, groups=groups, eps=eps, act=act, wanted=wanted,
                            config=config_of_call("backward", x, norm, act, dy.dtype))


def _forward(x, weight, bias, norm, groups, eps, act):
    y, _, stats = launch_forward(x, weight, bias, norm, groups, eps, act, x.dtype)
    return [y] if stats is None else [y, stats]


def _video_like(x):
    batch, channels, *rest = x.shape
    return x.new_empty((batch, *rest, channels)).movedim(-1, 1)


def _fake_forward(x, weight, bias, norm, groups, eps, act):
    stats = [x.new_empty((2, x.shape[0], groups), dtype=torch.float32)] if norm == "group" else []
    return [_video_like(x), *stats]


def _backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted):
    return [t for t in launch_backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted) if t is not None]


def _fake_backward(dy, x, weight, bias, stats, norm, groups, eps, act, wanted):
    want_x, *others = wanted
    return [_video_like(x)] * want_x + [t.new_empty(t.shape) for t, want in zip((weight, bias), others, strict=True) if want]


# y, and the statistics of a group norm; the gradients that are wanted of x, weight and bias.
operators.define("norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, str norm, int groups, float eps, str? act) "
                 "-> Tensor[]", _forward, _fake_forward)
operators.define("norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? stats, str norm, "
                 "int groups, float eps, str? act, bool[] wanted) -> Tensor[]", _backward, _fake_backward)


class _NormAct(torch.autograd.Function):
    """Saves x, weight, bias and the statistics of a group norm; rms recomputes its own."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, groups, eps, act):
        y, *stats = torch.ops.sora_fast.norm_act_forward(x, weight, bias, norm, groups, eps, act)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.facts = norm, groups, eps, act
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, *stats = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            found = iter(torch.ops.sora_fast.norm_act_backward(dy, x, weight, bias, stats[0] if stats else None, *ctx.facts,
                                                               wanted))
        return (*(next(found) if want else None for want in wanted), None, None, None, None)


def _triton(x, weight=None, bias=None, *, norm, groups, eps, act):
    return triton_backend.apply(_NormAct, x, weight, bias, norm, groups, eps, act)


def _triton_unsupported(problem: NormalizationProblem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    if problem.channels > WIDEST:
        reasons.append(f"Its kernels hold all channels of a pixel in registers, at most {WIDEST:,}, and x has "
                       f"{checks.shown(problem.channels)}.")
    return reasons


NORM_ACT = Op("norm_act", "normalization", _example, [
    normalization_cuda.NORM_ACT,
    Backend("triton", _triton, _triton_unsupported, kernel="normalization", config=_typical_config),
    Backend("torch", torch_norm_act), Backend("reference", reference.norm_act)])
OPS = (NORM_ACT,)


def check(op: str, x, weight, bias, norm: str, groups: int, eps: float, act, prefix: str = "") -> None:
    """The checks of norm_act, which norm_act_conv3d shares (there the weights are norm_weight and norm_bias)."""
    checks.shape(op, "x", x, ("B", "C", "T", "H", "W"), "an image is a clip of one frame: x[:, :, None]")
    names = {f"{prefix}weight": weight, f"{prefix}bias": bias}
    checks.floating(op, x=x, **names)
    checks.same_device(op, x=x, **names)
    checks.choice(op, "norm", norm, ("rms", "group"))
    checks.choice(op, "act", act, ACTS)
    for name, value in names.items():
        if value is not None:
            checks.shape(op, name, value, (x.shape[1],), "a norm has one number per channel of x")
    checks.number(op, "eps", eps)
    checks.require(eps >= 0, op, "eps of 0 or more", eps, "pass a small positive number")  # NaN is not
    if norm == "group":
        checks.whole(op, "groups", groups, 1)
        if x.shape[1] % groups:
            raise checks.error(op, f"groups to divide the {x.shape[1]} channels", groups,
                               "choose a divisor of the channels")


def norm_act(x, weight=None, bias=None, *, norm="rms", groups=32, eps=1e-6, act="silu", backend="auto"):
    """``act(norm(x) * weight + bias)`` on video features.

    Args:
        x: (B, C, T, H, W), floating. weight, bias: (C,), or None.
        norm: ``"rms"`` over C of each pixel (causal); ``"group"`` over (C / groups, T, H, W), which mixes frames and
            is therefore NOT causal: the whole clip must be there at once.
        eps: inside the root. Wan's form, which divides by the length of the vector, is eps = 1e-24: zeros stay 0.
        act: ``"silu"`` or None.

    Returns:
        (B, C, T, H, W) in x's dtype; computed in at least float32.
    """
    check("norm_act", x, weight, bias, norm, groups, eps, act)
    problem = NormalizationProblem(device_name(x), x.dtype, needs_grad(x, weight, bias), x.shape[1], norm, act,
                                   wide_dtype(x, weight, bias))
    return NORM_ACT.run(problem, backend, x=x, weight=weight, bias=bias, norm=norm, groups=groups, eps=eps, act=act)
