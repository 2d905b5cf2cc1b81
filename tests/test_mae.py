"""MAE: the paper's formula sample by sample, hidden pixels out of the trunk, visible ones out of the loss, packs that mix
nothing; masking, token dropping and its rates.

`assert_loss_is_blind`, `assert_exact` and `assert_keeps_positions` are the checks; each has a wrong result that must fail.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from float64_checks import assert_close, draw, seeded

from sora_fast import Pack, ops
from sora_fast.models.dit import sincos
from sora_fast.models.mae import MAE, MAEConfig
from sora_fast.nn import Masking, continuous_drop_rates, random_masking, size_drop_rates

TINY = MAEConfig(in_channels=2, patch=(1, 2, 3), width=32, depth=2, heads=2, decoder_width=24, decoder_depth=1,
                 decoder_heads=1)
SMALL = {
    "tokens": TINY,
    "tubelets": replace(TINY, patch=(2, 1, 2), pattern="tube", normalise_target=False),
    "fractional": replace(TINY, positions=(1, 2), fractional_side=16.0),
    "rope": replace(TINY, qk_norm=True, rope_axes=(4, 6, 6)),
}
TOKENS = [(2, 3, 2), (1, 2, 5), (1, 1, 1), (3, 2, 2)]
RATIOS = [0.75, 0.5, 0.75, 0.4]


def make(config):
    """Every parameter random, so that every path is open."""
    model, generator = MAE(config).double(), seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan))
    return model


def clips_of(config, grids=TOKENS, seed=0):
    sizes = [[n * p for n, p in zip(grid, config.patch, strict=True)] for grid in grids]
    return [draw(config.in_channels, *size, seed=seed + place) for place, size in enumerate(sizes)]


def places(masking, pack):
    """Visible and hidden places of each sample, counted from its first token."""
    starts = pack.cu_seqlens.tolist()
    inside = lambda index, s: [i - starts[s] for i in index.tolist() if starts[s] <= i < starts[s + 1]]
    return [(inside(masking.visible, s), inside(masking.hidden, s)) for s in range(pack.num_samples)]


# ------------------------------------------------------------------------------------------------ the formula
def plain(model, clip, visible, hidden):
    """One sample by the paper, in plain PyTorch: its loss, predictions (K, P) and the trunk's tokens (M, D)."""
    config = model.config
    state = dict(model.named_parameters())
    (t, h, w), (pt, ph, pw) = [n // p for n, p in zip(clip.shape[1:], config.patch, strict=True)], config.patch
    kernel = state["encoder.x_embedder.proj.weight"]
    x = F.conv3d(clip[None], kernel, state["encoder.x_embedder.proj.bias"], stride=config.patch)[0].flatten(1).T
    coords = torch.tensor([[a, b, c] for a in range(t) for b in range(h) for c in range(w)], dtype=torch.float64)
    places = coords
    if config.fractional_side is not None:
        side = config.fractional_side
        places = (coords.float() / torch.tensor([1.0, h, w]) * torch.tensor([1.0, side, side])).double()

    def embed(width):
        share = width // len(config.positions) // 2 * 2
        parts = []
        for axis in config.positions:
            angle = places[:, axis : axis + 1] * 10000.0 ** (-torch.arange(share // 2, dtype=torch.float64) / (share // 2))
            parts += [angle.sin(), angle.cos()]
        return F.pad(torch.cat(parts, 1), (0, width - share * len(config.positions)))

    def block(name, x, coords, heads, trunk):
        p = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        norm = lambda x, n: F.layer_norm(x, x.shape[1:], p[f"{n}.weight"], p[f"{n}.bias"], 1e-6)
        linear = lambda x, n: x @ p[f"{n}.weight"].T + p[f"{n}.bias"]
        q, k, v = linear(norm(x, "norm1"), "attn.qkv").unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        if trunk and config.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:], p[f"attn.{n}_norm"], 1e-6) for y, n in ((q, "q"), (k, "k")))
        if trunk and config.rope_axes:
            angle = torch.cat([coords[:, a : a + 1] * config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
                               for a, d in enumerate(config.rope_axes)], 1)
            turned = torch.polar(torch.ones_like(angle), angle)
            q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turned).flatten(-2)
                    for y in (q, k))
        out = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(out.permute(1, 0, 2).flatten(1), "attn.proj")
        return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1"), approximate="tanh"), "mlp.fc2")

    final = lambda x, n: F.layer_norm(x, x.shape[1:], state[f"{n}.weight"], state[f"{n}.bias"], 1e-6)
    x = (x + embed(config.width))[visible]
    for n in range(config.depth):
        x = block(f"encoder.blocks.{n}", x, coords[visible], config.heads, True)
    tokens = final(x, "encoder.norm")
    x = tokens @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
    full = torch.zeros(t * h * w, config.decoder_width, dtype=torch.float64)
    full[visible], full[hidden] = x, state["mask_token"].expand(len(hidden), -1)
    full = full + embed(config.decoder_width)
    for n in range(config.decoder_depth):
        full = block(f"decoder_blocks.{n}", full, coords, config.decoder_heads, False)
    prediction = final(full, "decoder_norm")[hidden] @ state["decoder_pred.weight"].T + state["decoder_pred.bias"]
    target = clip.reshape(-1, t, pt, h, ph, w, pw).permute(1, 3, 5, 2, 4, 6, 0).flatten(3).flatten(0, 2)[hidden]
    if config.normalise_target and hidden:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean(1).sum() / max(len(hidden), 1), prediction, tokens


