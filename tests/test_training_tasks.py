"""Training the VAE and the DiT on made media: resume, the memory estimate, latents, packs, frames."""

from dataclasses import replace

import pytest
import torch
from training_checks import QUIET, Stop, little, same_files, same_rows, stop_at

from sora_fast.data import FitPolicy, scan, write_image, write_video
from sora_fast.data.frames import Frames
from sora_fast.models import VideoVAE
from sora_fast.training import checkpoint, memory
from sora_fast.training import dit as dit_task
from sora_fast.training import vae as vae_task
from sora_fast.training.config import DiTTraining, VAETraining
from sora_fast.training.latents import LatentClip, LatentPacks, encode_library, load_library, save_library

for package in ("safetensors", "av", "PIL"):
    pytest.importorskip(package, reason="the train extra is not installed")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Three clips and two images of different sizes, with captions."""
    folder = tmp_path_factory.mktemp("media")
    ramp = torch.linspace(0, 255, 64)
    for index, (frames, height, width) in enumerate([(9, 48, 64), (13, 64, 48), (5, 48, 48)]):
        moving = torch.stack([(ramp[None, :width] + 8 * t + 40 * index).remainder(256).expand(height, width)
                              for t in range(frames)])
        write_video(folder / f"clip{index}.mp4", moving.to(torch.uint8)[..., None].repeat(1, 1, 1, 3), 8)
        (folder / f"clip{index}.txt").write_text(f"stripes {index}")
    for index, (height, width) in enumerate([(48, 80), (64, 64)]):
        picture = (ramp[:height, None].expand(height, width)).to(torch.uint8)[..., None].repeat(1, 1, 3)
        write_image(folder / f"image{index}.png", picture)
    return folder


@pytest.fixture(scope="module")
def clips():
    """Latents of three sizes with captions."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4, 6), (1, 6, 6), (2, 4, 4), (1, 4, 8)]
    return [LatentClip(torch.randn(16, *size, generator=generator), f"caption {i}", f"{i}.mp4", 0, 9, 8.0)
            for i, size in enumerate(sizes)]


TINY = dict(**QUIET, warmup=2, log_every=1)


def tiny_dit(out, clips, **settings):
    vae = VideoVAE.preset("tiny", width=4)
    config = DiTTraining(**dict(out=str(out), budget=40, look_ahead=6, **TINY) | settings)
    small = replace(dit_task.PRESETS["tiny"], width=48, depth=2, heads=2, rope_axes=(8, 8, 8))
    before, dit_task.PRESETS["tiny"] = dit_task.PRESETS["tiny"], small
    try:
        return dit_task.make_trainer(config, vae, clips)
    finally:
        dit_task.PRESETS["tiny"] = before


def test_dit_training_resumes_bit_for_bit(tmp_path, clips):
    """Packer, order, timesteps, noise and dropped captions included."""
    common = dict(steps=8, save_every=3, precision="bf16")
    tiny_dit(tmp_path / "whole", clips, **common).run()
    with pytest.raises(Stop):
        tiny_dit(tmp_path / "parts", clips, **common).run(stop_at(5))
    tiny_dit(tmp_path / "parts", clips, resume=True, **common).run()
    same_files(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "parts"))
    same_rows(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match="--resume: expected objective 'flow', .* got 'ddpm'; leave it out"):
        tiny_dit(tmp_path / "parts", clips, resume=True, objective="ddpm", **common)
    with pytest.raises(ValueError, match="expected the run's own 4 latent clips, got 2; keep"):
        tiny_dit(tmp_path / "parts", clips[:2], resume=True, **common)
    vae = VideoVAE.preset("tiny", width=4)
    with pytest.raises(ValueError, match="--resume: expected the model that"):  # no traceback of load_state_dict
        dit_task.make_trainer(DiTTraining(out=str(tmp_path / "parts"), resume=True, budget=40, **TINY), vae, clips)


@pytest.mark.parametrize("settings", [dict(prediction="x0"), dict(prediction="noise", timesteps="uniform", shift="2"),
                                      dict(objective="ddpm"), dict(objective="ddpm", prediction="velocity")])
def test_dit_loss_falls(tmp_path, clips, settings):
    trainer = tiny_dit(tmp_path, clips[:2], steps=30, lr=5e-3, ema=0.9, warmup=5, **settings)
    trainer.run()
    losses = [row["loss"] for row in trainer.rows]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6]), losses
    assert trainer.tokens + trainer.pad == 30 * 40


def test_masters_stay_float32(tmp_path, clips):
    trainer = tiny_dit(tmp_path, clips, steps=1, precision="bf16")
    trainer.run()
    state = checkpoint.newest(tmp_path)
    for name in ("model", "ema", "optimizer"):
        assert {t.dtype for t in checkpoint.load_tensors(state / f"{name}.safetensors").values()} == {torch.float32}
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in trainer.parameters.values())


