"""Clips of no frames: nothing comes out of what takes them, in the right shape and with gradients, or a sentence does."""

import pytest
import test_dit
import torch

from sora_fast import nn, ops
from sora_fast.models import VideoVAE


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", ["causal_conv3d", "norm_act_conv3d"])
@pytest.mark.parametrize("options", [
    {}, dict(stride=2), dict(phase=1), dict(upsample=2), dict(time_pad="replicate", space_pad="reflect"),
    dict(return_cache=True, time_pad="replicate")], ids=lambda options: " ".join(options) or "plain")
def test_convolutions(op, backend, options):
    x, weight = torch.randn(2, 4, 0, 5, 6, requires_grad=True), torch.randn(3, 4, 3, 3, 3, requires_grad=True)
    cache = torch.randn(2, 4, 2, 5, 6)
    for past in (None, cache):
        made = getattr(ops, op)(x, weight, cache=past, backend=backend, **options)
        y, kept = made if options.get("return_cache") else (made, None)
        scale = options.get("upsample", 1), options.get("stride", 1)
        assert y.shape == (2, 3, 0, -(-5 * scale[0] // scale[1]), -(-6 * scale[0] // scale[1]))
        assert kept is None or torch.equal(kept, cache if past is not None else cache[:, :, :0])
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert dx.shape == x.shape and not dweight.any()


def test_dit_beside_a_clip_and_alone():
    model, given = test_dit.make(test_dit.SMALL["tiny"]), test_dit.conditions(test_dit.SMALL["tiny"], 2)
    whole, other = test_dit.clips_of("tiny")[:2]
    empty, clip = model([whole[:, :0], other], **given)
    assert empty.shape == whole[:, :0].shape and clip.shape == other.shape and clip.isfinite().all()
    (out,) = model(whole[None, :, :0], given["timesteps"][:1], text=test_dit.conditions(test_dit.SMALL["tiny"], 1)["text"])
    out.sum().backward()
    assert out.shape == whole[:, :0].shape and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_linear_path_of_a_vae():
    vae = VideoVAE.preset("tiny")
    assert vae.linear_path is not None
    video, state = torch.randn(1, 3, 5, 16, 16), nn.StreamState()
    want = vae.moments(video)
    assert vae.moments(video[:, :, :0]).shape[:3] == (*want.shape[:2], 0)
    parts = [vae.moments(part, state) for part in (video[:, :, :0], video[:, :, :1], video[:, :, :0], video[:, :, 1:])]
    assert [part.shape[2] for part in parts] == [0, 1, 0, 1]
    torch.testing.assert_close(torch.cat(parts[1::2], dim=2), want, rtol=1e-4, atol=1e-5)