@pytest.mark.parametrize("tail", [None, 3])
@pytest.mark.parametrize("name", SMALL)
def test_a_pack_gives_the_paper_s_formula_sample_by_sample(name, tail):
    """Losses, predictions and every gradient; the loss is the mean over the samples that hide something."""
    model = make(SMALL[name])
    clips, config = clips_of(SMALL[name]), SMALL[name]
    pack = Pack(TOKENS)
    if tail is None:
        given = (clips,)
    else:
        pack = pack.pad_to(pack.num_tokens + tail)
        flat = torch.cat([clip.reshape(-1) for clip in clips])
        given = (F.pad(flat, (0, tail * config.numbers), value=float("nan")), pack)
    got = model(*given, ratio=RATIOS, generator=seeded())
    parts = [plain(model, clip, *where) for clip, where in zip(clips, places(got.masking, pack), strict=True)]
    wanted = sum(loss for loss, _, _ in parts) / 3  # the sample of one token hides nothing
    assert_close(got.per_sample, torch.stack([loss for loss, _, _ in parts]))
    assert got.per_sample[2] == 0 and (got.per_sample[[0, 1, 3]] > 0).all()
    assert_close(got.prediction, torch.cat([prediction for _, prediction, _ in parts]))
    assert_close(got.loss, wanted)
    leaves = list(model.parameters())
    for a, b in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert b.any()
        assert_close(a, b, 1e-10)


# ------------------------------------------------------------------------------------------------ what sees what
@pytest.mark.parametrize("name", SMALL)
def test_hidden_pixels_never_enter_the_trunk(name):
    """NaN in every hidden patch changes no token and no prediction by a bit; the trunk gets the visible tokens alone."""
    model, config = make(SMALL[name]), SMALL[name]
    pack, clips = Pack(TOKENS), clips_of(SMALL[name])
    masking = random_masking(pack, RATIOS, pattern=config.pattern, generator=seeded())
    patches, _ = model.patches(clips)
    spoiled = masking.unshuffle(patches[masking.visible], torch.full_like(patches[masking.hidden], float("nan")))
    spoiled = spoiled.unflatten(1, (config.in_channels, -1)).transpose(1, 2).flatten(1)
    seen = []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    clean = model(clips, masking=masking)
    dirty = model(ops.unpatchify(spoiled, pack, config.patch, config.in_channels), masking=masking)
    assert torch.equal(clean.prediction, dirty.prediction) and dirty.loss.isnan() and clean.loss.isfinite()
    assert torch.equal(*seen) and seen[0].shape == (len(masking.visible), config.width)
    assert len(masking.visible) < pack.num_tokens


def assert_loss_is_blind(loss, patches, masking):
    """`loss(patches)` does not depend on visible patches: not their values, not NaN, no gradient; on hidden ones it does."""
    wanted = loss(patches)
    for change in (lambda x: x + 1, lambda x: x * float("nan")):
        visible, hidden = masking.shuffle(patches)
        assert torch.equal(loss(masking.unshuffle(change(visible), hidden)), wanted)
    leaf = patches.clone().requires_grad_()
    grad = torch.autograd.grad(loss(leaf).sum(), leaf)[0]
    assert (grad[masking.visible] == 0).all() and (grad[masking.hidden] != 0).any(1).all()


