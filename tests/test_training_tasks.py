"""Training the VAE and the DiT on made media: resume, the memory estimate, latents, packs, frames."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_checks import (
    TINY,
    Stop,
    latent_clips,
    little,
    same_files,
    same_rows,
    stop_at,
    tiny_dit,
    tiny_vae,
    weights,
    write_media,
)

import sora_fast
from sora_fast import ops
from sora_fast.data import scan, write_image
from sora_fast.models import VideoVAE
from sora_fast.training import checkpoint, memory, throughput
from sora_fast.training import dit as dit_task
from sora_fast.training import vae as vae_task
from sora_fast.training.config import DiTTraining, VAETraining
from sora_fast.training.latents import held_out

for package in ("safetensors", "av", "PIL"):
    pytest.importorskip(package, reason="the train extra is not installed")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def clips():
    return latent_clips()


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
    with pytest.raises(ValueError, match="expected the run's own 4 latent clips, got as many others; keep"):
        tiny_dit(tmp_path / "parts", [*clips[:3], replace(clips[3], source="other.mp4")], resume=True, **common)
    state = checkpoint.newest(tmp_path / "parts") / "state.json"
    older = checkpoint.load_json(state)
    older["batches"].pop("sources")
    checkpoint.save_json(state, older)
    assert tiny_dit(tmp_path / "parts", clips, resume=True, **common).step == 8  # of a version that did not say
    vae = VideoVAE.preset("tiny", width=4)
    with pytest.raises(ValueError, match="--resume: expected the model that"):  # no traceback of load_state_dict
        dit_task.make_trainer(DiTTraining(out=str(tmp_path / "parts"), resume=True, budget=40, **TINY), vae, clips)


@pytest.mark.parametrize("settings", [dict(prediction="x0"), dict(objective="ddpm")])
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
    assert share < 0.2
    batch = trainer.drawn(trainer.batches.next())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        truth = memory.saved_bytes(lambda: trainer.loss(batch), list(trainer.modules.parameters()))
    assert truth / 1.4 < estimated < 1.4 * truth
    line = memory.estimate(trainer)
    assert "memory: about" in line and "% of a batch" in line and "free" in line
    assert trainer.step == 0 and trainer.batches.number == 1  # the one above
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
    batch = vae_task.Crops(torch.zeros(2, 3, 5, 32, 32), ("", ""))
    truth = memory.saved_bytes(lambda: trainer.loss(trainer.draw(batch, torch.Generator())),
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


# ---- What is held out, the budget, the rate


def test_held_out_files_are_chosen_by_name_and_never_trained_on(tmp_path, clips):
    names = [f"a/{i}.mp4" for i in range(40)]
    chosen = held_out(names, 0.25)
    assert len(chosen) == 10 and held_out(names[::-1] * 2, 0.25) == chosen and held_out(names, 0.3) > chosen
    assert {name.replace("a/", "b/") for name in chosen} == held_out([n.replace("a/", "b/") for n in names], 0.25)
    assert held_out(names[:19], 0.05) == set() and len(held_out(names[:20], 0.05)) == 1
    trainer = tiny_dit(tmp_path, clips, heldout=0.5, steps=6, heldout_every=4, log_samples=True, lr=0.0, ema=0.5)
    kept = held_out([clip.source for clip in clips], 0.5)
    assert {clip.source for clip in trainer.batches.clips} == {clip.source for clip in clips} - kept
    first = trainer.evaluate()
    assert list(first) == ["step", "t100", "t300", "t500", "t700", "t900", "mean"]
    assert first["mean"] == pytest.approx(sum(first[f"t{t}"] for t in (100, 300, 500, 700, 900)) / 5)
    trainer.run()
    rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(tmp_path / "heldout.csv"))]
    assert [row["step"] for row in rows] == [0, 4, 6]
    for row in rows:  # with a rate of 0 nothing moves: noise, timesteps and clips are the same each time
        assert list(row.values())[1:] == pytest.approx(list(first.values())[1:], rel=1e-5)
    with pytest.raises(ValueError, match="--resume: expected heldout 0.5, .* got 0.25; leave it out"):
        tiny_dit(tmp_path, clips, heldout=0.25, resume=True)


def test_held_out_loss_is_that_of_the_average_at_a_fixed_timestep(tmp_path, clips):
    trainer = tiny_dit(tmp_path, clips, heldout=0.5, steps=3, lr=0.05, ema=0.2, precision="bf16")
    trainer.run()
    before = weights(trainer)
    row = trainer.evaluate()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items()) and trainer.modules.training
    (name, batch), *others = [(n, b) for n, b in trainer.held_out() if n == "t300"]
    assert not others and batch.timesteps.unique().tolist() == [300.0] and not batch.clean.any()
    trainer.modules.load_state_dict(trainer.ema, strict=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert row["t300"] == pytest.approx(float(trainer.loss(batch)[0]), rel=1e-6)
    assert any(not torch.equal(before[name], value) for name, value in trainer.ema.items())
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    assert (tmp_path / "heldout.png").read_bytes()[:4] == b"\x89PNG"


def test_held_out_crops_of_the_vae(tmp_path, media):
    trainer = tiny_vae(tmp_path, media, heldout=0.4, steps=2, heldout_every=1)
    kept = {Path(name).name for name in held_out([str(path) for path in media.iterdir() if path.suffix != ".txt"], 0.4)}
    assert len(kept) == 2 and kept.isdisjoint(item.item.path.name for item in trainer.batches.frames.sources)
    (name, batch), = trainer.held_out()
    assert name == "loss" and {Path(n.partition(",")[0]).name for n in batch.names} <= kept
    trainer.run()
    assert [list(row) for row in trainer.held_out_rows] == [["step", "loss"]] * 2


def test_a_budget_from_free_memory(tmp_path, clips, monkeypatch, capsys):
    """As large as the memory holds, by memory's own measure; kept on resume; bounded by the clips on both sides."""
    many = clips * 400
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 100 * 2**20)
    trainer = tiny_dit(tmp_path / "a", many, budget=0, steps=1, look_ahead=2000)
    budget = trainer.config.budget
    assert f"budget: {budget:,} tokens a pack, from 100.0 MiB free" in capsys.readouterr().out and budget % 256 == 0
    needed = memory.activation_bytes(trainer)[0] + 16 * sum(p.numel() for p in trainer.parameters.values())
    share = needed / (memory.SHARE * 100 * 2**20)
    assert 0.8 < share < 1.05, share
    assert trainer.batches.load(trainer.batches.next()).length == budget
    trainer.run()
    assert checkpoint.load_json(tmp_path / "a" / "config.json")["training"]["budget"] == budget
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 50 * 2**20)
    assert tiny_dit(tmp_path / "a", many, budget=0, resume=True, look_ahead=2000).config.budget == budget
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 2**34)
    assert tiny_dit(tmp_path / "b", clips, budget=0).config.budget == 18 + 9 + 8 + 8  # all of them together
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 16 * 2**20)
    with pytest.raises(ValueError, match="--budget: expected free memory for the largest clip, 18 tokens, got 16.0 MiB"):
        tiny_dit(tmp_path / "c", clips, budget=0)


