"""norm_modulate, gate_residual, gate_residual_norm_modulate."""

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import Pack, ops, reference
from sora_fast.testing import assert_matches, cases

OPS = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")

test_error_rule = op_checks.error_rule(OPS)


def good(op, tokens=6, width=8):
    draw = lambda *shape: torch.randn(*shape)
    arguments = dict(x=draw(tokens, width), rows=torch.tensor([0, 0, 1, 1, 2, -1], dtype=torch.int32))
    if op != "norm_modulate":
        arguments |= dict(y=draw(tokens, width), gate=draw(3, width))
    if op != "gate_residual":
        arguments |= dict(shift=draw(3, width), scale=draw(3, width), weight=draw(width), bias=draw(width))
    return arguments


test_every_tensor_is_checked = op_checks.every_tensor_is_checked(OPS, good)


def _table():
    rows = lambda *numbers: dict(rows=torch.tensor(numbers, dtype=torch.int32))
    table = []
    for op in OPS:
        named = "scale" if op == "norm_modulate" else "gate"
        table += [
            (op, "x of rank 3", dict(x=torch.zeros(2, 3, 8)), ("x", "(N, D)", "(2, 3, 8)")),
            (op, "modulation of another width", {named: torch.zeros(3, 7)}, (named, "(3, 7)")),
            (op, "rows of another length", rows(0, 0, 1), ("rows", "(6,)", "(3,)")),
            (op, "rows beyond the modulation", rows(0, 0, 1, 1, 2, 3), ("rows below the 3", "got 3")),
            (op, "rows below -1", rows(-2, 0, 1, 1, 2, 2), ("got -2",)),
            (op, "rows that fall", rows(0, 1, 0, 1, 2, 2), ("never to fall", "got 1 before 0")),
            (op, "rows that fall across a tail", rows(0, 1, -1, 0, 2, 2), ("never to fall",)),
            (op, "rows in int16", dict(rows=torch.zeros(6, dtype=torch.int16)), ("int32",)),
            (op, "no rows, but three of modulation", dict(rows=None), ("(3, 8)",)),
        ]
        if op != "gate_residual":
            table += [
                (op, "unknown norm", dict(norm="batch"), ("'layer', 'rms'", "'batch'")),
                (op, "norm None", dict(norm=None), ("'layer', 'rms'", "None")),
                (op, "weight of another width", dict(weight=torch.zeros(7)), ("weight", "(8,)", "(7,)")),
                (op, "tables of unlike lengths", dict(shift=torch.zeros(4, 8)), ("(4, 8)",)),
                (op, "eps as text", dict(eps="small"), ("eps", "'small'")),
            ]
        if op != "norm_modulate":
            table += [
                (op, "y of another shape", dict(y=torch.zeros(6, 7)), ("y", "(6, 8)", "(6, 7)")),
                (op, "gate None", dict(gate=None), ("gate", "NoneType")),
            ]
    return table


test_refusals = op_checks.refusals(_table(), good)


# ---------------------------------------------------------------------------------------------------- gradcheck
ROWS = torch.tensor([0, 0, 1, -1], dtype=torch.int32)
test_gradcheck = op_checks.gradchecks([
    ("norm_modulate layer", lambda x, sh, sc, w, b: reference.norm_modulate(x, sh, sc, ROWS, weight=w, bias=b),
     (double(4, 3), double(2, 3), double(2, 3) + 1, double(3), double(3))),
    ("norm_modulate rms", lambda x, sh, sc, w: reference.norm_modulate(x, sh, sc, ROWS, norm="rms", weight=w),
     (double(4, 3), double(2, 3), double(2, 3) + 1, double(3))),
    ("norm_modulate, rows None", lambda x, sh: reference.norm_modulate(x, sh, None, None), (double(4, 3),
                                                                                           double(1, 3))),
    ("gate_residual", lambda x, y, g: reference.gate_residual(x, y, g, ROWS), (double(4, 3), double(4, 3) + 1,
                                                                              double(2, 3))),
    ("gate_residual_norm_modulate",
     lambda x, y, g, sh, sc: reference.gate_residual_norm_modulate(x, y, g, sh, sc, ROWS),
     (double(4, 3), double(4, 3) + 1, double(2, 3), double(2, 3), double(2, 3))),
])


