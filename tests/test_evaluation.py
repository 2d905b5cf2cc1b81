"""Figures of merit against other people's code and closed forms, the loss over timesteps, streams, sora-fast eval."""

import gc
import json
import math
import re
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
from cli_checks import refused
from training_checks import TINY, smaller, tiny_vae, write_media

from sora_fast.data import scan, to_pixels, to_uint8
from sora_fast.diffusion import DDPM, FlowMatching, LearnedVariance
from sora_fast.evaluation import ClipQuality, frechet, loss_by_timestep, psnr, ssim, temporal_psnr
from sora_fast.evaluation.features import Features
from sora_fast.evaluation.features import sentence as distance_sentence
from sora_fast.evaluation.timesteps import draws
from sora_fast.models import ByteTextEncoder, DiT, VideoVAE


def noisy_clips(frames=3, height=21, width=34, seed=0):
    """A smooth clip and a noisy copy, uint8 (T, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.arange(height)[:, None] * 5 + torch.arange(width) * 2
    real = torch.stack([(ramp + 9 * t)[..., None] + torch.tensor([0, 20, 40]) for t in range(frames)]) % 256
    got = real + torch.randint(-25, 26, real.shape, generator=generator)
    return got.clamp(0, 255).to(torch.uint8), real.to(torch.uint8)


# ---- Clips


def test_ssim_is_scikit_images():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    for height, width in ((7, 7), (21, 34), (8, 65)):
        got, real = noisy_clips(2, height, width)
        theirs = lambda a, b, peak, **more: torch.tensor(
            [structural_similarity(x.numpy(), y.numpy(), channel_axis=-1, data_range=peak, **more)
             for x, y in zip(a, b, strict=True)], dtype=torch.float64)
        assert (ssim(got, real) - theirs(got, real, 255)).abs().max() < 1e-10
        pixels = [to_pixels(clip).permute(1, 2, 3, 0).double() for clip in (got, real)]
        assert (ssim(*pixels) - theirs(*pixels, 2.0)).abs().max() < 1e-10
        # What tells another SSIM: the covariance of a population, one of another range.
        assert (ssim(got, real) - theirs(got, real, 255, use_sample_covariance=False)).abs().max() > 1e-5
        assert (ssim(got, real) - ssim(got, real, peak=100.0)).abs().max() > 1e-3
    assert torch.equal(ssim(real, real), torch.ones(2, dtype=torch.float64))


def test_psnr_by_hand_and_by_scikit_image():
    real = torch.full((2, 8, 9, 3), 100, dtype=torch.uint8)
    assert psnr(real + 5, real) == psnr(real, real + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(real, real) == math.inf
    assert psnr(torch.full((1, 2, 2, 3), 0.5), torch.full((1, 2, 2, 3), 0.25)) == pytest.approx(20 * math.log10(2 / 0.25))
    assert psnr(torch.full((1, 2, 2, 1), 0.5), torch.zeros(1, 2, 2, 1), peak=1.0) == pytest.approx(20 * math.log10(2))
    skimage = pytest.importorskip("skimage.metrics")
    got, real = noisy_clips()
    assert psnr(got, real) == pytest.approx(skimage.peak_signal_noise_ratio(real.numpy(), got.numpy(), data_range=255))


def test_temporal_psnr_sees_flicker_and_nothing_that_stays():
    got, real = noisy_clips(5)
    level = (real // 2).to(torch.uint8)
    assert temporal_psnr(level + 7, level) == math.inf
    flicker = level.clone()
    flicker[1::2] += 4  # every difference is off by 4
    assert temporal_psnr(flicker, level) == pytest.approx(20 * math.log10(255 / 4))
    assert math.isnan(temporal_psnr(got[:1], real[:1]))
    by_hand = (got.double().diff(dim=0) - real.double().diff(dim=0)).square().mean()
    assert temporal_psnr(got, real) == pytest.approx(float(10 * torch.log10(255**2 / by_hand)))


@pytest.mark.parametrize("plan", [(7,), (1, 6), (3, 0, 4), (1,) * 7])
def test_parts_of_a_clip_give_what_the_whole_gives(plan):
    got, real = noisy_clips(7)
    got[4] = 255 - got[4]  # the worst frame
    quality, start = ClipQuality(), 0
    for length in plan:
        quality.add(got[start : start + length], real[start : start + length])
        start += length
    found = quality.result()
    assert (found.frames, found.worst_frame) == (7, 4)
    assert found.psnr == pytest.approx(psnr(got, real)) and found.ssim == pytest.approx(float(ssim(got, real).mean()))
    assert found.temporal_psnr == pytest.approx(temporal_psnr(got, real))
    assert found.worst_psnr == pytest.approx(psnr(got[4:5], real[4:5])) == pytest.approx(min(quality.frame_psnr))


def test_all_clips_together_count_by_their_numbers_and_never_meet():
    one, other = noisy_clips(2, 21, 34), noisy_clips(5, 9, 8, seed=1)
    parts = []
    for got, real in (one, other):
        parts.append(ClipQuality())
        parts[-1].add(got, real)
    total = (parts[0] + parts[1]).result()
    squares = torch.cat([(got.double() - real.double()).square().flatten() for got, real in (one, other)])
    assert total.psnr == pytest.approx(float(10 * torch.log10(255**2 / squares.mean())))
    steps = torch.cat([(got.double() - real.double()).diff(dim=0).square().flatten() for got, real in (one, other)])
    assert total.temporal_psnr == pytest.approx(float(10 * torch.log10(255**2 / steps.mean())))
    assert total.frames == 7 and total.worst_psnr == min(part.result().worst_psnr for part in parts)
    tiny = ClipQuality()
    tiny.add(one[0][:1, :4], one[1][:1, :4])
    assert math.isnan(tiny.result().ssim) and math.isnan(tiny.result().temporal_psnr)


def test_clips_that_cannot_be_compared_are_refused():
    got, real = noisy_clips()
    for metric in (psnr, ssim, temporal_psnr, lambda a, b: ClipQuality().add(a, b)):
        with pytest.raises(ValueError, match=r"expected two clips \(T, H, W, C\) of one size"):
            metric(got, real[1:])
        with pytest.raises(TypeError, match="two uint8 or two floating clips"):
            metric(got.float(), real)
        with pytest.raises(TypeError, match="two uint8 or two floating clips"):
            metric(got.int(), real.int())
    with pytest.raises(ValueError, match="peak above 0"):
        psnr(got, real, peak=-1.0)
    with pytest.raises(ValueError, match="at least 7 x 7, got 6 x 34"):
        ssim(got[:, :6], real[:, :6])
    with pytest.raises(ValueError, match="at least one frame"):
        ClipQuality().result()


# ---- Sets


def test_frechet_by_closed_form_and_by_a_root_of_a_matrix():
    scipy = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, d: torch.randn(n, d, generator=generator, dtype=torch.float64)
    got, real = draw(60, 6) @ draw(6, 6) + 1, draw(45, 6) @ draw(6, 6)
    c1, c2 = torch.cov(got.T), torch.cov(real.T)
    root = torch.from_numpy(scipy.sqrtm((c1 @ c2).numpy()).real)
    theirs = (got.mean(0) - real.mean(0)).square().sum() + (c1 + c2 - 2 * root).trace()
    assert frechet(got, real) == pytest.approx(float(theirs), rel=1e-9) == pytest.approx(frechet(real, got), rel=1e-9)
    # One and the same set, scaled about its mean by s and moved by v: |v|^2 + (s - 1)^2 tr C.
    moved = 3 * (got - got.mean(0)) + got.mean(0) + 2
    assert frechet(moved, got) == pytest.approx(float(6 * 4 + 4 * c1.trace()), rel=1e-9)
    wrong = (got.mean(0) - real.mean(0)).square().sum() + (c1.diag().sqrt() - c2.diag().sqrt()).square().sum()
    assert abs(frechet(got, real) - float(wrong)) > 0.1  # variances alone are another distance


def test_frechet_is_stable():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    assert frechet(features, features) < 1e-12
    assert frechet(features[:, :8] + 1e6, features[:, :8] + 1e6 + 1) == pytest.approx(8, abs=1e-6)
    flat = features.clone()
    flat[:, 5] = 3.0  # a number that never changes
    assert frechet(flat, flat) < 1e-12
    few, wide = torch.randn(5, 300, generator=generator), torch.randn(7, 300, generator=generator)  # fewer than numbers
    assert frechet(few, few) < 1e-9 and 0 < frechet(few, wide) < math.inf
    turn = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    assert frechet(few.double() @ turn, wide.double() @ turn) == pytest.approx(frechet(few, wide), rel=1e-6)
    for wrong, message in ((few[:1], "2 samples or more"), (few.int(), "floating features"), (few * math.nan, "nan or inf")):
        with pytest.raises(ValueError, match=message):
            frechet(wrong, few)
    with pytest.raises(ValueError, match="one width"):
        frechet(few, few[:, 1:])


def test_features_of_clips_and_batches():
    clips = [torch.full((2, 3, width, 3), width, dtype=torch.uint8) for width in (4, 5, 4, 4, 5)]
    single, batched = Features(lambda clip: [clip.float().mean(), 1.0]), Features(
        lambda clips: torch.stack([clips.float().mean((1, 2, 3, 4)), torch.full((len(clips),), float(len(clips)))], 1), 2)
    for clip in clips:
        single.add(clip)
        batched.add(clip)
    assert single.values().tolist() == [[4, 1], [5, 1], [4, 1], [4, 1], [5, 1]]
    assert sorted(batched.values().tolist()) == [[4, 1], [4, 2], [4, 2], [5, 2], [5, 2]]
    for wrong in (lambda clip: clip.float().mean((1, 2)), lambda clip: clip.float().mean()):
        with pytest.raises(ValueError, match=r"expected D values for \(2, 3, 4, 3\) uint8, got shape"):
            Features(wrong).add(clips[0])
    counts = iter((3, 4))
    changing = Features(lambda clip: torch.zeros(next(counts)))
    changing.add(clips[0])
    with pytest.raises(ValueError, match="expected 3 values"):
        changing.add(clips[0])
    assert "warning: with fewer samples than dimensions" in distance_sentence(4, 9, 5, 1.0)
    assert "warning" not in distance_sentence(5, 9, 5, 1.0)


# ---- Loss over timesteps


@dataclass
class Latent:
    latent: torch.Tensor
    caption: str


def latents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, 4, 6), (3, 4, 4), (2, 6, 4), (1, 2, 2)]
    return [Latent(torch.randn(16, *size, generator=generator), f"caption {i}") for i, size in enumerate(sizes)]


def dit_and_text(**changes):
    torch.manual_seed(0)
    dit = DiT.preset("tiny", width=48, depth=2, heads=2, rope_axes=(8, 8, 8), text_width=64, **changes)
    text = ByteTextEncoder(64)
    for parameter in dit.parameters():  # not the identity that training begins at
        torch.nn.init.normal_(parameter, std=0.08)
    return dit, text


def test_loss_of_a_model_that_predicts_nothing_is_the_targets_square():
    dit, text = dit_and_text()
    for parameter in dit.final_layer.parameters():
        torch.nn.init.zeros_(parameter)
    clips = latents()
    found = loss_by_timestep(dit, text, FlowMatching(), clips, strata=3, seed=4)
    for k, clip in enumerate(clips):
        for b in range(3):
            t, noise = draws(4, k, b, 3, clip.latent.numel(), False)
            assert found.losses[b, k] == pytest.approx(float((noise - clip.latent.flatten()).square().mean()), rel=1e-5)
            assert found.timesteps[b, k] == pytest.approx(t) and found.edges[b] <= t < found.edges[b + 1]
    weights = found.numbers / found.numbers.sum()
    assert found.mean == pytest.approx(float((found.losses.mean(0) * weights).sum()))
    assert found.by_clip.tolist() == pytest.approx(found.losses.mean(0).tolist())


@pytest.mark.parametrize(("objective", "learn_sigma"), [
    (FlowMatching(), False), (FlowMatching("x0"), False), (DDPM(), False), (DDPM(), True), (LearnedVariance(), True),
], ids=["velocity", "x0", "ddpm", "ddpm, variance unused", "learned variance"])
def test_loss_over_timesteps_is_that_of_each_clip_alone(objective, learn_sigma):
    dit, text = dit_and_text(learn_sigma=learn_sigma)
    clips = latents()
    together = loss_by_timestep(dit, text, objective, clips, strata=4, budget=4096)
    apart = loss_by_timestep(dit, text, objective, clips, strata=4, budget=1)
    assert torch.allclose(together.losses, apart.losses, rtol=1e-4) and torch.equal(together.timesteps, apart.timesteps)
    with torch.no_grad():
        t, noise = draws(0, 1, 2, 4, clips[1].latent.numel(), isinstance(objective, DDPM))
        x0, when, counts = clips[1].latent.flatten(), torch.tensor([t]), torch.tensor([noise.numel()])
        noisy = objective.add_noise(x0, noise, when, counts).view(1, *clips[1].latent.shape)
        predicted = dit(noisy, when, text=text([clips[1].caption]))[0]
        mean, variance = predicted[:16].flatten(), predicted[16:].flatten()
        predicted = torch.stack([mean, variance], 1) if isinstance(objective, LearnedVariance) else mean
        by_hand = float(objective.loss(predicted, x0, noise, when, counts))
    assert together.losses[2, 1] == pytest.approx(by_hand, rel=1e-4)
    if isinstance(objective, DDPM):
        assert torch.equal(together.timesteps, together.timesteps.floor())


def test_loss_over_timesteps_is_fixed_by_its_seed_and_hears_captions():
    dit, text = dit_and_text()
    dit.train(), text.train()
    clips, steps = latents(), []
    one = loss_by_timestep(dit, text, FlowMatching(), clips, strata=2, progress=lambda *step: steps.append(step))
    assert dit.training and text.training and steps == [(1, 2), (2, 2)]
    torch.manual_seed(99)
    assert torch.equal(one.losses, loss_by_timestep(dit, text, FlowMatching(), clips, strata=2).losses)
    assert not torch.equal(one.losses, loss_by_timestep(dit, text, FlowMatching(), clips, strata=2, seed=1).losses)
    clips[0].caption = "another"
    changed = loss_by_timestep(dit, text, FlowMatching(), clips, strata=2).losses != one.losses
    assert changed[:, 0].all() and not changed[:, 1:].any()
    for some, keywords in (([], {}), (clips, dict(strata=0))):
        with pytest.raises(ValueError, match="loss_by_timestep: expected clips, strata and budget of 1 or more"):
            loss_by_timestep(dit, text, FlowMatching(), some, **keywords)


# ---- Streams


def test_reconstruction_streams_and_equals_the_whole_clip(tmp_path, monkeypatch):
    pytest.importorskip("av")
    from sora_fast.data import FitPolicy, write_video
    from sora_fast.data.frames import Frames
    from sora_fast.evaluation.reconstruction import length_of, reconstruct

    torch.manual_seed(0)
    vae = VideoVAE.preset("tiny", width=4).eval()
    moving = (torch.arange(32)[:, None] * 3 + torch.arange(40) * 2 + 5 * torch.arange(71)[:, None, None]) % 256
    write_video(tmp_path / "a.mp4", moving.to(torch.uint8)[..., None].repeat(1, 1, 1, 3), 8)
    policy = FitPolicy(short_side=32, fps=None, space_multiple=8)
    frames = Frames(scan(tmp_path, progress=False).items, policy, memory_gb=0.0, progress=False)
    alive, most, plain = set(), [0], frames.window

    def window(*arguments):
        gc.collect()
        most[0] = max(most[0], len(alive))
        part = plain(*arguments)
        assert len(part) <= 16
        number = most[0], len(alive), arguments
        alive.add(number)
        weakref.finalize(part.untyped_storage(), alive.discard, number)
        return part

    monkeypatch.setattr(frames, "window", window)
    parts = [(got.clone(), real.clone()) for got, real in reconstruct(vae, frames, 0)]
    got, real = map(torch.cat, zip(*parts, strict=True))
    assert length_of(vae, 71) == len(got) == 69 and length_of(vae, 71, 12) == 9 and most[0] <= 2
    whole = plain(0, 0, 69)
    assert torch.equal(real, whole)
    with torch.no_grad():
        expected = to_uint8(vae.decode(vae.encode(to_pixels(whole)[None]))[0])
    assert (got.int() - expected.int()).abs().max() <= 1 and (got != expected).float().mean() < 1e-3
    assert len(torch.cat([got for got, _ in reconstruct(vae, frames, 0, most=12)])) == 9


# ---- sora-fast eval


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Media, a run of train-vae and one of train that has held out two of five files."""
    for package in ("av", "PIL", "safetensors", "diffusers", "matplotlib"):
        pytest.importorskip(package, reason="the demo extra is not installed")
    from sora_fast.training import dit as dit_task
    from sora_fast.training import vae as vae_task

    root = tmp_path_factory.mktemp("eval")
    media = root / "media"
    media.mkdir()
    write_media(media)
    trainer = tiny_vae(root / "vae", media, steps=2, heldout=0.4, data=str(media), short_side=32)
    trainer.run()
    vae = vae_task.finish(trainer)
    config = dict(steps=2, heldout=0.4, data=str(media), short_side=32, frames=5, windows=2, latent_cache="none", budget=64)
    with smaller(dit_task.PRESETS, width=48, depth=2, heads=2, rope_axes=(8, 8, 8)):
        settings = dit_task.DiTTraining(out=str(root / "dit"), **TINY | config)
        clips = dit_task.encode_media(settings, vae, scan(media, progress=False).items)
        dit_task.make_trainer(settings, vae, clips).run()
    return root


