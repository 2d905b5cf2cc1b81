"""sora_fast.setup without a GPU: what a model calls, small twins of its problems, turns between processes, sentences."""

import subprocess
import sys

import pytest
import torch
from op_checks import assert_refused

from sora_fast import accelerate, env, ops, setup
from sora_fast.models import DiT, VideoVAE
from sora_fast.testing.rule import tensors
from sora_fast.tuning import recorded, setting_up, walk


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
