"""VideoVAE: Wan 2.1's graph by diffusers' own, streams over any chunk plan, constant memory, sizes, statistics.

`assert_streams` is the check of a stream; a decoder that takes every chunk for a first one must fail it.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from float64_checks import assert_close, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sora_fast.models import VAEConfig, VideoVAE
from sora_fast.models.checkpoints import vae_from_state_dict
from sora_fast.models.linear_path import Fold, Unfold
from sora_fast.models.vae import PRESETS
from sora_fast.nn import StreamState

SMALL = {
    "wan2.1": replace(PRESETS["wan2.1"], width=4, latent_channels=3, latent_mean=None, latent_std=None),
    "tiny": replace(PRESETS["tiny"], width=4, latent_channels=3),
}


def randomise(module, seed=0):
    """Every parameter random, those that start at zero too, so that every path is open and features stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan))
    return module


def make(config, seed=0):
    vae = randomise(VideoVAE(config).double(), seed)
    channels = config.latent_channels
    vae.set_latent_statistics(draw(channels, seed=7), draw(channels, seed=8).abs() + 0.5)
    return vae


assert_close = partial(assert_close, tolerance=1e-13)


def assert_streams(stream, whole, parts, tolerance=1e-13):
    """`stream` over `parts` gives what one shot gave, and what is out stays as it was, bit for bit."""
    out, seen = [], []
    for part in stream(parts):
        out.append(part)
        seen.append(part.clone())
    assert all(torch.equal(a, b) for a, b in zip(out, seen, strict=True))
    assert_close(torch.cat(out, dim=2), whole, tolerance=tolerance)
    return out


# ------------------------------------------------------------------------------------------ the graph of Wan 2.1
@pytest.mark.parametrize("base, multipliers, blocks, halves, channels", [
    (8, (1, 2, 4, 4), 2, (False, True, True), 16),
    (6, (1, 2, 2), 1, (True, True), 4),
    (4, (2, 1, 3), 1, (False, True), 3),
    (4, (1, 2), 2, (True,), 5),
    (4, (1, 1, 2, 2, 3), 1, (False, False, True, True), 4),
    (8, (1, 2, 1), 1, (False, False), 2),
    (4, (1, 2, 2), 1, (True, False), 2),
    (4, (1, 1, 2, 2), 1, (True, True, False), 2),
])
def test_the_graph_is_wan_2_1(base, multipliers, blocks, halves, channels):
    """Moments and streamed pixels against diffusers' AutoencoderKLWan with the same random weights, in float64."""
    diffusers = pytest.importorskip("diffusers")
    wan = diffusers.AutoencoderKLWan(
        base_dim=base, z_dim=channels, dim_mult=list(multipliers), num_res_blocks=blocks,
        temperal_downsample=list(halves), latents_mean=[0.0] * channels, latents_std=[1.0] * channels).double().eval()
    wan = randomise(wan, seed=1)
    # diffusers clamps pixels: kept inside, so that the clamp hides nothing; and it rounds what it repeats to float32
    for module in wan.modules():
        if isinstance(module, nn.Upsample):
            module.forward = partial(nn.Upsample.forward, module)
    with torch.no_grad():
        wan.decoder.conv_out.weight *= 0.02
        wan.decoder.conv_out.bias *= 0.02
    config = VAEConfig(width=base, multipliers=multipliers, encoder_blocks=blocks, decoder_blocks=blocks + 1,
                       latent_channels=channels, space_factor=2 ** len(halves), time_factor=2 ** sum(halves),
                       latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels,
                       time_levels=None if halves == tuple(sorted(halves)) else halves)
    vae = vae_from_state_dict(wan.state_dict(), wan.config)
    assert vae.config == config
    f = config.space_factor
    video, z = draw(2, 3, 9, 2 * f, 3 * f), draw(2, channels, 3, 2, 3, seed=2)
    with torch.no_grad():
        moments = wan.encode(video).latent_dist.parameters
        pixels = wan.decode(z).sample
        assert pixels.abs().max() < 1
        assert_close(vae.moments(video), moments, tolerance=1e-12)
        assert_close(vae.encode(video), moments.chunk(2, 1)[0], tolerance=1e-12)
        assert_close(vae.decode(z), pixels, tolerance=1e-12)
        assert_streams(vae.decode_stream, pixels, z, 1e-12)
        assert_streams(vae.encode_stream, moments.chunk(2, 1)[0], video, 1e-12)
        # a wrong graph: the first frame treated like the others
        for level in vae.decoder.levels:
            if level.resample is not None and level.resample.time_conv is not None:
                level.resample.time_conv.time_pad = "replicate"
        if sum(halves):
            with pytest.raises(AssertionError):
                assert_close(vae.decode(z), pixels, tolerance=1e-12)