@pytest.mark.parametrize("name", SMALL)
def test_visible_pixels_never_enter_the_loss(name):
    model, pack = make(SMALL[name]), Pack(TOKENS)
    masking = random_masking(pack, RATIOS, pattern=SMALL[name].pattern, generator=seeded())
    patches, _ = model.patches(clips_of(SMALL[name]))
    prediction = draw(len(masking.hidden), SMALL[name].numbers, seed=9)
    assert_loss_is_blind(lambda p: model.loss(prediction, p, pack, masking)[1], patches, masking)
    everything = Masking(masking.visible[:0], torch.arange(pack.num_tokens), pack.num_tokens)
    padded = masking.unshuffle(draw(len(masking.visible), SMALL[name].numbers), prediction)
    with pytest.raises(AssertionError):  # a loss over all patches
        assert_loss_is_blind(lambda p: model.loss(padded, p, pack, everything)[1], patches, masking)


def test_samples_of_a_pack_do_not_see_each_other():
    model, clips = make(TINY), clips_of(TINY)
    masking = random_masking(Pack(TOKENS), RATIOS, generator=seeded())
    wanted = model(clips, masking=masking).per_sample
    got = model([clips[0], clips[1] * float("nan"), *clips[2:]], masking=masking).per_sample
    assert torch.equal(got[[0, 2, 3]], wanted[[0, 2, 3]]) and got[1].isnan()


# ------------------------------------------------------------------------------------------------ positions
def assert_keeps_positions(encode, model, clips, masking):
    """The visible tokens alone through `encode` are those of the formula, which gives each the position it had."""
    wanted = [plain(model, clip, *where)[2] for clip, where in zip(clips, places(masking, Pack(TOKENS)), strict=True)]
    assert_close(encode(clips, masking), torch.cat(wanted))


@pytest.mark.parametrize("name", SMALL)
def test_dropped_tokens_keep_their_positions(name):
    model, clips = make(SMALL[name]), clips_of(SMALL[name])
    masking = random_masking(Pack(TOKENS), RATIOS, generator=seeded())
    assert_keeps_positions(lambda clips, masking: model.encode(clips, masking=masking)[0], model, clips, masking)

    def compacted(clips, masking):  # positions counted anew after the drop
        patches, pack = model.patches(clips)
        kept = pack.keep(masking.visible)
        counts = kept.cu_seqlens.diff().tolist()
        return model.encoder(patches[masking.visible], Pack([(1, 1, n) for n in counts]))

    with pytest.raises(AssertionError):
        assert_keeps_positions(compacted, model, clips, masking)


def test_fractional_positions_do_not_change_with_resolution():
    """A patch gets the same embedding at twice the resolution, and another one with absolute positions."""
    for config, same in ((SMALL["fractional"], True), (TINY, False)):
        small, large = Pack([(2, 3, 4)]), Pack([(2, 6, 8)])
        at = lambda pack, config=config: config.embedding(pack, 24, torch.float32)
        matching = (large.coords[:, 1:] % 2 == 0).all(1)
        assert torch.equal(at(large)[matching], at(small)) == same
    wide = sincos(small.fractional_coords(16.0), (1, 2), 24, torch.float32)
    assert torch.equal(wide, SMALL["fractional"].embedding(small, 24, torch.float32)) and len(wide.unique(dim=0)) == 12


# ------------------------------------------------------------------------------------------------ masking
def assert_exact(masking, x):
    """Shuffle and unshuffle are inverse bit for bit, and every token is in exactly one part."""
    visible, hidden = masking.shuffle(x)
    inside = len(masking.visible) + len(masking.hidden)
    assert sorted([*masking.visible.tolist(), *masking.hidden.tolist()]) == list(range(inside))
    back = masking.unshuffle(visible, hidden)
    assert torch.equal(back[:inside], x[:inside]) and (back[inside:] == 0).all()
    again = masking.shuffle(back)
    assert torch.equal(again[0], visible) and torch.equal(again[1], hidden)


