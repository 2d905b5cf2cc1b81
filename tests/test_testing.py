"""The error rule, the cases and the report judge rightly."""

import json

import op_checks
import pytest
import torch

from sora_fast import ops, validate
from sora_fast.testing import assert_matches, cases, compare, compare_with_reference


def test_every_op_has_cases_in_its_dtype():
    for op in ops.__all__:
        for dtype in op_checks.DTYPES:
            labels = [label for label, _ in cases(op, dtype)]
            assert labels and len(set(labels)) == len(labels)
            drawn = [t for _, inputs in cases(op, dtype) for t in op_checks.with_grad(inputs)[1].values()]
            assert any(t.dtype == dtype for t in drawn)
    for (_, a), (_, b) in zip(cases("norm_act", torch.float32), cases("norm_act", torch.float32), strict=True):
        assert torch.equal(a["x"], b["x"])
    with pytest.raises(ValueError, match="^cases: expected one of .*, got 'conv2d'; "):
        list(cases("conv2d", torch.float32))


@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_the_bound_is_where_it_is_written(dtype):
    eps = torch.finfo(dtype).eps
    ref = torch.full((1000,), 1.0, dtype=torch.float64)
    low = ref.to(dtype)
    allowed = {torch.float64: 3}.get(dtype, 2)
    one = lambda size: torch.cat([(ref[:1] + size * eps).to(dtype), low[1:]])
    assert compare("x", one(allowed), low, ref).passed
    assert not compare("x", one(allowed + 1), low, ref).passed
    if dtype in (torch.bfloat16, torch.float16):  # attention may round P
        assert compare("x", one(3), low, ref, rounds_p=True).passed
        assert not compare("x", one(4), low, ref, rounds_p=True).passed
    everywhere = (ref + 1 * eps * (2 if dtype == torch.float64 else 1)).to(dtype)
    result = compare("x", everywhere, low, ref)
    assert result.error_max <= result.allowed_max and not result.passed, "the RMS bound is half an eps"


def test_what_is_no_number_fails():
    ref = torch.randn(4, 3, dtype=torch.float64)
    low = ref.float()
    for bad in (float("nan"), float("inf"), -float("inf")):
        got = low.clone()
        got[1, 2] = bad
        assert not compare("x", got, low, ref).passed
    empty = ref.clone()
    empty[0] = -torch.inf
    assert compare("lse", empty.float(), empty.float(), empty).passed
    assert not compare("lse", low, empty.float(), empty).passed
    assert not compare("x", low[:3], low, ref).passed
    assert not compare("x", low.half(), low, ref).passed
    assert not compare("x", None, low, ref).passed
    worst = low.clone()
    worst[2, 1] += 1
    result = compare("x", worst, low, ref)
    assert result.worst == (2, 1) and "FAILED" in str(result) and "[2, 1]" in str(result)


def test_assert_matches():
    inputs = dict(x=torch.randn(6, 8), y=torch.randn(6, 8), gate=torch.randn(1, 8))
    assert [c.name for c in assert_matches("gate_residual", ops.gate_residual, inputs)] == [
        "output", "d x", "d y", "d gate"]
    assert len(assert_matches("gate_residual", ops.gate_residual(**inputs), inputs)) == 1  # tensors: outputs alone
    with pytest.raises(AssertionError, match="d gate"):
        assert_matches("gate_residual", lambda x, y, gate: x + gate.detach() * y, inputs)
    with pytest.raises(AssertionError, match="expected 1 outputs, got 2"):
        assert_matches("gate_residual", lambda x, y, gate: (x + gate * y, x), inputs)
    with pytest.raises(AssertionError, match="shape"):
        assert_matches("gate_residual", lambda x, y, gate: (x + gate * y)[:-1], inputs)
    with pytest.raises(AssertionError, match="dtype"):
        assert_matches("gate_residual", lambda x, y, gate: (x + gate * y).double(), inputs)
    with pytest.raises(ValueError, match="^testing: expected op to be one of .*, got 'gate'; "):
        assert_matches("gate", ops.gate_residual, inputs)
    flat = lambda x, y, gate: _BadOnStrideZero.apply(x + gate * y)
    assert all(c.passed for c in compare_with_reference("gate_residual", flat, inputs))
    with pytest.raises(AssertionError, match="d x"):
        assert_matches("gate_residual", flat, inputs, flat_cotangent=True)


class _BadOnStrideZero(torch.autograd.Function):
    """Reads its gradient's memory as if it were dense, as a careless kernel would."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        dense = grad if grad.is_contiguous() else torch.zeros_like(grad, memory_format=torch.contiguous_format)
        return dense


def test_validate_reports(capsys):
    report = validate("gate_residual")
    assert report.passed
    print(report)
    text = capsys.readouterr().out
    assert "gate_residual" in text and "bfloat16" in text and "backward" in text and "comparisons passed" in text
    rows = [json.loads(line) for line in report.to_jsonl().splitlines()]
    assert len(rows) == len(report.rows) and all(row["passed"] and row["op"] == "gate_residual" for row in rows)
    assert {row["dtype"] for row in rows} >= {"float32", "bfloat16", "float16"}
    assert {row["direction"] for row in rows} == {"forward", "backward"}

    def forgets_the_gate(x, y, gate, rows):
        return ops.gate_residual(x, y, torch.ones_like(gate), rows)

    report = validate("gate_residual", forgets_the_gate, dtypes=(torch.float32,))
    assert not report.passed and "FAILED" in str(report) and "forgets_the_gate" in str(report)
    assert not all(json.loads(line)["passed"] for line in report.to_jsonl().splitlines())
    report = validate("varlen_attention_forward", backend="torch", dtypes=(torch.float32,))
    assert not report.passed and report.unsupported and "not run" in str(report)
    with pytest.raises(ValueError, match="^validate: expected .*, got 'conv2d'; "):
        validate("conv2d")
