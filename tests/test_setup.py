"""sora_fast.setup without a GPU: what a model calls, small twins of its problems, turns between processes, sentences."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from op_checks import assert_refused

from sora_fast import accelerate, configs, env, ops, setup
from sora_fast.benchmarks import gate
from sora_fast.cli.__main__ import main
from sora_fast.models import DiT, VideoVAE
from sora_fast.testing.rule import tensors
from sora_fast.tuning import plan, recorded, setting_up, walk, workers
from sora_fast.tuning.launched import key, launched


@pytest.mark.parametrize("make, called", [
    (lambda: DiT.preset("S/2", depth=1), {"patch_embed", "unpatchify", "norm_modulate", "gate_residual_norm_modulate",
                                 "varlen_attention"}),
    (lambda: VideoVAE.preset("tiny", width=8), {"causal_conv3d", "norm_act_conv3d"})], ids=("DiT", "VideoVAE"))
def test_what_a_model_calls(make, called):
    """At common sizes, without memory; small twins have its widths and settings, and run."""
    model = make().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = walk.of_model(model, "cuda:sm90")
    assert {each.op for each in found} == called and not any(each.problem.grad for each in found)
    assert all(each.problem.device == "cuda:sm90" and each.callers for each in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {each.problem.grad for each in walk.of_model(model.train(), "cuda:sm90")} == {False, True}
    for case in {(each.op, type(each.arguments.get("residual"))): each for each in found}.values():
        small = case.small()
        inputs = small.inputs("cpu", 0)
        truth = small.truth(inputs, 0)
        assert all(each.passed for each in truth.compare(recorded.all_ops()[case.op].backends["torch"].run))
        assert max(each.numel() for each in tensors(inputs)) < 2_000_000


def test_a_model_of_diffusers_and_its_gradients():
    pytest.importorskip("diffusers", reason="the train extra is not installed")
    from sora_fast.integrations.comparison import open_model

    model = open_model("WanTransformer3DModel").to(torch.bfloat16).train()
    accelerate(model)
    found = walk.of_model(model, "cuda:sm90")
    assert ("qk_norm_rope", True) in {(each.op, each.problem.grad) for each in found}
    assert {name for each in found for name in each.callers} >= {"WanTransformerBlock", "WanAttention"}
    case = next(each for each in found if each.op == "gate_residual" and each.problem.grad)
    assert case.problem.size == (65_536,) and case.small().shape()["x"][0] == 2 * (recorded.TOKENS // 2)


def test_inputs_as_they_were_and_at_random():
    """Index values and strides of a call that was made for real; neither is kept of a twin."""
    class Packed(torch.nn.Module):
        def forward(self, x, rows):
            table = torch.randn(3, 12).chunk(3, 1)
            return ops.norm_modulate(x, table[0], table[1], rows)

    rows = torch.tensor([0, 0, 0, 1, 2], dtype=torch.int32)
    (case,) = walk.of_model(Packed().eval(), "cuda:sm90", lambda model: model(torch.randn(5, 4), rows))
    inputs = case.inputs("cpu", 0)
    assert torch.equal(inputs["rows"], rows) and inputs["shift"].stride() == (12, 1) and case.callers == {"Packed"}
    assert case.small().inputs("cpu", 0)["rows"].tolist() == [0, 0, 1, 1, 2]


def test_a_plan_counts_each_kernel_and_each_gate_once(monkeypatch, tmp_path):
    """Of attention at two lengths and with other heads; the small twin launches the kernels of the call itself."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path))

    def attend(model):
        for length, heads in ((4096, 2), (40_000, 2), (4096, 3)):
            ends = torch.empty(2, device="meta", dtype=torch.int32)
            q = torch.empty(length, heads, 64, device="meta", dtype=torch.bfloat16)
            ops.varlen_attention(q, q, q, ends, ends, length, length)

    work = walk.of_model(torch.nn.Identity().eval(), "cuda:sm90", attend)
    made = plan.make(work)
    assert [[case.shape()["q"] for case in group] for group in made.groups] == [
        [[4096, 2, 64], [40_000, 2, 64]], [[4096, 3, 64]]]
    assert [str(each) for each in made.validations] == ["varlen_attention, triton, bfloat16"]
    keys = [set(map(key, launched(case, "sm90").launches)) for case in (*work, *(case.small() for case in work))]
    assert keys[0] == keys[1] == keys[3] == keys[4] and not made.unseen
    of_validation = walk.of_validation("varlen_attention", torch.bfloat16, "cuda:sm90")
    every = set().union(*keys[:3], *(map(key, launched(case, "sm90").launches) for case in of_validation))
    assert len(made.kernels) == len(every) > 20 and len(of_validation) == made.validations[made.tasks(1)[0]]
    assert made.tasks(8)[:len(every)] == list(made.kernels) and len(made.tasks(1)) == 3
    assert made.seconds(8) < made.seconds(1) and f"= {made.seconds(8):.0f} s in 8 processes" in [*made.lines(8)][-1]