@pytest.mark.parametrize("pattern", ["token", "tube"])
@pytest.mark.parametrize("seed", range(5))
def test_shuffle_and_unshuffle_are_exact(pattern, seed):
    pack = Pack([*TOKENS, (0, 2, 2)]).pad_to(40)
    masking = random_masking(pack, [*RATIOS, 0.5], pattern=pattern, generator=seeded(seed))
    for x in (draw(40, 3).float(), torch.arange(40), draw(40, 2, 2).bfloat16()):
        assert_exact(masking, x)
    with pytest.raises(AssertionError):
        assert_exact(Masking(masking.visible, masking.hidden.roll(1) * 0, 40), torch.arange(40))
    leaf = draw(40, 3).requires_grad_()
    weight = draw(40, 3, seed=1)
    grad = torch.autograd.grad((masking.unshuffle(*masking.shuffle(leaf)) * weight).sum(), leaf)[0]
    assert torch.equal(grad[:35], weight[:35]) and not grad[35:].any()


@pytest.mark.parametrize("pattern", ["token", "tube"])
def test_every_sample_has_its_own_ratio(pattern):
    grids, ratios = [(4, 4, 5), (1, 3, 7), (2, 1, 1), (1, 1, 1), (0, 3, 3), (3, 10, 1)], [0.75, 0.9, 0.9, 0.5, 0.5, 0.0]
    pack = Pack(grids)
    masking = random_masking(pack, ratios, pattern=pattern, generator=seeded())
    for (t, h, w), ratio, (visible, hidden) in zip(grids, ratios, places(masking, pack), strict=True):
        unit = t if pattern == "tube" else 1
        total = t * h * w
        wanted = min(total, max(unit, round((1 - ratio) * total / max(unit, 1)) * unit))
        assert len(visible) == wanted and len(hidden) == total - wanted
        if pattern == "tube":
            assert {i % (h * w) for i in visible}.isdisjoint({i % (h * w) for i in hidden}) or not total
        assert visible == sorted(visible) and hidden == sorted(hidden)
    again = random_masking(pack, ratios, pattern=pattern, generator=seeded())
    other = random_masking(pack, ratios, pattern=pattern, generator=seeded(1))
    assert torch.equal(again.visible, masking.visible) and not torch.equal(other.visible, masking.visible)
    same = random_masking(pack, 0.75, pattern=pattern, generator=seeded())
    assert torch.equal(same.hidden, random_masking(pack, torch.full((6,), 0.75), pattern=pattern, generator=seeded()).hidden)
    assert pack.keep(masking.visible).coords.tolist() == pack.coords[masking.visible].tolist()


@pytest.mark.parametrize("pattern", ["token", "tube"])
def test_every_token_is_hidden_as_often_as_the_others(pattern):
    pack, generator, hidden = Pack([(2, 4, 4)]), seeded(), torch.zeros(32)
    for _ in range(1000):
        hidden[random_masking(pack, 0.75, pattern=pattern, generator=generator).hidden] += 1
    assert hidden.sum() == 24000 and (hidden / 1000 - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 1000)


# ------------------------------------------------------------------------------------------------ dropping rates
def test_continuous_rates_have_the_distribution_s_mean_and_spread():
    rates = torch.tensor(continuous_drop_rates(20000, 0.4, 0.2, generator=seeded()), dtype=torch.float64)
    assert 0 <= rates.min() and rates.max() < 1 and len(rates.unique()) > 19000
    assert abs(rates.mean() - 0.4) < 0.006 and abs(rates.std() - 0.2) < 0.006
    beta = torch.distributions.Beta(2.0, 3.0)  # mean 0.4 and variance 0.04
    samples = beta.sample((20000,)).double()
    for share in (0.1, 0.5, 0.9):
        assert abs(rates.quantile(share) - samples.quantile(share)) < 0.015
    assert continuous_drop_rates(5, generator=seeded(3)) == continuous_drop_rates(5, generator=seeded(3))
    extreme = continuous_drop_rates(1000, 0.5, 0.4999, generator=seeded())
    assert all(0 <= rate < 1 for rate in extreme) and continuous_drop_rates(0) == []


