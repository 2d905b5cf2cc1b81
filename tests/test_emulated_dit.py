"""A whole small DiT on Triton kernels, executed by the emulator: prediction and every gradient against the reference."""

from dataclasses import replace

import pytest
import torch

from sora_fast import Pack, use_backend
from sora_fast.models import DiT, Text
from sora_fast.models.dit import PRESETS

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

CONFIGS = {
    "tiny": replace(PRESETS["tiny"], width=64, depth=2, heads=2, in_channels=3, rope_axes=(8, 12, 12), text_width=32),
    "S/2": replace(PRESETS["S/2"], width=48, depth=2, heads=2, in_channels=3, classes=5),
}
SIZES = [(2, 4, 6), (1, 2, 2), (1, 8, 4)]
LENGTHS = (3, 0, 5)


def model_and_inputs(name, modulation="frame"):
    """A model whose parameters are all random, and what it is called with: a flat buffer with a tail of NaN."""
    config = CONFIGS[name]
    model = DiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.5)
    grids = [(t, h // 2, w // 2) for t, h, w in SIZES]
    pack = Pack(grids, modulation=modulation, text_lengths=LENGTHS if config.text_width else None)
    numbers = 4 * config.in_channels
    latents = torch.randn((pack.num_tokens + 3) * numbers)
    latents[-3 * numbers:] = float("nan")
    given = dict(labels=torch.tensor([1, 5, 0])) if config.classes else dict(
        text=Text(torch.randn(sum(LENGTHS), 32), torch.randn(3, 32), LENGTHS))
    return model, latents, torch.linspace(0, 1000, pack.num_rows), pack.pad_to(pack.num_tokens + 3), given


def step(model, latents, timesteps, pack, given, backend, dtype=torch.float32):
    """The prediction and the gradients of all parameters, in ``dtype``."""
    model = model.to(dtype)
    if "text" in given:
        text = given["text"]
        given = dict(text=Text(text.tokens.to(dtype), text.pooled.to(dtype), text.lengths))
    with use_backend(backend):
        out = model(latents.to(dtype), timesteps, pack, **given)
        # no symmetry of the model makes the gradient of this vanish
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(dtype)
        return [out.detach(), *torch.autograd.grad((out * weights).sum() + out.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dit_is_the_references(name):
    model, *inputs = model_and_inputs(name)
    got = step(model, *inputs, "triton")
    low = step(model, *inputs, "reference")
    truth = step(model, *inputs, "reference", torch.float64)
    names = ["prediction", *(name for name, _ in model.named_parameters())]
    for what, a, b, t in zip(names, got, low, truth, strict=True):
        allowed = 2 * (b - t).norm() + 1e-6 * t.norm()
        assert (a - t).norm() <= allowed, what
    assert any(not torch.equal(a, b) for a, b in zip(got, low, strict=True))  # other code, other roundings
    again = step(model.float(), *inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
