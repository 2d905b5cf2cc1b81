"""norm_act: norm and activation of video features in one pass. B batch, C channels, T frames, H height, W width."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import checks
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..measured import sizes
from ..precision import cast, wide_dtype, widen
from ..reference import normalization as reference
from . import normalization_cuda, normalization_triton

ACTS = ("silu", None)


@dataclass(frozen=True)
class NormalizationProblem(Problem):
    """``wide``: the dtype of the arithmetic, float64 if any tensor is float64, else float32; ``size``: of pixels."""

    channels: int
    norm: str
    act: str | None
    wide: torch.dtype
    size: tuple[int, ...] = ()


def _example(device: str, dtype: torch.dtype, grad: bool) -> NormalizationProblem:
    wide = torch.promote_types(dtype, torch.float32)
    return NormalizationProblem(device, dtype, grad, channels=96, norm="rms", act="silu", wide=wide)


# ---------------------------------------------------------------------------------------------- backend "torch"
def torch_norm_act(x, weight=None, bias=None, *, norm, groups, eps, act):
    """PyTorch's own composition; the convolution family recomputes with it in its backward."""
    if x.numel() == 0:  # F.group_norm's weight gradient is NaN on empty inputs
        return reference.norm_act(x, weight, bias, norm=norm, groups=groups, eps=eps, act=act)
    dtype = x.dtype
    x_BCTHW, weight_C, bias_C = widen(x, weight, bias)
    if norm == "group":
        x_BCTHW = F.group_norm(x_BCTHW, groups, weight_C, None if weight_C is None else bias_C, eps)
        if weight_C is None and bias_C is not None:
            x_BCTHW = x_BCTHW + bias_C[:, None, None, None]
    else:
        # F.rms_norm normalises the last dimension; the formula over channels needs no transpose
        inverse = torch.rsqrt(x_BCTHW.square().mean(dim=1, keepdim=True) + eps)
        x_BCTHW = x_BCTHW * inverse if weight_C is None else x_BCTHW * inverse * weight_C[:, None, None, None]
        if bias_C is not None:
            x_BCTHW = x_BCTHW + bias_C[:, None, None, None]
    return cast(F.silu(x_BCTHW) if act == "silu" else x_BCTHW, dtype)


NORM_ACT = Op("norm_act", "normalization", _example, [
    normalization_cuda.NORM_ACT, normalization_triton.NORM_ACT, Backend("torch", torch_norm_act),
    Backend("reference", reference.norm_act)], NormalizationProblem)
OPS = (NORM_ACT,)
__all__ = ["norm_act"]


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
            checks.shape(op, name, value, (x.shape[1],), "a norm has one element per channel of x")
    checks.number(op, "eps", eps)
    checks.require(eps >= 0, op, "eps of 0 or more", eps, "pass a small positive number")  # NaN is not
    if norm == "group":
        checks.whole(op, "groups", groups, 1)
        if x.shape[1] % groups:
            raise checks.error(op, f"groups to divide the {x.shape[1]} channels", groups,
                               "choose a divisor of the channels")


def norm_act(x, weight=None, bias=None, *, norm="rms", groups=32, eps=1e-6, act="silu", backend="auto"):
    """``act(norm(x) * weight + bias)`` on video features, computed in at least float32.

    Args:
        x: (B, C, T, H, W), floating.
        weight: (C,), or None.
        bias: (C,), or None.
        norm: str; "rms" over C of each pixel (causal); "group" over (C / groups, T, H, W), which mixes frames and is
            therefore NOT causal: pass the whole clip at once.
        groups: int that divides C, for "group".
        eps: float under the square root. Wan's F.normalize corresponds to 1e-24: zeros stay 0.
        act: str "silu", or None.
        backend: str; "auto", or "reference", "torch", "triton", "cuda" by name.

    Returns:
        (B, C, T, H, W) in x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> ops.norm_act(torch.randn(1, 16, 5, 8, 8), weight=torch.ones(16)).shape
    torch.Size([1, 16, 5, 8, 8])
    """
    key = call_key(NORM_ACT, backend, (x, weight, bias), norm, groups, eps, act)
    plan = remembered(key)
    if plan is None:
        check("norm_act", x, weight, bias, norm, groups, eps, act)
        facts = (device_name(x), x.dtype, needs_grad(x, weight, bias), x.shape[1], norm, act,
                 wide_dtype(x, weight, bias), sizes((x.shape[0], *x.shape[2:])))
        plan = remember(key, NORM_ACT.plan(facts, backend))
    return NORM_ACT.run(plan, key, x=x, weight=weight, bias=bias, norm=norm, groups=groups, eps=eps, act=act)