def test_wan_2_1_has_126_9_million_parameters():
    with torch.device("meta"):
        vae = VideoVAE.preset("wan2.1")
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 126.9
    assert vae.config.latent_mean[3] == 0.1075 and vae.config.latent_std[8] == 3.2687


def test_the_linear_path_starts_as_principal_components():
    vae = make(replace(SMALL["tiny"], linear_path=True))
    path, videos = vae.linear_path, [draw(2, 3, 1 + 2 * vae.config.time_factor, 16, 24) for _ in range(3)]
    path.start(videos)
    blocks = torch.cat([path.fold(v, None).transpose(0, 1).flatten(1) for v in videos], dim=1)
    mean, count = blocks.mean(1, keepdim=True), vae.config.latent_channels
    u, s, v = torch.linalg.svd(blocks - mean, full_matrices=False)
    best = mean + u[:, :count] * s[:count] @ v[:count]  # no linear codec of that size is closer (Eckart and Young)
    codes = path.down(blocks[None, :, :, None, None])
    assert_close(path.up(codes)[0, :, :, 0, 0], best)
    assert_close(codes.square().mean(), torch.ones((), dtype=codes.dtype))


def test_fold_and_unfold_are_inverse_and_see_an_image_as_a_clip_at_rest():
    video = draw(2, 3, 9, 16, 8)
    assert torch.equal(Unfold(4, 8)(Fold(4, 8)(video, None), None), video)
    at_rest = video[:, :, :1].expand(-1, -1, 5, -1, -1)
    folded = Fold(4, 8)(at_rest, None)
    assert torch.equal(folded[:, :, :1], folded[:, :, 1:])


def test_the_patch_fold_is_wan_2_2_s():
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    vae, video = make(replace(SMALL["tiny"], patch=4, linear_path=False)), draw(1, 3, 1, 16, 24)
    seen = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = vae.decode(vae.encode(video))
    assert torch.equal(seen[0], wan.patchify(video, 4))
    assert torch.equal(out, wan.unpatchify(seen[1], 4))


# ------------------------------------------------------------------------------------------------ streams
def cut(clip, plan):
    assert sum(plan) == clip.shape[2]
    return list(clip.split(list(plan), dim=2))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("plan", [
    (17,), (1,) * 17, (1, 4, 4, 4, 4), (4, 4, 4, 4, 1), (2, 3, 5, 7), (7, 5, 3, 2), (0, 1, 0, 2, 7, 7, 0), (16, 1),
    (3,) * 5 + (2,)], ids=str)
def test_a_stream_equals_one_shot(name, plan):
    vae, video, z = make(SMALL[name]), draw(2, 3, 17, 16, 8), draw(2, 3, 17, 2, 1, seed=1)
    with torch.no_grad():
        assert_streams(vae.encode_stream, vae.encode(video), cut(video, plan))
        out = assert_streams(vae.decode_stream, vae.decode(z), cut(z, plan))
    sizes = [size for size in plan if size]
    assert [part.shape[2] for part in out] == [4 * size - 3 * (place == 0) for place, size in enumerate(sizes)]


def test_a_decoder_that_forgets_the_past_fails_the_check():
    vae, z = make(SMALL["tiny"]), draw(1, 3, 4, 2, 1)
    forgetful = lambda parts: (vae.decode(part) for part in parts)
    with pytest.raises(AssertionError):
        assert_streams(forgetful, vae.decode(z), cut(z, (2, 2)))
    forgetful = lambda parts: (vae.decode(part)[:, :, -4 * part.shape[2] if place else None :] if place == 0 else
                               F.pad(vae.decode(part), (0,) * 4 + (3, 0)) for place, part in enumerate(parts))
    with pytest.raises(AssertionError):
        assert_streams(forgetful, vae.decode(z), cut(z, (2, 2)))


