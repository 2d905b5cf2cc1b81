"""Inflation: a static clip through the inflated model gives the image model's output; the central frame alone decides.

`assert_inflated` is the check; a weight that is copied to every frame and not divided must fail it.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from float64_checks import assert_close, draw

from sora_fast import Pack, ops
from sora_fast.models import DiT, VideoVAE
from sora_fast.models.dit import PRESETS
from sora_fast.models.inflation import inflate, inflate_patches
from sora_fast.models.mae import MAE, MAEConfig
from sora_fast.nn import random_masking

DIT = replace(PRESETS["S/2"], width=32, depth=2, heads=2, in_channels=3, classes=4, patch=(1, 2, 4))
VIT = MAEConfig(in_channels=3, patch=(1, 2, 4), width=32, depth=2, heads=2, decoder_width=24, decoder_depth=1,
                decoder_heads=1, positions=(1, 2), pattern="tube", normalise_target=False)


def make(model):
    """Every parameter random, the zeros of the start too, so that every path is open."""
    model, generator = model.double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan))
    return model


def clip_of(image, frames, tubelets, how):
    """A clip (3, frames * tubelets, H, W) of equal frames, or ("central") of equal central frames among others."""
    clip = image.repeat(1, frames * tubelets, 1, 1)
    if how == "central":
        others = draw(*clip.shape, seed=8)
        others[:, frames // 2 :: frames] = clip[:, frames // 2 :: frames]
        clip = others
    return clip


def assert_inflated(image_model, video_model, run, frames, how):
    """`run(model, clip)` on one and on three tubelets gives, in every frame, what it gives for the image."""
    image = draw(3, 1, 6, 8)
    wanted = run(image_model, image)
    for tubelets in (1, 3):
        got = run(video_model, clip_of(image, frames, tubelets, how))
        assert_close(got, wanted.repeat(1, frames * tubelets, 1, 1))


def dit_output(model, clip):
    return model([clip], torch.tensor([300.0]), labels=torch.tensor([2]))[0]


def mae_output(model, clip):
    """The clip with its hidden patches predicted; the same ones hide in every frame."""
    patches, pack = model.patches([clip])
    masking = random_masking(Pack(pack.grids), 0.5, pattern="tube", generator=torch.Generator().manual_seed(3))
    prediction = model([clip], masking=masking).prediction
    filled = masking.unshuffle(torch.zeros_like(model.target(patches[masking.visible])), prediction)
    return ops.unpatchify(filled, pack, model.config.patch, 3)[0]


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["filter", "central"])
def test_the_weight_alone(how, frames):
    weight, bias, image = draw(5, 3, 2, 4), draw(5, seed=1), draw(2, 3, 6, 8, seed=2)
    inflated = inflate_patches(weight, frames, how)
    clips = torch.stack([clip_of(each[:, None], frames, 2, how) for each in image])
    got = F.conv3d(clips, inflated, bias, stride=(frames, 2, 4))
    assert_close(got, F.conv2d(image, weight, bias, stride=(2, 4))[:, :, None].repeat(1, 1, 2, 1, 1))
    assert torch.equal(inflated, inflate_patches(weight[:, :, None], frames, how))
    if how == "central":
        assert (inflated != 0).any((0, 1, 3, 4)).nonzero().tolist() == [[frames // 2]]


@pytest.mark.parametrize("frames", [2, 3])
@pytest.mark.parametrize("how", ["filter", "central"])
@pytest.mark.parametrize("kind, config, run", [(DiT, DIT, dit_output), (MAE, VIT, mae_output)])
def test_the_inflated_model_gives_the_image_model_s_output(kind, config, run, how, frames):
    model = make(kind(config))
    inflated = inflate(model, frames, how)
    assert inflated.config == replace(model.config, patch=(frames, 2, 4)) and type(inflated) is type(model)
    assert_inflated(model, inflated, run, frames, how)
    wrong = inflate(model, frames, how)
    with torch.no_grad():
        embedder = wrong.x_embedder if isinstance(wrong, DiT) else wrong.encoder.x_embedder
        embedder.proj.weight.copy_(inflate_patches(embedder.proj.weight.sum(2), frames, "filter") * frames)
    with pytest.raises(AssertionError):
        assert_inflated(model, wrong, run, frames, how)


def test_each_way_is_what_it_says_and_not_the_other():
    """Filter inflation sees every frame of a tubelet, the central one no other than its own."""
    model, clip = make(DiT(DIT)), draw(3, 3, 6, 8)
    for how, seen in (("filter", [True, True, True]), ("central", [False, True, False])):
        inflated = inflate(model, 3, how)
        wanted, changes = dit_output(inflated, clip), []
        for frame in range(3):
            other = clip.clone()
            other[:, frame] += 1
            changes.append(not torch.equal(dit_output(inflated, other), wanted))
        assert changes == seen


def test_the_new_model_is_its_own():
    """It trains, keeps dtype and mode, and shares no memory with the image model, which stays as it was."""
    model = make(DiT(DIT)).float().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inflated = inflate(model, 2)
    assert not inflated.training and inflated.x_embedder.proj.weight.dtype == torch.float32
    assert all(p.requires_grad and p.device.type == "cpu" for p in inflated.parameters())
    dit_output(inflated, draw(3, 4, 6, 8).float()).square().sum().backward()
    assert all(p.grad is not None for p in inflated.parameters())
    with torch.no_grad():
        for p in inflated.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_are_one_sentence():
    calls = {
        "how to be 'filter' or 'central', got 'mean'": (ValueError, lambda: inflate_patches(draw(2, 3, 2, 2), 2, "mean")),
        "frames to be an int of 1 or more, got 0": (ValueError, lambda: inflate_patches(draw(2, 3, 2, 2), 0)),
        r"got \(2, 3, 2, 2, 2\)": (ValueError, lambda: inflate_patches(draw(2, 3, 2, 2, 2), 2)),
        r"patches of one frame, got patch \(2, 2, 4\)": (ValueError, lambda: inflate(inflate(DiT(DIT), 2), 2)),
        "a DiT or a MAE, got VideoVAE": (TypeError, lambda: inflate(VideoVAE.preset("tiny", width=4), 2)),
    }
    for words, (kind, call) in calls.items():
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
