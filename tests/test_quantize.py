"""VectorQuantizer: nearest codes, straight-through, the loss and who learns from it, usage, restarts; a VideoVAE on it.

`assert_nearest` is the check of the search; a search that loses small differences to cancellation must fail it.
"""

import math
from dataclasses import replace

import pytest
import torch
from float64_checks import assert_close, draw, seeded

from sora_fast.data import to_pixels
from sora_fast.models import VAEConfig, VideoVAE
from sora_fast.models.vae import PRESETS
from sora_fast.nn import VectorQuantizer
from sora_fast.nn.quantize import nearest
from sora_fast.training.vae import measure_latents


def make(codes=7, channels=3, seed=0, **options):
    quantizer = VectorQuantizer(codes, channels, **options).double()
    with torch.no_grad():
        quantizer.codebook.copy_(draw(codes, channels, seed=seed + 40))
    return quantizer


# ------------------------------------------------------------------------------------------------ the search
def assert_nearest(search, vectors, codebook):
    """The code that `search` names is as near as the nearest, in float64, but for rounding of the difference itself."""
    distances = (vectors.double()[:, None] - codebook.double()).square().sum(-1)
    chosen = distances.gather(1, search(vectors, codebook)[:, None])[:, 0]
    assert (chosen <= distances.min(1).values * (1 + 1e-5)).all()


def test_the_code_is_the_nearest():
    """Also of codes that differ in their last bits, far from the origin, where |z|^2 - 2 z e + |e|^2 rounds to nothing."""
    def expanded(z, e):
        return ((z * z).sum(1)[:, None] - 2 * z @ e.T + (e * e).sum(1)).argmin(1)

    assert_nearest(nearest, draw(5000, 4).float(), draw(64, 4, seed=1).float())
    far, codes = 100 + 1e-3 * draw(200, 4).float(), 100 + 1e-3 * draw(32, 4, seed=1).float()
    assert_nearest(nearest, far, codes)
    with pytest.raises(AssertionError):
        assert_nearest(expanded, far, codes)
    assert nearest(draw(0, 4), draw(3, 4)).shape == (0,)
    assert nearest(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0], [1.0]])).tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 3, 4), (0, 3, 2), (2, 3, 0, 4, 4)])
def test_latents_are_entries_of_the_codebook(shape):
    quantizer, z = make(), draw(*shape)
    out = quantizer(z)
    assert out.latent.shape == z.shape and out.codes.shape == (shape[0], *shape[2:]) and out.loss.shape == (shape[0],)
    assert torch.equal(out.latent, quantizer.lookup(out.codes)) and out.codes.dtype == torch.int64
    assert out.loss.isfinite().all()
    rows = z.movedim(1, -1).reshape(-1, 3)
    for row, code in zip(rows, out.codes.flatten(), strict=True):
        assert code == (quantizer.codebook - row).norm(dim=1).argmin()


# ------------------------------------------------------------------------------------------------ gradients
def test_the_loss_and_its_gradients_are_the_paper_s():
    """The codebook learns from the first term alone, the encoder from the second and straight through the latent."""
    quantizer, z = make(commitment=0.3), draw(2, 3, 5).requires_grad_()
    out, weight = quantizer(z), draw(2, 3, 5, seed=5)
    rows = z.detach().movedim(1, -1)
    error = rows - quantizer.codebook.detach()[out.codes]
    assert_close(out.loss, 1.3 * error.square().flatten(1).mean(1))
    d_z, d_codes = torch.autograd.grad(out.loss.sum(), (z, quantizer.codebook), retain_graph=True)
    assert_close(d_z, (0.3 * 2 * error / 15).movedim(-1, 1))
    wanted = torch.zeros_like(d_codes)
    wanted.index_add_(0, out.codes.flatten(), (-2 * error / 15).flatten(0, 1))
    assert_close(d_codes, wanted)
    through = torch.autograd.grad((out.latent * weight).sum(), (z, quantizer.codebook), allow_unused=True)
    assert torch.equal(through[0], weight) and through[1] is None


def test_low_precision_and_autocast_search_in_float32():
    quantizer = make(codes=64).float()
    z = draw(2, 3, 20).bfloat16()
    wanted = quantizer(z.float())
    for out in (quantizer(z), torch.autocast("cpu", torch.bfloat16)(quantizer)(z)):
        assert torch.equal(out.codes, wanted.codes) and out.latent.dtype == torch.bfloat16
        assert out.loss.dtype == torch.float32 and torch.equal(out.loss, wanted.loss)
        assert torch.equal(out.latent, wanted.latent.bfloat16())


