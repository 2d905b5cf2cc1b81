"""Images and clips as prompts: given frames, seams, SDEdit, guidance, training with clean frames, and the command."""

import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from cli_checks import refused
from training_checks import QUIET

from sora_fast.diffusion import (
    FlowMatching,
    FrameTimesteps,
    Known,
    MediaPrompt,
    draw_clean_frames,
    generate,
    jumps,
    make_objective,
    place,
    sampling,
)
from sora_fast.models import DiT, DiTConfig, VideoVAE
from sora_fast.models.text import Text

pytest.importorskip("diffusers", reason="the train extra is not installed")

PATCH = (1, 2, 2)
SIZES = [(4, 4, 4, 6), (4, 1, 8, 4), (4, 3, 2, 2), (4, 5, 4, 4)]


class Model:
    """A DiT of a few thousand weights that attends; records what it is called with."""

    def __init__(self, text=False, **config):
        torch.manual_seed(0)
        self.dit = DiT(DiTConfig(**dict(width=32, depth=2, heads=2, patch=PATCH, in_channels=4, text_width=8 if text else 0,
                                        rope_axes=(4, 6, 6)) | config)).eval()
        for parameter in self.dit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.calls = []

    def __call__(self, flat, timesteps, pack, **conditions):
        self.calls.append((flat.clone(), timesteps, pack))
        return self.dit(flat, timesteps, pack, **conditions)