@st.composite
def cases(draw_):
    space, time = draw_(st.sampled_from([1, 2, 4, 8, 16])), draw_(st.sampled_from([1, 2, 4, 8]))
    config = VAEConfig(
        width=draw_(st.sampled_from([2, 4])), latent_channels=draw_(st.integers(1, 3)),
        multipliers=draw_(st.sampled_from([(1,), (1, 2), (1, 2, 4), (2, 1)])), space_factor=space, time_factor=time,
        patch=draw_(st.sampled_from([p for p in (1, 2) if p <= space])), encoder_blocks=1, decoder_blocks=1,
        linear_path=draw_(st.booleans()), linear_heads=draw_(st.booleans()), attention=draw_(st.booleans()))
    frames = 1 + time * draw_(st.integers(0, 3))
    plans = []
    for total in (frames, 1 + (frames - 1) // time):
        plan = []
        while sum(plan) < total:
            plan.append(min(draw_(st.sampled_from((7, 1, 2, 3, 5, 4, 6, 0))), total - sum(plan)))
        plans.append(plan)
    return config, plans


@settings(max_examples=25, deadline=None)
@given(cases(), st.integers(1, 2))
def test_any_config_streams_over_any_plan(case, batch):
    config, (frames_plan, latents_plan) = case
    vae, f = make(config), config.space_factor
    video = draw(batch, 3, sum(frames_plan), f, 2 * f)
    with torch.no_grad():
        z = vae.encode(video)
        assert z.shape[1:] == vae.latent_shape(*video.shape[2:])
        assert_streams(vae.encode_stream, z, cut(video, frames_plan))
        pixels = vae.decode(z)
        assert pixels.shape == video.shape
        assert_streams(vae.decode_stream, pixels, cut(z, latents_plan))
        # an image is the clip's first frame: T = 1 and the first frame of the clip agree
        assert_close(vae.encode(video[:, :, :1]), z[:, :, :1])
        assert_close(vae.decode(z[:, :, :1]), pixels[:, :, :1])


@pytest.mark.parametrize("name", SMALL)
def test_the_past_is_all_that_counts(name):
    """Later frames change nothing that stands before them; NaN proves it without a tolerance."""
    vae, video, z = make(SMALL[name]), draw(1, 3, 13, 8, 8), draw(1, 3, 4, 1, 2)
    with torch.no_grad():
        before, after = vae.encode(video), vae.encode(torch.cat([video[:, :, :9], video[:, :, 9:] * float("nan")], 2))
        assert torch.equal(before[:, :, :3], after[:, :, :3]) and after[:, :, 3].isnan().any()
        before, after = vae.decode(z), vae.decode(torch.cat([z[:, :, :2], z[:, :, 2:] * float("nan")], 2))
        assert torch.equal(before[:, :, :5], after[:, :, :5]) and after[:, :, 5:].isnan().any()


def test_streams_are_lazy_and_do_not_mix():
    vae, z = make(SMALL["tiny"]), draw(2, 3, 5, 1, 2)
    pulled = []

    def source(clip, name):
        for part in clip.split(1, dim=2):
            pulled.append(name)
            yield part

    streams = [vae.decode_stream(source(z[:1], "a")), vae.decode_stream(source(z[1:], "b"))]
    assert pulled == []
    outs = [[], []]
    for step in range(5):
        for which in (0, 1):
            outs[which].append(next(streams[which]))
        assert pulled == ["a", "b"] * (step + 1)
    with torch.no_grad():
        for which in (0, 1):
            assert_close(torch.cat(outs[which], 2), vae.decode(z[which : which + 1]))
    frames = vae.encode_stream(source(draw(1, 3, 9, 8, 8), "c"))
    assert next(frames).shape[2] == 1 and pulled.count("c") == 1
    assert next(frames).shape[2] == 1 and pulled.count("c") == 5


def test_streams_keep_no_graph():
    """Also outside no_grad: a stream that kept its graph would grow with every chunk."""
    vae, video = make(SMALL["tiny"]), draw(1, 3, 9, 8, 8)
    assert all(not part.requires_grad for part in vae.encode_stream(video))
    assert all(not part.requires_grad for part in vae.decode_stream(draw(1, 3, 3, 1, 1)))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_the_chunk_of_one_tensor_changes_nothing(chunk):
    vae, video = make(SMALL["tiny"]), draw(1, 3, 9, 8, 8)
    with torch.no_grad():
        z = vae.encode(video)
        assert_close(torch.cat(list(vae.encode_stream(video, chunk=chunk)), 2), z)
        assert_close(torch.cat(list(vae.decode_stream(z, chunk=chunk)), 2), vae.decode(z))


# ------------------------------------------------------------------------- autograd and compile beside streams
def test_a_stream_has_the_gradients_of_one_shot_and_can_be_checkpointed():
    vae = make(SMALL["tiny"])
    z, weights = draw(1, 3, 4, 1, 2).requires_grad_(), draw(1, 3, 13, 8, 16, seed=1)
    leaves = [z, *vae.from_latents.parameters(), *vae.decoder.parameters()]
    wanted = torch.autograd.grad((vae.decode(z) * weights).sum(), leaves)

    def step(part, past):
        state = past.copy()  # checkpoint runs this twice, each time from the same past
        return vae.decode(part, state), state

    for run in (step, lambda part, past: checkpoint(step, part, past, use_reentrant=False)):
        state, out = StreamState(), []
        for part in z.split([1, 2, 1], dim=2):
            pixels, state = run(part, state)
            out.append(pixels)
        for got, want in zip(torch.autograd.grad((torch.cat(out, 2) * weights).sum(), leaves), wanted, strict=True):
            assert_close(got, want, tolerance=1e-12)


# ------------------------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize("shape, words", [
    ((1, 3, 4, 8, 8), "got 4; the nearest lengths are 1 or 5"),
    ((1, 3, 16, 8, 8), "got 16; the nearest lengths are 13 or 17"),
    ((1, 3, 0, 8, 8), "the nearest lengths are 1"),
    ((1, 3, 5, 12, 8), "height that is a multiple of 8, got 12; crop or pad to 8 or 16"),
    ((1, 3, 5, 8, 3), "width that is a multiple of 8, got 3; crop or pad to 8"),
    ((1, 3, 5, 8, 0), "width .* got 0; crop or pad to 8"),
    ((1, 4, 5, 8, 8), r"\(B, 3, T, H, W\), got \(1, 4, [35], 8, 8\)"),
    ((3, 5, 8, 8), "clip of one frame"),
])
def test_a_shape_that_does_not_fit_names_the_nearest(shape, words):
    vae = make(SMALL["tiny"])
    for call in (vae.encode, vae, lambda video: list(vae.encode_stream(video, chunk=3))):
        with pytest.raises(ValueError, match=words) as caught:
            call(torch.zeros(shape, dtype=torch.float64))
        assert "\n" not in str(caught.value)


