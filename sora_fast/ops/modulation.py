"""norm_modulate, gate_residual, gate_residual_norm_modulate: adaLN on packs.

N tokens, D width, R modulation rows.
"""

from dataclasses import dataclass
from functools import partial

import torch

from .. import checks
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..measured import sizes
from ..pack import Pack, check_kind, check_pack
from ..precision import cast, wide_dtype, widen
from ..reference import modulation as reference
from ..reference.modulation import only_samples, pick
from . import modulation_triton

NORMS = ("layer", "rms")


@dataclass(frozen=True)
class ModulationProblem(Problem):
    """``width`` D; ``norm`` is None for gate_residual; ``affine``: a norm weight or bias is given.

    ``wide``: the dtype of the arithmetic, float64 if any tensor is float64, else float32; ``size``: of N.
    """

    width: int
    norm: str | None
    affine: bool
    wide: torch.dtype
    size: tuple[int, ...] = ()


def _example(device: str, dtype: torch.dtype, grad: bool, norm: str | None = "layer") -> ModulationProblem:
    wide = torch.promote_types(dtype, torch.float32)
    return ModulationProblem(device, dtype, grad, width=1536, norm=norm, affine=False, wide=wide)


# ---------------------------------------------------------------------------------------------- backend "torch"
def _row_of_token(table, rows, tail):
    """``pick``, without its clamp if no row is -1."""
    return pick(table, rows) if tail else table.index_select(0, rows)


def _modulated(x, shift, scale, rows, tail, norm, weight, bias, eps):
    """Of tensors of one dtype."""
    # weight and bias are applied outside: layer_norm accumulates their gradients less accurately over many tokens
    width = x.shape[-1:]
    h = torch.layer_norm(x, width, eps=eps) if norm == "layer" else torch.rms_norm(x, width, eps=eps)
    h = h if weight is None else h * weight
    h = h if bias is None else h + bias
    scale = None if scale is None else 1 + scale
    if rows is not None:
        shift = None if shift is None else _row_of_token(shift, rows, tail)
        scale = None if scale is None else _row_of_token(scale, rows, tail)
    if scale is None or shift is None or torch.is_grad_enabled():  # as in _gated
        h = h if scale is None else h * scale
        h = h if shift is None else h + shift
    else:
        h = torch.addcmul(shift, h, scale)
    return only_samples(h, rows) if tail else h


def _gated(x, y, gate, rows, tail):
    dtype = x.dtype
    x, y, gate = widen(x, y, gate)
    if tail:
        x, y = only_samples(x, rows), only_samples(y, rows)
    gate = gate if rows is None else _row_of_token(gate, rows, tail)
    # addcmul is one pass, but its backward makes two more: it multiplies by its value of 1 too
    x = x + gate * y if torch.is_grad_enabled() else torch.addcmul(x, gate, y)
    return cast(only_samples(x, rows) if tail else x, dtype)


# If every row has ``even`` tokens, view tokens as (R, N / R, D) and tables as (R, 1, D) instead of expanding to N rows.
def _torch_norm_modulate(x, shift, scale, rows, tail, even, *, norm, weight, bias, eps, dtype):
    dtype = dtype or x.dtype
    x, shift, scale, weight, bias = widen(x, shift, scale, weight, bias)
    if even:
        x, rows = x.view(-1, even, x.shape[1]), None
        shift, scale = shift if shift is None else shift.unsqueeze(1), scale if scale is None else scale.unsqueeze(1)
    x = only_samples(x, rows) if tail else x
    h = cast(_modulated(x, shift, scale, rows, tail, norm, weight, bias, eps), dtype)
    return h.flatten(0, 1) if even else h


def _torch_gate_residual(x, y, gate, rows, tail, even):
    if not even:
        return _gated(x, y, gate, rows, tail)
    width = x.shape[1]
    return _gated(x.view(-1, even, width), y.view(-1, even, width), gate.unsqueeze(1), None, False).flatten(0, 1)


def _torch_gate_residual_norm_modulate(x, y, gate, shift, scale, rows, tail, even, *, norm, weight, bias, eps):
    if even:
        width = x.shape[1]
        x, y, gate, rows = x.view(-1, even, width), y.view(-1, even, width), gate.unsqueeze(1), None
        shift, scale = shift if shift is None else shift.unsqueeze(1), scale if scale is None else scale.unsqueeze(1)
    x_new = _gated(x, y, gate, rows, tail)
    normed, shift, scale, weight, bias = widen(x_new, shift, scale, weight, bias)
    h = cast(_modulated(normed, shift, scale, rows, tail, norm, weight, bias, eps), y.dtype)
    return (x_new.flatten(0, 1), h.flatten(0, 1)) if even else (x_new, h)