def captions(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(1 + i % 3 for i in range(count))
    return Text(torch.randn(sum(lengths), 8, generator=generator), torch.randn(count, 8, generator=generator), lengths)


def random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def seeds(count=4, first=5):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def known_of(mode, size, seed=0):
    """What each mode knows of a sample of ``size``."""
    part = lambda frames, more=0: random(size[0], frames, *size[2:], seed=seed + more)
    return {"text": lambda: None,
            "image": lambda: place(size, start=part(1)),
            "after": lambda: place(size, start=part(size[1] - 1)),
            "before": lambda: place(size, end=part(size[1] - 1)),
            "between": lambda: place(size, part(1), part(1, 1)),
            "edit": lambda: Known(part(size[1]), (False,) * size[1], 0.6),
            "edit, first kept": lambda: Known(part(size[1]), (True,) + (False,) * (size[1] - 1), 0.6)}[mode]()


MODES = ("text", "image", "after", "before", "between", "edit", "edit, first kept")


def make(model, known, kind="flow", sizes=SIZES, steps=3, **more):
    return generate(model, make_objective(kind), sizes, patch=PATCH, steps=steps, known=known,
                    **dict(generator=seeds(len(sizes))) | more)


# ---- Known frames in the sampler


def assert_kept(made, known):
    for sample, k in zip(made, known, strict=True):
        if k is not None:
            kept = torch.tensor(k.kept)
            assert torch.equal(sample[:, kept], k.latents[:, kept])
            assert sample.shape == k.latents.shape and sample.isfinite().all()


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_given_frames_come_out_bit_for_bit(mode, guidance, kind):
    known = [known_of(mode, SIZES[0]), None, known_of(mode, SIZES[2], 3), known_of(mode, SIZES[3], 6)]
    condition = (lambda null: dict(text=captions(4, 9 if null else 8))) if guidance != 1 else None
    made = make(Model(text=guidance != 1), known, kind, guidance=guidance, condition=condition)
    assert_kept(made, known)
    if mode == "between":
        assert known[0].kept == (True, False, False, True)
        assert not torch.equal(made[0][:, 1], made[0][:, 2])


def test_the_check_of_given_frames_can_fail(monkeypatch):
    known = [place(SIZES[0], start=random(4, 2, 4, 6)), None, None, None]
    begin = sampling._begin
    monkeypatch.setattr(sampling, "_begin", lambda *a: (*begin(*a)[:2], torch.zeros_like(begin(*a)[2])))
    with pytest.raises(AssertionError):
        assert_kept(make(Model(), known), known)


def test_the_model_sees_given_frames_clean_at_time_zero():
    known = [place(SIZES[0], random(4, 1, 4, 6), random(4, 2, 4, 6, seed=1)), None, known_of("edit", SIZES[2]), None]
    model = Model()
    make(model, known, steps=4)
    for flat, timesteps, pack in model.calls:
        assert pack.modulation == "frame" and timesteps.shape == (pack.num_rows,)
        assert [t == 0 for t in timesteps.tolist()] == [True, False, True, True] + 9 * [False]
        first = flat[: math.prod(SIZES[0])].view(SIZES[0])
        assert torch.equal(first[:, [0, 2, 3]], known[0].latents[:, [0, 2, 3]])
        others = timesteps[4:]
        assert len({*others[1:4].tolist()}) == 1  # one timestep within a sample
    alone = Model()
    make(alone, [None] * 4)
    assert alone.calls[0][2].modulation == "sample" and alone.calls[0][1].shape == (4,)


def test_samples_of_a_mixed_pack_do_not_see_each_other():
    modes = ("image", "text", "edit", "between")
    known = [known_of(mode, size) for mode, size in zip(modes, SIZES, strict=True)]
    made = make(Model(), known)
    for changed in (0, 2, 3):
        other = list(known)
        other[changed] = replace(known[changed], latents=known[changed].latents + 1)
        again = make(Model(), other)
        for index in range(4):
            assert torch.equal(made[index], again[index]) == (index != changed)
    free = ~torch.tensor(known[0].kept)
    assert not torch.equal(make(Model(), [replace(known[0], latents=known[0].latents + 1), *known[1:]])[0][:, free],
                           made[0][:, free])  # the given frame is looked at
    for index, size in enumerate(SIZES):
        alone = make(Model(), [known[index]], sizes=[size], generator=[torch.Generator().manual_seed(5 + index)])[0]
        torch.testing.assert_close(alone, made[index], atol=2e-5, rtol=2e-5)


def test_seeds():
    known = [known_of("image", SIZES[0]), None, None, known_of("edit", SIZES[3])]
    one, two = make(Model(), known), make(Model(), known)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    three = make(Model(), known, generator=[*seeds(3), torch.Generator().manual_seed(99)])
    assert [torch.equal(a, b) for a, b in zip(one, three, strict=True)] == [True, True, True, False]
    shared = make(Model(), known, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(shared[0], one[0], atol=2e-5, rtol=2e-5)  # the first of one generator for all


def noise_towards(objective, x0, rows_of):
    """A model that knows the clean latents and predicts what the objective asks for, at its own rows' timesteps."""
    def model(flat, timesteps, pack):
        t = timesteps[rows_of] if pack.modulation == "frame" else timesteps.new_full(x0.shape, float(timesteps[0]))
        ones = torch.ones(len(x0), dtype=torch.int64)
        if isinstance(objective, FlowMatching):
            noise = (flat - (1 - t / 1000) * x0) / (t / 1000).clamp(min=1e-6)
        else:
            a = objective.alphas[t.long()]
            noise = (flat - a.sqrt() * x0) / (1 - a).sqrt()
        return objective.target(x0, noise, t, ones)
    return model


@pytest.mark.parametrize("kind, prediction", [("flow", "velocity"), ("flow", "x0"), ("ddpm", "velocity"), ("ddpm", "x0")])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_an_oracle_recovers_the_frames_between(kind, prediction, strength):
    size, objective = (4, 4, 4, 6), make_objective(kind, prediction)
    x0 = random(*size)
    rows_of = torch.arange(4).repeat_interleave(24).repeat(4)
    for kept in ((True, False, False, True), (False,) * 4):
        guess = x0 if strength == 1.0 else x0 + 0.1 * ~torch.tensor(kept)[None, :, None, None]
        made = generate(noise_towards(objective, x0.flatten(), rows_of), objective, [size], patch=PATCH, steps=4,
                        known=[Known(guess, kept, strength)], generator=torch.Generator().manual_seed(1))[0]
        torch.testing.assert_close(made, x0, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_strength_is_where_an_edit_begins(kind):
    size, objective = SIZES[0], make_objective(kind)
    source, noise = random(*size, seed=3), random(*size, seed=4)
    far = []
    for strength in (0.1, 0.5, 5 / 6):
        model = Model()
        made = generate(model, objective, [size], patch=PATCH, steps=5,
                        known=[Known(source, (False,) * 4, strength)], generator=torch.Generator().manual_seed(4))[0]
        flat, timesteps, _ = model.calls[0]
        assert len(model.calls) == 5  # all steps, whatever the strength
        assert float(timesteps[0]) == pytest.approx(1000 * strength, abs=2)  # 24 tokens are not shifted
        count = torch.tensor([flat.numel()])
        assert torch.equal(flat, objective.add_noise(source.flatten(), noise.flatten(), timesteps, count))
        far.append(float((made - source).square().mean()))
    assert far[0] < far[1] < far[2] and far[0] < 0.3


# ---- Guidance


@pytest.mark.parametrize("mode", MODES)
def test_guidance_in_every_mode(mode):
    """One Euler step is linear in the prediction: null + g (wanted - null) shows in the result."""
    known = [known_of(mode, SIZES[0]), None, None, None]
    condition = lambda null: dict(text=captions(4, 9 if null else 8))
    by = {g: make(Model(text=True), known, steps=1, guidance=g, condition=condition)[0] for g in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(by[3.0], by[0.0] + 3 * (by[1.0] - by[0.0]), atol=2e-4, rtol=1e-4)
    assert (by[3.0] - by[1.0]).abs().max() > 1e-2


def test_guided_channels_and_a_learned_variance():
    """As in the official DiT: the first channels guided, the others as the condition alone; of 2 C channels the first C."""
    sizes, condition = [(4, 1, 4, 4), (4, 2, 4, 4)], lambda null: dict(labels=torch.tensor([7, 7] if null else [1, 2]))
    config = dict(classes=7, learn_sigma=True)
    run = lambda **more: make(Model(**config), [None, place(sizes[1], start=random(4, 1, 4, 4))], sizes=sizes, steps=1,
                              condition=condition, **more)
    plain, guided, three = run(), run(guidance=4.0), run(guidance=4.0, guided_channels=3)
    for sample, all_guided, part in zip(plain, guided, three, strict=True):
        torch.testing.assert_close(part[:3], all_guided[:3])
        torch.testing.assert_close(part[3:], sample[3:], atol=1e-5, rtol=1e-5)
        assert (all_guided[3:, -1] - sample[3:, -1]).abs().max() > 1e-2
    model = Model(**config)

    def mean_only(flat, timesteps, pack, **conditions):
        out = model(flat, timesteps, pack, **conditions)
        return torch.cat([part[: part.numel() // 2] for part in out.split([2 * math.prod(size) for size in sizes])])

    again = make(mean_only, [None, place(sizes[1], start=random(4, 1, 4, 4))], sizes=sizes, steps=1, condition=condition)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ---- Training with clean frames

GRIDS = ((4, 2, 3), (1, 4, 2), (2, 1, 1), (5, 2, 2))
COUNTS = [4 * t * h * w * 4 for t, h, w in GRIDS]


def test_clean_frames_are_drawn_in_every_way():
    generator = torch.Generator().manual_seed(0)
    seen, some = set(), 0
    for _ in range(400):
        clean = draw_clean_frames(GRIDS, 0.5, generator)
        for part, (frames, _, _) in zip(clean.split([t for t, _, _ in GRIDS]), GRIDS, strict=True):
            assert not part.all()  # something is left to learn
            some += bool(part.any())
            assert frames > 1 or not part.any()
            if frames == 4:
                seen.add(tuple(part.tolist()))
    assert 0.45 < some / 1200 < 0.55
    of = lambda text: tuple(letter == "x" for letter in text)
    assert seen == {of(t) for t in ("....", "x...", "xx..", "xxx.", "...x", "..xx", ".xxx", "x..x", "xx.x", "x.xx")}
    assert not draw_clean_frames(GRIDS, 0.0, generator).any()
    assert draw_clean_frames(GRIDS, 1.0, generator).split([4, 1, 2, 5])[3].any()
    assert draw_clean_frames((), 0.5, generator).shape == (0,)


@pytest.mark.parametrize("kind, prediction", [("flow", "velocity"), ("flow", "x0"), ("ddpm", "noise")])
def test_clean_frames_are_not_noised_and_leave_the_loss(kind, prediction):
    objective = make_objective(kind, prediction)
    timesteps = torch.tensor([100.0, 900.0, 480.0, 700.0])
    clean = torch.tensor([1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0]).bool()
    frames = FrameTimesteps(timesteps, clean, COUNTS, GRIDS, 4)
    x0, noise = random(sum(COUNTS)), random(sum(COUNTS), seed=1)
    assert frames.timesteps.tolist() == [0, 100, 100, 0, 900, 480, 0, 0, 0, 700, 700, 700]
    noisy = frames.add_noise(objective, x0, noise)
    plain = objective.add_noise(x0, noise, timesteps, torch.tensor(COUNTS))
    wrong = random(sum(COUNTS), seed=2)
    total, numbers = 0.0, 0
    rows = clean.split([t for t, _, _ in GRIDS])
    for index, (t, h, w) in enumerate(GRIDS):  # sample by sample and frame by frame, as (C, T, H, W)
        shape = (4, t, 2 * h, 2 * w)
        for frame in range(t):
            cut = [flat.split(COUNTS)[index].view(shape)[:, frame] for flat in (noisy, x0, plain, wrong, noise)]
            if rows[index][frame]:
                assert torch.equal(cut[0], cut[1])
                continue
            assert torch.equal(cut[0], cut[2])
            one, count = timesteps[index : index + 1], torch.tensor([cut[0].numel()])
            total += float(objective.loss(cut[3].flatten(), cut[1].flatten(), cut[4].flatten(), one, count)) * cut[0].numel()
            numbers += cut[0].numel()
    tail = torch.cat([wrong, torch.full((7,), math.nan)])  # of a pack: never read
    assert float(frames.loss(objective, tail, x0, noise)) == pytest.approx(total / numbers, rel=1e-5)
    everything = float(objective.loss(wrong, x0, noise, timesteps, torch.tensor(COUNTS)))
    assert everything != pytest.approx(total / numbers, rel=1e-3)
    with pytest.raises(ValueError, match="expected timesteps of 4 samples and clean of 12 frames, got .4,. and .3,.; pass"):
        FrameTimesteps(timesteps, clean[:3], COUNTS, GRIDS, 4)


def tiny_trainer(out, vae=None, **settings):
    from sora_fast.training import dit as task
    from sora_fast.training.config import DiTTraining
    from sora_fast.training.latents import LatentClip

    clips = [LatentClip(random(16, *size, seed=i), f"caption {i}", f"{i}.mp4", 0, 4 * size[0] - 3, 8.0)
             for i, size in enumerate([(3, 4, 6), (1, 6, 6), (2, 4, 4)])]
    config = DiTTraining(**dict(out=str(out), budget=40, look_ahead=6, warmup=1, log_every=1, steps=2, frames=9,
                                short_side=32, fps=8.0, heldout=0.0, **QUIET) | settings)
    small = replace(task.PRESETS["tiny"], width=48, depth=2, heads=2, rope_axes=(8, 8, 8))
    before, task.PRESETS["tiny"] = task.PRESETS["tiny"], small
    try:
        return task.make_trainer(config, vae or VideoVAE.preset("tiny", width=4), clips)
    finally:
        task.PRESETS["tiny"] = before


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_training_shows_the_model_clean_frames(tmp_path, share):
    """They reach the model as they are, at t = 0, and no gradient comes back from what it says of them."""
    pytest.importorskip("safetensors", reason="the train extra is not installed")
    trainer = tiny_trainer(tmp_path, steps=12, clean_frames=share, precision="fp32")
    dit, seen = trainer.modules["dit"], []
    forward = dit.forward

    def watched(flat, timesteps, pack, **conditions):
        predicted = forward(flat, timesteps, pack, **conditions)
        predicted.register_hook(lambda grad: seen.append((timesteps, pack, grad)))
        return predicted

    dit.forward = watched
    trainer.run()
    zeros = 0
    for timesteps, pack, grad in seen:
        assert timesteps.shape == (pack.num_rows,)
        place = 0
        for index, (t, h, w) in enumerate(pack.grids):
            count = 16 * 4 * t * h * w
            part = grad[place : place + count].view(16, t, -1)
            for row, frame in enumerate((pack.row_samples == index).nonzero()[:, 0].tolist()):
                assert bool((part[:, row] == 0).all()) == (float(timesteps[frame]) == 0)
                zeros += float(timesteps[frame]) == 0
            place += count
    assert len(seen) == 12 and (zeros > 12) == (share == 1.0)


def test_the_share_of_clean_frames_is_checked():
    from sora_fast.training.config import DiTTraining

    assert DiTTraining().clean_frames == 0.25
    with pytest.raises(ValueError, match="clean_frames: expected 0 to 1, got 1.5; change"):
        DiTTraining(clean_frames=1.5)


# ---- Pixels: encoding given frames, and putting them back


def moving(frames, size=(32, 32), seed=0, speed=2):
    """A uint8 clip of a smooth picture that moves to the right."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (size[0], size[1] + frames * speed), mode="bicubic")[0].clamp(0, 1)
    return torch.stack([wide[:, :, speed * i : speed * i + size[1]].permute(1, 2, 0).mul(255).round().byte()
                        for i in range(frames)])


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VideoVAE.preset("tiny", width=4).eval()


def test_known_latents_of_pixels(vae):
    from sora_fast.data import to_pixels

    clip = moving(17)
    encode = lambda frames: vae.encode(to_pixels(frames)[None])[0].detach()
    first = MediaPrompt.after(clip[:1], 4).known(vae, 9)
    assert first.kept == (True, False, False)
    torch.testing.assert_close(first.latents[:, :1], encode(clip[:1]))
    after = MediaPrompt.after(clip[:7], 4)  # the last 5 of 7
    assert torch.equal(after.start, clip[2:7])
    torch.testing.assert_close(after.known(vae, 9).latents[:, :2], encode(clip[2:7]))
    before = MediaPrompt.before(clip[:6], 4)  # the first 4 of 6, behind a still of 5
    assert torch.equal(before.end, clip[:4]) and before.known(vae, 9).kept == (False, False, True)
    still = clip[:1].expand(5, -1, -1, -1)
    torch.testing.assert_close(before.known(vae, 9).latents[:, 2], encode(torch.cat([still, clip[:4]]))[:, 2])
    both = MediaPrompt.between(clip[:5], clip[9:13], 4)
    assert both.known(vae, 17).kept == (True, True, False, False, True)
    loop = MediaPrompt.loop(clip[:5], 4)
    assert loop.cut == 4 and loop.known(vae, 9).kept == (True, True, False, True)
    assert torch.equal(loop.end, clip[:4])
    image = MediaPrompt.loop(clip[:1], 4)  # held for a latent frame at the end
    assert image.known(vae, 9).kept == (True, False, False, True) and image.given(4) == (1, 4)
    edit = MediaPrompt.edit(clip[:9], 0.5).known(vae, 9)
    assert edit.strength == 0.5 and not any(edit.kept)
    torch.testing.assert_close(edit.latents, encode(clip[:9]))


def test_last_frames_are_encoded_nearly_as_with_their_past(vae):
    """A past at rest in place of the real one: the linear path, which carries the picture, does not see it at all."""
    from sora_fast.data import to_pixels

    clip = moving(17, speed=1)
    real = vae.encode(to_pixels(clip)[None])[0].detach()[:, 3:]
    known = MediaPrompt.before(clip[9:], 4).known(vae, 17).latents[:, 3:]
    moved = MediaPrompt.before(clip[9:], 4).known(vae, 13).latents[:, 2:]
    spread = float(real.std())
    assert float((known - real).square().mean().sqrt()) < 0.02 * spread
    assert float((moved - real).square().mean().sqrt()) < 0.2 * spread


def finished(prompt, decoded):
    return prompt.finish(decoded, 4)


def assert_joined(prompt, clip):
    """No step at a seam is larger than the given clip's own."""
    seams = prompt.seams(clip, 4)
    assert seams
    for seam in seams:
        assert seam.largest is None or seam.jump <= seam.largest, seam


PROMPTS = [("after", lambda clip: MediaPrompt.after(clip[:5], 4)), ("before", lambda clip: MediaPrompt.before(clip[:8], 4)),
           ("between", lambda clip: MediaPrompt.between(clip[:5], clip[8:12], 4)),
           ("loop", lambda clip: MediaPrompt.loop(clip[:5], 4))]


@pytest.mark.parametrize("name, prompt", PROMPTS)
@pytest.mark.parametrize("frames", [13, 29])
@pytest.mark.parametrize("decoder", ["noise", "blurred"])
def test_given_pixels_and_seams(name, prompt, frames, decoder):
    """Whatever the model and the decoder make: given frames are themselves, and no seam is larger than a real step."""
    prompt = prompt(moving(17))
    total = frames + prompt.cut
    noise = torch.randint(0, 256, (total, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    decoded = noise if decoder == "noise" else moving(total, seed=7).float().mul(0.8).byte()
    clip = finished(prompt, decoded)
    begin, end = prompt.given(4)
    assert clip.shape == (frames, 32, 32, 3) and clip.dtype == torch.uint8
    if begin:
        assert torch.equal(clip[:begin], prompt.start)
    if end and not prompt.cut:
        assert torch.equal(clip[-end:], prompt.end)
    assert_joined(prompt, clip)
    plain = decoded[:frames].clone()  # planted: given frames pasted in, and no more
    if begin:
        plain[:begin] = prompt.start
    if end and not prompt.cut:
        plain[-end:] = prompt.end
    with pytest.raises(AssertionError):
        assert_joined(prompt, plain)
    if frames == 29:  # far from the seams nothing is touched
        middle = slice(begin + 8, total - end - 8)
        assert torch.equal(clip[middle], decoded[middle]) and clip[middle].shape[0] > 0


def test_the_decoders_residual_fades_linearly():
    image = moving(1)
    decoded = moving(13).clamp(40, 200)
    decoded[0] = image[0].clamp(40, 200) // 2 + 30
    clip = finished(MediaPrompt.after(image, 4), decoded)
    missed = image[0].float() - decoded[0].float()
    for distance in range(1, 13):
        share = max(0.0, 1 - distance / 9)
        want = (decoded[distance].float() + share * missed).round().clamp(0, 255).byte()
        assert torch.equal(clip[distance], want), distance
    assert torch.equal(clip[0], image[0])
    same = decoded.clone()
    same[0] = image[0]
    assert torch.equal(finished(MediaPrompt.after(image, 4), same), same)  # a perfect decoder is left alone


def test_a_seam_within_the_clips_own_steps_is_left_alone():
    clip = moving(13)
    small = torch.cat([clip[:5], clip[4:5].int().sub(1).clamp(0).byte().expand(8, -1, -1, -1)])
    prompt = MediaPrompt.after(clip[:5], 4)
    assert torch.equal(finished(prompt, small), small)
    assert prompt.seams(small, 4)[0].jump == pytest.approx(float(jumps(small)[4]))
    held = MediaPrompt.before(clip[:1], 4)  # an image has no steps of its own to compare with
    assert held.seams(finished(held, clip), 4)[0].largest is None
    assert torch.equal(finished(held, clip)[-4:], clip[:1].expand(4, -1, -1, -1))
    edit = MediaPrompt.edit(clip, 0.5)
    assert torch.equal(finished(edit, clip), clip) and edit.seams(clip, 4) == []


@pytest.mark.parametrize("call, sentence", [
    (lambda v: Known(random(4, 2, 4, 4), (True,)), "Known: expected floating latents .* got .* and 1 of kept; "),
    (lambda v: Known(random(4, 1, 4, 4), (True,), 0.0), "expected strength above 0 and at most 1, got 0.0; "),
    (lambda v: place((4, 3, 4, 4)), "place: expected 1 to 3 latent frames to place, got 0 and 0; "),
    (lambda v: place((4, 3, 4, 4), random(4, 2, 4, 4), random(4, 2, 4, 4)), "got 2 and 2; "),
    (lambda v: place((4, 3, 4, 4), random(4, 2, 4, 6)), "4 x 4, as the sample, got .4, 2, 4, 6.; "),
    (lambda v: make(None, [None]), "expected known for 4 samples, got 1; "),
    (lambda v: make(None, [known_of("image", SIZES[3]), None, None, None]), "known latents of the sample's size .*; place"),
    (lambda v: make(None, None, generator=seeds(3)), "one generator, or one per sample .4., got 3; "),
    (lambda v: make(None, None, guided_channels=5), "guided_channels of 1 to 4, got 5; "),
    (lambda v: make(None, [Known(random(*SIZES[0]), (False,) * 4, 0.001), None, None, None]), "steps / strength of at most"),
    (lambda v: generate(None, FlowMatching(), [SIZES[0]], patch=(2, 2, 2),
                        known=[place(SIZES[0], start=random(4, 1, 4, 6))]), "kept frames in whole patches of 2, got .True"),
    (lambda v: MediaPrompt(), "MediaPrompt: expected start, end or both, or source alone, got 0 clips; "),
    (lambda v: MediaPrompt(start=moving(1), source=moving(9)), "or source alone, got 2 clips; "),
    (lambda v: MediaPrompt(start=moving(1).float()), "expected uint8 clips .T, H, W, 3., got torch.float32 of"),
    (lambda v: MediaPrompt.between(moving(1), moving(4, (32, 48)), 4), "clips of one size, got .32, 32. and .32, 48.; "),
    (lambda v: MediaPrompt.before(moving(3), 4), "an image or at least 4 frames to end with, got 3; "),
    (lambda v: MediaPrompt(start=moving(4)).known(v, 9), "expected 1 . 4 k first and 4 m last frames, got 4 and 0; "),
    (lambda v: MediaPrompt.after(moving(9), 4).known(v, 9), "leave some to generate, got 9 given of 9; "),
    (lambda v: MediaPrompt.edit(moving(5), 0.5).known(v, 9), "a source of the sample's 9 frames, got 5; "),
])
def test_wrong_arguments_get_a_sentence(vae, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(vae)


# ---- The command


@pytest.fixture(scope="module")
def files(tmp_path_factory, vae):
    """A run folder of a tiny model, two clips and an image."""
    for package in ("av", "PIL", "safetensors"):
        pytest.importorskip(package, reason="the train extra is not installed")
    from sora_fast.data import write_image, write_video

    root = tmp_path_factory.mktemp("generation")
    trainer = tiny_trainer(root / "run", vae)
    trainer.run()
    paths = Namespace(run=root / "run", one=root / "one.mp4", two=root / "two.mp4", short=root / "short.mp4",
                      image=root / "image.png")
    write_video(paths.one, moving(20, (40, 48)), 8)
    write_video(paths.two, moving(20, (48, 40), seed=3), 8)
    write_video(paths.short, moving(3, (40, 48)), 8)
    write_image(paths.image, moving(1, (48, 64))[0])
    return paths


def read_pngs(folder):
    from sora_fast.data import probe, read_clip

    return torch.cat([read_clip(probe(path), frames=1) for path in sorted(folder.iterdir())])


def fitted(path, frames, start, size=(32, 32)):
    from sora_fast.data import probe, read_clip

    item = probe(path)
    return read_clip(item, frames=frames, start=start, fps=8.0, size=size)


def command(cli, files, out, *more, steps=2):
    code, said, wrong = cli("generate", files.run, "--prompt", "caption 0", "--out", out, "--steps", steps, "--device",
                            "cpu", *more)
    assert code == 0, wrong
    return said


def test_image_to_video(cli, files, tmp_path):
    said = command(cli, files, tmp_path, "--image", files.image, "--size", "9x32x32", "--png")
    clip = read_pngs(tmp_path / "sample-00")
    assert clip.shape == (9, 32, 32, 3) and torch.equal(clip[:1], fitted(files.image, 1, 0.0))
    assert "after the given start: neighbouring frames differ by" in said
    command(cli, files, tmp_path / "plain", "--image", files.image, "--size", "9x32x32", "--png", "--decoded")
    plain = read_pngs(tmp_path / "plain" / "sample-00")
    assert not torch.equal(plain[:1], clip[:1])
    command(cli, files, tmp_path, "--image", files.image, "--size", "5x32x32", "--png")
    assert len(list((tmp_path / "sample-01").iterdir())) == 5  # and what was there stays
    assert torch.equal(read_pngs(tmp_path / "sample-00"), clip)
    assert cli("generate", files.run, "--prompt", "a", "--size", "5x32x32", "--png", "--gif")[0] == 2
    command(cli, files, tmp_path / "end", "--image", files.image, "--size", "9x32x32", "--png", "--extend", "before")
    assert torch.equal(read_pngs(tmp_path / "end" / "sample-00")[-4:], fitted(files.image, 1, 0.0).expand(4, -1, -1, -1))


@pytest.mark.parametrize("more, frames, begin, end", [
    (["--extend", "after"], 9, (5, 15 / 8), None), (["--extend", "before"], 9, None, (4, 0.0)),
    (["--extend", "before", "--start", "0.5", "--given", "9"], 17, None, (8, 0.5)),
    (["--extend", "after", "--given", "8"], 17, (5, 15 / 8), None), (["--loop"], 9, (5, 0.0), None),
    (["--loop", "--start", "0.25", "--given", "1"], 9, (1, 0.25), None)])
def test_going_on_from_a_clip(cli, files, tmp_path, more, frames, begin, end):
    said = command(cli, files, tmp_path, "--clip", files.one, "--size", f"{frames}x32x32", "--png", *more)
    clip = read_pngs(tmp_path / "sample-00")
    assert len(clip) == frames
    real = jumps(fitted(files.one, 20, 0.0)).max()
    steps = []
    if begin:
        count, start = begin
        assert torch.equal(clip[:count], fitted(files.one, count, start))
        steps.append((clip[count - 1], clip[count]))
    if end:
        count, start = end
        assert torch.equal(clip[-count:], fitted(files.one, count, start))
        steps.append((clip[-count - 1], clip[-count]))
    if "--loop" in more:
        steps.append((clip[-1], clip[0]))
        assert "from the end to the beginning" in said
    if "--given" not in more or end:  # one frame given has no step of its own
        for one, other in steps:
            assert jumps(torch.stack([one, other])) <= real


def test_interpolation_edits_and_a_loop_of_a_caption(cli, files, tmp_path):
    from sora_fast.data import probe

    command(cli, files, tmp_path / "to", "--clip", files.one, "--to", files.two, "--size", "17x32x32", "--png")
    clip = read_pngs(tmp_path / "to" / "sample-00")
    assert torch.equal(clip[:5], fitted(files.one, 5, 15 / 8)) and torch.equal(clip[-4:], fitted(files.two, 4, 0.0))
    command(cli, files, tmp_path / "still", "--image", files.image, "--to", files.image, "--size", "9x32x32", "--png")
    assert read_pngs(tmp_path / "still" / "sample-00").shape[0] == 9
    command(cli, files, tmp_path / "edit", "--clip", files.one, "--strength", 0.5)  # the size as in training
    made = probe(tmp_path / "edit" / "sample-00.mp4")
    assert (made.frames, made.height, made.width, made.fps) == (9, 32, 32, 8.0)
    command(cli, files, tmp_path / "photo", "--image", files.image, "--strength", 0.5)
    assert probe(tmp_path / "photo" / "sample-00.png").height == 32
    said = command(cli, files, tmp_path / "loop", "--loop", "--size", "9x32x32", "--png", "--guidance", 2.0)
    assert len(list((tmp_path / "loop" / "sample-00").iterdir())) == 9 and "end to the beginning" in said


def test_several_samples_at_once_and_seeds(cli, files, tmp_path):
    """One flag for all or one for each; a sample is the same alone, with its own seed."""
    command(cli, files, tmp_path / "many", "--prompt", "caption 1", "--image", files.image, "--size", "9x32x32", "--size",
            "5x48x32", "--png", "--seed", 3)
    many = [read_pngs(tmp_path / "many" / f"sample-0{i}") for i in range(2)]
    assert [clip.shape[0] for clip in many] == [9, 5]
    command(cli, files, tmp_path / "one", "--image", files.image, "--size", "9x32x32", "--png", "--seed", 3)
    one = read_pngs(tmp_path / "one" / "sample-00")
    assert (one.int() - many[0].int()).abs().max() <= 1
    command(cli, files, tmp_path / "again", "--image", files.image, "--size", "9x32x32", "--png", "--seed", 3)
    assert torch.equal(read_pngs(tmp_path / "again" / "sample-00"), one)
    command(cli, files, tmp_path / "other", "--image", files.image, "--size", "9x32x32", "--png", "--seed", 4)
    assert not torch.equal(read_pngs(tmp_path / "other" / "sample-00"), one)


@pytest.mark.parametrize("more, parts", [
    (["--clip", "{one}"], ["what to do with --clip", "--extend after", "--strength"]),
    (["--clip", "{one}", "--image", "{image}"], ["--image or --clip, got both", "--to FILE"]),
    (["--clip", "{one}", "--loop", "--extend", "after"], ["one of --extend, --loop", "got --extend and --loop"]),
    (["--extend", "before"], ["--image FILE or --clip FILE for --extend, got none"]),
    (["--to", "{one}"], ["--clip FILE for --to, got none"]),
    (["--strength", "0.5"], ["--clip FILE for --strength, got none"]),
    (["--clip", "{one}", "--strength", "0"], ["--strength above 0 and at most 1, got 0"]),
    (["--clip", "{one}", "--strength", "nan"], ["--strength above 0", "got nan"]),
    (["--image", "nowhere.png"], ["a file for --image, got nowhere.png, which is not there"]),
    (["--image", "{one}"], ["an image for --image, got the clip", "give it as --clip"]),
    (["--clip", "{image}", "--loop"], ["a clip for --clip, got the image", "give it as --image"]),
    (["--image", "{image}", "--given", "4"], ["--given with --clip"]),
    (["--clip", "{one}", "--loop", "--given", "0"], ["--given of 1 frame or more, got 0"]),
    (["--image", "{image}", "--start", "1"], ["--start with --clip"]),
    (["--clip", "{one}", "--loop", "--start", "-1"], ["--start of 0 seconds or more, got -1"]),
    (["--clip", "{one}", "--loop", "--start", "9"], ["--start within the 2.50 s of", "got 9"]),
    (["--clip", "{one}", "--extend", "after", "--given", "9"], ["leave some of the 9 frames", "got 9"]),
    (["--clip", "{one}", "--extend", "before", "--given", "3"], ["at least 4 frames to lead to"]),
    (["--clip", "{short}", "--extend", "before"], ["at least 4 frames to lead to at 8 a second"]),
    (["--clip", "{short}", "--strength", "0.5"], ["a clip of the 9 frames", "got 3", "--size 1x32x32"]),
    (["--image", "{image}", "--size", "1x32x32"], ["one --size, or one per"]),
    (["--image", "{image}", "--image", "{image}", "--image", "{image}", "--size", "9x32x32"],
     ["one --size, or one per --image (3), got 2"]),
])
def test_wrong_flags_get_a_sentence(cli, files, tmp_path, more, parts):
    more = [part.format(**{name: str(path) for name, path in vars(files).items()}) for part in more]
    extra = ["--prompt", "b", "--prompt", "c"] if parts[0].startswith("one --size, or one per") and len(more) < 5 else []
    refused(cli("generate", files.run, "--prompt", "a", "--size", "9x32x32", "--out", tmp_path / "x", "--device", "cpu",
                *more, *extra), *parts)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("more, parts", [
    ([], ["--size TxHxW, got none"]),
    (["--image", "{image}", "--size", "1x32x32"], ["--size of at least 5 frames", "got 1", "--strength"]),
    (["--image", "{image}", "--to", "{image}", "--size", "5x32x32"], ["--size of at least 9 frames", "got 5"]),
    (["--loop", "--size", "1x32x32"], ["--size of at least 5 frames for --loop, got 1"]),
])
def test_wrong_sizes_get_a_sentence(cli, files, tmp_path, more, parts):
    more = [part.format(image=files.image) for part in more]
    refused(cli("generate", files.run, "--prompt", "a", "--out", tmp_path / "x", "--device", "cpu", *more), *parts)
    assert not (tmp_path / "x").exists()
