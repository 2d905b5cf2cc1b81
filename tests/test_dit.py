"""DiT: the paper's sizes and formula, zero at the start, packs that equal every sample alone and never mix.

`assert_isolated` is the check of a pack; a model that lets tokens see the whole row must fail it.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from float64_checks import assert_close, draw
from torch import nn

from sora_fast import Pack
from sora_fast.models import ByteTextEncoder, DiT, Text
from sora_fast.models.checkpoints import dit_state_dict
from sora_fast.models.dit import PRESETS

SMALL = {
    "tiny": replace(PRESETS["tiny"], width=64, depth=2, heads=2, in_channels=3, rope_axes=(8, 12, 12), text_width=32),
    "S/2": replace(PRESETS["S/2"], width=64, depth=2, heads=2, in_channels=3, classes=5),
    "XL/4": replace(PRESETS["XL/4"], width=144, depth=1, heads=2, in_channels=2, classes=3),
    "tubelets": replace(PRESETS["tiny"], width=48, depth=2, heads=1, in_channels=2, patch=(2, 1, 3), text_width=16,
                        classes=4, qk_norm=False, rope_axes=None, learn_sigma=True, fractional_side=6.0),
}
SIZES = {"tiny": [(2, 4, 6), (1, 2, 2), (3, 2, 4), (1, 6, 4)], "S/2": [(1, 4, 4), (1, 8, 2), (2, 2, 2)],
         "XL/4": [(1, 8, 4), (1, 4, 4), (1, 12, 8)], "tubelets": [(4, 3, 6), (2, 1, 3), (2, 2, 9)]}
LENGTHS = (3, 0, 5, 1)  # text tokens


def make(config, seed=0):
    """Every parameter random, the zeros of the start too, so that every path is open."""
    model, generator = DiT(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan))
    return model


def conditions(config, count, seed=0):
    """Timesteps, and labels and text where the model wants them, of `count` samples."""
    lengths = LENGTHS[:count]
    out = dict(timesteps=torch.tensor([300.0, 0.0, 812.5, 1000.0][:count]))
    if config.classes:
        out["labels"] = torch.tensor([1, config.classes, 0, 2][:count])
    if config.text_width:
        out["text"] = Text(draw(sum(lengths), config.text_width, seed=seed + 50),
                           draw(count, config.text_width, seed=seed + 51), lengths)
    return out


def alone(given, place):
    """The conditions of one sample."""
    out = {name: value[place : place + 1] for name, value in given.items() if name != "text"}
    if "text" in given:
        text = given["text"]
        out["text"] = Text(text.tokens.split(text.lengths)[place], text.pooled[place : place + 1],
                           text.lengths[place : place + 1])
    return out


def clips_of(name, seed=0):
    channels = SMALL[name].in_channels
    return [draw(channels, *size, seed=seed + place) for place, size in enumerate(SIZES[name])]


# ------------------------------------------------------------------------------------------------ sizes, start
@pytest.mark.parametrize("size, millions", [("S", 32.9), ("B", 130.3), ("L", 457.8), ("XL", 674.8)])
def test_the_paper_s_sizes(size, millions):
    with torch.device("meta"):
        model = DiT.preset(f"{size}/2")
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1) == millions
    assert model.config.patch == (1, 2, 2) and model.config.out_channels == 8
    with torch.device("meta"):
        assert DiT.preset(f"{size}/8").x_embedder.proj.weight.shape[2:] == (1, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_the_start_is_zero_and_every_block_the_identity(name):
    model = DiT(SMALL[name])
    clips = [clip.float() for clip in clips_of(name)]
    given = conditions(SMALL[name], len(clips))
    if "text" in given:
        given["text"] = Text(given["text"].tokens.float(), given["text"].pooled.float(), given["text"].lengths)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append([
            stream.joined(inputs[2].rows) for stream in (inputs[0], output)]))
    out = model(clips, **given)
    assert all((part == 0).all() for part in out)
    assert [part.shape[1:] for part in out] == [clip.shape[1:] for clip in clips]
    assert len(seen) == SMALL[name].depth
    for before, after in seen:
        assert torch.equal(before, after) and before.abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ packs
def flat_of(clips, tail, numbers):
    nan = torch.full((tail * numbers,), float("nan"), dtype=torch.float64)
    return torch.cat([*(clip.reshape(-1) for clip in clips), nan])


def run_flat(model, clips, given, tail=0, modulation="sample"):
    """The flat form, with a tail of NaN: predictions cut into the samples' own."""
    patch, channels = model.config.patch, model.config.out_channels
    grids = [tuple(n // p for n, p in zip(clip.shape[1:], patch, strict=True)) for clip in clips]
    pack = Pack(grids, modulation=modulation, text_lengths=given["text"].lengths if "text" in given else None)
    pack = pack.pad_to(pack.num_tokens + tail)
    given = dict(given)
    out = model(flat_of(clips, tail, clips[0].shape[0] * math.prod(patch)), given.pop("timesteps"), pack, **given)
    assert (out[out.shape[0] - tail * channels * math.prod(patch) :] == 0).all()
    counts = [clip[0].numel() * channels for clip in clips]
    parts = out[: sum(counts)].split(counts)
    return [part.reshape(channels, *clip.shape[1:]) for part, clip in zip(parts, clips, strict=True)]


def run_list(model, clips, given):
    given = dict(given)
    return model(clips, given.pop("timesteps"), **given)


@pytest.mark.parametrize("tail", [None, 0, 7])
@pytest.mark.parametrize("name", SMALL)
def test_a_pack_equals_every_sample_alone(name, tail):
    """Predictions, gradients of every sample, of its conditions and of all parameters, in float64."""
    model, clips = make(SMALL[name]), [clip.requires_grad_() for clip in clips_of(name)]
    given = conditions(SMALL[name], len(clips))
    text = (given["text"].tokens, given["text"].pooled) if "text" in given else ()
    leaves = [*clips, *(t.requires_grad_() for t in text), *model.parameters()]
    weights = [draw(model.config.out_channels, *clip.shape[1:], seed=90) for clip in clips]
    score = lambda outs, ws: sum((out * w).sum() for out, w in zip(outs, ws, strict=True))
    together = run_list(model, clips, given) if tail is None else run_flat(model, clips, given, tail)
    apart = [run_list(model, [clip], alone(given, place))[0] for place, clip in enumerate(clips)]
    for got, want in zip(together, apart, strict=True):
        assert_close(got, want)
    grads = torch.autograd.grad(score(together, weights), leaves)
    wanted = torch.autograd.grad(score(apart, weights), leaves)
    for got, want in zip(grads, wanted, strict=True):
        assert want.any()
        assert_close(got, want)


def test_the_text_encoder_learns_the_same_from_a_pack():
    torch.manual_seed(0)
    model, encoder = make(SMALL["tiny"]), ByteTextEncoder(32, depth=1, heads=2).double()
    clips, captions = clips_of("tiny"), ["a bunny", "", "zwei Häschen", "x"]
    steps = torch.tensor([10.0, 500.0, 3.0, 999.0])
    together = sum(out.square().sum() for out in model(clips, steps, text=encoder(captions)))
    apart = sum(model([clip], step[None], text=encoder([caption]))[0].square().sum()
                for clip, step, caption in zip(clips, steps, captions, strict=True))
    got, wanted = (torch.autograd.grad(loss, list(encoder.parameters())) for loss in (together, apart))
    for a, b in zip(got, wanted, strict=True):
        assert b.any()
        assert_close(a, b)


def assert_isolated(run, clips, given):
    """A perturbed sample, NaN at worst, changes no other prediction and no other gradient by a bit."""
    def both(clips):
        leaves = [clip.detach().clone().requires_grad_() for clip in clips]
        outs = run(leaves, given)
        return [out.detach() for out in outs], torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)

    outs, grads = both(clips)
    for place in range(len(clips)):
        for change in (lambda clip: clip + 1, lambda clip: clip * float("nan")):
            others = [change(clip) if other == place else clip for other, clip in enumerate(clips)]
            new_outs, new_grads = both(others)
            for other in range(len(clips)):
                assert torch.equal(outs[other], new_outs[other]) == (other != place)
                assert other == place or torch.equal(grads[other], new_grads[other])


@pytest.mark.parametrize("tail", [None, 5])
@pytest.mark.parametrize("name", SMALL)
def test_samples_of_a_pack_do_not_see_each_other(name, tail):
    model = make(SMALL[name])
    run = lambda clips, given: run_list(model, clips, given) if tail is None else run_flat(model, clips, given, tail)
    assert_isolated(run, clips_of(name), conditions(SMALL[name], len(SIZES[name])))


def test_a_model_that_sees_the_whole_row_fails_the_check():
    model = make(SMALL["S/2"])
    for block in model.blocks:
        inner = block.attn.forward
        block.attn.forward = lambda x, pack, inner=inner: inner(x, Pack([(1, 1, x.shape[0])]))
    with pytest.raises(AssertionError):
        assert_isolated(lambda clips, given: run_list(model, clips, given), clips_of("S/2"), conditions(SMALL["S/2"], 3))


@pytest.mark.parametrize("what", ["tokens", "pooled", "timesteps"])
def test_conditions_of_one_sample_stay_its_own(what):
    model, clips = make(SMALL["tiny"]), clips_of("tiny")
    given = conditions(SMALL["tiny"], 4)
    before = run_list(model, clips, given)
    tokens, pooled, steps = given["text"].tokens.clone(), given["text"].pooled.clone(), given["timesteps"].clone()
    dict(tokens=tokens, pooled=pooled, timesteps=steps)[what][2 if what != "tokens" else slice(3, 8)] += 7
    after = run_list(model, clips, dict(timesteps=steps, text=Text(tokens, pooled, LENGTHS)))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("name", SMALL)
def test_batch_list_and_flat_agree(name):
    model, size = make(SMALL[name]), SIZES[name][0]
    batch, given = draw(3, SMALL[name].in_channels, *size), conditions(SMALL[name], 3)
    out = run_list(model, batch, given)
    assert out.shape == (3, model.config.out_channels, *size)
    for other in (run_list(model, list(batch), given), run_flat(model, list(batch), given)):
        assert all(torch.equal(a, b) for a, b in zip(out, other, strict=True))
    pack = Pack([tuple(n // p for n, p in zip(size, model.config.patch, strict=True))] * 3,
                text_lengths=LENGTHS[:3] if "text" in given else None)
    steps, rest = given["timesteps"], {k: v for k, v in given.items() if k != "timesteps"}
    padded = pack.pad_to(pack.num_tokens + 3)
    assert_close(model(batch, steps, padded, **rest), out)
    assert_close(torch.stack(model(list(batch), steps, padded, **rest)), out)


def test_empty_packs_and_empty_samples_are_legal():
    model = make(SMALL["tiny"])
    nothing = Text(draw(0, 32), draw(0, 32), ())
    assert model([], torch.zeros(0), text=nothing) == []
    assert model(draw(0, 3, 1, 2, 2), torch.zeros(0), text=nothing).shape == (0, 3, 1, 2, 2)
    clips, given = [draw(3, 1, 2, 2), draw(3, 0, 2, 2), draw(3, 2, 2, 2)], conditions(SMALL["tiny"], 3)
    out = run_list(model, clips, given)
    assert out[1].shape == (3, 0, 2, 2)
    assert_close(out[2], run_list(model, clips[2:], alone(given, 2))[0])


# ------------------------------------------------------------------------------------------------ conditioning
@pytest.mark.parametrize("name", SMALL)
def test_a_timestep_per_frame(name):
    """Constant over a sample's frames it equals one per sample; on one frame it reaches that sample alone."""
    model, clips, given = make(SMALL[name]), clips_of(name), conditions(SMALL[name], len(SIZES[name]))
    wanted = run_list(model, clips, given)
    frames = torch.tensor([clip.shape[1] // model.config.patch[0] for clip in clips])
    per_frame = given | dict(timesteps=given["timesteps"].repeat_interleave(frames))
    for tail in (0, 3):
        for same in (given, per_frame):
            for got, want in zip(run_flat(model, clips, same, tail, "frame"), wanted, strict=True):
                assert_close(got, want)
    steps = per_frame["timesteps"].clone()
    steps[0] += 400  # the first frame of the first sample
    changed = run_flat(model, clips, per_frame | dict(timesteps=steps), 0, "frame")
    plain = run_flat(model, clips, per_frame, 0, "frame")
    assert [torch.equal(a, b) for a, b in zip(changed, plain, strict=True)] == [False] + [True] * (len(clips) - 1)


def test_a_clean_first_frame_is_modulated_by_its_own_timestep():
    """Without attention nothing travels between frames: another timestep of frame 1 leaves frame 0 as it was."""
    model, clip = make(replace(SMALL["S/2"], classes=0)), draw(3, 3, 2, 2)
    for block in model.blocks:
        block.attn.forward = lambda x, pack: torch.zeros_like(x)
    pack = Pack([(3, 1, 1)], modulation="frame")
    first = model([clip], torch.tensor([0.0, 500.0, 500.0]), pack)[0]
    second = model([clip], torch.tensor([0.0, 900.0, 500.0]), pack)[0]
    same = [torch.equal(first[:, frame], second[:, frame]) for frame in range(3)]
    assert same == [True, False, True]


# ------------------------------------------------------------------------------------------------ the official DiT
def official_positions(width, side):
    """facebookresearch/DiT's fixed table (1, side * side, width): 2-D sin-cos, w first."""
    def sincos(dim, places):
        omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
        out = places.reshape(-1)[:, None] * omega
        return torch.cat([out.sin(), out.cos()], 1)

    w, h = torch.meshgrid(torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64), indexing="xy")
    return torch.cat([sincos(width // 2, w), sincos(width // 2, h)], 1)[None]


def official(state, x_BCHW, t_B, y_B, depth, heads, patch):
    """facebookresearch/DiT, models.py, written out: patches, table of positions, adaLN-Zero blocks, final layer."""
    width = state["x_embedder.proj.bias"].shape[0]
    batch, channels, height, _ = x_BCHW.shape
    side = height // patch

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def modulate(x, shift, scale):
        return x * (1 + scale[:, None]) + shift[:, None]

    x = F.conv2d(x_BCHW, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    freqs = torch.exp(-math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128)
    args = t_B[:, None].float() * freqs[None]
    t = torch.cat([torch.cos(args), torch.sin(args)], dim=-1).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", t))) + state["y_embedder.embedding_table.weight"][y_B]
    for n in range(depth):
        parts = linear(f"blocks.{n}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        h = modulate(norm(x), parts[0], parts[1])
        q, k, v = linear(f"blocks.{n}.attn.qkv", h).reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        h = ((q @ k.mT) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + parts[2][:, None] * linear(f"blocks.{n}.attn.proj", h.transpose(1, 2).reshape(batch, -1, width))
        h = linear(f"blocks.{n}.mlp.fc1", modulate(norm(x), parts[3], parts[4]))
        x = x + parts[5][:, None] * linear(f"blocks.{n}.mlp.fc2", F.gelu(h, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    x = linear("final_layer.linear", modulate(norm(x), shift, scale))
    x = torch.einsum("nhwpqc->nchpwq", x.reshape(batch, side, side, patch, patch, 2 * channels))
    return x.reshape(batch, 2 * channels, side * patch, side * patch)


@pytest.mark.parametrize("preset", ["S/2", "S/4"])
def test_the_formula_and_the_names_are_the_official_ones(preset):
    config = replace(PRESETS[preset], depth=2, classes=10)
    model = make(config)
    state = dit_state_dict(model, side=16)
    assert_close(state["pos_embed"], official_positions(config.width, 16 // config.patch[1]), 1e-14)
    x, t, y = draw(2, 4, 16, 16), torch.tensor([3, 871]), torch.tensor([10, 4])
    wanted = official(state, x, t, y, 2, config.heads, config.patch[1])
    got = model(x[:, :, None], t, labels=y)[:, :, 0]
    assert_close(got, wanted)
    swapped = replace(config, positions=(1, 2))  # h first: wrong
    wrong = make(swapped)(x[:, :, None], t, labels=y)[:, :, 0]
    with pytest.raises(AssertionError):
        assert_close(wrong, wanted)


def test_the_official_state_dict_has_these_names():
    with torch.device("meta"):
        model = DiT.preset("S/2")
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    modules = ["t_embedder.mlp.0", "t_embedder.mlp.2", "x_embedder.proj", "final_layer.linear",
               "final_layer.adaLN_modulation.1", *(f"blocks.{n}.{part}" for n in range(12) for part in parts)]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    state = dit_state_dict(model)
    assert set(state) == names | {"y_embedder.embedding_table.weight", "pos_embed"}
    assert state["x_embedder.proj.weight"].shape == (384, 4, 2, 2) and state["pos_embed"].shape == (1, 256, 384)


# ------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_changes_no_gradient(name):
    model, clips, given = make(SMALL[name]), clips_of(name), conditions(SMALL[name], len(SIZES[name]))
    grads = []
    for model.gradient_checkpointing in (False, True):
        loss = sum(out.square().sum() for out in run_list(model, clips, given))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain)


@pytest.mark.parametrize("name", SMALL)
def test_autocast_keeps_the_stream_in_float32(name):
    model = DiT(SMALL[name])
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    clips, given = [clip.float() for clip in clips_of(name)], conditions(SMALL[name], len(SIZES[name]))
    if "text" in given:
        given["text"] = Text(given["text"].tokens.float(), given["text"].pooled.float(), given["text"].lengths)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].x.dtype, output.x.dtype)))
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wanted = run_list(model, clips, given)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = run_list(model, clips, given)
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)] * len(model.blocks)
    sum(part.float().square().sum() for part in out).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    scale = max(part.abs().max() for part in wanted)
    assert max((a - b).abs().max() for a, b in zip(out, wanted, strict=True)) < 0.05 * scale


def test_a_bfloat16_model_runs():
    model = make(SMALL["S/2"]).bfloat16()
    out = model([clip.bfloat16() for clip in clips_of("S/2")], **conditions(SMALL["S/2"], 3))
    assert all(part.dtype == torch.bfloat16 and part.isfinite().all() for part in out)


# ------------------------------------------------------------------------------------------------ compile
def test_fractional_positions_place_a_token_by_its_share_of_the_picture():
    """Every second token of a picture of twice the size stands where the small one's do; by counts it does not."""
    config = SMALL["tubelets"]
    small, large = Pack([(1, 3, 4)]), Pack([(1, 6, 8)])
    matching = (large.coords[:, 1:] % 2 == 0).all(1)
    assert torch.equal(config.coords(large)[matching], config.coords(small))
    assert not torch.equal(replace(config, fractional_side=None).coords(large)[matching], small.coords)
    model, clips, given = make(config), clips_of("tubelets")[:1], conditions(config, 1)
    shares = model(clips, **given)[0]
    model.config = replace(config, fractional_side=None)
    assert not torch.allclose(model(clips, **given)[0], shares)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8], ids=str)
def test_timesteps_of_any_dtype(dtype):
    model, given = make(SMALL["tiny"]), conditions(SMALL["tiny"], 2)
    clips, steps = clips_of("tiny")[:2], torch.tensor([96.0, 200.0])  # whole in all of them
    got, want = (model(clips, times, text=given["text"]) for times in (steps.to(dtype), steps))
    assert all(map(torch.equal, got, want))


# ------------------------------------------------------------------------------------------------ errors
def test_errors_are_one_sentence():
    tiny, classes = make(SMALL["tiny"]), make(SMALL["S/2"])
    clips, given = clips_of("tiny")[:2], conditions(SMALL["tiny"], 2)
    text, steps, pack = given["text"], given["timesteps"], Pack([(2, 2, 3), (1, 1, 1)])
    flat = torch.cat([clip.reshape(-1) for clip in clips])
    calls = {
        "text for this model, got NoneType": lambda: tiny(clips, steps),
        "labels for this model, got NoneType": lambda: classes(clips, steps),
        "labels to be None": lambda: tiny(clips, steps, text=text, labels=torch.tensor([1, 2])),
        "text to be None": lambda: classes(clips, steps, text=text, labels=torch.tensor([1, 2])),
        r"one timestep per sample \(2\) .* got shape \(3,\)": lambda: tiny(clips, torch.zeros(3), text=text),
        r"got shape \(\)": lambda: tiny(clips, torch.tensor(3.0), text=text),
        r"\(2\), got 3\.5; pass a tensor": lambda: tiny(clips, 3.5, text=text),
        r"got \[300, 800\]; pass a tensor": lambda: tiny(clips, [300, 800], text=text),
        "labels of 2 samples, got 1": lambda: classes(clips, steps, labels=torch.tensor([1])),
        "text_lengths": lambda: tiny(clips, steps, text=conditions(SMALL["tiny"], 3)["text"]),
        "H is a multiple of the patch's 2, got 5; crop or pad to 4 or 6$": lambda: tiny([draw(3, 1, 5, 4)] * 2, steps,
                                                                                      text=text),
        "W is a multiple of the patch's 2, got 1; crop or pad to 2$": lambda: tiny([draw(3, 1, 4, 1)], steps, text=text),
        r"clips of shape \(3, T, H, W\), got \(4, 1, 4, 4\)": lambda: tiny([draw(4, 1, 4, 4)], steps[:1], text=text),
        "an image is a clip of one frame": lambda: tiny(draw(1, 3, 4, 4), steps[:1], text=text),
        "a pack with a flat buffer": lambda: tiny(flat, steps, text=text),
        "a pack with text_lengths": lambda: tiny(flat, steps, pack, text=text),
        "12 elements for each of the pack's 20 tokens": lambda: tiny(
            flat, steps, pack._copy().set_text(text.lengths).pad_to(20), text=text),
        "the latents' own pack": lambda: tiny(clips[::-1], steps, pack, text=text),
        "one of nano, tiny, S/2": lambda: DiT.preset("M/2"),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
