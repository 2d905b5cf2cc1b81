"""norm_modulate, gate_residual, gate_residual_norm_modulate: adaLN on packs.

N tokens, D width, R modulation rows.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .. import checks
from ..dispatch import Backend, Op, Problem, device_name, needs_grad
from ..pack import Pack, check_kind, check_pack
from ..precision import wide_dtype
from ..reference import modulation as reference
from ..reference.modulation import only_samples, pick
from . import modulation_triton

NORMS = ("layer", "rms")


@dataclass(frozen=True)
class ModulationProblem(Problem):
    """``width`` D; ``norm`` is None for gate_residual; ``affine``: a norm weight or bias is given.

    ``wide``: what the call is computed in, float64 if any tensor is float64, else float32.
    """

    width: int
    norm: str | None
    affine: bool
    wide: torch.dtype


def _example(device: str, dtype: torch.dtype, grad: bool, norm: str | None = "layer") -> ModulationProblem:
    wide = torch.promote_types(dtype, torch.float32)
    return ModulationProblem(device, dtype, grad, width=1536, norm=norm, affine=False, wide=wide)


# ---------------------------------------------------------------------------------------------- backend "torch"
def _normalise(x_ND, norm, weight, bias, eps):
    # weight and bias stay outside: layer_norm's own sums of their gradients lose digits on long rows of tokens
    h_ND = F.layer_norm(x_ND, x_ND.shape[-1:], None, None, eps) if norm == "layer" else F.rms_norm(
        x_ND, x_ND.shape[-1:], None, eps)
    h_ND = h_ND if weight is None else h_ND * weight
    return h_ND if bias is None else h_ND + bias


def _modulated(x_ND, shift, scale, rows, norm, weight, bias, eps):
    shift, scale, weight, bias = (None if t is None else t.to(x_ND.dtype) for t in (shift, scale, weight, bias))
    h_ND = _normalise(x_ND, norm, weight, bias, eps)
    if scale is not None and shift is not None:
        h_ND = torch.addcmul(pick(shift, rows), h_ND, 1 + pick(scale, rows))
    elif scale is not None:
        h_ND = h_ND * (1 + pick(scale, rows))
    elif shift is not None:
        h_ND = h_ND + pick(shift, rows)
    return only_samples(h_ND, rows)


def _torch_norm_modulate(x, shift, scale, rows, *, norm, weight, bias, eps, dtype):
    wide = wide_dtype(x, shift, scale, weight, bias)
    return _modulated(only_samples(x.to(wide), rows), shift, scale, rows, norm, weight, bias, eps).to(dtype or x.dtype)


def _torch_gate_residual(x, y, gate, rows):
    wide = wide_dtype(x, y, gate)
    x_ND, y_ND = only_samples(x.to(wide), rows), only_samples(y.to(wide), rows)
    return only_samples(torch.addcmul(x_ND, pick(gate.to(wide), rows), y_ND), rows).to(x.dtype)


def _torch_gate_residual_norm_modulate(x, y, gate, shift, scale, rows, *, norm, weight, bias, eps):
    x_new = _torch_gate_residual(x, y, gate, rows)
    wide = wide_dtype(x, y, gate, shift, scale, weight, bias)
    return x_new, _modulated(x_new.to(wide), shift, scale, rows, norm, weight, bias, eps).to(y.dtype)


NORM_MODULATE = Op("norm_modulate", "modulation", _example, [
    modulation_triton.NORM_MODULATE, Backend("torch", _torch_norm_modulate), Backend("reference", reference.norm_modulate)])
GATE_RESIDUAL = Op("gate_residual", "modulation", partial(_example, norm=None), [
    modulation_triton.GATE_RESIDUAL, Backend("torch", _torch_gate_residual), Backend("reference", reference.gate_residual)])
GATE_RESIDUAL_NORM_MODULATE = Op("gate_residual_norm_modulate", "modulation", _example, [
    modulation_triton.GATE_RESIDUAL_NORM_MODULATE, Backend("torch", _torch_gate_residual_norm_modulate),
    Backend("reference", reference.gate_residual_norm_modulate)])
OPS = (NORM_MODULATE, GATE_RESIDUAL, GATE_RESIDUAL_NORM_MODULATE)
__all__ = ["gate_residual", "gate_residual_norm_modulate", "norm_modulate"]


# ------------------------------------------------------------------------------------------------------- checks
def _check(op: str, x, tables: dict, rows, norm=None, weight=None, bias=None, eps=0.0, normed=True):
    """The rows (N,) of a call, or None."""
    checks.shape(op, "x", x, ("N", "D"), "flatten the tokens of all samples into one row each")
    tokens, width = x.shape
    checks.floating(op, x=x, weight=weight, bias=bias, **tables)
    check_kind(op, "rows", rows)
    pack = rows if isinstance(rows, Pack) else None
    if pack is not None:
        check_pack(op, pack, x=x)
        rows = pack.rows
    checks.same_device(op, x=x, rows=rows, weight=weight, bias=bias, **tables)
    if normed:
        checks.choice(op, "norm", norm, NORMS)
    checks.number(op, "eps", eps)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.shape(op, name, value, (width,), "a norm has one number per column of x")
    count = None
    for name, value in tables.items():
        if value is None:
            continue
        checks.shape(op, name, value, ("R", width), "modulation has x's width")
        count = value.shape[0] if count is None else count
        checks.shape(op, name, value, (count, width), "all modulation of a call has the same rows")
        if pack is not None and value.shape[0] != pack.num_rows:
            raise checks.error(op, f"{name} of one row for each of the pack's {checks.shown(pack.num_rows)} modulation rows "
                               f"(modulation={pack.modulation!r})", f"{checks.shown(value.shape[0])} rows",
                               "pass the pack that the modulation was made for")
        if rows is None and value.shape[0] != 1:
            checks.shape(op, name, value, (tokens, width), "without rows it holds one row, or one per token")
    if rows is not None and pack is None:  # a pack's were checked when it was made
        checks.rows(op, rows, tokens, count)
    return rows


# ------------------------------------------------------------------------------------------------- public ops
def norm_modulate(x, shift, scale, rows=None, *, norm="layer", weight=None, bias=None, eps=1e-6, dtype=None,
                  backend="auto"):
    """``norm(x) * (1 + scale[rows]) + shift[rows]``.

    Args:
        x: (N, D), floating.
        shift, scale: (R, D), any floating dtype, strided views welcome (``chunk(6, -1)``); either may be None.
        rows: (N,) int32, the modulation row of each token, non-decreasing; -1: the token belongs to no sample. Or the
            Pack of these N tokens and R rows. None: R is 1 or N.
        norm: ``"layer"``: ``(x - mean) * rsqrt(var + eps)``; ``"rms"``: ``x * rsqrt(mean(x^2) + eps)``.
        weight, bias: (D,) of the norm, or None.
        dtype: of the result, x's where None; 16 bits for the next layer of a stream x kept in float32.

    Returns:
        (N, D) in ``dtype``; 0 on tokens of no sample, whose contents are never read. Computed in at least float32.

    Source: adaLN of DiT, arXiv 2212.09748.
    """
    rows = _check("norm_modulate", x, {"shift": shift, "scale": scale}, rows, norm, weight, bias, eps)
    checks.require(dtype is None or getattr(dtype, "is_floating_point", False), "norm_modulate",
                   "dtype to be a floating torch.dtype", dtype, "pass torch.bfloat16, or leave it out for x's own")
    problem = ModulationProblem(device_name(x), x.dtype, needs_grad(x, shift, scale, weight, bias), x.shape[1], norm,
                                weight is not None or bias is not None, wide_dtype(x, shift, scale, weight, bias))
    return NORM_MODULATE.run(problem, backend, x=x, shift=shift, scale=scale, rows=rows, norm=norm, weight=weight,
                             bias=bias, eps=eps, dtype=dtype)


def gate_residual(x, y, gate, rows=None, *, backend="auto"):
    """``x + gate[rows] * y``: x, y (N, D), gate (R, D), rows as in ``norm_modulate``; returns (N, D) in x's dtype.

    x may be float32 with a 16-bit y (a residual stream kept in float32).
    """
    checks.shape("gate_residual", "gate", gate, ("R", "D"), "gate is modulation, one row per sample or frame")
    rows = _check("gate_residual", x, {"gate": gate}, rows, normed=False)
    checks.floating("gate_residual", y=y)
    checks.same_device("gate_residual", x=x, y=y)
    checks.shape("gate_residual", "y", y, x.shape, "y is added to x")
    problem = ModulationProblem(device_name(x), x.dtype, needs_grad(x, y, gate), x.shape[1], None, False,
                                wide_dtype(x, y, gate))
    return GATE_RESIDUAL.run(problem, backend, x=x, y=y, gate=gate, rows=rows)


def gate_residual_norm_modulate(x, y, gate, shift, scale, rows=None, *, norm="layer", weight=None, bias=None,
                                eps=1e-6, backend="auto"):
    """``x_new = x + gate[rows] * y`` and ``h = norm(x_new) * (1 + scale[rows]) + shift[rows]`` in one pass.

    Arguments as in ``norm_modulate`` and ``gate_residual``.

    Returns:
        ``(x_new, h)``: x_new (N, D) in x's dtype, h (N, D) in y's dtype (float32 stream, 16-bit branch).
    """
    op = "gate_residual_norm_modulate"
    checks.shape(op, "gate", gate, ("R", "D"), "gate is modulation, one row per sample or frame")
    rows = _check(op, x, {"gate": gate, "shift": shift, "scale": scale}, rows, norm, weight, bias, eps)
    checks.floating(op, y=y)
    checks.same_device(op, x=x, y=y)
    checks.shape(op, "y", y, x.shape, "y is added to x")
    problem = ModulationProblem(device_name(x), x.dtype, needs_grad(x, y, gate, shift, scale, weight, bias),
                                x.shape[1], norm, weight is not None or bias is not None,
                                wide_dtype(x, y, gate, shift, scale, weight, bias))
    return GATE_RESIDUAL_NORM_MODULATE.run(problem, backend, x=x, y=y, gate=gate, shift=shift, scale=scale, rows=rows,
                                           norm=norm, weight=weight, bias=bias, eps=eps)