# ---------------------------------------------------------------------------------------------------- exactness
def _brute(x, y, gate, shift, scale, rows, norm, weight, bias, eps):
    """Token by token in float64; also what gate_residual gives."""
    x_new, h = torch.zeros_like(x), torch.zeros_like(x)
    for n, row in enumerate(range(len(x)) if rows is None else rows.tolist()):
        if row < 0:
            continue
        at = lambda table, row=row: table[0] if rows is None and len(table) == 1 else table[row]
        x_new[n] = x[n] + at(gate) * y[n]
        mean = x_new[n].mean() if norm == "layer" else 0
        variance = ((x_new[n] - mean) ** 2).mean()
        h[n] = (x_new[n] - mean) / torch.sqrt(variance + eps) * weight + bias
        h[n] = h[n] * (1 + at(scale)) + at(shift)
    return x_new, h


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("rows", (ROWS, torch.tensor([0, 1, 1, 1]), None), ids=("tail", "int64", "none"))
def test_formula(rows, norm, backend):
    count = 4 if rows is None else 2
    x, y, gate, shift, scale = double(4, 5), double(4, 5) + 1, double(count, 5), double(count, 5), double(count, 5)
    weight, bias = double(5), double(5) + 2
    want_x, want_h = _brute(x, y, gate, shift, scale, rows, norm, weight, bias, 0.1)
    settings = dict(norm=norm, weight=weight, bias=bias, eps=0.1, backend=backend)
    got_x, got_h = ops.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, **settings)
    torch.testing.assert_close((got_x, got_h), (want_x, want_h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.gate_residual(x, y, gate, rows, backend=backend), want_x, rtol=1e-12, atol=1e-12)
    got = ops.norm_modulate(want_x, shift, scale, rows, **settings)
    torch.testing.assert_close(got, want_h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_indexing_bit_for_bit(backend, dtype):
    """Small integers are exact in every dtype: each token must take its own row, forward and backward."""
    pack = Pack([(2, 2, 3), (0, 1, 1), (3, 1, 2)], modulation="frame").pad_to(21)
    rows = pack.rows
    x = torch.randint(-4, 5, (21, 5)).to(dtype).requires_grad_()
    y = torch.randint(-4, 5, (21, 5)).to(dtype).requires_grad_()
    gate = torch.arange(pack.num_rows)[:, None].expand(-1, 5).to(dtype).clone().requires_grad_()
    out = ops.gate_residual(x, y, gate, rows, backend=backend)
    row = rows.clamp(min=0)[:, None].to(dtype)
    inside = (rows >= 0)[:, None]
    assert torch.equal(out, torch.where(inside, x + row * y, 0))
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad, inside.expand_as(x).to(dtype)) and torch.equal(y.grad, (row * inside).expand_as(y))
    want = torch.stack([y.detach()[rows == r].sum(0) for r in range(pack.num_rows)])
    assert torch.equal(gate.grad, want)


def test_dtypes():
    x, y = torch.randn(6, 8), torch.randn(6, 8, dtype=torch.bfloat16)
    table = torch.randn(1, 8, dtype=torch.float16)
    x_new, h = ops.gate_residual_norm_modulate(x, y, table, table, None)
    assert (x_new.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    assert ops.gate_residual(y, x, table).dtype == torch.bfloat16
    assert ops.norm_modulate(y, None, table.float()).dtype == torch.bfloat16
    assert ops.norm_modulate(y.double(), None, table).dtype == torch.float64
    for backend in ("reference", "torch"):
        h = ops.norm_modulate(x, None, table, dtype=torch.bfloat16, backend=backend)
        assert torch.equal(h, ops.norm_modulate(x, None, table, backend=backend).bfloat16())
    with pytest.raises(ValueError, match="norm_modulate: expected dtype.*int32"):
        ops.norm_modulate(x, None, table, dtype=torch.int32)


def test_plain_layer_norm():
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(ops.norm_modulate(x, None, None), F.layer_norm(x, (12,), eps=1e-6))
    torch.testing.assert_close(ops.norm_modulate(x, None, None, norm="rms"), F.rms_norm(x, (12,), eps=1e-6))


# ---------------------------------------------------------------------------------------------------- isolation
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_isolation(op, backend, poison):
    """Another sample's numbers, and its modulation rows, change no output and no input gradient of these samples."""
    pack = Pack([(1, 2, 3), (2, 1, 2), (1, 1, 1)], modulation="frame").pad_to(14)
    inputs = good(op) | dict(rows=pack.rows)
    for name in ("x", "y"):
        if name in inputs:
            inputs[name] = torch.randn(14, 8)
    for name in ("shift", "scale", "gate"):
        if name in inputs:
            inputs[name] = torch.randn(pack.num_rows, 8)
    others = pack.segment_ids != 1

    def outcome(change):
        fresh, leaves = with_grad(inputs)
        with torch.no_grad():
            for name, value in fresh.items():
                if change and name in ("x", "y"):
                    value[pack.segment_ids == 1] += poison
                elif change and name in ("shift", "scale", "gate"):
                    value[pack.row_samples == 1] += poison
        outs = op_checks.tensors(getattr(ops, op)(**fresh, backend=backend))
        torch.autograd.backward([o.sum() for o in outs])
        return outs, {n: leaf.grad for n, leaf in leaves.items()}

    (want, want_grads), (got, got_grads) = outcome(False), outcome(True)
    assert any(not same_bits(a, b) for a, b in zip(want, got, strict=True)), "the poison reached nothing"
    for a, b in zip(want, got, strict=True):
        assert same_bits(a[others], b[others])
    for name, a in want_grads.items():
        if name in ("x", "y"):
            assert same_bits(a[others], got_grads[name][others]), name
        elif name in ("shift", "scale", "gate"):
            rows = pack.row_samples != 1
            assert same_bits(a[rows], got_grads[name][rows]), name


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_nan_in_the_tail_is_never_read(op, backend):
    inputs = good(op)
    for name in ("x", "y"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full((3, 8), float("nan"))])
    inputs["rows"] = torch.cat([inputs["rows"], torch.full((3,), -1, dtype=torch.int32)])
    fresh, leaves = with_grad(inputs)
    outs = op_checks.tensors(getattr(ops, op)(**fresh, backend=backend))
    cotangents = [torch.where(inputs["rows"][:, None] < 0, float("nan"), torch.ones_like(o)) for o in outs]
    torch.autograd.backward(outs, cotangents)
    for out in outs:
        assert torch.isfinite(out).all() and not out[inputs["rows"] < 0].any()
    for name, leaf in leaves.items():
        assert torch.isfinite(leaf.grad).all(), name
        if name in ("x", "y"):
            assert not leaf.grad[inputs["rows"] < 0].any()


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grids, tokens", ([[], 0], [[], 5], [[(0, 1, 1)], 0], [[(1, 1, 1)], 1], [[(0, 2, 2)], 3]))
def test_empty_packs(grids, tokens, op, backend):
    pack = Pack(grids, tokens=tokens)
    inputs = good(op) | dict(rows=pack.rows)
    for name in ("x", "y"):
        if name in inputs:
            inputs[name] = torch.randn(tokens, 8)
    for name in ("shift", "scale", "gate"):
        if name in inputs:
            inputs[name] = torch.randn(pack.num_rows, 8)
    fresh, leaves = with_grad(inputs)
    outs = op_checks.tensors(getattr(ops, op)(**fresh, backend=backend))
    assert all(o.shape == (tokens, 8) for o in outs)
    torch.autograd.backward([o.sum() for o in outs])
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all(), name
    if not pack.num_samples:
        assert not any(o.any() for o in outs)


# --------------------------------------------------------------------------------------------- drawn and wrong
@op_checks.drawn
@given(grids=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), max_size=5),
       width=st.sampled_from((1, 7, 8, 33)), tail=st.integers(0, 3), frames=st.booleans(),
       op=st.sampled_from(OPS), norm=st.sampled_from(("layer", "rms")), dtype=st.sampled_from(op_checks.DTYPES))
