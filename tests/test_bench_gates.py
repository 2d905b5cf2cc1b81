"""Every provider of a CPU passes the benchmark's gate, models and their peers too; what is planted in them does not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_bench_attention as of_attention
import test_bench_convolution as of_convolution
import test_bench_dit_layers as of_dit_layers
import test_bench_models as of_models
import torch

from sora_fast.benchmarks import gate, loss_parity, rows
from sora_fast.benchmarks.model import case as frame
from sora_fast.benchmarks.model import vae, wan
from sora_fast.benchmarks.specs.attention import truth_in_pieces
from sora_fast.ops.modulation import GATE_RESIDUAL_NORM_MODULATE
from sora_fast.testing import truth

pytestmark = [pytest.mark.full, pytest.mark.ci]

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", of_convolution.QUICK, ids=lambda case: case.id)
def test_every_provider_passes_the_gate(case):
    found, passed = case.truth(case.inputs(CPU, 0), 0), set()
    for peer in of_convolution.providers(case):
        assert json.dumps(peer.details(case, CPU))
        if not peer.compiled and not peer.unavailable(case, "forward", CPU):
            verdicts = gate.check(case, peer, found, CPU, tuple(case.directions()))
            assert {v.status for v in verdicts.values()} == {"PASSED"}, (peer.name, verdicts)
            passed.add(peer.name)
    assert {"torch", "reference"} < passed


@pytest.mark.parametrize("case", of_dit_layers.SMALL, ids=of_dit_layers.names(of_dit_layers.SMALL))
def test_every_provider_of_a_cpu_obeys_the_error_rule(case):
    ran = []
    for provider in of_dit_layers.providers(case.op).values():
        if provider.compiled or any(provider.unavailable(case, direction, CPU) for direction in case.directions()):
            continue
        assert not of_dit_layers.failures(case, provider), provider.name
        ran.append(provider.name)
    peers = {"patch_embed": ["conv3d"], "unpatchify": []}.get(case.op, ["eager"])
    assert ran == ["torch", "reference", *peers]


@pytest.mark.parametrize("most_scores", [1, 150, 2**26])
@of_attention.cases(
    *of_attention.VARLEN, replace(of_attention.RAGGED, label="lse", return_lse=True), of_attention.WITHOUT_KEYS,
    replace(of_attention.WITHOUT_KEYS, label="window ahead", causal=False, window=(3, 5)),
    replace(of_attention.WITHOUT_KEYS, label="only ahead", causal=False, window=(-1, 6), dtype=torch.bfloat16))
def test_the_truth_in_pieces_is_the_truth(case, most_scores):
    if most_scores == 1 and case is of_attention.RAGGED:
        case = replace(case, queries=(17, 5), keys=(17, 5))  # one query at a time
    inputs = case.inputs(CPU, 0)
    whole = truth(case.op, inputs, names={"q", "k", "v"}, seed=3)
    found = truth_in_pieces(case, inputs, 3, most_scores=most_scores * case.heads // case.key_heads)
    assert found.scope == "every element"
    assert all(torch.equal(a, b) for a, b in zip(found.cotangents, whole.cotangents, strict=True))
    # float32 sums in another order, and perhaps another rounding to 16 bits at the end
    for kind, apart in (("ref", 4e-13), ("low", 5e-6 + (torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 0))):
        (outs, grads), (whole_outs, whole_grads) = getattr(found, kind), getattr(whole, kind)
        assert set(grads) == set(whole_grads)
        for name, a, b in [*(("out", a, b) for a, b in zip(outs, whole_outs, strict=True)),
                           *((name, grads[name], whole_grads[name]) for name in grads)]:
            assert a.dtype == b.dtype, (kind, name)
            torch.testing.assert_close(a, b, rtol=apart, atol=apart * float(b.detach()[b.isfinite()].abs().max()))


CHECKED = [("wan_vae_decode", "auto_chunk4"), ("wan_vae_encode", "auto"), ("wan_vae_encode", "auto_chunk16"),
           ("dit_block_training_step", "auto"), ("dit_block_training_step", "padded"), ("dit_training_step", "auto")]


@pytest.mark.parametrize("op, name", CHECKED)
def test_providers_pass_their_gate_and_their_step_repeats(op, name):
    case = of_models.QUICK[op]
    assert of_models.provider(case, name).unavailable(case, CPU) == ""
    comparisons = case.gate(of_models.provider(case, name), CPU)
    assert [str(c) for c in comparisons if not c.passed] == []
    assert case.scope() and (len(comparisons) > 10) == ("training" in op)
    if op != "dit_training_step":  # whose optimizer has moved the weights
        step = of_models.provider(case, name).build(case, CPU)
        first = {key: t.clone() for key, t in step().items()}
        again = step()
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.usefixtures("sums_of_real_clips")
@pytest.mark.parametrize("op", ["wan_vae_decode", "vae_training_step"])
def test_the_vae_and_its_peer_pass_and_a_peer_with_one_other_weight_fails(op, monkeypatch):
    """One truth for all; the peers are diffusers' own class with our weights, in both layouts."""
    pytest.importorskip("diffusers")
    case, copy = of_models.QUICK[op].small(), wan.copy_weights
    truth, low = (case.plain_step(CPU, dtype)() for dtype in (torch.float64, None))

    def passes(name):
        return all(c.passed for c in frame.compare_all(of_models.provider(case, name).build(case, CPU)(), low, truth))

    def off_by_one(ours, theirs):
        copy(ours, theirs)
        with torch.no_grad():
            theirs.decoder.mid_block.resnets[0].conv1.weight[0, 0, 2, 1, 1] += 1.0
    assert passes("auto") and passes("diffusers") and passes("diffusers_channels_last")
    monkeypatch.setattr(vae, "copy_weights", off_by_one)
    assert not passes("diffusers")


