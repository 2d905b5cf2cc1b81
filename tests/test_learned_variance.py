"""DDPM with a learned variance against formulas of its own: the joint Gaussian, closed forms, numerical integration.

`assert_only_variance_learns` is the check of the variational term; a mean that is not detached must fail it.
"""

import math
from dataclasses import replace

import pytest
import torch
from float64_checks import draw, seeded
from training_checks import latent_clips, tiny_dit

from sora_fast.diffusion import DDPM, LearnedVariance, generate, make_objective, pairs, place
from sora_fast.diffusion.learned_variance import (
    bin_log_likelihood,
    denoised,
    gaussian_kl,
    log_variance,
    posterior_mean,
    steps_of,
)
from sora_fast.models import DiT
from sora_fast.models.dit import PRESETS
from sora_fast.training.dit import load_run

diffusers = pytest.importorskip("diffusers")
LINEAR = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)  # the source's schedule


def at(steps, place):
    return type(steps)(*(t[place] for t in steps))


# ------------------------------------------------------------------------------------------------ parts
def test_pairs_put_each_sample_s_halves_side_by_side():
    flat = torch.cat([torch.arange(6.0), 10 + torch.arange(4.0), torch.full((5,), float("nan"))])
    assert pairs(flat, [3, 2]).tolist() == [[0, 3], [1, 4], [2, 5], [10, 12], [11, 13]]
    assert pairs(torch.zeros(0), []).shape == (0, 2)


