"""WanDiT: diffusers' WanTransformer3DModel in both namings, packs that equal every clip alone, a timestep per frame.

diffusers rounds its norms, its tables of angles and what it sums to float32, also in a model of float64: `in_float64`
leaves those numbers as they are, and shows by how much they were off.
"""

import contextlib
import json
import re
from dataclasses import replace

import pytest
import torch
from float64_checks import assert_close, draw
from torch import nn

from sora_fast import Pack
from sora_fast.diffusion import generate, make_objective
from sora_fast.models import Text, WanDiT, WanDiTConfig, load_dit, pad_text, save_dit
from sora_fast.models.checkpoints import wan_from_state_dict, wan_state_dict

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = {  # diffusers' arguments
    "test": dict(num_attention_heads=2, attention_head_dim=12),
    "tubelets": dict(num_attention_heads=3, attention_head_dim=16, patch_size=(2, 1, 2), num_layers=3),
    "wide head": dict(num_attention_heads=1, attention_head_dim=128, in_channels=6, freq_dim=64),
}
OURS = WanDiTConfig(width=48, depth=2, heads=2, mlp_width=40, in_channels=3, out_channels=3, text_width=10, frequencies=32)


def randomise(model):
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(draw(*p.shape, seed=place) / (p[0].numel() if p.dim() > 1 else 4) ** 0.5)
    return model


@contextlib.contextmanager
def in_float64():
    """Nothing is rounded from float64 to float32 by `.float()`."""
    rounding = torch.Tensor.float
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else rounding(t)
    try:
        yield
    finally:
        torch.Tensor.float = rounding