def test_a_gate_judges_the_configs_of_the_call_itself(monkeypatch):
    """Not those that its small twin would have alone."""
    x = torch.empty(100_000, 64, device="meta", dtype=torch.bfloat16)
    (case,) = walk.of_model(torch.nn.Identity().eval(), "cuda:sm90", lambda model: ops.norm_modulate(x, x[:1], x[:1]))
    ((asked, config),) = launched(case, "sm90").lookups.items()
    tuned, seen = replace(config, tokens=2 * config.tokens), []
    monkeypatch.setattr(configs, "gpu_name", lambda device: "sm90")

    def check(small, provider, *rest):
        seen.extend(launched(small, "sm90").lookups.values())
        return {"forward": gate.Verdict("PASSED", "", 0.0, 0.0)}

    monkeypatch.setattr(gate, "check", check)
    with configs.override(asked.family, asked.kernel, tuned, asked.problem):
        assert list(launched(case.small(), "sm90").lookups.values()) == [config]
        assert workers.Gate(case).run("cpu") == {"triton": "", "torch": ""} and seen == [tuned, tuned]


def test_plan_of_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path))
    x = torch.empty(100_000, 64, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(walk, "common", lambda gpu, suite: walk.of_model(
        torch.nn.Identity().eval(), gpu, lambda model: ops.norm_modulate(x, x[:1], x[:1])))
    for words, code in ((["--plan", "--gpu", "h200", "--jobs", "4", "--quick"], 0), (["--gpu", "h200"], 2)):
        with pytest.raises(SystemExit) as done:
            main(["setup", *words])
        assert done.value.code == code
    out, errors = capsys.readouterr()
    assert "kernels of modulation to compile" in out and out.endswith("s in 4 processes\n")
    assert "--gpu: expected it beside --plan" in errors and not list(tmp_path.rglob("*.jsonl"))


def test_the_next_process_has_its_turn(monkeypatch, tmp_path):
    """When the first has been killed; until then it waits, and says so."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path))
    hold = ("import pathlib, sys, time\nfrom sora_fast import files\n"
            "with files.claimed(pathlib.Path(sys.argv[1])):\n    print('has it', flush=True)\n    time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", hold, str(env.cache() / "setup")], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "has it\n"
    said = []
    with setting_up._alone(lambda line: (said.append(line), first.kill(), first.wait())):
        assert said == ["setup: another process is at it; this one waits for its turn"]
    first.stdout.close()


def test_sentences():
    if torch.cuda.is_available():
        pytest.skip("expected no GPU, got one")
    assert_refused(lambda: setup(), "setup", "a CUDA GPU", "'cuda'")
    assert_refused(lambda: walk.of_model(torch.nn.Linear(2, 2), "cuda:sm90"), "setup", "call=", "Linear")
