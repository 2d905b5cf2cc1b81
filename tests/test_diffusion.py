"""Objectives and sampling: what is learned, the timesteps it is learned at, and generation from grids of noise."""

import math

import pytest
import torch

from sora_fast.diffusion import DDPM, FlowMatching, LearnedVariance, generate, make_objective, training_loss
from sora_fast.models import DiT, DiTConfig
from sora_fast.models.text import Text
from sora_fast.pack import Pack

diffusers = pytest.importorskip("diffusers", reason="the train extra is not installed")

KINDS = [(kind, prediction) for kind in ("flow", "ddpm") for prediction in ("x0", "velocity", "noise")]
PATCH = (1, 2, 2)
SIZES = [(4, 3, 4, 6), (4, 1, 8, 4), (4, 2, 2, 2)]  # a clip, an image, another clip


def batch(sizes=SIZES, seed=0):
    """x0, noise (flat), counts (S,)."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([math.prod(size) for size in sizes])
    return *torch.randn(2, int(counts.sum()), generator=generator), counts


def noise_in(objective, x_t, x0, timesteps, counts):
    """The noise that leads from x0 to x_t."""
    if isinstance(objective, FlowMatching):
        s = torch.repeat_interleave(timesteps / 1000, counts)
        return (x_t - (1 - s) * x0) / s
    a = torch.repeat_interleave(objective.alphas[timesteps.long()], counts)
    return (x_t - a.sqrt() * x0) / (1 - a).sqrt()


def oracle(objective, x0, counts):
    """A model that knows the clean latents, and predicts what the objective asks for."""
    def model(flat, timesteps, pack):
        return objective.target(x0, noise_in(objective, flat, x0, timesteps, counts), timesteps, counts)
    return model


# ---- Objectives


@pytest.mark.parametrize("kind, prediction", KINDS)
@pytest.mark.parametrize("steps", [4, 25])
def test_an_oracle_recovers_the_clean_latents(kind, prediction, steps):
    objective = make_objective(kind, prediction)
    x0, _, counts = batch()
    made = generate(oracle(objective, x0, counts), objective, SIZES, patch=PATCH, steps=steps)
    for got, want, size in zip(made, x0.split(counts.tolist()), SIZES, strict=True):
        assert got.shape == size and got.dtype == torch.float32
        torch.testing.assert_close(got.flatten(), want, atol=2e-5, rtol=0)


def test_the_oracle_test_can_fail():
    objective = FlowMatching("velocity")
    x0, _, counts = batch()
    wrong = oracle(FlowMatching("x0"), x0, counts)  # predicts another quantity than the objective samples with
    made = generate(wrong, objective, SIZES, patch=PATCH, steps=4)
    assert (torch.cat([m.flatten() for m in made]) - x0).abs().max() > 0.1


@pytest.mark.parametrize("kind, prediction", KINDS)
def test_loss_is_zero_for_a_perfect_prediction_only(kind, prediction):
    objective = make_objective(kind, prediction)
    x0, noise, counts = batch()
    timesteps = torch.tensor([10.0, 500.0, 990.0])
    target = objective.target(x0, noise, timesteps, counts)
    assert objective.loss(target, x0, noise, timesteps, counts) == 0
    loss = objective.loss((target + 0.1).bfloat16(), x0, noise, timesteps, counts)
    assert loss > 0.005 and loss.dtype == torch.float32


def test_conversions_agree():
    """The three predictions of one truth give the scheduler the same velocity."""
    x0, noise, counts = batch()
    timesteps = torch.tensor([100.0, 500.0, 940.0])
    x_t = FlowMatching().add_noise(x0, noise, timesteps, counts)
    for prediction in ("x0", "velocity", "noise"):
        objective = FlowMatching(prediction)
        velocity = objective.for_scheduler(objective.target(x0, noise, timesteps, counts), x_t, timesteps, counts)
        torch.testing.assert_close(velocity, noise - x0, atol=2e-5, rtol=1e-5)


def test_predicting_noise_stays_finite_where_there_is_only_noise():
    """At s = 1 a small error must not be divided by nothing; at s = 0 nor for x0."""
    noise = torch.randn(8)
    count = torch.tensor([8])
    wild = FlowMatching("noise").for_scheduler(noise + 0.01, noise, torch.tensor([1000.0]), count)
    assert wild.abs().max() < 1
    assert FlowMatching("x0").for_scheduler(noise, noise, torch.tensor([0.0]), count).isfinite().all()
    cosine = DDPM("noise", "cosine")
    model = lambda flat, timesteps, pack: torch.zeros_like(flat) + 0.1  # small, wrong
    made = generate(model, cosine, [(4, 1, 8, 8)], patch=PATCH, steps=25)[0]
    assert made.abs().max() < 1e3


def test_x0_loss_is_weighted_as_velocity():
    """error(x0)^2 / s^2 is the velocity's squared error; below s = 0.05 the weight stays."""
    x0, noise, counts = batch()
    s = torch.tensor([0.1, 0.5, 0.9])
    predicted = x0 + torch.randn(x0.shape)
    x_t = FlowMatching().add_noise(x0, noise, 1000 * s, counts)
    as_velocity = FlowMatching("x0").for_scheduler(predicted, x_t, 1000 * s, counts)
    torch.testing.assert_close(FlowMatching("x0").loss(predicted, x0, noise, 1000 * s, counts),
                               FlowMatching("velocity").loss(as_velocity, x0, noise, 1000 * s, counts))
    one = torch.tensor([4])
    low = FlowMatching("x0").loss(torch.ones(4), torch.zeros(4), torch.zeros(4), torch.tensor([1.0]), one)
    assert float(low) == pytest.approx(400)