def make_wan(**sizes):
    diffusers = pytest.importorskip("diffusers")
    usual = dict(in_channels=4, out_channels=4, text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    with in_float64():
        wan = diffusers.WanTransformer3DModel(**usual | sizes)
    return randomise(nn.Module.to(wan, torch.float64).eval())  # its own to() has a warning here


def make(config=OURS):
    return randomise(WanDiT(config).double())


# ------------------------------------------------------------------------------------------------ diffusers' model
@pytest.mark.parametrize("name", SIZES)
def test_saved_weights_load_agree_and_come_back(tmp_path, monkeypatch, name):
    wan = make_wan(**SIZES[name])
    wan.save_pretrained(tmp_path / "theirs")
    model = load_dit(tmp_path / "theirs")
    patch, channels = model.config.patch, model.config.in_channels
    for place, (size, length) in enumerate([((4, 4, 6), 7), ((2, 8, 4), 1), ((6, 2, 2), 512)]):
        x, text, steps = draw(2, channels, *size, seed=place), draw(2, length, 16, seed=place), torch.tensor([3, 871])
        grid = tuple(n // p for n, p in zip(size, patch, strict=True))
        frames = torch.arange(2 * grid[0]) * 90 + 7
        per_token = frames.view(2, -1).repeat_interleave(grid[1] * grid[2], 1)  # as Wan 2.2's 5B model has them
        with torch.no_grad():
            with in_float64():
                wanted, wanted_frames = wan(x, steps, text).sample, wan(x, per_token, text).sample
            got = model(x, steps, text=text)
            assert_close(got, wanted)
            pack = Pack([grid] * 2, modulation="frame", text_lengths=(length,) * 2)
            assert_close(model(x, frames, pack, text=text), wanted_frames)
            rounded = wan(x, steps, text).sample
            assert_close(got, rounded, 1e-5)
            with pytest.raises(AssertionError):  # what diffusers rounds is more than the check lets through
                assert_close(rounded, wanted)
            with pytest.raises(AssertionError):
                assert_close(model(x, steps, text=text + 1e-9), wanted)
    save_dit(model, tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    monkeypatch.setattr(type(wan), "_keep_in_fp32_modules", None)  # which its loader wants another package for
    again = type(wan).from_pretrained(tmp_path / "ours", torch_dtype=torch.float64, low_cpu_mem_usage=False)
    assert all(torch.equal(again.state_dict()[key], t) for key, t in wan.state_dict().items())
    theirs, ours = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    differ = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
    assert differ == {"_diffusers_version", "rope_max_seq_len"}  # a limit of diffusers' tables, which we have not


def test_the_original_names_are_those_of_diffusers_converter(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    wan = make_wan(**SIZES["test"])
    model = wan_from_state_dict(wan.state_dict(), wan.config)
    save_dit(model, tmp_path / "model.safetensors", "wan")
    state = wan_state_dict(model, "wan")
    converted = convert_wan_transformer_to_diffusers(dict(state))
    assert set(converted) == set(wan.state_dict())
    for name, t in wan.state_dict().items():
        assert torch.equal(converted[name], t) and converted[name].shape == t.shape, name
    (tmp_path / "config.json").write_text(json.dumps(dict(_class_name="WanModel", dim=24, num_heads=2, eps=1e-6)))
    for path in (tmp_path / "model.safetensors", tmp_path):
        back = load_dit(path)
        assert back.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_the_published_sizes_are_the_presets():
    for name, billions in (("1.3B", 1.42), ("14B", 14.29)):
        with torch.device("meta"):
            model = WanDiT.preset(name)
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
        assert model.config.rope_axes == (44, 42, 42)
        for layout in ("diffusers", "wan"):
            state = wan_state_dict(model, layout)
            assert len(state) == 15 + 27 * model.config.depth
            assert wan_from_state_dict(state).config == model.config


# ------------------------------------------------------------------------------------------------ packs
def clips_and_texts():
    clips = [draw(3, 3, 4, 6), draw(3, 1, 8, 2, seed=1), draw(3, 2, 2, 2, seed=2)]
    lengths = (5, 1, 9)
    return clips, Text(draw(15, 10, seed=3), draw(3, 10), lengths), torch.tensor([30.0, 500.0, 999.0])


def test_a_pack_equals_every_clip_alone_and_gradients_too():
    model, (clips, text, steps) = make(), clips_and_texts()
    leaves = [*(clip.requires_grad_() for clip in clips), text.tokens.requires_grad_(), *model.parameters()]
    together = model(clips, steps, text=text)
    texts = text.tokens.split(text.lengths)
    alone = [model([clip], steps[n : n + 1], text=texts[n][None])[0] for n, clip in enumerate(clips)]
    for got, wanted in zip(together, alone, strict=True):
        assert_close(got, wanted)
    score = lambda outs: sum((out * draw(*out.shape, seed=9)).sum() for out in outs)
    grads = zip(torch.autograd.grad(score(together), leaves), torch.autograd.grad(score(alone), leaves), strict=True)
    for got, wanted in grads:
        assert wanted.any()
        assert_close(got, wanted)
    model.gradient_checkpointing = True
    for got, wanted in zip(torch.autograd.grad(score(model(clips, steps, text=text)), leaves),
                           torch.autograd.grad(score(together := model(clips, steps, text=text)), leaves), strict=True):
        assert_close(got, wanted)


def test_flat_buffers_with_tails_and_batches():
    model, (clips, text, steps) = make(), clips_and_texts()
    wanted = model(clips, steps, text=text)
    grids = [tuple(n // p for n, p in zip(clip.shape[1:], (1, 2, 2), strict=True)) for clip in clips]
    for modulation in ("sample", "frame"):
        pack = Pack(grids, modulation=modulation, text_lengths=text.lengths)
        pack = pack.pad_to(pack.num_tokens + 5)
        flat = torch.cat([*(clip.flatten() for clip in clips), torch.full((5 * 12,), float("nan"), dtype=torch.float64)])
        out = model(flat, steps, pack, text=text)
        assert not out[-60:].any()
        for got, want in zip(out[:-60].split([clip.numel() for clip in clips]), wanted, strict=True):
            assert_close(got.view(want.shape), want)


def test_samples_do_not_see_each_other():
    model, (clips, text, steps) = make(), clips_and_texts()
    before = model(clips, steps, text=text)
    tokens = text.tokens.clone()
    tokens[5] = float("nan")  # the second clip's only token
    for after in (model([clips[0], clips[1] * float("nan"), clips[2]], steps, text=text),
                  model(clips, steps, text=replace(text, tokens=tokens)),
                  model(clips, torch.tensor([30.0, 4.0, 999.0]), text=text)):
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_padded_text_is_attended_to_as_in_the_published_pipeline():
    """Zeros after the text's own tokens, all of them attended to, as WanPipeline passes them to its transformer."""
    wan = make_wan(**SIZES["test"])
    model = wan_from_state_dict(wan.state_dict(), wan.config)
    text = Text(draw(9, 16), draw(2, 16), (6, 3))
    padded = pad_text(text, 12)
    assert padded.lengths == (12, 12) and padded.pooled is text.pooled
    batch = nn.utils.rnn.pad_sequence(text.tokens.split(text.lengths), batch_first=True)
    batch = torch.cat([batch, batch.new_zeros(2, 6, 16)], 1)
    x, steps = draw(2, 4, 1, 4, 4), torch.tensor([5, 700])
    with torch.no_grad(), in_float64():
        wanted = wan(x, steps, batch).sample
    with torch.no_grad():
        assert_close(model(x, steps, text=padded), wanted)
        assert (model(x, steps, text=text) - wanted).abs().max() > 1e-3
    assert pad_text(Text(draw(0, 16), draw(0, 16), ())).lengths == ()


def test_it_generates():
    """Clips of two sizes in one pack, from text, with guidance: what `sora_fast.diffusion` asks of a model."""
    model = make().float()
    condition = lambda null: dict(text=pad_text(Text(torch.full((5, 10), float(not null)), torch.zeros(2, 10), (2, 3)), 4))
    made = generate(model, make_objective("flow", "velocity"), [(3, 2, 4, 4), (3, 1, 2, 6)], patch=(1, 2, 2), steps=2,
                    guidance=2.0, condition=condition, generator=torch.Generator().manual_seed(0))
    assert [tuple(clip.shape) for clip in made] == [(3, 2, 4, 4), (3, 1, 2, 6)]
    assert all(clip.isfinite().all() and clip.std() > 0.1 for clip in made)


def test_16_bits_with_tables_in_float32():
    """As diffusers' loader keeps them, and under autocast: near the float64 model."""
    model, (clips, text, steps) = make(), clips_and_texts()
    wanted = model(clips, steps, text=text)
    low, few = [clip.bfloat16() for clip in clips], replace(text, tokens=text.tokens.bfloat16())
    state = {name: t.float() for name, t in wan_state_dict(model).items()}
    mixed = wan_from_state_dict(state, heads=2, dtype=torch.bfloat16)
    kept = {re.sub(r"^blocks.\d+.", "", name) for name, p in mixed.named_parameters() if p.dtype == torch.float32}
    assert kept == {"table", "cross_norm.weight", "cross_norm.bias", *(f"t_embedder.mlp.{n}" for n in (
        "0.weight", "0.bias", "2.weight", "2.bias"))}
    for half in (mixed, make().bfloat16()):
        out = half(low, steps, text=few)
        assert all(part.dtype == torch.bfloat16 for part in out)
        assert max((a - b).abs().max() for a, b in zip(out, wanted, strict=True)) < 0.1
    single = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = single([clip.float() for clip in clips], steps, text=replace(text, tokens=text.tokens.float()))
    sum(part.float().square().sum() for part in out).backward()
    assert max((a - b).abs().max() for a, b in zip(out, wanted, strict=True)) < 0.1
    assert all(p.grad.isfinite().all() for p in single.parameters())


# ------------------------------------------------------------------------------------------------ errors
def test_errors_are_one_sentence(tmp_path):
    wan, (clips, text, steps) = make_wan(**SIZES["test"]), clips_and_texts()
    state, config, model = wan.state_dict(), dict(wan.config), make()
    image = make_wan(**SIZES["test"], image_dim=8, added_kv_proj_dim=24)
    renamed = {name.replace("attn1.to_q", "attn1.to_r"): t for name, t in state.items()}
    load = lambda state, config=config, **options: wan_from_state_dict(state, config, **options)
    one = lambda **given: model(clips[0].flatten(), steps[:1], Pack([(3, 2, 3)], **given), text=text)
    calls = {
        r"text-to-video .*\(condition_embedder.image_embedder.norm1.weight, ": lambda: load(image.state_dict()),
        r"image_dim in config.json": lambda: load(state, dict(image.config)),
        "without blocks.0.attn1.to_q.weight, .* and 1 more, with unknown blocks.0.attn1.to_r.weight": lambda: load(renamed),
        r"with proj_out.bias of \(3,\) for \(16,\)": lambda: load(state | {"proj_out.bias": torch.zeros(3)}),
        "cross_attn_norm True in config.json, got False": lambda: load(state, config | dict(cross_attn_norm=False)),
        "qk_norm 'rms_norm_across_heads' in config.json, got None": lambda: load(state, config | dict(qk_norm=None)),
        "heads that divide the width 24, got 0; pass heads=": lambda: load(state, None),
        "heads that divide the width 24, got 5": lambda: load(state, heads=5),
        "expected a tensor patch_embedding.weight": lambda: load({}),
        "file of .safetensors": lambda: save_dit(model, tmp_path / "a", "wan"),
        "one of 1.3B, 14B, got '5B'": lambda: WanDiT.preset("5B"),
        "heads of an even width": lambda: WanDiT(replace(OURS, heads=16)),
        r"one timestep per sample \(3\) or modulation row \(3\), got": lambda: model(clips, steps[:2], text=text),
        r"\(3\), got 3\.5; pass a tensor": lambda: model(clips, 3.5, text=text),
        "a pack with text_lengths": lambda: one(),
        "text of 1 samples, got 3": lambda: one(text_lengths=[5]),
        "texts of at most 8 tokens, got one of 9": lambda: pad_text(text, 8),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value), caught.value