def evaluated(out):
    found = json.loads((out / "eval.json").read_text())
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
    assert (out / "eval.png").read_bytes()[:4] == b"\x89PNG"
    return found, page


def test_eval_of_a_vae(runs, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_features.py").write_text("def mean(clip):\n    return clip.float().mean((0, 1, 2))\n")
    code, said, wrong = cli("eval", runs / "vae", "--data", runs / "media", "--device", "cpu", "--features",
                            "own_features:mean", "--feature-frames", "5", "--out", "e")
    assert code == 0, wrong
    found, page = evaluated(tmp_path / "e")
    last, total = found["clips"][-1]["frames"], found["all"]["frames"]
    assert f"reconstruct {total}/{total}: " in said and f"{last} of {last} frames" in said
    assert found["kind"] == "vae" and len(found["clips"]) == 5 and "sora-fast eval" in found["command"]

    from sora_fast.data import FitPolicy
    from sora_fast.data.frames import Frames
    from sora_fast.training.vae import load_vae
    vae = load_vae(str(runs / "vae"))
    items = scan(runs / "media", progress=False).items
    frames = Frames(items, FitPolicy(short_side=32, fps=None, space_multiple=8), progress=False)
    for index, row in enumerate(found["clips"]):
        length = (frames.frames(index) - 1) // 4 * 4 + 1
        real = frames.window(index, 0, length)
        with torch.no_grad():
            got = to_uint8(vae.decode(vae.encode(to_pixels(real)[None]))[0])
        assert row["file"].endswith(items[index].path.name) and row["frames"] == length == len(row["frame_psnr"])
        assert row["psnr"] == pytest.approx(psnr(got, real), abs=0.02)
        assert row["ssim"] == pytest.approx(float(ssim(got, real).mean()), abs=1e-3)
        worst = min(psnr(a[None], b[None]) for a, b in zip(got, real, strict=True))
        assert row["worst_psnr"] == pytest.approx(worst, abs=0.05)
        assert f"{row['psnr']:.2f}" in said and f"{row['psnr']:.2f}" in page
        assert row["temporal_psnr"] == (None if length == 1 else pytest.approx(temporal_psnr(got, real), abs=0.02))
    assert found["all"]["frames"] == sum(row["frames"] for row in found["clips"])
    # 9 and 13 frames are one and two windows of 5, the 5 frames one, and each image a sample of its own
    assert (found["frechet"]["samples"], found["frechet"]["dimensions"]) == (6, 3) and "Frechet distance" in said


def test_eval_takes_what_the_run_held_out_and_survives_damage(runs, cli, tmp_path):
    code, said, wrong = cli("eval", runs / "vae", "--device", "cpu", "--out", tmp_path / "e")
    assert code == 0, wrong
    from sora_fast.training.latents import held_out
    names = held_out([str(path) for path in (runs / "media").iterdir() if path.suffix in (".mp4", ".png")], 0.4)
    assert {row["file"] for row in evaluated(tmp_path / "e")[0]["clips"]} == names and len(names) == 2
    assert "2 files that the run held out" in said

    from sora_fast.data import write_image, write_video
    media = tmp_path / "media"
    noise = torch.randint(0, 256, (24, 32, 32, 3), dtype=torch.uint8)
    write_image(media / "good.png", noise[0])
    damaged = write_video(media / "damaged.mp4", noise, 8)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 : -8] = bytes(len(data) - 8 - len(data) // 2)
    damaged.write_bytes(data)
    (media / "empty.png").touch()
    code, said, wrong = cli("eval", runs / "vae", "--data", media, "--device", "cpu", "--out", tmp_path / "d")
    assert code == 0, wrong
    found, page = evaluated(tmp_path / "d")
    assert [row["file"] for row in found["clips"]] == [str(media / "good.png")] and found["all"]["frames"] == 1
    reasons = {each["file"]: each["reason"] for each in found["skipped"]}
    assert reasons.keys() == {str(media / "empty.png"), str(media / "damaged.mp4")}
    assert "0 bytes" in reasons[str(media / "empty.png")] and "cannot be read" in reasons[str(media / "damaged.mp4")]
    for name in reasons:
        assert name in page
    assert "skipped" in said and "2 files were skipped" in said


def test_eval_of_a_dit(runs, cli, tmp_path):
    code, said, wrong = cli("eval", runs / "dit", "--data", runs / "media", "--device", "cpu", "--strata", "3", "--steps",
                            "2", "--out", tmp_path / "e", "--size", "5x16x32", "--size", "1x32x16", "--prompt",
                            "stripes 0", "--prompt", "a <b>", "--gif", "--seed", "7")
    assert code == 0, wrong
    found, page = evaluated(tmp_path / "e")
    assert found["kind"] == "dit" and len(found["by_timestep"]) == 3 and "a &lt;b&gt;" in page

    from sora_fast.training.dit import load_run
    from sora_fast.training.latents import load_library
    made, clips = load_run(str(runs / "dit")), load_library(runs / "dit" / "latents")
    losses = loss_by_timestep(made.dit, made.text_encoder, made.objective, clips, strata=3, seed=7)
    assert found["loss"] == pytest.approx(losses.mean, rel=1e-4) and found["by_timestep"] == pytest.approx(
        losses.by_timestep.tolist(), rel=1e-4)
    assert [row["loss"] for row in found["clips"]] == pytest.approx(losses.by_clip.tolist(), rel=1e-4)
    raw = load_run(str(runs / "dit"))
    from sora_fast.training import checkpoint
    weights = checkpoint.load_tensors(checkpoint.newest(runs / "dit") / "model.safetensors")
    torch.nn.ModuleDict({"dit": raw.dit, "text": raw.text_encoder}).load_state_dict(weights)
    other = loss_by_timestep(raw.dit, raw.text_encoder, raw.objective, clips, strata=3, seed=7)
    assert abs(other.mean - found["loss"]) > 1e-5 * found["loss"]  # the last weights are not the averaged ones

    from sora_fast.data import probe
    gif, sheet = probe(tmp_path / "e" / "sheet.gif"), probe(tmp_path / "e" / "sheet.png")
    assert (gif.frames, gif.height, gif.width) == (5, 2 * 32 + 4, 32 + 4 + 16) == (5, sheet.height, sheet.width)
    assert found["samples"]["prompts"] == ["stripes 0", "a <b>"] and found["samples"]["sizes"] == [[5, 16, 32], [1, 32, 16]]


def test_eval_of_a_dit_with_features_and_its_own_prompts(runs, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many.py").write_text("def numbers(clips):\n    return clips.float().mean((1, 4)).flatten(1)[:, :90]\n")
    code, said, wrong = cli("eval", runs / "dit", "--device", "cpu", "--strata", "1", "--steps", "1", "--out", "e",
                            "--features", "many:numbers", "--feature-batch", "3")
    assert code == 0, wrong
    found, _ = evaluated(tmp_path / "e")
    from sora_fast.training.latents import held_out, load_library
    names = held_out([clip.source for clip in load_library(runs / "dit" / "latents")], 0.4)
    assert {clip["clip"].partition(", frames")[0] for clip in found["clips"]} == names and len(names) == 2
    assert found["frechet"]["samples"] == found["frechet"]["real_samples"] == len(found["clips"])
    assert found["frechet"]["dimensions"] == 90 and "warning: with fewer samples than dimensions" in said


def test_eval_says_what_is_wrong(runs, cli, tmp_path):
    media = runs / "media"
    for arguments, parts in (
        ((tmp_path / "none", "--data", media), ("expected a run folder of sora-fast train-vae",)),
        ((runs / "vae", "--data", media, "--files", "-1"), ("--files of 0 or more, got -1",)),
        ((runs / "vae", "--data", media, "--features", "no_such_module:f"), ("--features: expected to import",)),
        ((runs / "vae", "--data", tmp_path / "gone"), ("expected a folder of media",)),
        ((runs / "dit", "--data", media, "--size", "5x17x32"), ("--size: expected lines as a multiple of 16",)),
    ):
        refused(cli("eval", *arguments), *parts)


def test_eval_without_matplotlib_has_no_plot(runs, cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, said, wrong = cli("eval", runs / "vae", "--device", "cpu", "--out", tmp_path / "e", "--files", "1")
    assert code == 0 and "no plot, since matplotlib is not installed" in said, wrong
    assert not (tmp_path / "e" / "eval.png").exists() and "data:image/png;base64,\"" not in (
        tmp_path / "e" / "report.html").read_text()
    assert len(json.loads((tmp_path / "e" / "eval.json").read_text())["clips"]) == 1