@pytest.mark.parametrize("objective", (FlowMatching(), FlowMatching("x0"), DDPM(), LearnedVariance()), ids=repr)
def test_training_loss_is_the_objectives_on_one_pack(objective):
    """Of a model that is told what was drawn, and of one DiT step on a clip and an image."""
    latents, seen = [torch.randn(4, 3, 4, 6), torch.randn(4, 1, 2, 2)], {}
    width = 2 if isinstance(objective, LearnedVariance) else 1

    def model(x_t, timesteps, pack, *, labels):
        seen.update(x_t=x_t, timesteps=timesteps, grids=pack.grids, labels=labels)
        return x_t.new_zeros(width * x_t.shape[0])

    draw = lambda: torch.Generator().manual_seed(3)
    loss = training_loss(model, objective, latents, patch=(1, 2, 2), generator=draw(), labels="given")
    assert seen["grids"] == ((3, 2, 3), (1, 1, 1)) and seen["labels"] == "given"
    generator, counts = draw(), [288, 16]
    timesteps = objective.draw_timesteps(torch.tensor([18, 1]), generator)
    noise, x0 = torch.randn(304, generator=generator), torch.cat([clip.flatten() for clip in latents])
    assert torch.equal(seen["timesteps"], timesteps)
    assert torch.equal(seen["x_t"], objective.add_noise(x0, noise, timesteps, torch.tensor(counts)))
    predicted = objective.split(torch.zeros(304 * width), counts)
    assert torch.equal(loss, objective.loss(predicted, x0, noise, timesteps, torch.tensor(counts)))


