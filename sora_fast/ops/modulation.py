"""norm_modulate, gate_residual, gate_residual_norm_modulate: adaLN on packs.

N tokens, D width, R modulation rows.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .. import checks, configs
from ..dispatch import Backend, Op, Problem, device_name, needs_grad
from ..pack import Pack, check_kind, check_pack
from ..reference import modulation as reference
from ..reference.modulation import only_samples, pick
from ..reference.precision import wide_dtype
from . import operators, triton_backend

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


# --------------------------------------------------------------------------------------------- backend "triton"
WIDEST = 8192
_INPUTS = ("x", "y", "gate", "shift", "scale", "weight", "bias")  # that have gradients, in the kernels' order


def _config_of_call(direction, x, y, norm, affine):
    return triton_backend.config("modulation", direction, x.device, width=x.shape[1], tokens=configs.bucket(x.shape[0]),
                                 x_dtype=x.dtype, y_dtype=None if y is None else y.dtype, norm=norm, affine=affine).config


def _typical_config(problem: ModulationProblem, gated: bool) -> configs.Found:
    return triton_backend.config("modulation", "forward", problem.device, width=problem.width, tokens=32768,
                                 x_dtype=problem.dtype, y_dtype=problem.dtype if gated else None, norm=problem.norm,
                                 affine=problem.affine)


def _forward(x, y, gate, shift, scale, rows, weight, bias, norm, eps, save, dtype):
    from ..kernels import modulation as kernels

    config = _config_of_call("forward", x, y, norm, weight is not None or bias is not None)
    made = kernels.forward(x, y, gate, shift, scale, rows, weight, bias, norm=norm, eps=eps, save=save, dtype=dtype,
                           config=config)
    return [t for t in made if t is not None]


def _fake_forward(x, y, gate, shift, scale, rows, weight, bias, norm, eps, save, dtype):
    made = [] if gate is None else [x.new_empty(x.shape)]
    if norm is not None:
        made.append(x.new_empty(x.shape, dtype=dtype))
        if save:
            made.append(x.new_empty((2 if norm == "layer" else 1, x.shape[0]), dtype=torch.float32))
    return made


def _backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, norm, wanted):
    from ..kernels import modulation as kernels

    config = _config_of_call("backward", x if dx_new is None else dx_new, y, norm,
                             weight is not None or bias is not None)
    found = kernels.backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, norm=norm, wanted=wanted,
                             config=config)
    return [t for t in found if t is not None]


def _fake_backward(dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, norm, wanted):
    inputs = (x if dx_new is None else dx_new, y, gate, shift, scale, weight, bias)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want]


# What is there of x_new, h and stats; the gradients that are wanted of x, y, gate, shift, scale, weight and bias.
operators.define("modulation_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? rows, "
                 "Tensor? weight, Tensor? bias, str? norm, float eps, bool save, ScalarType dtype) -> Tensor[]",
                 _forward, _fake_forward)
operators.define("modulation_backward(Tensor? dx_new, Tensor? dh, Tensor? x, Tensor? y, Tensor? gate, Tensor? shift, "
                 "Tensor? scale, Tensor? rows, Tensor? weight, Tensor? bias, Tensor? stats, str? norm, bool[] wanted) "
                 "-> Tensor[]", _backward, _fake_backward)


class _Modulation(torch.autograd.Function):
    """Saves what the norm was taken of, its statistics (8 bytes a token) and the inputs; not x where there is a gate."""

    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, weight, bias, rows, norm, eps, save, dtype):
        made = torch.ops.sora_fast.modulation_forward(x, y, gate, shift, scale, rows, weight, bias, norm, eps, save, dtype)
        if save:
            normed = (x if gate is None else made[0]) if norm else None
            ctx.save_for_backward(normed, y, gate, shift, scale, rows, weight, bias, made[-1] if norm else None)
        ctx.norm = norm
        return tuple(made[:len(made) - bool(norm and save)])

    @staticmethod
    def backward(ctx, *grads):
        x, y, gate, shift, scale, rows, weight, bias, stats = ctx.saved_tensors
        dx_new = None if gate is None else grads[0]
        dh = grads[-1] if ctx.norm else None
        wanted = list(ctx.needs_input_grad[:len(_INPUTS)])
        # x + gate * y: x has the very gradient that came, but for tokens of no sample, where it is 0
        same = wanted[0] and not ctx.norm and rows is None
        wanted[0] = wanted[0] and not same
        with torch.no_grad():
            found = iter(torch.ops.sora_fast.modulation_backward(
                dx_new, dh, x, y, gate, shift, scale, rows, weight, bias, stats, ctx.norm, wanted))
        gradients = [next(found) if want else None for want in wanted]
        if same:
            gradients[0] = dx_new
        return (*gradients, None, None, None, None, None)


def _triton(x, y=None, gate=None, shift=None, scale=None, rows=None, *, norm=None, weight=None, bias=None, eps=0.0,
            dtype=None):
    save = needs_grad(x, y, gate, shift, scale, weight, bias)
    made = triton_backend.apply(_Modulation, x, y, gate, shift, scale, weight, bias, rows, norm, eps, save,
                             dtype or (x if y is None else y).dtype)
    return made if len(made) > 1 else made[0]


def _triton_unsupported(problem: ModulationProblem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    if problem.width > WIDEST:
        reasons.append(f"Its kernels hold a whole row in registers, at most {WIDEST:,} numbers, and x has "
                       f"{checks.shown(problem.width)} columns.")
    return reasons


def _triton_backend(gated: bool) -> Backend:
    return Backend("triton", _triton, _triton_unsupported, kernel="modulation",
                   config=lambda problem: _typical_config(problem, gated))


NORM_MODULATE = Op("norm_modulate", "modulation", _example, [
    _triton_backend(gated=False), Backend("torch", _torch_norm_modulate), Backend("reference", reference.norm_modulate)])
GATE_RESIDUAL = Op("gate_residual", "modulation", partial(_example, norm=None), [
    _triton_backend(gated=True), Backend("torch", _torch_gate_residual), Backend("reference", reference.gate_residual)])
GATE_RESIDUAL_NORM_MODULATE = Op("gate_residual_norm_modulate", "modulation", _example, [
    _triton_backend(gated=True), Backend("torch", _torch_gate_residual_norm_modulate),
    Backend("reference", reference.gate_residual_norm_modulate)])
OPS = (NORM_MODULATE, GATE_RESIDUAL, GATE_RESIDUAL_NORM_MODULATE)


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
