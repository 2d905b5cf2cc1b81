"""`sora-fast validate --model`: every covered family passes, a wrong layer is found and named."""

import pytest
import torch

from sora_fast.cli.__main__ import main
from sora_fast.integrations import comparison, swapping, wan_vae
from sora_fast.integrations.comparison import compare, open_model
from sora_fast.integrations.recipes import RECIPES

diffusers = pytest.importorskip("diffusers")


def exit_code(*flags) -> int:
    try:
        return main(list(flags)) or 0
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("name", RECIPES)
def test_every_family_passes(name):
    found = compare(open_model(name))
    text = str(found)
    assert found.passed and found.departs is None and "no layer departs" in text and found.model == name
    assert {line.name for line in found.lines} >= {"output"} and sum(line.name != "output" for line in found.lines) > 20
    assert len(found.layers) > 8 and all(line.fast > 0 or line.plain == 0 for line in found.layers[:3])


def test_the_first_wrong_layer_is_named(monkeypatch, capsys, tmp_path):
    """An accelerated resampler that is off by a hundredth: outputs and gradients fail, and it is the first that departs."""
    right = wan_vae.Resample.forward
    monkeypatch.setattr(wan_vae.Resample, "forward", lambda self, x, *rest, **more: 1.01 * right(self, x, *rest, **more))
    swapping.fast_class.cache_clear()
    model = open_model("AutoencoderKLWan")
    found = compare(model)
    assert not found.passed and found.departs.name == "encoder.down_blocks.1" and "BEYOND" in str(found)
    model.save_pretrained(tmp_path)
    assert exit_code("validate", "--model", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "first departs at encoder.down_blocks.1 (encode a clip)" in out and "validate: FAILED" in out
    monkeypatch.undo()
    swapping.fast_class.cache_clear()
    assert exit_code("validate", "--model", str(tmp_path)) == 0
    assert "validate: as right as the original" in capsys.readouterr().out


def test_a_model_of_one_s_own():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU()), torch.nn.Conv3d(4, 2, 1))
    x = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64)
    found = compare(model, [("a clip", lambda model, cast: model(cast(x)))])
    assert found.passed and len(found.report.swapped) == 1
    with pytest.raises(ValueError, match="expected calls for a Sequential, got none"):
        compare(model)


def test_nothing_swapped_is_no_pass(monkeypatch):
    monkeypatch.setenv("SORA_FAST_ACCELERATE", "0")
    assert not compare(open_model("DiTTransformer2DModel")).passed


def test_errors(capsys):
    for flags, words in ((["--model", "UNet"], "expected a folder or the name of one of AutoencoderKLWan"),
                         (["--model", ""], "got ''"),
                         (["--model", "AutoencoderKLWan", "--op", "norm_act"], "expected no --op beside it")):
        assert exit_code("validate", *flags) == 2
        assert words in capsys.readouterr().err
    assert comparison.open_model("diffusers.WanTransformer3DModel").config.num_layers == 2
