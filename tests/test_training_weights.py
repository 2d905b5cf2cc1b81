"""A step's loss and gradient are means over what is learned in it, however its samples are cut into packs."""

from dataclasses import replace

import pytest
import torch
from training_checks import Numbers, little, step_of, tiny_dit, tiny_vae, write_media

from sora_fast.diffusion import FrameTimesteps, make_objective
from sora_fast.training import checkpoint, distributed
from sora_fast.training.latents import LatentClip, NoisyBatch, PackPlan

for package in ("safetensors", "av", "PIL"):
    pytest.importorskip(package, reason="the train extra is not installed")


def clips():
    """80, 4 and 24 tokens of a patch of (1, 2, 2)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 8, 8), (1, 4, 4), (2, 8, 6)]
    return [LatentClip(torch.randn(16, *size, generator=generator), f"caption {i}", f"{i}.mp4", 0, 4 * size[0] - 3, 8.0)
            for i, size in enumerate(sizes)]


def drawn_by_sample(batch, generator):
    """Noise, timestep and clean frames that depend on the sample alone."""
    numbers = [int(source.partition(".")[0]) for source in batch.sources]
    each = [checkpoint.generator(0, "sample", number) for number in numbers]
    noise = torch.cat([torch.randn(count, generator=g) for count, g in zip(batch.counts, each, strict=True)])
    clean = [torch.arange(frames) < (2 if frames == 5 else 0) for frames, _, _ in batch.grids]
    return NoisyBatch(batch, noise, torch.tensor([100.0 + 300 * number for number in numbers]), torch.cat(clean))


def step_of_packs(trainer, plans):
    """(loss, gradients) of a step made of these plans; the learning rate is 0, so that the weights stay."""
    trainer.packs_per_step, trainer.batches.next = len(plans), iter(plans).__next__
    return step_of(trainer)


STILL = dict(heldout=0, clip=0, lr=0.0)


def same_gradients(one, two):
    """To the rounding of float32 sums of some ten thousand elements in another order."""
    assert one.keys() == two.keys() and any(float(value.abs().max()) for value in one.values())
    scale = max(float(value.abs().max()) for value in two.values())
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) <= 1e-4 * scale, name


@pytest.mark.parametrize("settings", [dict(), dict(prediction="x0"), dict(objective="ddpm", learn_sigma=True)], ids=str)
def test_a_step_is_one_number_however_it_is_packed(tmp_path, settings):
    if "objective" in settings:
        pytest.importorskip("diffusers", reason="the train extra is not installed")
    trainer = tiny_dit(tmp_path, clips(), budget=108, **STILL, **settings)
    trainer.draw = drawn_by_sample
    packs = lambda *packs: [PackPlan(number, tuple(f"{clip}:{clip}" for clip in pack)) for number, pack in enumerate(packs)]
    loss, gradients = step_of_packs(trainer, packs((0, 1, 2)))
    for plans in (packs((0,), (1, 2)), packs((1,), (0,), (2,))):
        other, others = step_of_packs(trainer, plans)
        assert other == pytest.approx(loss, rel=1e-5)
        same_gradients(others, gradients)
    # By hand: samples one by one, each with the elements that are not given clean.
    whole = trainer.drawn(*packs((0, 1, 2)))
    weights = [3 * 8 * 8 * 16, 4 * 4 * 16, 2 * 8 * 6 * 16]  # the first is given two of its five frames
    each = [float(trainer.loss(whole.only(i))[0].detach()) for i in range(3)]
    assert whole.learned == sum(weights)
    by_hand = sum(w * value for w, value in zip(weights, each, strict=True)) / sum(weights)
    assert loss == pytest.approx(by_hand, rel=1e-5)
    assert abs(sum(each) / 3 - by_hand) > 1e-3 * by_hand  # else equal weights would pass too


def test_one_pack_steps_as_before(tmp_path):
    """Its weight is exactly 1, so that no bit of a run with one pack a step depends on it."""
    trainer = little(tmp_path, batches=Numbers(size=3), clip=0)
    plan = Numbers(size=3).next()
    trainer.loss(trainer.drawn(plan))[0].backward()
    wanted = {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}
    trainer.optimizer.zero_grad(set_to_none=True)
    _, gradients = step_of(trainer)
    assert all(torch.equal(gradients[name], value) for name, value in wanted.items()) and wanted


def test_crops_weigh_by_their_pixels(tmp_path):
    write_media(tmp_path)
    trainer = tiny_vae(tmp_path / "run", tmp_path, image_share=0.5, **STILL)
    trainer.draw = lambda crops, generator: replace(crops, noise=torch.zeros(2, 16, 1 + crops.video.shape[2] // 4, 4, 4))
    plans = [trainer.batches.plan(number) for number in range(12)]
    both = [next(plan for plan in plans if plan.frames == frames) for frames in (5, 1)]
    steps = {name: step_of_packs(trainer, chosen) for name, chosen in dict(clip=both[:1], image=both[1:], both=both).items()}
    share = 5 / 6  # two crops of five frames beside two of one
    assert steps["both"][0] == pytest.approx(share * steps["clip"][0] + (1 - share) * steps["image"][0], rel=1e-5)
    assert abs(steps["clip"][0] - steps["image"][0]) > 1e-3
    same_gradients(steps["both"][1], {name: share * value + (1 - share) * steps["image"][1][name]
                                      for name, value in steps["clip"][1].items()})


def test_a_pack_that_is_all_clean_teaches_nothing():
    frames = FrameTimesteps(torch.tensor([500.0]), torch.ones(2, dtype=torch.bool), [32], [(2, 2, 2)], 4)
    predicted, x0 = torch.randn(32, requires_grad=True), torch.randn(32)
    loss = frames.loss(make_objective("flow"), predicted, x0, torch.randn(32))
    loss.backward()
    assert loss == 0 and torch.equal(predicted.grad, torch.zeros(32))


def test_ranks_whose_gradients_are_averaged_make_the_same_step(tmp_path, monkeypatch):
    """Two ranks with 1 + 3 and 2 + 4 rows, as DDP and FSDP2 bring them together; tests/test_distributed.py has real ones."""
    settings = dict(accumulate=4, clip=0, lr=0.0)
    loss, gradients = step_of(little(tmp_path / "one", batches=Numbers(uneven=True), **settings))
    ranks = []
    for rank in range(2):
        trainer = little(tmp_path / str(rank), batches=Numbers(uneven=True), **settings)
        with monkeypatch.context() as patched:
            patched.setattr(distributed, "size", lambda: 2)
            patched.setattr(distributed, "share", lambda values, rank=rank: values[rank::2])
            patched.setattr(distributed, "sum_of", lambda *numbers: [10.0] if len(numbers) == 1 else list(numbers))
            ranks.append(step_of(trainer))
    assert sum(part for part, _ in ranks) == pytest.approx(loss, rel=1e-5)
    same_gradients({name: (ranks[0][1][name] + ranks[1][1][name]) / 2 for name in gradients}, gradients)
