"""Every provider of a CPU passes the benchmark's gate: as gpu_run.sh sees it too, and in pieces."""

import json
from dataclasses import replace

import pytest
import test_bench_attention as of_attention
import test_bench_convolution as of_convolution
import test_bench_dit_layers as of_dit_layers
import test_bench_models as of_models
import torch

from sora_fast.benchmarks import gate, loss_parity
from sora_fast.benchmarks.specs.attention import truth_in_pieces
from sora_fast.testing import truth

pytestmark = pytest.mark.full

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
