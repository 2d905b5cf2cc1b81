"""sora-fast validate --device emulated:sm90, and what becomes of its rows."""

import json

import pytest
import torch

pytest.importorskip("triton")
from sora_fast import env, records  # noqa: E402
from sora_fast.ops.modulation import OPS  # noqa: E402
from sora_fast.testing import cases, validate  # noqa: E402

GATE = ("validate", "--op", "gate_residual", "--device", "emulated:sm90", "--dtype", "bfloat16")


@pytest.fixture
def beside_the_kernels(monkeypatch, request):
    monkeypatch.chdir(request.path.parent)


@pytest.fixture(autouse=True)
def two_cases(monkeypatch):
    """A kernel is compiled for each."""
    monkeypatch.setattr("sora_fast.testing.validation.cases", lambda *call: list(cases(*call))[:2])


def test_a_users_kernel_is_judged(cli, beside_the_kernels, tmp_path):
    """The forward passes, the backward that it lacks fails, and rows say what was emulated."""
    code, out, _ = cli(*GATE, "--impl", "emulated_kernels:gate_residual", "--counters", "--jsonl", tmp_path / "rows.jsonl")
    assert code == 1 and "one of them is missing" in out  # no gradient
    assert "gate_kernel, grid 71 x 1 x 1:" in out and "warp instructions" in out and "distinct" in out
    forward, backward = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert forward["passed"] and not backward["passed"]
    assert forward["emulated"] == "sm90" and forward["arch"] is None and forward["environment"]["kind"] == "cpu"


def test_a_tail_that_is_read_fails(cli, beside_the_kernels):
    code, out, _ = cli(*GATE, "--impl", "emulated_kernels:gate_residual_of_all")
    assert code == 1
    assert "case 'rms with weight, per frame, NaN tail, odd width', output, at [64, 0]" in out and "non-finite" in out


def test_flags_without_an_emulated_gpu_are_refused(cli):
    for flag in (("--schedules", "3"), ("--race",), ("--counters",), ("--jobs", "2")):
        code, _, error = cli("validate", "--op", "gate_residual", *flag)
        assert code != 0 and f"{flag[0]}: expected --device emulated:sm90" in error
    for device in ("cpu", "emulated:sm90"):
        code, _, error = cli("validate", "--op", "gate_residual", "--device", device, "--schedules", "0")
        assert code != 0 and "schedules" in error
    code, _, error = cli("validate", "--op", "gate_residual", "--device", "emulated:sm75")
    assert code != 0 and "emulated_gpu: expected one of sm80" in error


def test_an_emulated_gpu_gets_a_gpus_cases():
    labels = lambda device: [label for label, _ in cases("norm_act", torch.bfloat16, device)]
    assert len(labels("emulated:sm90")) > len(labels("cpu")) and all(
        inputs["x"].device.type == "cpu" for _, inputs in cases("norm_act", torch.bfloat16, "emulated:sm90"))


def test_no_reader_of_records_takes_the_rows(monkeypatch, tmp_path):
    """Wherever records are read, with an architecture written in besides: auto's choice stays."""
    (op,) = [op for op in OPS if op.name == "gate_residual"]
    ask = op.example("cuda:sm90", torch.bfloat16, False)
    before = op.choose(ask).name
    report = validate("gate_residual", backend="triton", device="emulated:sm90", dtypes=(torch.bfloat16,))
    rows = report.to_dicts()
    assert report.passed and all(row["emulated"] == "sm90" and row["kernel_hash"] for row in rows)
    assert records.save(rows) is None and not records.user_file().exists()
    planted = "".join(json.dumps(row | more) + "\n" for row in rows for more in ({}, dict(arch="sm90")))
    shipped = tmp_path / "results" / "nvidia-h200"
    shipped.mkdir(parents=True)
    room = records._room
    monkeypatch.setattr(records, "_room", lambda name: iter([tmp_path]) if name == "benchmarks" else room(name))
    env.cache().mkdir(parents=True, exist_ok=True)
    for place in (shipped / "validate.jsonl", records.user_file()):
        place.write_text(planted)
        records.forget()
        assert op.choose(ask).name == before != "triton"
        place.write_text(planted.replace('"emulated": "sm90"', '"emulated": null'))  # so it is read there
        records.forget()
        assert op.choose(ask).name == "triton"
        place.unlink()
    records.forget()