def test_a_nan_names_its_file_window_and_timestep(tmp_path, clips):
    bad = replace(clips[2], latent=clips[2].latent.clone(), start=8)
    bad.latent[3, 1, 2, 2] = torch.nan
    trainer = tiny_dit(tmp_path, [*clips[:2], bad, clips[3]], steps=20, save_every=1, precision="bf16")
    with pytest.raises(FloatingPointError, match=r"it comes from 2.mp4, frames 8 to 12, timestep [0-9.]+; ") as stopped:
        trainer.run()
    assert trainer.step == 0 or f"step-{trainer.step:08d}, is whole" in str(stopped.value)


def test_flops_of_a_step(tmp_path, clips):
    """Those of PyTorch's own counter; without what checkpointing computes again; MFU is their rate over the peak."""
    trainer = tiny_dit(tmp_path / "a", clips, steps=2, peak_tflops=0.5)
    other = tiny_dit(tmp_path / "b", clips, steps=1, checkpointing=True)
    batch = trainer.drawn(trainer.batches.next())
    _, flops = throughput.count(lambda: trainer.loss(batch)[0])
    width, tokens = 48, 40
    products = 3 * 2 * tokens * (2 * (3 + 1 + 1 + 1 + 8) * width**2 + 2 * 64 * width)  # qkv, proj, q, proj, MLP; patches
    assert products < flops < 5 * products  # the text encoder and the modulation are the rest
    trainer.batches.load_state_dict(trainer.batches.state_dict() | dict(drawn=0, number=0, packer=dict(
        waiting=[], packs=0, packed_tokens=0, capacity=0)))
    trainer.run()
    other.run()
    assert trainer.flops_per_token == pytest.approx(flops / 40)
    assert other.flops_per_token == trainer.flops_per_token
    row = trainer.rows[-1]
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * trainer.flops_per_token / 0.5e12, rel=1e-6)


