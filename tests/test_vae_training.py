"""Losses of VAE training: each term by a formula of its own, gradients that do not mix, codes that restart, resume.

`assert_apart` is the check of the two sides of the adversary; one that leaks must fail it.
"""

import math

import pytest
import torch
from torch import nn
from training_checks import smaller, write_media

from sora_fast.data import scan
from sora_fast.models import VideoVAE
from sora_fast.models.discriminator import PatchDiscriminator
from sora_fast.models.vae import PRESETS
from sora_fast.named import load_function
from sora_fast.training import checkpoint
from sora_fast.training import vae as task
from sora_fast.training.config import VAETraining
from sora_fast.training.vae_loss import VAELoss, adaptive_weight, adversary_losses, modules_of, reconstruction_error


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(adversarial=0.0, **changes):
    torch.manual_seed(0)
    return modules_of(VideoVAE.preset("tiny", width=8, latent_channels=4, **changes), adversarial)


# ------------------------------------------------------------------------------------------------ terms
@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_the_reconstruction_is_the_mean_error(kind, power):
    x, y = draw(2, 3, 1, 4, 4), draw(2, 3, 1, 4, 4, seed=1)
    assert reconstruction_error(kind, x, y) == pytest.approx(float(((x - y).abs() ** power).mean()))
    assert reconstruction_error(kind, x.bfloat16(), y).dtype == torch.float32


@pytest.mark.parametrize("regularisation", ["kl", "vq"])
@pytest.mark.parametrize("frames", [1, 5])
def test_the_loss_is_the_sum_of_its_terms(regularisation, frames):
    modules, video = make(regularisation=regularisation, codes=16), draw(2, 3, frames, 16, 16).tanh()
    vae = modules["vae"].eval()
    noise = draw(2, *vae.latent_shape(frames, 16, 16), seed=2)
    reconstruction, regulariser = vae(video, noise)
    perceptual = lambda got, wanted: (got - wanted).square().flatten(1).mean(1)  # (B,)
    got = VAELoss(modules, reconstruction="l2", kl=0.01, vq=0.7, perceptual=perceptual, perceptual_weight=0.3)(video, noise)
    error = (reconstruction - video).square().mean()
    per_number = 0.01 / video[0].numel()  # of a sum over the clip's latents
    wanted = 1.3 * error + (per_number if regularisation == "kl" else 0.7) * regulariser.mean()
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert regulariser.mean() > 0