def _op(name: str, example, kernel: Backend, run) -> Op:
    definition = lambda *, tail, even, **arguments: getattr(reference, name)(**arguments)  # it handles both itself
    return Op(name, "modulation", example, [kernel, Backend("torch", run), Backend("reference", definition)],
              ModulationProblem)


NORM_MODULATE = _op("norm_modulate", _example, modulation_triton.NORM_MODULATE, _torch_norm_modulate)
GATE_RESIDUAL = _op("gate_residual", partial(_example, norm=None), modulation_triton.GATE_RESIDUAL, _torch_gate_residual)
GATE_RESIDUAL_NORM_MODULATE = _op("gate_residual_norm_modulate", _example, modulation_triton.GATE_RESIDUAL_NORM_MODULATE,
                                  _torch_gate_residual_norm_modulate)
OPS = (NORM_MODULATE, GATE_RESIDUAL, GATE_RESIDUAL_NORM_MODULATE)
__all__ = ["gate_residual", "gate_residual_norm_modulate", "norm_modulate"]


# ------------------------------------------------------------------------------------------------------- checks
def _check(op: str, x, y, tables: dict, rows, weight=None, bias=None) -> None:
    """Checks all but the settings and the values of ``rows``. That a required gate is given was checked before."""
    checks.shape(op, "x", x, ("N", "D"), "flatten the tokens of all samples into one row each")
    tokens, width = x.shape
    checks.floating(op, x=x, weight=weight, bias=bias, **tables)
    check_kind(op, "rows", rows)
    pack = rows if isinstance(rows, Pack) else None
    if pack is not None:
        check_pack(op, pack, x=x)
        rows = pack.rows
    checks.same_device(op, x=x, rows=rows, weight=weight, bias=bias, **tables)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.shape(op, name, value, (width,), "a norm has one element per column of x")
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
    if y is not None:
        checks.floating(op, y=y)
        checks.same_device(op, x=x, y=y)
        checks.shape(op, "y", y, x.shape, "y is added to x")


def _check_norm(op: str, norm, eps) -> None:
    checks.choice(op, "norm", norm, NORMS)
    checks.number(op, "eps", eps)


def _facts(x, y, gate, shift, scale, weight, bias, norm) -> tuple:
    """The fields of a ModulationProblem."""
    tensors = (x, y, gate, shift, scale, weight, bias)
    return (device_name(x), x.dtype, needs_grad(*tensors), x.shape[1], norm, weight is not None or bias is not None,
            wide_dtype(*tensors), sizes(x.shape[:1]))


def _rows(op: str, x, table, rows, key) -> dict:
    """``rows`` (N,) of a call, or None; ``tail``: whether some may be -1; ``even``: Pack.even.

    The rows of a Pack were checked when it was built.
    """
    if rows is None:
        return dict(rows=None, tail=False, even=0)
    if not isinstance(rows, Pack):
        tail = checks.rows(op, rows, x.shape[0], None if table is None else table.shape[0])
        return dict(rows=rows, tail=tail, even=0)
    if key is None:  # one graph for packs with a tail and without
        return dict(rows=rows.rows, tail=True, even=0)
    return dict(rows=rows.rows, tail=rows.tail, even=rows.even)


# ------------------------------------------------------------------------------------------------- public ops
def norm_modulate(x, shift, scale, rows=None, *, norm="layer", weight=None, bias=None, eps=1e-6, dtype=None,
                  backend="auto"):
    """``norm(x) * (1 + scale[rows]) + shift[rows]``, computed in at least float32.

    Args:
        x: (N, D), floating.
        shift: (R, D), any floating dtype, also a strided view (of ``chunk(6, -1)``); or None.
        scale: (R, D), likewise.
        rows: (N,) int32, the modulation row of each token, non-decreasing; -1: the token belongs to no sample. Or the
            Pack of these N tokens and R rows. None: R is 1 or N.
        norm: str; "layer": ``(x - mean) * rsqrt(var + eps)``; "rms": ``x * rsqrt(mean(x^2) + eps)``.
        weight: (D,) of the norm, or None.
        bias: (D,) of the norm, or None.
        eps: float, added to the variance or mean square.
        dtype: torch.dtype of the result, default x's; 16 bits suit the next layer if x is a float32 residual stream.
        backend: str; "auto", or "reference", "torch", "triton" by name.

    Returns:
        (N, D) in ``dtype``; 0 on tokens of no sample, which are never read.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> x, scale = torch.randn(5, 8), torch.randn(2, 8)
    >>> rows = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    >>> ops.norm_modulate(x, None, scale, rows).shape
    torch.Size([5, 8])

    Source: adaLN of DiT, arXiv 2212.09748.
    """
    op = "norm_modulate"
    key = call_key(NORM_MODULATE, backend, (x, shift, scale, weight, bias, rows), norm, eps, dtype)
    plan = remembered(key)
    if plan is None:
        _check(op, x, None, {"shift": shift, "scale": scale}, rows, weight, bias)
        _check_norm(op, norm, eps)
        checks.require(dtype is None or getattr(dtype, "is_floating_point", False), op,
                       "dtype to be a floating torch.dtype", dtype, "pass torch.bfloat16, or leave it out for x's own")
        facts = _facts(x, None, None, shift, scale, weight, bias, norm)
        plan = remember(key, NORM_MODULATE.plan(facts, backend))
    where = _rows(op, x, scale if shift is None else shift, rows, key)
    return NORM_MODULATE.run(plan, key, x=x, shift=shift, scale=scale, **where, norm=norm, weight=weight,
                             bias=bias, eps=eps, dtype=dtype)