# ------------------------------------------------------------------------------------------------ usage, restarts
def test_usage_and_perplexity_count_training_alone():
    quantizer = make(codes=4, channels=1)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    z = torch.tensor([[0.1], [0.0], [1.2], [0.9], [2.1], [2.2]], dtype=torch.float64)
    quantizer.eval()(z)
    assert [float(x) for x in quantizer.usage()] == [0, 1]
    quantizer.train()(z)
    assert quantizer.counts.tolist() == [2, 2, 2, 0]
    assert [float(x) for x in quantizer.usage()] == [0.75, pytest.approx(3)]
    quantizer(torch.zeros(6, 1, dtype=torch.float64))
    share = torch.tensor([8, 2, 2]) / 12
    assert quantizer.counts.tolist() == [8, 2, 2, 0]
    assert float(quantizer.usage()[1]) == pytest.approx(math.exp(-(share * share.log()).sum()))
    assert "counts" in quantizer.state_dict()


def test_a_restart_moves_dead_codes_alone_and_the_seed_decides_where():
    def restarted(seed, least=1):
        quantizer = make(codes=6, channels=2)
        quantizer(quantizer.lookup(torch.tensor([[1, 1, 4]])).detach())
        before, z = quantizer.codebook.detach().clone(), draw(2, 2, 10, seed=9)
        count = quantizer.restart(z, least=least, generator=seeded(seed))
        return before, quantizer.codebook.detach(), int(count), z, quantizer

    before, after, count, z, quantizer = restarted(0)
    same = (before == after).all(1)
    assert same.tolist() == [False, True, False, False, True, False] and count == 4
    vectors = z.movedim(1, -1).reshape(-1, 2)
    found = [(vectors == code).all(1).nonzero().item() for code in after[~same]]
    assert len(set(found)) == 4  # four vectors, none twice
    assert quantizer.counts.sum() == 0 and quantizer.codebook.requires_grad
    assert torch.equal(restarted(0)[1], after) and not torch.equal(restarted(1)[1], after)
    assert restarted(0, least=2)[2] == 5
    few = make(codes=6, channels=2)
    assert int(few.restart(draw(1, 2, 2), generator=seeded())) == 6 and len(few.codebook.unique(dim=0)) == 2


def test_it_learns_clusters_and_restarts_bring_dead_codes_back():
    """Eight clusters, 32 codes: from a start in one corner restarts find what gradients alone cannot."""
    centres = 4 * draw(8, 2, seed=2).float()

    def train(restarts):
        quantizer = VectorQuantizer(32, 2)
        with torch.no_grad():
            quantizer.codebook.copy_(20 + 0.1 * draw(32, 2, seed=3))
        optimiser, generator = torch.optim.Adam(quantizer.parameters(), 0.05), seeded()
        for step in range(200):
            z = centres[torch.randint(8, (256,), generator=generator)] + 0.05 * torch.randn(256, 2, generator=generator)
            if restarts and step % 20 == 0:
                quantizer.restart(z, generator=generator)
            optimiser.zero_grad()
            quantizer(z).loss.mean().backward()
            optimiser.step()
        quantizer.counts.zero_()
        return float(quantizer(z).loss.detach().mean()), *(float(x) for x in quantizer.usage())

    loss, used, perplexity = train(True)
    stuck, few, _ = train(False)
    assert loss < 0.05 and used > 0.8 and perplexity > 8
    assert stuck > 20 * loss and few < 0.5


# ------------------------------------------------------------------------------------------------ in a VideoVAE
SMALL = {
    "wan2.1": replace(PRESETS["wan2.1"], width=4, latent_channels=3, latent_mean=None, latent_std=None, regularisation="vq",
                      codes=16),
    "tiny": replace(PRESETS["tiny"], width=4, latent_channels=3, regularisation="vq", codes=16),
}


def make_vae(name, **changes):
    vae, generator = VideoVAE(replace(SMALL[name], **changes)).double(), seeded(1)
    with torch.no_grad():
        for p in vae.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan))
    vae.set_latent_statistics(draw(3, seed=7), draw(3, seed=8).abs() + 0.5)
    return vae


