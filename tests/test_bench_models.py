"""Model-level benchmark cases: FLOPs, gates that pass and fail, padded batches, the peer's weights; loss parity."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sora_fast.benchmarks import loss_parity
from sora_fast.benchmarks.model import case as frame
from sora_fast.benchmarks.model import dit, vae, wan
from sora_fast.benchmarks.model.case import ModelCase, ModelProvider
from sora_fast.models.vae import PRESETS

CPU = torch.device("cpu")
CASES = (*vae.CASES, *dit.CASES)
QUICK = {case.op: case for case in CASES if "quick" in case.suites}
FULL = {case.id: case for case in CASES if "model" in case.suites}


def provider(case: ModelCase, name: str) -> ModelProvider:
    return next(p for p in case.providers() if p.name == name)


def one(op: str, *words: str) -> ModelCase:
    found = [case for case in FULL.values() if case.op == op and all(word in case.label for word in words)]
    assert len(found) == 1
    return found[0]


# ------------------------------------------------------------------------------------------------ the list
def test_every_op_has_a_quick_and_a_real_case_and_ids_are_unique():
    ops = ["wan_vae_decode", "wan_vae_encode", "vae_training_step", "dit_block_training_step", "dit_training_step"]
    assert list(QUICK) == ops and {case.op for case in FULL.values()} == set(ops)
    assert len({case.id for case in CASES}) == len(CASES) == len(QUICK) + len(FULL)
    for case in CASES:
        names = [p.name for p in case.providers()]
        assert names[:2] == ["auto", "torch"] and "compile" in names and len(set(names)) == len(names)
        json.dumps(case.shape())
        assert ("frames" in case.shape()) == ("vae" in case.op) and ("tokens" in case.shape()) == ("dit" in case.op)
        assert case.small().dtype == case.dtype and case.small().config == case.config


def test_the_sizes_are_the_published_models():
    shape = one("dit_block_training_step", "14B").shape()
    assert (shape["width"], shape["heads"], shape["hidden"]) == (5120, 40, 13824)
    shape = one("dit_block_training_step", "1.3B").shape()
    assert (shape["width"], shape["heads"], shape["hidden"]) == (1536, 12, 8960)
    shape = one("dit_block_training_step", "XL/2").shape()
    assert (shape["width"], shape["heads"], shape["hidden"]) == (1152, 16, 4608)
    shape = one("dit_training_step").shape()
    assert (shape["depth"], shape["tokens"], shape["longest"]) == (28, 64 * 256, 256)


# ------------------------------------------------------------------------------------------------ FLOPs
def test_the_vae_s_flops_are_the_published_counts():
    tera = lambda op, size: round(one(op, size).flops() / 1e12, 1)
    assert [tera("wan_vae_decode", size) for size in ("480x832", "720x1280")] == [274.1, 632.5]
    assert [tera("wan_vae_encode", size) for size in ("480x832", "720x1280")] == [162.5, 375.0]
    # both halves forward, then twice that backward, without the gradient of the video
    case = one("vae_training_step")
    forward = sum(replace(case, op=op).flops() for op in ("wan_vae_decode", "wan_vae_encode"))
    stem = 2 * 27 * 3 * 96 * 17 * 256 * 256
    assert case.flops() == 3 * forward - stem


@pytest.mark.parametrize("op", ["dit_block_training_step", "dit_training_step"])
def test_the_dit_s_flops_are_those_of_the_reference(op):
    step = provider(QUICK[op], "reference").build(QUICK[op], CPU)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == QUICK[op].flops()


def test_the_paper_s_figure_of_dit_xl_2():
    """118.6 Gflops an image, which are multiplications with an addition each (arXiv 2212.09748, table 4)."""
    case = one("dit_training_step")
    assert case.flops() / 3 / 2 / 64 == pytest.approx(118.6e9, rel=2e-3)


# ------------------------------------------------------------------------------------------------ gates
def test_the_peer_is_laid_out_and_its_weights_are_all_named():
    pytest.importorskip("diffusers")
    case = QUICK["wan_vae_decode"]
    ours = vae._vae(case, CPU)
    theirs = vae._Wan(ours, channels_last=True, compiled=False).wan
    for module in theirs.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            assert module.weight.is_contiguous(memory_format=layout)
    named = wan.wan_parameters(ours, theirs)
    assert sorted(map(id, named.values())) == sorted(map(id, theirs.parameters()))
    for name, parameter in ours.named_parameters():
        assert torch.equal(named[name].reshape(parameter.shape), parameter), name
    pruned = wan.make_wan(replace(PRESETS["wan2.1"], width=4, latent_channels=2, latent_mean=None, latent_std=None))
    pruned.decoder.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="expected diffusers' AutoencoderKLWan to have the parameters of Wan 2.1"):
        wan.wan_parameters(ours, pruned)


def spoilt(good: ModelProvider, change) -> ModelProvider:
    """`good`, whose results `change` has touched."""
    def build(case, device):
        step = good.build(case, device)
        return lambda: change(step())
    return replace(good, name="spoilt", build=build)


def element(name: str):
    def change(result):
        wrong = result[name].clone()
        wrong.view(-1)[wrong.numel() // 2] += 2 * wrong.abs().max()
        return result | {name: wrong}
    return change


@pytest.mark.parametrize("op, name", [("wan_vae_decode", "output"), ("dit_block_training_step", "output"),
                                      ("dit_block_training_step", "d x"), ("dit_block_training_step", "d attn.qkv.weight"),
                                      ("dit_training_step", "d blocks.0.mlp.fc1.bias")])
def test_one_wrong_element_fails(op, name):
    case = QUICK[op]
    failed = [c.name for c in case.gate(spoilt(provider(case, "auto"), element(name)), CPU) if not c.passed]
    assert failed == [name]


def test_one_wrong_weight_fails(monkeypatch):
    case = QUICK["dit_block_training_step"]
    make = frame.model

    def off_by_one(*arguments):
        module = make(*arguments)
        with torch.no_grad():
            module.attn.proj.weight[0, 0] += 1.0
        return module

    def build(case, device):
        with monkeypatch.context() as patch:
            patch.setattr(dit, "model", off_by_one)
            return dit._block(case, device, backend="auto")
    results = case.gate(replace(provider(case, "auto"), build=build), CPU)
    assert "output" in [c.name for c in results if not c.passed]


def test_a_padded_batch_whose_padding_is_seen_fails(monkeypatch):
    case = QUICK["dit_block_training_step"]
    make = dit._Padded.__init__

    def unmasked(self, pack):
        make(self, pack)
        self.keys = torch.ones_like(self.keys)
    monkeypatch.setattr(dit._Padded, "__init__", unmasked)
    assert not all(c.passed for c in case.gate(provider(case, "padded"), CPU))


def test_gradients_of_few_numbers_count_together_and_names_must_agree():
    truth = {"output": torch.randn(100), "d a": torch.randn(3), "d b": 1e-3 * torch.randn(2)}
    near = {name: t * (1 + 1e-8) for name, t in truth.items()}
    assert [c.passed for c in frame.compare_all(near, truth, truth)] == [True, True]
    wrong = near | {"d b": near["d b"] * torch.tensor([1.0, 1.001])}  # lost beside a, were both in one unit
    assert [c.passed for c in frame.compare_all(wrong, truth, truth)] == [True, False]
    with pytest.raises(AssertionError, match="expected a step that returns .* got others in d b; give each"):
        frame.compare_all({name: near[name] for name in ("output", "d a")}, truth, truth)


# ------------------------------------------------------------------------------------------------ who cannot run
def test_what_cannot_run_says_so_in_a_sentence(monkeypatch):
    case = QUICK["dit_block_training_step"]
    assert provider(case, "compile").unavailable(case, CPU).startswith("torch.compile takes longer on a CPU")

    class Gpu:
        total_memory = 140 * 10**9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    cuda, large, small = torch.device("cuda"), one("dit_block_training_step", "14B"), one("dit_block_training_step", "1.3B")
    reason = "The reference's attention scores take 184 GB, more than this GPU has."
    assert provider(large, "reference").unavailable(large, cuda) == reason
    assert provider(small, "reference").unavailable(small, cuda) == ""
    assert provider(large, "reference").unavailable(large, CPU) == ""


# ------------------------------------------------------------------------------------------------ loss parity
def curves(*levels):
    """A curve per run: its loss in each window of 20 steps."""
    return {name: [level for level in each for _ in range(20)]
            for name, each in zip(loss_parity.RUNS, levels, strict=True)}


def test_the_verdict():
    judge = lambda *levels: loss_parity.judge(curves(*levels))
    same = judge((1.0, 0.5), (1.02, 0.49), (0.985, 0.515))
    assert same["status"] == "PASSED" and same["error"] == pytest.approx(0.015) and same["allowed"] == pytest.approx(0.02)
    assert judge((1.0, 0.5), (1.02, 0.49), (1.0, 0.53))["reason"].startswith("From step 21 to 40 auto's loss is 0.53000")
    assert judge((1.0, 0.95), (1.02, 0.94), (1.0, 0.95))["reason"].startswith("The reference's loss did not fall")
    broken = judge((1.0, 0.5), (1.02, 0.49), (1.0, float("nan")))
    assert broken["reason"] == "A loss is not finite: auto, seed 0." and broken["error"] is None
    assert broken["windows"]["auto, seed 0"] == [1.0, None]


def test_parity_refuses_what_it_cannot_judge(capsys):
    assert loss_parity.main(["--device", "cpu", "--quick", "--steps", "50"]) == 2
    assert "expected steps as a multiple of 20, at least 40, got 50; pass 40" in capsys.readouterr().err