def gate_residual(x, y, gate, rows=None, *, backend="auto"):
    """``x + gate[rows] * y``, computed in at least float32.

    Args:
        x: (N, D), floating; may be float32 with a 16-bit y (a residual stream kept in float32).
        y: (N, D), floating.
        gate: (R, D), any floating dtype.
        rows: (N,) int32, a Pack, or None, as in ``norm_modulate``.
        backend: str; "auto", or "reference", "torch", "triton" by name.

    Returns:
        (N, D) in x's dtype; 0 on tokens of no sample, which are never read.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> x, y, gate = torch.randn(5, 8), torch.randn(5, 8), torch.randn(2, 8)
    >>> rows = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    >>> ops.gate_residual(x, y, gate, rows).shape
    torch.Size([5, 8])
    """
    op = "gate_residual"
    key = call_key(GATE_RESIDUAL, backend, (x, y, gate, rows))
    plan = remembered(key)
    if plan is None:
        checks.shape(op, "gate", gate, ("R", "D"), "gate is modulation, one row per sample or frame")
        checks.tensor(op, "y", y)
        _check(op, x, y, {"gate": gate}, rows)
        facts = _facts(x, y, gate, None, None, None, None, None)
        plan = remember(key, GATE_RESIDUAL.plan(facts, backend))
    where = _rows(op, x, gate, rows, key)
    return GATE_RESIDUAL.run(plan, key, x=x, y=y, gate=gate, **where)


def gate_residual_norm_modulate(x, y, gate, shift, scale, rows=None, *, norm="layer", weight=None, bias=None,
                                eps=1e-6, backend="auto"):
    """``x_new = x + gate[rows] * y`` and ``h = norm(x_new) * (1 + scale[rows]) + shift[rows]`` in one pass.

    Args:
        x: (N, D), floating.
        y: (N, D), floating.
        gate: (R, D), any floating dtype.
        shift: (R, D), any floating dtype, or None.
        scale: (R, D), any floating dtype, or None.
        rows: (N,) int32, a Pack, or None, as in ``norm_modulate``.
        norm: str; "layer" or "rms".
        weight: (D,) of the norm, or None.
        bias: (D,) of the norm, or None.
        eps: float, added to the variance or mean square.
        backend: str; "auto", or "reference", "torch", "triton" by name.

    Returns:
        ``(x_new, h)``: x_new (N, D) in x's dtype, h (N, D) in y's dtype (float32 stream, 16-bit branch).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> x, y, row = torch.randn(5, 8), torch.randn(5, 8), torch.randn(1, 8)
    >>> x_new, h = ops.gate_residual_norm_modulate(x, y, gate=row, shift=row, scale=row)
    >>> torch.allclose(x_new, x + row * y)
    True
    """
    op = "gate_residual_norm_modulate"
    key = call_key(GATE_RESIDUAL_NORM_MODULATE, backend, (x, y, gate, shift, scale, weight, bias, rows), norm, eps)
    plan = remembered(key)
    if plan is None:
        checks.shape(op, "gate", gate, ("R", "D"), "gate is modulation, one row per sample or frame")
        checks.tensor(op, "y", y)
        _check(op, x, y, {"gate": gate, "shift": shift, "scale": scale}, rows, weight, bias)
        _check_norm(op, norm, eps)
        facts = _facts(x, y, gate, shift, scale, weight, bias, norm)
        plan = remember(key, GATE_RESIDUAL_NORM_MODULATE.plan(facts, backend))
    where = _rows(op, x, gate, rows, key)
    return GATE_RESIDUAL_NORM_MODULATE.run(plan, key, x=x, y=y, gate=gate, shift=shift, scale=scale,
                                           norm=norm, weight=weight, bias=bias, eps=eps, **where)