def test_condition_dropout(tmp_path, clips):
    seen = []
    trainer = tiny_dit(tmp_path, clips, steps=40, condition_dropout=0.25, lr=0.0)
    encoder = trainer.modules["text"]
    forward = encoder.forward
    encoder.forward = lambda captions: seen.extend(captions) or forward(captions)
    trainer.run()
    share = sum(caption == "" for caption in seen) / len(seen)
    assert 0.15 < share < 0.35 and len(seen) == trainer.samples


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_estimate_of_the_dit(tmp_path, clips, precision):
    trainer = tiny_dit(tmp_path, clips, budget=400, look_ahead=60, precision=precision)
    estimated, share = memory.activation_bytes(trainer)
    state = trainer.generator.get_state()
    assert share < 0.2
    batch = trainer.batches.next()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        truth = memory.saved_bytes(lambda: trainer.loss(batch, torch.Generator()), list(trainer.modules.parameters()))
    assert truth / 1.4 < estimated < 1.4 * truth
    line = memory.estimate(trainer)
    assert "memory: about" in line and "% of a batch" in line and "free" in line
    assert torch.equal(state, trainer.generator.get_state()) and trainer.step == 0
    assert all(p.grad is None for p in trainer.parameters.values())


def test_memory_estimate_counts_every_copy_of_the_weights(tmp_path, monkeypatch):
    trainer = little(tmp_path)
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 10)
    line = memory.estimate(trainer)
    trained, frozen = sum(p.numel() for p in trainer.parameters.values()), 4
    assert f"{(5 * trained + frozen) * 4 / 2**20:.1f} MiB for weights, gradients, AdamW and average" in line
    assert "will probably not fit: lower" in line


def test_vae_trains_resumes_and_is_estimated(tmp_path, media):
    items = scan(media, progress=False).items
    common = dict(steps=4, save_every=2, crop=32, frames=5, clips=2, images=2, short_side=48, **TINY)
    make = lambda name, **more: vae_task.make_trainer(VAETraining(out=str(tmp_path / name), **common | more), items)
    trainer = make("whole")
    assert trainer.batches.summary() == ("crops of 32 x 32 from 5 items, 3 of them clips of 5 frames or more; 0 smaller "
                                         "items left out")
    estimated, _ = memory.activation_bytes(trainer)
    truth = memory.saved_bytes(lambda: trainer.loss(torch.zeros(2, 3, 5, 32, 32), torch.Generator()),
                               list(trainer.modules.parameters()))
    assert truth / 1.2 < estimated < 1.2 * truth
    trainer.run()
    with pytest.raises(Stop):
        make("parts").run(stop_at(3))
    make("parts", resume=True).run()
    same_files(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "parts"))
    with pytest.raises(ValueError, match="--resume: expected preset 'tiny', .* got 'wan2.1'"):
        make("parts", resume=True, preset="wan2.1")
    assert "only if" not in trainer.batches.summary()
    long = make("long", frames=21)
    assert "no clip has 21 frames, so the VAE learns single frames only" in long.batches.summary()
    with pytest.raises(ValueError, match="media of at least 64 x 64 pixels, got none; lower --crop"):
        make("large", crop=64)
    with pytest.raises(ValueError, match="--crop a multiple of 8 and --frames 1 [+] 4 k, got 30 and 5"):
        make("odd", crop=30)


def test_an_unfinished_vae_is_usable_and_said_to_be(tmp_path, media, capsys, clips):
    items = scan(media, progress=False).items
    config = VAETraining(out=str(tmp_path / "vae"), steps=2, crop=32, frames=5, short_side=48, **TINY)
    trainer = vae_task.make_trainer(config, items)
    trainer.run()
    vae = vae_task.load_vae(str(tmp_path / "vae"))
    assert "not trained to its end: taking step-00000002" in capsys.readouterr().out
    for name, value in trainer.ema.items():
        assert torch.equal(vae.state_dict()[name.removeprefix("vae.")], value)
    finished = vae_task.finish(trainer)
    again = vae_task.load_vae(str(tmp_path / "vae"))
    assert capsys.readouterr().out == "" and float(again.latent_std.min()) > 0
    for name, value in finished.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    # A run carries the VAE it was given, finished or not, and reads it back.
    made = dit_task.make_trainer(DiTTraining(out=str(tmp_path / "dit"), vae="nowhere", budget=40, steps=1, **TINY), again,
                                 clips)
    made.run()
    assert torch.equal(dit_task.load_run(str(tmp_path / "dit")).vae.latent_std, again.latent_std)
    with pytest.raises(ValueError, match="expected a run of sora-fast train-vae, got one of kind 'dit'"):
        vae_task.load_vae(str(tmp_path / "dit"))
    with pytest.raises(ValueError, match="expected a run of sora-fast train, got one of kind 'vae'"):
        dit_task.load_run(str(tmp_path / "vae"))