@pytest.mark.parametrize("name", SMALL)
def test_the_decoder_sees_codes_and_the_latents_are_what_comes_before(name):
    vae, video = make_vae(name).eval(), draw(2, 3, 5, 16, 8)
    z = vae.moments(video)
    assert z.shape == (2, 3, 2, 2, 1) == (2, *vae.latent_shape(5, 16, 8))
    latents = vae.encode(video)
    shift, scale = (t[:, None, None, None] for t in (vae.latent_mean, vae.latent_std))
    assert_close(latents * scale + shift, z)
    assert torch.equal(vae.encode(video, draw(*z.shape, seed=4)), latents)
    reconstruction, loss = vae(video, draw(*z.shape, seed=4))
    assert_close(vae.decode(latents), reconstruction)
    assert torch.equal(loss, vae.quantizer(z).loss)
    quantized = vae.quantizer(z).latent
    assert_close(vae.decode((quantized - shift) / scale), reconstruction)
    near = z + 1e-6 * draw(*z.shape, seed=6)  # within the same cells: the same pixels
    assert torch.equal(vae._pixels(vae.quantizer(near).latent), vae._pixels(quantized))
    saved = VideoVAE(vae.config).double().eval()
    saved.load_state_dict(vae.state_dict())
    assert torch.equal(saved.decode(latents), vae.decode(latents))


@pytest.mark.parametrize("name", SMALL)
def test_streams_equal_one_shot(name):
    vae, video = make_vae(name).eval(), draw(1, 3, 9, 16, 8)
    latents = vae.encode(video)
    assert_close(torch.cat(list(vae.encode_stream(video.split(2, 2))), 2), latents)
    pixels = vae.decode(latents)
    assert_close(torch.cat(list(vae.decode_stream(latents.split(1, 2))), 2), pixels, 1e-11)
    assert_close(vae.decode_clip(latents), pixels, 1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name):
    vae, video = make_vae(name), draw(1, 3, 5, 8, 8).requires_grad_()
    reconstruction, loss = vae(video)
    grads = torch.autograd.grad((reconstruction - video).square().mean() + loss.mean(), [video, *vae.parameters()])
    assert all(grad.any() for grad in grads) and vae.quantizer.counts.sum() == 2


class Footage:
    """Two clips and an image of random frames, in the form of data.Frames."""

    def __init__(self):
        self.clips = [torch.randint(256, (n, 16, 8, 3), generator=seeded(n), dtype=torch.uint8) for n in (9, 13, 1)]

    def __len__(self):
        return len(self.clips)

    def frames(self, index):
        return len(self.clips[index])

    def window(self, index, start, length):
        return self.clips[index][start : start + length]


def test_the_latent_scale_comes_from_data():
    """Statistics measured on footage make its latents zero-mean and unit-deviation in every channel, and change no pixel."""
    vae, footage = make_vae("tiny", regularisation="kl").float().eval(), Footage()
    encoded = lambda: [vae.encode(to_pixels(footage.window(i, 0, footage.frames(i)))[None]) for i in range(3)]
    before = [vae.decode(z) for z in encoded()]
    measure_latents(vae, footage, windows=1, length=9)
    z = encoded()
    seen = torch.cat([z[0].flatten(2), z[1][:, :, :3].flatten(2), z[2].flatten(2)], 2)[0]  # what was measured
    assert seen.mean(1).abs().max() < 1e-4 and (seen.std(1, correction=0) - 1).abs().max() < 1e-4
    for got, wanted in zip([vae.decode(each) for each in z], before, strict=True):
        assert_close(got, wanted, 1e-4)


def test_the_config_decides_and_kl_has_no_codebook():
    plain, vq = VideoVAE.preset("tiny", width=4), VideoVAE.preset("tiny", width=4, regularisation="vq", codes=32)
    assert plain.quantizer is None and not any("quantizer" in name for name in plain.state_dict())
    assert vq.quantizer.codebook.shape == (32, 16) and vq.to_moments.weight.shape[0] == 16
    wan = VideoVAE.preset("wan2.1", width=4, regularisation="vq")
    assert wan.latent_mean.tolist() == [0] * 16  # Wan's statistics are of other latents
    video = torch.rand(1, 3, 1, 16, 16)
    assert vq.decode(vq.encode(video)).shape == video.shape


def test_errors_are_one_sentence():
    quantizer = make()
    calls = {
        "regularisation to be 'kl' or 'vq', got 'gan'": lambda: VAEConfig(regularisation="gan"),
        r"z of shape \(B, 3, ...\), got \(2, 4\)": lambda: quantizer(draw(2, 4)),
        r"got \(3,\)": lambda: quantizer(draw(3)),
        "codes of 1 or more, got 0": lambda: VectorQuantizer(0, 3),
        r"at least one vector \(B, 3, ...\), got \(0, 3\)": lambda: quantizer.restart(draw(0, 3)),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
    with pytest.raises(TypeError, match="codes in torch.int64"):
        quantizer.lookup(torch.zeros(2, dtype=torch.int32))