@pytest.mark.parametrize("shape", [(2, 3, 1, 32, 32), (1, 3, 5, 32, 40)])
def test_the_discriminator_judges_images_and_clips_patch_by_patch(shape):
    judge = PatchDiscriminator(width=8)
    out = judge(draw(*shape))
    assert out.shape == (shape[0], 1, shape[2], shape[3] // 8, shape[4] // 8)
    if shape[2] > 1:  # causal but for the norm: the stem and the convolutions look back
        assert all(conv.lookahead == 0 for conv in [judge.stem, judge.head])


def assert_apart(for_vae, for_discriminator, judge, made):
    """The VAE's side has a gradient for `made` and none for the judge, the other side the other way round."""
    parameters = list(judge.parameters())
    a = torch.autograd.grad(for_vae, [made, *parameters], allow_unused=True, retain_graph=True)
    b = torch.autograd.grad(for_discriminator, [made, *parameters], allow_unused=True)
    assert a[0].any() and all(grad is None or not grad.any() for grad in a[1:])
    # within the hinges the last bias stands on both sides: its gradient is 0
    assert (b[0] is None or not b[0].any()) and sum(bool(grad.any()) for grad in b[1:]) >= len(parameters) - 1


def test_the_two_sides_of_the_adversary_do_not_mix():
    torch.manual_seed(0)
    judge, made, real = PatchDiscriminator(width=8), draw(2, 3, 3, 16, 16).requires_grad_(), draw(2, 3, 3, 16, 16, seed=1)
    for_vae, for_discriminator = adversary_losses(judge, made, real)
    with torch.no_grad():
        fake, true = judge(made), judge(real)
    assert float(for_vae) == pytest.approx(-float(fake.mean()), rel=1e-5)
    hinge = 0.5 * ((1 - true).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    assert float(for_discriminator) == pytest.approx(float(hinge), rel=1e-5)
    assert_apart(for_vae, for_discriminator, judge, made)
    with pytest.raises(AssertionError):  # planted: the judge learns from the VAE's side
        assert_apart(-judge(made).mean(), adversary_losses(judge, made, real)[1], judge, made)
    with pytest.raises(AssertionError):  # planted: the VAE learns from the judge's side
        assert_apart(adversary_losses(judge, made, real)[0], (judge(made) - judge(real)).mean(), judge, made)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer, x = nn.Linear(4, 4), draw(3, 4)
    y = layer(x)
    pixels, adversary = (y - 1).abs().mean(), (y * draw(4, seed=3)).square().mean()
    norms = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (pixels, adversary)]
    weight = adaptive_weight(pixels, adversary, layer.weight)
    assert float(weight) == pytest.approx(float(norms[0] / (norms[1] + 1e-4))) and not weight.requires_grad
    assert adaptive_weight(1e3 * pixels, (y * 0).sum(), layer.weight) == 1e4  # without its limit 1e7 of a norm of about 1


def test_the_adversary_enters_with_its_weight_when_it_has_begun():
    modules = make(0.5)
    video, vae = draw(1, 3, 5, 16, 16).tanh(), modules["vae"]
    noise = draw(1, *vae.latent_shape(5, 16, 16), seed=2)
    measure = VAELoss(modules, kl=0.1, adversarial=0.5)
    early, late = measure(video, noise, begun=False), measure(video, noise)
    reconstruction, kl = vae(video, noise)
    pixels = (reconstruction - video).abs().mean()
    for_vae, for_discriminator = adversary_losses(modules["discriminator"], reconstruction, video)
    weight = adaptive_weight(pixels, for_vae, vae.decoder.head.weight)
    assert float(early) == pytest.approx(float(pixels + 0.1 * kl.mean() / video[0].numel()), rel=1e-5)
    assert float(late) == pytest.approx(float(early + 0.5 * weight * for_vae + for_discriminator), rel=1e-4)
    with torch.no_grad():
        assert float(measure(video, noise)) == pytest.approx(float(early), rel=1e-5)  # held-out data: no adversary
    late.backward()
    assert all(p.grad.any() for name, p in modules["discriminator"].named_parameters() if name != "head.bias")


# ------------------------------------------------------------------------------------------------ runs
def brightness(reconstruction, video):
    """(B,): a perceptual function of the tests' own, named on the command line."""
    return (reconstruction.mean((1, 2, 3, 4)) - video.mean((1, 2, 3, 4))).square()


def config(tmp_path, name="run", **changes):
    settings = dict(out=str(tmp_path / name), steps=6, warmup=1, frames=5, crop=16, clips=1, images=2, device="cpu",
                    precision="fp32", threads=1, log_every=1, tensorboard=False, heldout=0.0, short_side=48, peak_tflops=1.0)
    return VAETraining(**(settings | changes))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return scan(write_media(tmp_path_factory.mktemp("media")), progress=False).items


def make_run(settings, items, **options):
    with smaller(PRESETS, width=8, latent_channels=4):
        return task.make_trainer(settings, items, **options)


def run(settings, items, **options):
    trainer = make_run(settings, items, **options)
    trainer.run()
    return trainer


EVERYTHING = dict(regularisation="vq", codes=32, reconstruction="l2", adversarial=0.1, adversarial_start=2,
                  perceptual=f"{__name__}:brightness", perceptual_weight=0.1)


def test_a_run_with_everything_resumes_bit_for_bit(tmp_path, items, monkeypatch):
    """Codebook, its counts, discriminator, moments: six steps equal three, a resume and three more.

    Codes restart at steps 0 and 4: there the resumed run must know what was counted before it.
    """
    restart, restarts = task.restart_codes, []
    monkeypatch.setattr(task, "RESTART_EVERY", 4)
    monkeypatch.setattr(task, "restart_codes", lambda *arguments: restarts.append(restart(*arguments)))
    same = EVERYTHING | dict(final_lr=1.0)  # a schedule that does not look at the run's end
    whole = run(config(tmp_path, "whole", **same), items)
    assert restarts[0] == 32 and len(restarts) == 2 and 0 < restarts[1] < 32
    run(config(tmp_path, "parts", **same | dict(steps=3)), items)
    again = run(config(tmp_path, "parts", **same | dict(resume=True)), items)
    assert restarts[2:] == restarts[:2]
    assert whole.losses == again.losses
    for name, value in whole.modules.state_dict().items():
        assert torch.equal(value, again.modules.state_dict()[name]), name
    assert whole.modules["vae"].quantizer.counts.sum() > 0 and "discriminator" in whole.modules
    vae = task.finish(whole)
    assert vae.quantizer is not None and not any("discriminator" in name for name in vae.state_dict())


def test_settings_reach_the_loss(tmp_path, items):
    """What the command line sets, batch by batch, before and after the adversary begins."""
    trainer = make_run(config(tmp_path, reconstruction="l2", kl=3.0, adversarial=5.0, adversarial_start=2,
                              perceptual=f"{__name__}:brightness", perceptual_weight=30.0), items)
    vae, judge = trainer.modules["vae"], trainer.modules["discriminator"]
    for number in range(4):
        batch = trainer.drawn(trainer.batches.plan(number))
        reconstruction, kl = vae(batch.video, batch.noise)
        pixels = (reconstruction - batch.video).square().mean() + 30 * brightness(reconstruction, batch.video).mean()
        wanted = pixels + 3 * kl.mean() / batch.video[0].numel()
        if number >= 2:
            for_vae, for_judge = adversary_losses(judge, reconstruction, batch.video)
            wanted = wanted + 5 * adaptive_weight(pixels, for_vae, vae.decoder.head.weight) * for_vae + for_judge
        assert float(trainer.loss(batch)[0].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_codes_begin_from_data_and_the_latent_scale_is_measured(tmp_path, items):
    """The first step sets all codes to latents; the finished VAE's latents are of zero mean and unit deviation."""
    trainer = make_run(config(tmp_path, regularisation="vq", codes=8, steps=1), items)
    before = trainer.modules["vae"].quantizer.codebook.detach().clone()
    trainer.run()
    assert not torch.allclose(trainer.modules["vae"].quantizer.codebook, before, atol=1e-2)
    vae = task.finish(trainer)
    frames, z = trainer.batches.frames, []
    for index in range(len(frames)):  # just what is measured
        have = frames.frames(index)
        take = 9 if have >= 9 else 1
        for window in range(4 if take > 1 else 1):
            video = task.to_pixels(frames.window(index, (have - take) * window // 3, take))[None]
            z.append(vae.encode(video)[0].flatten(1).detach())
    z = torch.cat(z, 1)
    assert z.shape[0] == 4 and z.mean(1).abs().max() < 1e-3 and (z.std(1, correction=0) - 1).abs().max() < 1e-3


def test_training_with_an_adversary_learns(tmp_path):
    """A short run on one still: the reconstruction gets better and the judge tells real from made."""
    torch.manual_seed(0)
    modules = make(0.1)
    video = draw(2, 3, 1, 16, 16).tanh()
    optimizer, measure = torch.optim.AdamW(modules.parameters(), 2e-3), VAELoss(modules, adversarial=0.1)
    shape, errors = modules["vae"].latent_shape(1, 16, 16), []
    for step in range(40):
        optimizer.zero_grad()
        measure(video, draw(2, *shape, seed=step)).backward()
        optimizer.step()
        errors.append(float((modules["vae"](video)[0] - video).abs().mean().detach()))
    judge = modules["discriminator"]
    assert errors[-1] < 0.9 * errors[0] and judge(video).mean() > judge(modules["vae"](video)[0]).mean()


def test_errors(tmp_path):
    for words, kind, path in (("a colon before", ValueError, "module"), ("expected to import nowhere_at_all", ImportError,
                              "nowhere_at_all:f"), ("a function 'missing'", ValueError, "math:missing")):
        with pytest.raises(kind, match=words):
            load_function(path, "--perceptual")
    assert load_function("math:sqrt", "--perceptual") is math.sqrt
    with pytest.raises(ValueError, match="reconstruction"):
        config(tmp_path, reconstruction="l3")
    assert checkpoint.generator(0, "codes", 0).initial_seed() != checkpoint.generator(0, "codes", 100).initial_seed()
