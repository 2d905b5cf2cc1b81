"""The error rule, the cases and the report judge rightly."""

import json

import op_checks
import pytest
import torch

from sora_fast import ops, validate
from sora_fast.testing import assert_matches, cases, compare, compare_with_reference, validation


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
    row = json.loads(report.to_jsonl().splitlines()[0])
    assert row["backend"] is None and row["implementation"] == "forgets_the_gate" and row["kernel_hash"] is None
    assert row["failed"] and all(each["error_max"] > each["allowed_max"] for each in row["failed"])
    assert (row["tensor"], row["error"]) in {(each["tensor"], each["error_max"]) for each in row["failed"]}
    report = validate("varlen_attention_forward", backend="torch", dtypes=(torch.float32,))
    assert not report.passed and len(report.unsupported) == 6
    assert "not run: case 'self, ragged, float32' and 5 more" in str(report)
    assert "every case was refused" in str(report) and "comparisons passed" in str(report)
    with pytest.raises(ValueError, match="^validate: expected .*, got 'conv2d'; "):
        validate("conv2d")


def test_a_row_holds_its_cases_dtype_whatever_its_tensors_have():
    report = validate("varlen_attention", backend="reference", dtypes=(torch.bfloat16,))  # with a float32 log-sum-exp
    rows = report.to_dicts()
    assert report.passed and [(row["dtype"], row["direction"]) for row in rows] == [
        ("bfloat16", "forward"), ("bfloat16", "backward")]
    assert {c.dtype for _, c in report.rows[0].compared} == {torch.bfloat16, torch.float32}
    for row in rows:
        assert row["schema"] == 1 and row["row"] == "validate" and row["passed"] and row["cases"] == 6
        assert row["backend"] == row["implementation"] == "reference" and row["kernel"] is row["arch"] is None
        assert 0 <= row["error"] <= row["allowed"] and row["comparisons"] >= row["cases"] and row["failed"] == []
        assert row["environment"]["torch"] == torch.__version__ and row["environment"]["kind"] == "cpu"


def gate_residual(break_at="", how=None):
    """The right function, but for what ``how`` does to (arguments, output) in cases of ``break_at`` columns."""
    def fn(**arguments):
        out = ops.gate_residual(**arguments)
        if not break_at or arguments["x"].shape[1] == break_at:
            return how(arguments, out)
        return out
    return fn


def by_direction(report):
    return {row.direction: row for row in report.rows}


def test_what_raises_in_one_case_fails_there_and_the_others_run():
    def raises(arguments, out):
        raise KeyError("no such row")

    report = validate("gate_residual", gate_residual(37, raises), dtypes=(torch.float32,))
    whole = validate("gate_residual", dtypes=(torch.float32,))
    assert not report.passed and len(report.tracebacks) == 1 and "no such row" in report.tracebacks[0]
    for way, row in by_direction(report).items():
        ((case, reason),) = row.raised
        assert "odd width" in case and "fn raised KeyError where gate_residual does not: 'no such row'" == reason
        assert len(row.ran) == len(by_direction(whole)[way].ran) - 1 and all(c.passed for _, c in row.compared)
        assert not row.passed and row.as_dict()["raised"] == [dict(case=case, reason=reason)]
    assert "FAILED: case 'rms with weight, per frame, NaN tail, odd width': fn raised KeyError" in str(report)


def test_what_raises_in_its_backward_has_a_forward():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise refusal

    for refusal in (RuntimeError("no kernel image"), NotImplementedError("only forward")):
        rows = by_direction(validate("gate_residual", gate_residual(how=lambda _, out: NoBackward.apply(out)),
                                     dtypes=(torch.float32,)))
        assert rows["forward"].passed and not rows["backward"].passed
        assert rows["backward"].refused_whole == isinstance(refusal, NotImplementedError)


def test_another_number_of_outputs_fails():
    report = validate("gate_residual", gate_residual(how=lambda _, out: (out, out)), dtypes=(torch.float32,))
    assert not report.passed and "expected 1 outputs, got 2" in str(report) and not report.tracebacks


def test_a_refused_case_is_listed_and_no_pass():
    def refuses(arguments, out):
        raise NotImplementedError("only even widths")

    report = validate("gate_residual", gate_residual(37, refuses), dtypes=(torch.float32,))
    assert report.passed and len(report.unsupported) == 1 and "only even widths" in str(report)
    assert "(cases refused: 1)" in str(report) and all(len(row.ran) == 6 for row in report.rows)
    report = validate("gate_residual", gate_residual(how=refuses), dtypes=(torch.float32,))
    assert not report.passed and all(row.refused_whole and not row.passed for row in report.rows)
    row = report.to_dicts()[0]
    assert (row["passed"], row["error"], row["case"], row["comparisons"]) == (False, None, None, 0)
    assert row["refused"][0]["reason"] == "only even widths"