@pytest.mark.parametrize("place", [1, 5, 400, 999])
def test_the_posterior_is_that_of_the_joint_gaussian(place):
    """x_{t-1} and x_t of one x0 are jointly normal: condition by hand on what the chain's definition says."""
    alphas = LearnedVariance().alphas.double()
    step = at(steps_of(alphas), place)
    before, now = alphas[place - 1], alphas[place]
    keep = now / before  # x_t = sqrt(keep) x_{t-1} + sqrt(1 - keep) noise
    x0, x_t = draw(50), draw(50, seed=1)
    prior_mean, prior_var = before.sqrt() * x0, 1 - before
    gain = prior_var * keep.sqrt() / (keep * prior_var + (1 - keep))
    mean = prior_mean + gain * (x_t - keep.sqrt() * prior_mean)
    variance = prior_var - gain * keep.sqrt() * prior_var
    assert (posterior_mean(step, x0, x_t) - mean).abs().max() < 1e-12
    assert abs(step.log_least.exp() / variance - 1) < 1e-9
    assert abs(step.log_most.exp() / (1 - keep) - 1) < 1e-12
    noise = (x_t - now.sqrt() * x0) / (1 - now).sqrt()
    assert (denoised(step, noise, x_t) - x0).abs().max() < 1e-7
    between = log_variance(step, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert between.tolist() == pytest.approx(
        [float(step.log_least), float(step.log_least + step.log_most) / 2, float(step.log_most)])


def test_the_schedule_is_in_float64():
    """At t = 0 float32's product of the alphas would put the variances off by 2e-4."""
    def apart(alphas):
        logs = lambda steps: torch.stack([steps.log_most, steps.log_least])
        return float((logs(steps_of(alphas)) - logs(steps_of(LINEAR))).abs().max())

    assert apart(LearnedVariance().alphas) < 1e-6 < 1e-4 < apart(LINEAR.float().double())


def test_kl_is_the_integral():
    x = torch.linspace(-30, 30, 200001, dtype=torch.float64)
    for mean, var, other_mean, other_var in ((0.3, 1.2, -0.5, 0.7), (2.0, 0.3, 2.1, 2.5)):
        p, q = (torch.distributions.Normal(*torch.tensor([m, v**0.5], dtype=torch.float64))
                for m, v in ((mean, var), (other_mean, other_var)))
        wanted = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
        args = [torch.tensor(v, dtype=torch.float64) for v in (mean, math.log(var), other_mean, math.log(other_var))]
        assert abs(gaussian_kl(*args) - wanted) < 1e-8
        assert abs(gaussian_kl(*args[2:], *args[:2]) - wanted) > 0.05  # swapped arguments are another number


def test_bins_hold_the_density_s_share_and_sum_to_one():
    mean, log_var = torch.tensor(0.1, dtype=torch.float64), torch.tensor(-7.0, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    for x in (0.1, 0.12, 0.05):
        grid = torch.linspace(x - 1 / 255, x + 1 / 255, 20001, dtype=torch.float64)
        wanted = torch.trapezoid(normal.log_prob(grid).exp(), grid).log()
        assert abs(bin_log_likelihood(torch.tensor(x, dtype=torch.float64), mean, log_var) - wanted) < 1e-6
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    assert abs(bin_log_likelihood(levels, mean, log_var).exp().sum() - 1) < 1e-9


# ------------------------------------------------------------------------------------------------ the loss
def by_hand(objective, predicted, x0, noise, timesteps, counts):
    """The loss in float64, sample by sample, from torch.distributions."""
    alphas, total, start = objective.alphas.double(), [], 0
    for t, count in zip(timesteps.long().tolist(), counts.tolist(), strict=True):
        own = slice(start, start + count)
        start += count
        (eps, v), x, n = predicted[own].unbind(1), x0[own], noise[own]
        now, before = alphas[t], alphas[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - now / before
        tilde = [(1 - a / b) * (1 - b) / (1 - a) for a, b in ((alphas[max(t, 1)], alphas[max(t, 1) - 1]),)][0]
        x_t = now.sqrt() * x + (1 - now).sqrt() * n
        mean_of = lambda clean, x_t=x_t, now=now, before=before, beta=beta: (
            before.sqrt() * beta * clean + (now / before).sqrt() * (1 - before) * x_t) / (1 - now)
        share = (v + 1) / 2
        scale = (0.5 * (share * beta.log() + (1 - share) * tilde.log())).exp()
        model = torch.distributions.Normal(mean_of((x_t - (1 - now).sqrt() * eps) / now.sqrt()), scale)
        if t:
            term = torch.distributions.kl_divergence(torch.distributions.Normal(mean_of(x), tilde.sqrt()), model)
        else:
            upper = torch.where(x > 0.999, 1.0, model.cdf(x + 1 / 255))
            term = -(upper - torch.where(x < -0.999, 0.0, model.cdf(x - 1 / 255))).clamp(min=1e-12).log()
        total.append((eps - n).square() + term / math.log(2))
    return torch.cat(total).mean()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_is_the_formula(schedule):
    objective = LearnedVariance(schedule=schedule)
    counts, timesteps = torch.tensor([40, 30, 50, 20]), torch.tensor([0.0, 1.0, 500.0, 999.0])
    x0, noise = draw(140).clamp(-1, 1), draw(140, seed=1)
    predicted = torch.stack([noise + 0.3 * draw(140, seed=2), 0.8 * draw(140, seed=3).tanh()], dim=1)
    wanted = by_hand(objective, predicted, x0, noise, timesteps, counts)
    got = objective.variational(predicted, x0, noise, timesteps, counts).mean() + (predicted[:, 0] - noise).square().mean()
    assert abs(got - wanted) < 1e-7 * wanted
    assert abs(objective.loss(predicted, x0, noise, timesteps, counts) - wanted) < 1e-5 * wanted
    single = objective.loss(predicted.float(), x0.float(), noise.float(), timesteps, counts)
    assert single.dtype == torch.float32 and abs(single - wanted) < 1e-3 * wanted
    alone = [objective.loss(p, a, b, timesteps[k : k + 1], counts[k : k + 1]) * counts[k] for k, (p, a, b) in enumerate(
        zip(predicted.split(counts.tolist()), x0.split(counts.tolist()), noise.split(counts.tolist()), strict=True))]
    assert abs(sum(alone) / 140 - objective.loss(predicted, x0, noise, timesteps, counts)) < 1e-5 * wanted


def assert_only_variance_learns(term, predicted):
    """`term(predicted)` has a gradient for the variance and none for the noise."""
    leaf = predicted.clone().requires_grad_()
    grad = torch.autograd.grad(term(leaf).sum(), leaf)[0]
    assert not grad[:, 0].any() and grad[:, 1].any()


def test_the_variational_term_teaches_the_variance_alone():
    objective, counts, timesteps = LearnedVariance(), torch.tensor([30, 30]), torch.tensor([0.0, 300.0])
    x0, noise = draw(60).clamp(-1, 1), draw(60, seed=1)
    predicted = torch.stack([noise + 0.1 * draw(60, seed=2), draw(60, seed=3).tanh()], dim=1)
    assert_only_variance_learns(lambda p: objective.variational(p, x0, noise, timesteps, counts), predicted)
    step = at(steps_of(objective.alphas.double()), 300)
    x_t = step.signal * x0 + step.sigma * noise

    def attached(p):
        return gaussian_kl(posterior_mean(step, x0, x_t), step.log_least,
                           posterior_mean(step, denoised(step, p[:, 0], x_t), x_t), log_variance(step, p[:, 1]))

    with pytest.raises(AssertionError):
        assert_only_variance_learns(attached, predicted)


# ------------------------------------------------------------------------------------------------ sampling
def test_a_step_is_diffusers_learned_range():
    scheduler = LearnedVariance().scheduler(1000, 1)
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, variance_type="learned_range", clip_sample=False)
    theirs.set_timesteps(1000)
    eps, v, x = draw(1, 3, 4, 5), draw(1, 3, 4, 5, seed=1).tanh(), draw(1, 3, 4, 5, seed=2)
    for t in (999, 500, 3):
        scheduler.generator = seeded(7)
        (got,) = scheduler.step(torch.stack([eps.flatten(), v.flatten()], 1), torch.tensor(t), x.flatten())
        noise = torch.randn(60, generator=seeded(7)).view(1, 3, 4, 5).double()
        mean = theirs.step(torch.cat([eps, v], 1), t, x, generator=seeded(3)).prev_sample
        other = torch.randn(1, 3, 4, 5, generator=seeded(3), dtype=torch.float64)  # the noise that they have drawn
        variance = theirs._get_variance(t, predicted_variance=v)
        wanted = mean - (0.5 * variance).exp() * other + (0.5 * variance).exp() * noise
        assert (got.view_as(wanted) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    (last,) = scheduler.step(torch.stack([eps.flatten(), v.flatten()], 1), torch.tensor(0), x.flatten())
    (again,) = scheduler.step(torch.stack([eps.flatten(), v.flatten()], 1), torch.tensor(0), x.flatten())
    assert torch.equal(last, again)  # the last step draws nothing


def joint(before, now, x0, x_t):
    """Mean and variance of x at alpha bar ``before`` given x0 and x_t at ``now``, from their joint Gaussian."""
    keep = now / before
    gain = (1 - before) * keep.sqrt() / (1 - now)
    return before.sqrt() * x0 + gain * (x_t - now.sqrt() * x0), (1 - before) * (1 - gain * keep.sqrt())


def test_250_steps_are_those_of_the_respaced_chain():
    """The timesteps of the official sampler, and between them the chain that skips the others."""
    scheduler = LearnedVariance().scheduler(250, 1)
    times = [round(k * 999 / 249) for k in range(250)]
    assert scheduler.timesteps.tolist() == times[::-1]
    x0, eps, draws = draw(60), draw(60, seed=1), torch.randn(60, generator=seeded(7)).double()
    for k in (249, 120, 1):
        before, now = LINEAR[times[k - 1]], LINEAR[times[k]]
        mean, least = joint(before, now, x0, now.sqrt() * x0 + (1 - now).sqrt() * eps)
        for v, variance in ((-1.0, least), (1.0, 1 - now / before)):
            scheduler.generator = seeded(7)
            prediction = torch.stack([eps, torch.full_like(eps, v)], dim=1)
            (got,) = scheduler.step(prediction, torch.tensor(times[k]), now.sqrt() * x0 + (1 - now).sqrt() * eps)
            assert (got - mean - variance.sqrt() * draws).abs().max() < 1e-6
    assert LearnedVariance().scheduler(1, 1).timesteps.tolist() == [999]  # from noise, as any other number


def perfect(mean, std):
    """The best prediction of noise and variance for numbers that are all N(mean, std^2), as a flat model of 2 C channels."""
    alphas = LearnedVariance().alphas.double()

    def model(flat, timesteps, pack, **conditions):
        counts = [flat.shape[0] // len(timesteps)] * len(timesteps)
        out = []
        for t, x in zip(timesteps, flat.double().split(counts), strict=True):
            a = alphas[int(t)]
            x0 = mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x - a.sqrt() * mean)
            out += [(x - a.sqrt() * x0) / (1 - a).sqrt(), torch.full_like(x, 0.0)]
        return torch.cat(out)
    return model


def test_a_perfect_model_samples_the_right_numbers():
    sizes = [(1, 1, 64, 64), (1, 1, 64, 64)]
    found = generate(perfect(0.4, 0.5), LearnedVariance(), sizes, patch=(1, 2, 2), steps=100, generator=seeded())
    for sample in found:
        assert abs(sample.mean() - 0.4) < 0.03 and abs(sample.std() - 0.5) < 0.03
    alone = generate(perfect(0.4, 0.5), LearnedVariance(), sizes[:1], patch=(1, 2, 2), steps=100, generator=seeded())
    assert torch.equal(alone[0], found[0])  # the same whatever follows
    own = generate(perfect(0.4, 0.5), LearnedVariance(), sizes, patch=(1, 2, 2), steps=20, generator=[seeded(1), seeded(1)])
    assert torch.equal(own[0], own[1])


def test_the_official_guidance_leaves_the_variance_and_the_fourth_channel():
    """Guidance on three channels of four: the rest, and the variance of all, are the condition's."""
    seen = []

    class Spy(LearnedVariance):
        def for_scheduler(self, predicted, x_t, timesteps, counts):
            seen.append(predicted.clone())
            return predicted

    wanted, null = draw(2 * 4 * 4), draw(2 * 4 * 4, seed=1)
    model = lambda flat, timesteps, pack, **conditions: torch.cat([wanted, null])
    for channels in (3, None):
        generate(model, Spy(), [(4, 1, 2, 2)], patch=(1, 2, 2), steps=1, guidance=4.0, guided_channels=channels,
                 condition=lambda null: {}, generator=seeded())
        eps, v = seen.pop().unbind(1)
        guided = (null[:16] + 4 * (wanted[:16] - null[:16])).float()
        split = 12 if channels == 3 else 16
        assert torch.allclose(eps[:split], guided[:split]) and torch.equal(eps[split:], wanted[split:16].float())
        assert torch.equal(v, wanted[16:].float())


# ------------------------------------------------------------------------------------------------ training
def test_a_class_conditional_dit_learns():
    """Labels, 2 C channels, a pack of two sizes: a few steps lower the loss, and the learned variance its own term.

    Every other step is at t < 10, where nearly all of the variational term is.
    """
    torch.manual_seed(0)
    model = DiT(replace(PRESETS["S/2"], width=48, depth=2, heads=2, classes=2))
    objective, generator = make_objective("ddpm", learn_sigma=True), seeded()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    sizes = [(4, 1, 8, 8), (4, 1, 4, 8)] * 4
    counts = torch.tensor([torch.Size(size).numel() for size in sizes])
    labels = torch.tensor([0, 1] * 4)
    for step in range(40):
        x0 = torch.cat([torch.full(size, 0.5 - label.item()).flatten() for size, label in zip(sizes, labels, strict=True)])
        timesteps = (objective.draw_timesteps(counts, generator) * (0.01 if step % 2 else 1)).floor()
        noise = torch.randn(x0.shape, generator=generator)
        noisy = objective.add_noise(x0, noise, timesteps, counts)
        clips = [part.view(size) for part, size in zip(noisy.split(counts.tolist()), sizes, strict=True)]
        out = torch.cat([clip.flatten() for clip in model(clips, timesteps, labels=labels)])
        predicted = pairs(out, counts)
        loss = objective.loss(predicted, x0, noise, timesteps, counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    predicted = predicted.detach()
    term = lambda v: float(objective.variational(torch.stack([predicted[:, 0], v], 1), x0, noise, timesteps, counts).mean())
    assert term(predicted[:, 1]) < 0.99 * term(torch.zeros_like(noise))  # v = 0: what it began with


def test_a_run_of_train_learns_it_and_generates_with_it(tmp_path):
    """``sora-fast train --objective ddpm --learn-sigma``: its loss is the formula's, and its frames known stay."""
    pytest.importorskip("safetensors", reason="the train extra is not installed")
    trainer = tiny_dit(tmp_path / "run", latent_clips(), objective="ddpm", learn_sigma=True, steps=2, clean_frames=0.0)
    trainer.run()
    drawn = trainer.drawn(trainer.batches.next())
    batch, dit, text = drawn.batch, trainer.modules["dit"], trainer.modules["text"]
    with torch.no_grad():  # outputs as large as noise: after two steps they are all but 0, and anything looks alike
        torch.nn.init.normal_(dit.final_layer.linear.weight, std=0.1, generator=seeded())
        got = trainer.loss(drawn)[0]
        counts = torch.as_tensor(batch.counts)
        noisy = LearnedVariance().add_noise(batch.latents, drawn.noise, drawn.timesteps, counts)
        clips = [part.view(16, *(n * p for n, p in zip(grid, dit.config.patch, strict=True)))
                 for part, grid in zip(noisy.split(counts.tolist()), batch.grids, strict=True)]
        out = dit(clips, drawn.timesteps, text=text(batch.captions))
    predicted = torch.cat([torch.stack([part.flatten() for part in clip.chunk(2)], dim=1) for clip in out])
    wide = (tensor.double() for tensor in (predicted, batch.latents, drawn.noise, drawn.timesteps))
    wanted = by_hand(LearnedVariance(), *wide, counts)
    assert float(got) == pytest.approx(float(wanted), rel=1e-3)
    found = load_run(str(tmp_path / "run"))
    assert isinstance(found.objective, LearnedVariance) and found.dit.config.learn_sigma
    first = draw(16, 1, 4, 6).float()
    made = generate(found.dit, found.objective, [(16, 3, 4, 6), (16, 1, 4, 4)], patch=found.dit.config.patch, steps=5,
                    guidance=2.0, condition=lambda null: dict(text=found.text_encoder(["" if null else "a", ""])),
                    known=[place((16, 3, 4, 6), first), None], generator=seeded())
    assert torch.equal(made[0][:, :1], first) and all(bool(sample.isfinite().all()) for sample in made)


def test_errors_and_names():
    assert isinstance(make_objective("ddpm", learn_sigma=True), LearnedVariance)
    assert type(make_objective("ddpm")) is DDPM
    for words, call in (("prediction 'noise', got 'x0'", lambda: LearnedVariance(prediction="x0")),
                        ("learn_sigma with 'ddpm' alone", lambda: make_objective("flow", learn_sigma=True)),
                        ("expected 1 to 1,000 steps, got 1,500", lambda: LearnedVariance().scheduler(1500, 1)),
                        ("2 C channels, 12 elements or more, got 6", lambda: LearnedVariance().split(draw(6), [6])),
                        (r"predictions \(N, 2\)", lambda: LearnedVariance().loss(draw(3), draw(3), draw(3), draw(1), None))):
        with pytest.raises(ValueError, match=words):
            call()