@pytest.mark.parametrize("schedule, name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_ddpm_is_diffusers(schedule, name):
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    ours = DDPM("velocity", schedule)
    timesteps = torch.tensor([0, 431, 999])
    x0, noise = torch.randn(2, 3, 40)
    counts = torch.tensor([40, 40, 40])
    flat = lambda t: t.flatten()
    torch.testing.assert_close(ours.add_noise(flat(x0), flat(noise), timesteps.float(), counts),
                               flat(theirs.add_noise(x0, noise, timesteps)))
    torch.testing.assert_close(ours.target(flat(x0), flat(noise), timesteps.float(), counts),
                               flat(theirs.get_velocity(x0, noise, timesteps)))


@pytest.mark.parametrize("kind, prediction", KINDS)
def test_timesteps_are_per_sample(kind, prediction):
    """A flat pack equals its samples alone, in noising, target, loss and conversion."""
    objective = make_objective(kind, prediction)
    x0, noise, counts = batch()
    timesteps = torch.tensor([20.0, 480.0, 930.0])
    x_t = objective.add_noise(x0, noise, timesteps, counts)
    sums = 0.0
    for place, part in enumerate(torch.arange(len(x0)).split(counts.tolist())):
        one, t = counts[place : place + 1], timesteps[place : place + 1]
        assert torch.equal(objective.add_noise(x0[part], noise[part], t, one), x_t[part])
        target = objective.target(x0, noise, timesteps, counts)[part]
        assert torch.equal(objective.target(x0[part], noise[part], t, one), target)
        assert torch.equal(objective.for_scheduler(target, x_t[part], t, one),
                           objective.for_scheduler(objective.target(x0, noise, timesteps, counts), x_t, timesteps,
                                                   counts)[part])
        sums += objective.loss(torch.zeros_like(target), x0[part], noise[part], t, one) * one
    whole = objective.loss(torch.zeros_like(x0), x0, noise, timesteps, counts)
    torch.testing.assert_close(sums[0] / counts.sum(), whole)


# ---- Timesteps


def test_uniform_timesteps_are_stratified():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((40,), 100)
    for objective in (FlowMatching(timesteps="uniform", shift=1.0), DDPM()):
        t = objective.draw_timesteps(tokens, generator)
        assert t.shape == (40,) and t.min() >= 0 and t.max() <= 1000
        assert (t.sort().values // 25 == torch.arange(40)).all()  # one from each 40th of the range
        assert not torch.equal(t, t.sort().values)
    t = DDPM().draw_timesteps(tokens.repeat(100), generator)
    assert torch.equal(t, t.round()) and t.max() == 999 and t.min() == 0
    assert FlowMatching().draw_timesteps(tokens[:0], generator).shape == (0,)
    assert FlowMatching().draw_timesteps(tokens[:1], generator).shape == (1,)


def test_logit_normal_quantiles():
    t = FlowMatching(shift=1.0).draw_timesteps(torch.full((4000,), 100), torch.Generator().manual_seed(0)) / 1000
    z = torch.logit(t)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(z.quantile(quantiles), torch.special.ndtri(quantiles), atol=5e-3, rtol=0)


def test_shift_moves_timesteps_up_with_the_tokens():
    objective = FlowMatching(shift="tokens", base_tokens=256)
    tokens = torch.tensor([1, 256, 1024, 4096, 65536])
    assert objective.shift_of(tokens).tolist() == [1.0, 1.0, 2.0, 4.0, 16.0]
    medians = []
    for count in tokens.tolist():
        t = objective.draw_timesteps(torch.full((501,), count), torch.Generator().manual_seed(1))
        assert t.min() >= 0 and t.max() <= 1000
        medians.append(float(t.median()))
    assert medians[0] == medians[1] < medians[2] < medians[3] < medians[4]
    assert medians[3] == pytest.approx(1000 * 4 / 5, abs=2)  # s = 1/2 becomes 4/2 / (1 + 3/2)
    # and each sample of a pack by its own count
    t = objective.draw_timesteps(torch.tensor([256] * 500 + [4096] * 500), torch.Generator().manual_seed(2))
    assert t[500:].median() - t[:500].median() > 200
    # the sampler's schedule as well
    few, many = (objective.scheduler(10, n).timesteps for n in (256, 4096))
    assert (many[1:] > few[1:]).all() and few[0] == many[0] == 1000


def test_scheduler_spends_its_steps_evenly():
    scheduler = FlowMatching(shift=1.0).scheduler(5, 100)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 800, 600, 400, 200]))
    assert scheduler.sigmas[-1] == 0


# ---- Generation


class Model:
    """A DiT of a few thousand weights that attends; records the calls."""

    def __init__(self, text=True):
        torch.manual_seed(0)
        self.dit = DiT(DiTConfig(width=32, depth=2, heads=2, patch=PATCH, in_channels=4, text_width=8 if text else 0,
                                 rope_axes=(4, 6, 6))).eval()
        for parameter in self.dit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.packs = []

    def __call__(self, flat, timesteps, pack: Pack, **conditions):
        self.packs.append((pack, timesteps))
        return self.dit(flat, timesteps, pack, **conditions)