def test_writing_into_the_arguments_fails():
    def writes(arguments, out):
        arguments["y"].data[:1] += 1
        return out

    def puts_back(arguments, out):  # with NaN in the tail, which is no change
        arguments["y"].data.copy_(arguments["y"].data.clone())
        return out

    report = validate("gate_residual", gate_residual(37, writes), dtypes=(torch.float32,))
    assert not report.passed and "FAILED: case 'rms with weight, per frame, NaN tail, odd width'" in str(report)
    assert "It writes into what it is given: argument y." in str(report)
    assert all(c.passed for _, c in by_direction(report)["forward"].compared if c.name == "output"), "put right again"
    assert validate("gate_residual", gate_residual(how=puts_back), dtypes=(torch.float32,)).passed

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            given = grad.clone()
            if 0 not in grad.stride():
                grad.mul_(2)
            return given

    scales = gate_residual(how=lambda _, out: Scales.apply(out))
    rows = by_direction(validate("gate_residual", scales, dtypes=(torch.float32,)))
    assert rows["forward"].passed and "the gradient it is given" in str(rows["backward"]) and not rows["backward"].passed


def test_a_reference_that_cannot_run_ends_its_rows(monkeypatch):
    """Not the run: the other cases, dtypes and ops have theirs."""
    known = validation.truth

    def truth(op, inputs, **options):
        if inputs["y"].dtype == torch.float32:
            raise NotImplementedError("cuDNN 9.10.2 was found.")
        return known(op, inputs, **options)

    monkeypatch.setattr(validation, "truth", truth)
    report = validate("gate_residual", dtypes=(torch.float32, torch.bfloat16))
    assert "the reference of gate_residual raised NotImplementedError: cuDNN 9.10.2 was found." in str(report)
    assert {row.dtype: row.passed for row in report.rows} == {"float32": False, "bfloat16": True} and not report.passed


def test_a_device_that_answers_no_more_ends_the_report(monkeypatch):
    def raises(arguments, out):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("sora_fast.testing.validation._answers", lambda device: False)
    report = validate("gate_residual", gate_residual(37, raises), dtypes=(torch.float32, torch.bfloat16))
    assert not report.passed and "cpu answers no more after case 'rms with weight" in report.stopped
    assert "stopped: cpu answers no more" in str(report) and len(report.rows) == 2 and report.to_jsonl()


def test_what_is_no_number_is_null_in_json():
    report = validate("gate_residual", gate_residual(how=lambda _, out: out * float("nan")), dtypes=(torch.float32,))
    row = json.loads(report.to_jsonl().splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not row["passed"] and row["error"] is None and "non-finite" in row["failed"][0]["problem"]


def test_progress_names_each_case():
    said = []
    validate("kl_sample", dtypes=(torch.float32,), progress=said.append)
    assert said == [f"kl_sample, auto, float32: {label}" for label, _ in cases("kl_sample", torch.float32)]


@pytest.mark.parametrize("op", ("causal_conv3d", "norm_act_conv3d", "norm_act"))
def test_cases_of_a_gpu_are_calls_that_work(op, models=None):
    """Cases with the channels, or at the sizes, of models, which only a GPU is given, and no other machine would try."""
    few = [label for label, _ in cases(op, torch.float32)]
    more = dict(cases(op, torch.float32, "emulated:sm90", 0, models))
    assert len(more) > len(few) and few == list(more)[:len(few)]
    for label, inputs in more.items():
        if models and label in few:
            continue
        with torch.no_grad():
            outputs = getattr(ops, op)(**inputs, backend="auto" if op == "varlen_attention_forward" else "torch")
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.numel() and first.isfinite().all(), label


def test_a_part_of_the_cases_makes_no_record(monkeypatch):
    monkeypatch.setattr(validation, "_arch", lambda device: "sm90")
    labels = [label for label, _ in cases("kl_sample", torch.float32)]
    for options, ran, arch in ((dict(), labels, "sm90"), (dict(case="clamped"), ["clamped below", "clamped above"], None),
                               (dict(models=False), labels, None)):
        report = validate("kl_sample", backend="torch", dtypes=(torch.float32,), **options)
        assert all(row.ran == set(ran) and row.as_dict()["arch"] == arch for row in report.rows)
