"""sora-fast validate and bench on the fake device, times faked: records in a cache of its own, graphs that capture."""

import json
from itertools import islice

import pytest
import torch

from sora_fast import env, ops, records, validate
from sora_fast.benchmarks import rows, timing
from sora_fast.benchmarks.roofs import Roofs
from sora_fast.ops.modulation import GATE_RESIDUAL, ModulationProblem
from sora_fast.precision import tf32_convolutions
from sora_fast.testing import assert_matches, cases, validation

from . import waits
from .tensors import tf32


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_validate_writes_records_that_auto_takes(monkeypatch, kernels, cli, cache, tmp_path):
    labels = [label for label, _ in cases("gate_residual", torch.float32, "cuda")]
    assert "width 5376, 1,235 tokens" in labels
    # the small ones alone, since the emulator would take hours
    monkeypatch.setattr(validation, "cases", lambda *given: cases(*given[:-1], False))
    problem = GATE_RESIDUAL.example("cuda:sm90", torch.float32, True)
    assert isinstance(problem, ModulationProblem) and GATE_RESIDUAL.choose(problem).name == "torch"
    code, out, err = cli("validate", "--op", "gate_residual", "--backend", "triton", "--device", "cuda", "--dtype",
                         "float32", "--jsonl", tmp_path / "rows.jsonl")
    assert code == 0, out + err
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert {(row["arch"], row["direction"], row["passed"]) for row in found} == {
        ("sm90", "forward", True), ("sm90", "backward", True)}
    assert records.user_file().is_relative_to(cache) and records.user_file().is_file() and env.cache() == cache
    assert GATE_RESIDUAL.choose(problem).name == "triton"


def test_a_convolution_of_tf32_is_refused(monkeypatch):
    """PyTorch's own with its defaults is one, and so is the definition that it would be held to under them."""
    monkeypatch.setattr(validation, "cases", lambda *given: islice(cases(*given), 2))
    assert tf32_convolutions()
    short = lambda x, weight, **rest: ops.causal_conv3d(tf32(x), tf32(weight), **rest, backend="torch")
    for call, right in ((None, True), (lambda **given: short(**given), False)):
        report = validate("causal_conv3d", call, device="cuda", dtypes=(torch.float32,), backend="torch")
        assert report.passed is right and tf32_convolutions(), str(report)
    inputs = dict(x=torch.randn(1, 8, 3, 16, 16, device="cuda"), weight=torch.randn(8, 8, 3, 3, 3, device="cuda"))
    outputs = ops.causal_conv3d(**inputs, backend="torch")
    with pytest.raises(AssertionError, match="departs from its reference"):
        assert_matches("causal_conv3d", outputs, inputs)


@pytest.mark.parametrize("wait, captures, why", [
    (lambda x: x, 1, ""), (lambda x: x.sum().item(), 0, "It waits for the GPU."),
    (lambda x: torch.cuda.synchronize(), 1, "NotCapturable: operation not permitted when stream is capturing")],
    ids=["nothing", "item", "synchronize"])
def test_what_waits_is_timed_by_events(monkeypatch, wait, captures, why):
    """And is not captured where PyTorch can tell beforehand."""
    begun, capture = [], timing.Graph.__init__
    monkeypatch.setattr(timing.Graph, "__init__", lambda *given: (begun.append(given), capture(*given))[1])
    x, device = torch.ones(3, device="cuda"), torch.device("cuda", 0)
    made = timing.timer([lambda: wait(x)], device, torch.cuda.Stream())
    assert len(begun) == captures and made.name == ("events" if why else "graph") and made.not_captured.startswith(why)
    (measured,) = timing.measure({"one": made}, timing.Effort(0.0, 0.0)).values()
    assert (measured.timer, measured.not_captured) == (made.name, made.not_captured)
    assert torch.cuda.get_sync_debug_mode() == 0 and waits.state.capture is None


def test_an_error_before_a_capture_stays_one():
    def call():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        timing.timer([call], torch.device("cuda", 0), torch.cuda.Stream())
    assert torch.cuda.get_sync_debug_mode() == 0


def test_bench_captures_what_it_times(monkeypatch, kernels, cli, cache, tmp_path):
    monkeypatch.setattr(Roofs, "matrix", lambda self, dtype: 1e12)
    monkeypatch.setattr(Roofs, "copy", lambda self, size: 1e12)
    monkeypatch.setattr(timing, "GPU", timing.Effort(0.0, 0.0))
    monkeypatch.setattr(timing, "input_sets", lambda *_: 1)
    monkeypatch.setattr(timing, "LEAST_SAMPLES", timing.ROUNDS)
    captured, capture = [], timing.Graph.__init__
    monkeypatch.setattr(timing.Graph, "__init__", lambda *given: (capture(*given), captured.append(given))[0])
    code, out, err = cli("bench", "modulation", "--quick", "--device", "cuda", "--providers", "torch",
                         "--case", "DiT-S", "--out", tmp_path / "out")
    assert code == 0, out + err
    found = [row for row in rows.read(tmp_path / "out" / "bench.jsonl") if row["row"] == "time"]
    assert found and {row["status"] for row in found} == {"PASSED"} and len(captured) == len(found)
    assert {row["timer"] for row in found} == {"graph"} and (tmp_path / "out" / "report.html").is_file()
    assert waits.state.capture is None