def test_parity_passes_and_writes_its_row(tmp_path, capsys):
    assert loss_parity.main(["--device", "cpu", "--quick", "--steps", "40", "--out", str(tmp_path)]) == 0
    (line,) = (tmp_path / "parity.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["row"], row["schema"], row["status"], row["reason"], row["suite"]) == ("parity", 1, "PASSED", "", "quick")
    assert list(row["curves"]) == list(loss_parity.RUNS) and {len(c) for c in row["curves"].values()} == {40}
    assert row["error"] <= row["allowed"] and row["allowed"] > 1e-4 and row["environment"]["kind"] == "cpu"
    first, last = row["windows"]["auto, seed 0"]
    assert last < 0.9 * first and row["final"]["auto, seed 0"] == last
    assert first == pytest.approx(sum(row["curves"]["auto, seed 0"][:20]) / 20, abs=1e-5)
    assert row["backends"]["varlen_attention"] == "torch"
    out = capsys.readouterr().out
    assert "auto, seed 0 40/40" in out and "PASSED" in out


def test_parity_fails_with_a_norm_that_is_off_by_a_tenth(tmp_path, monkeypatch, capsys):
    good = GATE_RESIDUAL_NORM_MODULATE.backends["torch"]

    def off(**inputs):
        x_new, h = good.run(**inputs)
        return x_new, 1.1 * h
    monkeypatch.setitem(GATE_RESIDUAL_NORM_MODULATE.backends, "torch", replace(good, run=off))
    assert loss_parity.main(["--device", "cpu", "--quick", "--steps", "40", "--out", str(tmp_path)]) == 1
    row = json.loads((tmp_path / "parity.jsonl").read_text())
    assert row["status"] == "FAILED" and row["error"] > row["allowed"]
    assert row["reason"].startswith("From step ") and row["reason"] in capsys.readouterr().out


def test_a_killed_run_loses_no_finished_row(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(textwrap.dedent("""
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_bench import CASE, RIGHT, runner
        from sora_fast.benchmarks.case import Provider
        def slow(**inputs):
            time.sleep(0.003)
            return RIGHT(**inputs)
        cases = [replace(CASE, label=f"pack {n}") for n in range(40)]
        runner(Path(sys.argv[1])).run([("modulation", case, [Provider("torch", slow)]) for case in cases])
    """))
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)]
    running = subprocess.Popen(command)
    path = tmp_path / "bench.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") > 6):
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = [row for row in rows.read(path) if row["row"] == "time"]
    assert 4 <= len(before) < 80
    subprocess.run(command, check=True)
    after = [row for row in rows.read(path) if row["row"] == "time"]
    assert after[:len(before)] == before and len({rows.key(row) for row in after}) == len(after) == 80