def test_drawn_packs(grids, width, tail, frames, op, norm, dtype):
    pack = Pack(grids, modulation="frame" if frames else "sample")
    pack = pack.pad_to(pack.num_tokens + tail)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    inputs = dict(x=draw(pack.num_tokens, width), rows=pack.rows)
    if op != "norm_modulate":
        inputs |= dict(y=draw(pack.num_tokens, width), gate=draw(pack.num_rows, width))
    if op != "gate_residual":
        inputs |= dict(shift=draw(pack.num_rows, width), scale=draw(pack.num_rows, width), norm=norm)
        # a norm of one number is all cancellation: keep it away from division by nearly 0
        inputs["eps"] = 1e-6 if width > 1 else 0.1
    op_checks.assert_close_to_reference(op, lambda **arguments: getattr(ops, op)(**arguments, backend="torch"), inputs)


def test_wrong_kernels_fail():
    wrong = {
        "norm_modulate": lambda x, shift, scale, rows, **rest: ops.norm_modulate(x, scale, shift, rows, **rest),
        "gate_residual": lambda x, y, gate, rows: torch.cat([ops.gate_residual(x, y, gate, rows)[:-1], x[-1:]]),
        "gate_residual_norm_modulate": lambda x, y, gate, shift, scale, rows, **rest: (
            ops.gate_residual(x, y, gate, rows), ops.norm_modulate(x, shift, scale, rows, **rest).to(y.dtype)),
    }
    for op, kernel in wrong.items():
        label, inputs = next(iter(cases(op, torch.bfloat16)))
        with pytest.raises(AssertionError, match=op):
            assert_matches(op, kernel, inputs)