def captions(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return Text(torch.randn(sum(lengths), 8, generator=generator), torch.randn(len(lengths), 8, generator=generator),
                tuple(lengths))


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_sizes_in_one_pack_equal_each_alone(kind):
    objective, model = make_objective(kind), Model(text=False)
    together = generate(model, objective, SIZES, patch=PATCH, steps=3, generator=torch.Generator().manual_seed(5))
    assert model.packs[0][0].grids == ((3, 2, 3), (1, 4, 2), (2, 1, 1))
    generator = torch.Generator().manual_seed(5)
    for size, got in zip(SIZES, together, strict=True):
        assert got.shape == size
        alone = generate(model, objective, [size], patch=PATCH, steps=3, generator=generator)[0]
        # DDPM divides by the little signal of its first step, so rounding grows with what it makes
        torch.testing.assert_close(got, alone, atol=1e-5 * float(alone.abs().max() + 1), rtol=2e-5)


def test_first_sample_does_not_depend_on_what_follows():
    model = Model(text=False)
    make = lambda sizes: generate(model, FlowMatching(), sizes, patch=PATCH, steps=2,
                                  generator=torch.Generator().manual_seed(5))[0]
    torch.testing.assert_close(make(SIZES), make(SIZES[:1]), atol=2e-5, rtol=2e-5)


def test_timesteps_of_a_pack_differ_by_tokens():
    model = Model(text=False)
    generate(model, FlowMatching(base_tokens=8), [(4, 1, 4, 4), (4, 4, 16, 16)], patch=PATCH, steps=4)
    _, timesteps = model.packs[1]
    assert timesteps.shape == (2,) and timesteps[1] > timesteps[0] + 50


def test_guidance():
    """1.0 is the conditional prediction alone; otherwise one doubled pack and null + g (wanted - null)."""
    given, null = captions([3, 5, 1], 1), captions([1, 1, 1], 2)
    asked = []

    def condition(nothing):
        asked.append(nothing)
        return dict(text=null if nothing else given)

    make = lambda model, g, steps=1: torch.cat([part.flatten() for part in generate(
        model, FlowMatching(), SIZES, patch=PATCH, steps=steps, guidance=g, condition=condition,
        generator=torch.Generator().manual_seed(3))])
    model = Model()
    plain = make(model, 1.0)
    assert asked == [False] and model.packs[0][0].num_samples == 3
    guided = Model()
    three = make(guided, 3.0)
    assert [pack.num_samples for pack, _ in guided.packs] == [6]
    assert guided.packs[0][0].grids == model.packs[0][0].grids * 2
    assert torch.equal(guided.packs[0][1], model.packs[0][1].repeat(2))
    # one Euler step is linear in the prediction, so the formula shows in the result
    zero = make(Model(), 0.0)
    torch.testing.assert_close(three, zero + 3 * (plain - zero), atol=1e-4, rtol=1e-4)
    assert (three - plain).abs().max() > 1e-2
    assert not torch.allclose(make(Model(), 3.0, steps=2), three)


def test_guidance_with_labels_and_absent_conditions():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(width=32, depth=1, heads=2, patch=PATCH, in_channels=4, classes=7, rope_axes=(4, 6, 6))).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    condition = lambda null: dict(labels=torch.full((2,), 7) if null else torch.tensor([1, 2]), text=None)
    made = generate(dit, FlowMatching(), SIZES[:2], patch=PATCH, steps=2, guidance=2.0, condition=condition)
    assert [m.shape for m in made] == SIZES[:2]


def test_progress_and_nothing_to_make():
    ticks = []
    model = lambda flat, timesteps, pack: flat
    assert generate(model, FlowMatching(), [], patch=PATCH) == []
    generate(model, FlowMatching(), SIZES[:1], patch=PATCH, steps=3, progress=lambda *tick: ticks.append(tick))
    assert ticks == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("call, sentence", [
    (lambda: FlowMatching("x1"), "FlowMatching: expected prediction to be .*, got 'x1'; choose"),
    (lambda: FlowMatching(timesteps="normal"), "expected timesteps to be .*, got 'normal'; choose"),
    (lambda: FlowMatching(shift=0), "expected shift to be 'tokens' or a number above 0, got 0; "),
    (lambda: FlowMatching(shift="token"), "expected shift to be .*, got 'token'; "),
    (lambda: FlowMatching(shift=math.nan), "expected shift to be .*, got nan; "),
    (lambda: FlowMatching(base_tokens=0), "expected base_tokens of 1 or more, got 0; "),
    (lambda: DDPM("epsilon"), "DDPM: expected prediction to be .*, got 'epsilon'; choose"),
    (lambda: DDPM(schedule="sqrt"), "DDPM: expected schedule to be .*, got 'sqrt'; choose"),
    (lambda: make_objective("edm"), "expected 'flow' or 'ddpm', got 'edm'; choose"),
    (lambda: generate(None, FlowMatching(), [(4, 1, 3, 4)], patch=PATCH), "multiples of the patch .*, got .4, 1, 3, 4.; "),
    (lambda: generate(None, FlowMatching(), [(1, 4, 4)], patch=PATCH), "expected latent sizes .C, T, H, W."),
    (lambda: generate(None, FlowMatching(), [(4, 0, 4, 4)], patch=PATCH), "multiples of the patch"),
    (lambda: generate(None, FlowMatching(), SIZES, patch=PATCH, steps=0), "expected steps of 1 or more, got 0; "),
    (lambda: generate(None, FlowMatching(), SIZES, patch=PATCH, guidance=2.0), "expected a condition for guidance 2.0"),
])
def test_wrong_arguments_get_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_missing_sampler_library_gets_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="expected the diffusers package .* got none .*; run pip install"):
        FlowMatching().scheduler(5, 10)
    with pytest.raises(ImportError, match="pip install"):
        DDPM()