def test_a_frozen_text_encoder_is_not_trained(tmp_path, clips):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "t5"
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "caption": 3, "0": 4, "1": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder)
    sizes = dict(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    trainer = tiny_dit(tmp_path / "run", clips, steps=2, text_encoder=str(folder))
    trainer.run()
    for names in (trainer.parameters, trainer.ema, trainer.modules.state_dict()):
        assert all(name.startswith("dit.") for name in names)
    assert trainer.modules["dit"].config.text_width == 16
    run = dit_task.load_run(str(tmp_path / "run"))
    assert run.text_encoder(["caption 0", ""]).lengths == (3, 1)


# ---- Latents and frames


def test_latents_are_written_whole(tmp_path, clips, monkeypatch):
    save_library(tmp_path / "latents", clips)
    back = load_library(tmp_path / "latents")
    assert [clip.caption for clip in back] == [clip.caption for clip in clips]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(back, clips, strict=True))
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        save_library(tmp_path / "latents", clips[:1])
    assert not (tmp_path / "latents.json").exists()  # so nobody takes the old list for the new tensors


def test_packs_are_endless_full_and_within_budget(clips):
    packs = LatentPacks(clips, (1, 2, 2), 40, look_ahead=8)
    counted = {clip.caption: 0 for clip in clips}
    for _ in range(50):
        batch = packs.next()
        tokens = [t * h * w for t, h, w in batch.grids]
        assert 0 < sum(tokens) <= 40 and batch.latents.shape == (sum(batch.counts),)
        assert [16 * 4 * n for n in tokens] == list(batch.counts)
        for caption in batch.captions:
            counted[caption] += 1
    assert max(counted.values()) - min(counted.values()) <= 4  # epochs, shuffled
    with pytest.raises(ValueError, match="at least one latent clip to pack, got none"):
        LatentPacks([], (1, 2, 2), 40)
    with pytest.raises(ValueError, match="has 18 tokens, the budget is 10"):
        LatentPacks(clips[:1], (1, 2, 2), 10, look_ahead=1).next()


def test_windows_of_clips(media, tmp_path):
    vae = VideoVAE.preset("tiny", width=4).eval()
    items = scan(media, progress=False).items
    policy = FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16, max_tokens=24)
    for windows, starts in ((1, [0]), (2, [0, 8]), (3, [0, 4, 8])):
        found = encode_library(vae, items[1:2], policy, windows=windows, progress=False)
        assert [clip.start for clip in found] == starts
        for clip in found:
            assert clip.latent.shape[1] == 1 + (clip.frames - 1) // 4 and clip.caption == "stripes 1"
            t, h, w = clip.grid((1, 2, 2))
            assert t * h * w <= 24


def test_frames_of_clips_without_rate_or_length(media):
    item = next(i for i in scan(media, progress=False).items if i.path.name == "clip0.mp4")
    policy = FitPolicy(short_side=48, fps=None)
    for odd in (replace(item, fps=0.0, seconds=0.0), replace(item, seconds=0.01), replace(item, fps=0.0)):
        frames = Frames([odd], policy, progress=False)
        assert len(frames) == 1 and frames.frames(0) == 1
        assert frames.window(0, 0, 1).shape == (1, 48, 64, 3)
    assert len(Frames([replace(item, seconds=0.01)], policy, span=(0.5, 1.0), progress=False)) == 0
    whole = Frames([item], policy, progress=False)
    assert whole.frames(0) == 9
    parts = [Frames([item], policy, span=span, progress=False) for span in ((0.0, 0.6), (0.6, 1.0))]
    assert [part.frames(0) for part in parts] == [6, 3]
    assert torch.equal(torch.cat([part.window(0, 0, part.frames(0)) for part in parts]), whole.window(0, 0, 9))
    on_demand = Frames([item], policy, memory_gb=0.0, progress=False)
    assert torch.equal(on_demand.window(0, 2, 5), whole.window(0, 2, 5))
    with pytest.raises(ValueError, match="expected frames within the 9 of clip0.mp4, got 5 to 10"):
        whole.window(0, 5, 5)


def test_memory_of_frames_goes_to_those_that_fit(media):
    items = scan(media, progress=False).items
    kept = Frames(items, FitPolicy(short_side=48, fps=None), memory_gb=5 * 48 * 48 * 3 / 2**30, progress=False)
    assert [kept.item(i).path.name for i in kept._kept] == ["clip2.mp4"]