def test_other_errors_are_one_sentence():
    vae = make(SMALL["tiny"])
    calls = {
        "power of two, got 6": lambda: VAEConfig(space_factor=6),
        "time_factor of 8 or less, got 16": lambda: VAEConfig(time_factor=16),
        "patch to divide": lambda: VAEConfig(space_factor=2, patch=4),
        r"time_levels of 3 levels, 2 of which halve time, got \(True, True\)": lambda: VAEConfig(time_levels=(True, True)),
        "2 of which halve time, got": lambda: VAEConfig(time_levels=(True, False, False)),
        "latent_channels of 1 or more, got 0": lambda: VideoVAE.preset("tiny", latent_channels=0),
        "latent_std of 16 elements, got 2": lambda: VAEConfig(latent_std=(1.0, 2.0)),
        "one of wan2.1, tiny": lambda: VideoVAE.preset("wan"),
        r"latents \(B, 3, t, h, w\)": lambda: vae.decode(torch.zeros(1, 3, 0, 1, 1)),
        r"got \(1, 4, 1, 1, 1\)": lambda: vae.decode(torch.zeros(1, 4, 1, 1, 1)),
        "chunk of 1 or more, got 0": lambda: list(vae.decode_stream(draw(1, 3, 1, 1, 1), chunk=0)),
        r"alike in all but their frames, \(1, C, T, 16, 16\), got \(1, 3, 4, 32, 16\)": lambda: list(vae.encode_stream(
            iter([draw(1, 3, 1, 16, 16), draw(1, 3, 4, 32, 16)]))),
        r"\(2, C, T, 1, 1\), got \(1, 3, 1, 1, 1\)": lambda: list(vae.decode_stream(
            iter([draw(2, 3, 1, 1, 1), draw(1, 3, 1, 1, 1)]))),
        "chunk of 1 or more, got -1": lambda: list(vae.encode_stream(draw(1, 3, 1, 8, 8), chunk=-1)),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)