def test_flops_of_our_kernels():
    """The formulas for the opaque ops, against PyTorch's counter on the reference of the same call."""
    from torch.utils.flop_counter import FlopCounterMode

    def counted(compute, backward):
        with FlopCounterMode(display=False) as counter:
            out = compute()
            forward = counter.get_total_flops()
            if backward:
                out.sum().backward()
        return forward, counter.get_total_flops() - forward

    q, k = torch.randn(20, 2, 16, requires_grad=True), torch.randn(14, 2, 16, requires_grad=True)
    ends = torch.tensor([0, 5, 20], dtype=torch.int32), torch.tensor([0, 4, 14], dtype=torch.int32)
    pairs = 5 * 4 + 15 * 10
    with sora_fast.use_backend("reference"):
        forward, backward = counted(lambda: ops.varlen_attention(q, k, k * 1, *ends, 15, 10), True)
    assert throughput.attention_forward(q, k, k, *ends) == forward == 4 * 2 * 16 * pairs
    assert throughput.attention_backward(q, None, q, k, k, q, None, None, *ends) == backward == 2 * forward
    x, weight = torch.randn(2, 3, 4, 6, 6, requires_grad=True), torch.randn(5, 3, 3, 3, 3, requires_grad=True)
    with sora_fast.use_backend("reference"):
        y = ops.causal_conv3d(x, weight)
        forward, backward = counted(lambda: ops.causal_conv3d(x, weight), True)
    assert throughput.convolution_forward(x.shape, weight.shape, out_shape=[y.shape]) == forward
    wanted = [True, True, False, False, False, False]
    assert throughput.convolution_backward(y.shape, None, x.shape, weight.shape, *[None] * 5, wanted) == backward
    assert throughput.peak(torch.device("cpu"), "fp32", 1) > 1e8
    throughput._ours()
    from torch.utils.flop_counter import flop_registry

    assert torch.ops.sora_fast.attention_forward in flop_registry


def test_a_resume_tells_which_files_came_and_went(tmp_path, capsys):
    media = write_media(tmp_path / "media")
    make = lambda **more: tiny_vae(tmp_path / "run", media, data=str(media), steps=1, heldout=0.2, **more)
    make().run()
    capsys.readouterr()
    make(resume=True)
    assert "--resume" not in capsys.readouterr().out  # the same files: nothing to say
    (kept,) = held_out([path.name for path in media.iterdir() if path.suffix != ".txt"], 0.2)
    (media / "clip2.mp4").rename(media / "clip9.mp4")
    write_image(media / "image1.png", torch.zeros(50, 50, 3, dtype=torch.uint8))
    make(resume=True)
    told = capsys.readouterr().out
    assert ("the files are not those that" in told and "1 added (clip9.mp4), 1 removed (clip2.mp4), 1 changed (image1.png). "
            "Crops are drawn from what is there now" in told)
    for name in "abcdef":
        (media / f"{name}.png").write_bytes((media / "image0.png").read_bytes())
    make(resume=True)
    told = capsys.readouterr().out
    assert "6 added (a.png, b.png, c.png, ...). " in told
    now = held_out([path.name for path in media.iterdir() if path.suffix != ".txt"], 0.2)
    assert (f"held out before and trained on now: {kept}" in told) == (kept not in now and (media / kept).exists())
    (tmp_path / "run" / "media.json").unlink()
    make(resume=True)
    assert "whether files were added or removed since its last checkpoint is not known" in capsys.readouterr().out