def test_size_dependent_rates_follow_the_size():
    tokens = [10, 64, 544, 1024, 5000]
    exact = size_drop_rates(tokens, std=0)
    assert exact == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
    rates = torch.tensor([size_drop_rates(tokens, std=0.02, generator=seeded(s)) for s in range(500)])
    assert ((rates - torch.tensor(exact)).abs() <= 0.04 + 1e-6).all() and (rates.std(0) > 0.015).all()
    assert (rates.mean(0) - torch.tensor(exact)).abs().max() < 0.004
    falling = size_drop_rates([64, 1024], (64, 0.6), (1024, 0.1), std=0)
    assert falling == pytest.approx([0.6, 0.1])
    pack = Pack([(1, 8, 8), (1, 32, 32)])
    masking = random_masking(pack, size_drop_rates([64, 1024], std=0, generator=seeded()), generator=seeded())
    assert [len(hidden) for _, hidden in places(masking, pack)] == [13, 819]


# ------------------------------------------------------------------------------------------------ use
def test_batch_list_and_flat_agree_and_nothing_is_legal():
    model = make(TINY)
    batch, pack = draw(3, 2, 2, 4, 6), Pack([(2, 2, 2)] * 3)
    masking = random_masking(pack, 0.5, generator=seeded())
    wanted = model(batch, masking=masking)
    for given in ((list(batch),), (batch.reshape(-1), pack), (batch, pack)):
        assert torch.equal(model(*given, masking=masking).prediction, wanted.prediction)
    nothing = model([])
    assert nothing.loss == 0 and nothing.per_sample.shape == (0,) and nothing.prediction.shape == (0, TINY.numbers)
    whole = model(batch, ratio=0.0)
    assert whole.loss == 0 and whole.prediction.shape[0] == 0
    empty = model([draw(2, 0, 4, 6), draw(2, 1, 2, 6)], ratio=0.5)
    assert empty.per_sample.shape == (2,) and empty.per_sample[0] == 0 and empty.loss == empty.per_sample[1]
    tokens, own = model.encode(batch)
    assert own.pool(tokens).shape == (3, TINY.width)
    assert torch.equal(model.encode(batch, masking=masking)[1].kept, masking.visible)


def test_low_precision_and_autocast_run():
    torch.manual_seed(0)
    model, clips = MAE(SMALL["rope"]), [clip.float() for clip in clips_of(SMALL["rope"])]
    masking = random_masking(Pack(TOKENS), 0.5, generator=seeded())
    wanted = model(clips, masking=masking)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(clips, masking=masking)
    got.loss.backward()
    assert got.loss.dtype == got.per_sample.dtype == torch.float32 and abs(got.loss - wanted.loss) < 0.05 * wanted.loss
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    low = model.bfloat16()([clip.bfloat16() for clip in clips], masking=masking)
    assert low.prediction.dtype == torch.bfloat16 and low.loss.dtype == torch.float32
    assert abs(low.loss - wanted.loss) < 0.05 * wanted.loss


def test_errors_are_one_sentence():
    model, pack = make(TINY), Pack(TOKENS)
    clips = clips_of(TINY)
    masking = random_masking(pack, 0.5)
    calls = {
        r"clips \(2, T, H, W\) .* multiples of the patch \(1, 2, 3\), got \(2, 1, 5, 6\)": lambda: model([draw(2, 1, 5, 6)]),
        r"got \(3, 1, 4, 6\)": lambda: model([draw(3, 1, 4, 6)]),
        "the clips' own pack": lambda: model(clips[::-1], pack),
        "12 elements per token, got 100 elements": lambda: model(draw(100), pack),
        "got 100 elements and None": lambda: model(draw(100)),
        "one for each of 4 samples, got 2": lambda: model(clips, ratio=[0.5, 0.5]),
        "not including 1, got 1.0": lambda: model(clips, ratio=1.0),
        "not including 1, got -0.1": lambda: random_masking(pack, -0.1),
        "pattern to be one of 'token', 'tube', got 'block'": lambda: random_masking(pack, 0.5, pattern="block"),
        "dropped nothing yet": lambda: random_masking(pack.keep(masking.visible), 0.5),
        r"x of shape \(35, D1\), got \(3, 2\)": lambda: masking.shuffle(draw(3, 2)),
        "hidden of shape": lambda: masking.unshuffle(draw(len(masking.visible), 2), draw(1, 2)),
        "positions of at least one axis": lambda: replace(TINY, positions=()),
        "two elements or more": lambda: replace(TINY, patch=(1, 1, 1), in_channels=1),
        "a mean between 0 and 1": lambda: continuous_drop_rates(3, 0.5, 0.6),
        "rising tokens": lambda: size_drop_rates([1], (64, 0.5), (64, 0.6)),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