@pytest.mark.parametrize("space, time", [(1, 1), (1, 8), (2, 8), (4, 2), (16, 4), (32, 1)])
def test_factors_and_channels_come_from_the_config(space, time):
    vae = VideoVAE(VAEConfig(width=2, latent_channels=5, in_channels=4, space_factor=space, time_factor=time,
                             encoder_blocks=1, decoder_blocks=1)).double()
    z = vae.encode(draw(1, 4, 1 + 2 * time, 2 * space, space))
    assert z.shape == (1, 5, 3, 2, 1) and vae.latent_shape(1 + 2 * time, 2 * space, space) == (5, 3, 2, 1)
    assert vae.decode(z).shape == (1, 4, 1 + 2 * time, 2 * space, space)


def test_a_preset_with_other_latents_drops_their_statistics():
    vae = VideoVAE.preset("wan2.1", width=4, latent_channels=3)
    assert vae.latent_mean.tolist() == [0] * 3 and vae.latent_std.tolist() == [1] * 3


# ------------------------------------------------------------------------------------ the posterior, statistics
def test_kl_and_sample_are_the_posterior_s():
    vae, video = make(SMALL["tiny"]), draw(2, 3, 5, 8, 8)
    mean, logvar = vae.moments(video).chunk(2, 1)
    noise = draw(*mean.shape, seed=3)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    reconstruction, kl = vae(video, noise)
    assert_close(kl, wanted, tolerance=1e-12)
    z = mean + (logvar / 2).exp() * noise
    shift, scale = (t[:, None, None, None] for t in (vae.latent_mean, vae.latent_std))
    assert_close(vae.encode(video, noise), (z - shift) / scale, tolerance=1e-12)
    assert_close(vae.encode(video), (mean - shift) / scale)
    assert_close(reconstruction, vae.decode(vae.encode(video, noise)))
    assert_close(vae(video)[0], vae.decode(vae.encode(video)))


def test_statistics_are_used_in_both_directions():
    """Other statistics change the latents and not the pixels that come of them."""
    vae, video = make(SMALL["wan2.1"]), draw(1, 3, 5, 8, 8)
    z, pixels = vae.encode(video), vae.decode(vae.encode(video))
    mean, std = vae.latent_mean.clone(), vae.latent_std.clone()
    vae.set_latent_statistics(draw(3, seed=20), draw(3, seed=21).abs() + 0.1)
    other = vae.encode(video)
    assert (other - z).abs().max() > 0.1
    assert_close(vae.decode(other), pixels, tolerance=1e-12)
    shape = lambda t: t[:, None, None, None]
    assert_close(other * shape(vae.latent_std) + shape(vae.latent_mean), z * shape(std) + shape(mean), tolerance=1e-12)
    saved = VideoVAE(vae.config).double()
    saved.load_state_dict(vae.state_dict())
    assert torch.equal(saved.encode(video), other)


def test_gradients_reach_every_parameter():
    for config in SMALL.values():
        vae, video = make(config), draw(1, 3, 5, 8, 8).requires_grad_()
        reconstruction, kl = vae(video, draw(1, 3, 2, 1, 1, seed=3))
        ((reconstruction - video).square().mean() + 1e-3 * kl.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
        dead = [name for name, p in vae.named_parameters() if not p.grad.any()]
        assert not dead and video.grad.any()
        vae.zero_grad()
        vae.encode(video, draw(1, 3, 2, 1, 1, seed=3)).sum().backward()
        assert all(p.grad.any() for p in vae.encoder.parameters())
        assert vae.to_moments.weight.grad[3:].any(), "the sample depends on the log-variance"


def test_blocks_start_as_their_shortcut():
    vae, x = VideoVAE(SMALL["wan2.1"]).double(), draw(1, 4, 2, 4, 4)
    block = vae.encoder.levels[0].blocks[0]
    assert torch.equal(block(x, None), x)


@pytest.mark.parametrize("name", SMALL)
def test_low_precision_runs(name):
    vae, video = VideoVAE(SMALL[name]), torch.randn(1, 3, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, kl = vae(video, torch.randn(1, 3, 2, 1, 1))
        assert reconstruction.dtype == torch.bfloat16 and kl.dtype == torch.float32
        reconstruction.float().square().mean().backward()
    vae = vae.to(torch.bfloat16)
    assert vae.decode(vae.encode(video.bfloat16())).dtype == torch.bfloat16
    assert torch.cat(list(vae.decode_stream(torch.randn(1, 3, 2, 1, 1).bfloat16())), 2).shape[2] == 5
