"""AutoencoderKLWan (2.1, 2.2) and AutoencoderKLQwenImage of diffusers, accelerated: the same numbers as the real classes."""

import copy
import io

import accelerate_checks as checks
import pytest
import torch
from accelerate_checks import draw
from op_checks import assert_sentence
from torch.utils.checkpoint import checkpoint

import sora_fast

diffusers = pytest.importorskip("diffusers")

SMALL = dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
             latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
CONFIGS = {
    "2.1": (diffusers.AutoencoderKLWan, SMALL),
    "2.1 wide": (diffusers.AutoencoderKLWan, SMALL | dict(base_dim=6, num_res_blocks=2, dim_mult=[1, 2, 4, 4])),
    "2.2": (diffusers.AutoencoderKLWan, SMALL | dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12,
                                                     decoder_base_dim=6, scale_factor_spatial=16)),
    "qwen": (diffusers.AutoencoderKLQwenImage, SMALL),
}


def make(name, seed=0):
    kind, config = CONFIGS[name]
    torch.manual_seed(seed)
    return checks.randomise(kind(**config), seed)


def encode(vae, video):
    return [vae.encode(video).latent_dist.parameters]


def decode(vae, z):
    return [vae.decode(z).sample]


# ------------------------------------------------------------------------------------------------ the same numbers
@pytest.mark.parametrize("name, frames, grads", [("2.1", 5, True), ("2.1", 9, False), ("2.2", 5, True), ("qwen", 5, True)])
def test_it_is_as_right_as_the_original(name, frames, grads):
    vae = make(name)
    got = checks.assert_accelerates(vae, encode, dict(video=draw(2, 3, frames, 32, 16)), grads=grads)
    checks.assert_catches(*got)
    latents = draw(2, 4, 1 + (frames - 1) // 4, 2, 4, seed=1)
    checks.assert_catches(*checks.assert_accelerates(vae, decode, dict(z=latents), grads=grads))


@pytest.mark.parametrize("name", ["2.1"])
def test_it_is_as_right_in_bfloat16(name):
    vae = make(name)
    checks.assert_accelerates(vae, encode, [dict(video=draw(1, 3, 5, 16, 32, seed=n)) for n in range(8)], torch.bfloat16)
    checks.assert_accelerates(vae, decode, [dict(z=draw(1, 4, 2, 2, 4, seed=n)) for n in range(8)], torch.bfloat16)


@pytest.mark.parametrize("name", ["2.1", "2.2", "qwen"])
def test_the_whole_model_and_the_uncached_path(name):
    vae = make(name)
    checks.assert_accelerates(vae, lambda vae, video: [vae(video).sample], dict(video=draw(1, 3, 5, 16, 16)))
    if name == "2.2":  # whose shortcuts resample frames without caches too, so that diffusers' own path fails
        return
    z = draw(1, 4, 3, 2, 2)  # without caches diffusers resamples no frames: 3 in, 3 out
    assert checks.assert_accelerates(vae, lambda vae, z: [vae.decoder(z)], dict(z=z))[0]["output 0"][0].shape[2] == 3


def test_caches_of_one_s_own_go_on_working():
    """Positional lists filled by the caller, chunk by chunk, as pipelines for endless clips do."""
    vae = make("2.1")

    def by_hand(vae, video):
        vae.clear_cache()
        parts = []
        for part in (video[:, :, :1], video[:, :, 1:5], video[:, :, 5:9]):
            vae._enc_conv_idx = [0]
            parts.append(vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
        vae.clear_cache()
        return [torch.cat(parts, 2)]

    checks.assert_accelerates(vae, by_hand, dict(video=draw(1, 3, 9, 16, 16)))

    def one_block(vae, x):
        cache, out = [None] * 4, []
        for part in x.split((1, 4), 2):
            out.append(vae.decoder.mid_block(part, feat_cache=cache, feat_idx=[0]))
        return [torch.cat(out, 2)]

    checks.assert_accelerates(vae, one_block, dict(x=draw(1, 8, 5, 4, 4)))


# ------------------------------------------------------------------------------------------------ what is swapped
def test_the_report_names_every_module():
    vae = make("2.1")
    fast, report = checks.accelerated(vae)
    assert [row.name for row in report.rows] == [name for name, _ in vae.named_modules()]
    assert {row.state for row in report.rows} == {"swapped", "inside", "left"} and all(row.note for row in report.rows)
    kinds = {row.kind for row in report.swapped}
    assert {"AutoencoderKLWan", "WanEncoder3d", "WanDecoder3d", "WanResidualBlock", "WanResample"} <= kinds
    assert all(row.note for row in report.left) and "modules replaced" in str(report)
    assert {"encoder.mid_block.attentions.0"} <= {row.name for row in report.left}
    again = sora_fast.accelerate(fast)
    assert again == report and [type(m) for m in fast.modules()] == [type(m) for m in copy.deepcopy(fast).modules()]


def test_parameters_stay_the_same_objects_and_copies_stay_fast():
    vae = make("2.1")
    before, keys = list(vae.parameters()), list(vae.state_dict())
    optimizer = torch.optim.SGD(vae.parameters(), 0.1)
    sora_fast.accelerate(vae)
    assert all(a is b for a, b in zip(vae.parameters(), before, strict=True)) and list(vae.state_dict()) == keys
    assert isinstance(vae, diffusers.AutoencoderKLWan) and type(vae).__name__ == "AutoencoderKLWan"
    video = draw(1, 3, 5, 16, 16).float()
    loss = lambda: (vae(video).sample - video).square().mean()
    first = loss()
    first.backward()
    optimizer.step()
    assert loss() < first
    copied = copy.deepcopy(vae)
    buffer = io.BytesIO()
    torch.save(vae, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert [type(m) for m in other.modules()] == [type(m) for m in vae.modules()]
        with torch.no_grad():
            assert torch.equal(other(video).sample, vae(video).sample)


def test_an_altered_class_and_an_odd_layer_are_left_alone_and_said_so():
    vae = make("2.1")
    block = type(vae.decoder.mid_block.resnets[0])

    class Altered(block):
        def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
            return 2 * super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)

    vae.decoder.mid_block.resnets[0].__class__ = Altered
    vae.encoder.down_blocks[0].dropout.p = 0.5
    handle = vae.encoder.down_blocks[2].conv1.register_forward_hook(lambda module, inputs, output: output + 1)
    resample = type(vae.encoder.down_blocks[3])
    vae.encoder.down_blocks[3].__class__ = type("OtherResample", (resample,), {})
    report = sora_fast.accelerate(copy.deepcopy(vae))
    notes = {row.name: row.note for row in report.left}
    assert "altered WanResidualBlock" in notes["decoder.mid_block.resnets.0"]
    assert "dropout" in notes["encoder.down_blocks.0"] and "hook" in notes["encoder.down_blocks.2"]
    assert "altered WanResample" in notes["encoder.down_blocks.3"]
    vae.eval()
    for grads in (True, False):
        checks.assert_accelerates(vae, encode, dict(video=draw(1, 3, 9, 16, 16)), grads=grads)
        checks.assert_accelerates(vae, decode, dict(z=draw(1, 4, 3, 2, 2)), grads=grads)
    handle.remove()


@pytest.mark.parametrize("name", ["2.1", "2.2", "qwen"])
def test_a_changed_encoder_or_decoder_takes_its_own_caches(name):
    """A hook on a first or last layer, a subclass: the whole part is left, and the model goes on with what is inside it."""
    vae = make(name).eval()
    vae.encoder.conv_in.register_forward_hook(lambda module, inputs, output: output * 1.5)
    vae.decoder.__class__ = type("Altered", (type(vae.decoder),), {})
    assert {"encoder", "decoder"} <= {row.name for row in sora_fast.accelerate(copy.deepcopy(vae)).left}
    for grads in (True, False):
        checks.assert_accelerates(vae, encode, dict(video=draw(1, 3, 5, 16, 16)), grads=grads)
        checks.assert_accelerates(vae, decode, dict(z=draw(1, 4, 2, 2, 2)), grads=grads)


def test_a_child_replaced_afterwards_acts():
    """An adapter put on a convolution after accelerate: what it adds is in the result, with chunks and whole."""
    vae = make("2.1")
    fast, _ = checks.accelerated(vae)
    for model in (vae, fast):
        for module in (model.decoder.up_blocks[0].resnets[0].conv1, model.decoder.conv_in, model.encoder.conv_in):
            module.register_forward_hook(lambda module, inputs, output: output * 1.5)
    z, video = draw(1, 4, 3, 2, 2).float(), draw(1, 3, 5, 16, 16).float()
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            for wanted, got in ((vae.decode(z).sample, fast.decode(z).sample),
                                (vae.encode(video).latent_dist.mean, fast.encode(video).latent_dist.mean)):
                assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv("SORA_FAST_ACCELERATE", "0")
    vae = make("2.1")
    report = sora_fast.accelerate(vae)
    assert not report.swapped and all("SORA_FAST_ACCELERATE=0" in row.note for row in report.rows)
    assert type(vae) is diffusers.AutoencoderKLWan and sora_fast.restore(vae) == 0


def test_another_version_of_diffusers_is_left_alone(monkeypatch):
    from sora_fast.integrations import swapping

    monkeypatch.setattr(swapping, "PROVEN", {"diffusers": ("0.41.",)})
    report = sora_fast.accelerate(make("2.1"))
    assert not report.swapped and any("has not been compared" in row.note for row in report.left)


def test_what_is_no_module_is_told():
    with pytest.raises(TypeError, match="expected an nn.Module, got dict"):
        sora_fast.accelerate({})


# ------------------------------------------------------------------------------------------------ training, compiling
@pytest.mark.parametrize("name", ["2.1", "2.2", "qwen"])
def test_checkpointing_changes_no_gradient(name):
    """torch.utils.checkpoint around encode and decode, and diffusers' own switch, which its class refuses."""
    vae = make(name)
    with pytest.raises(ValueError):
        vae.enable_gradient_checkpointing()
    fast, _ = checks.accelerated(vae)
    z, video = draw(1, 4, 3, 2, 2).float(), draw(1, 3, 5, 32, 16).float()

    def gradients(around):
        fast.zero_grad()
        a = around(lambda z: fast.decode(z).sample, z.requires_grad_())
        b = around(lambda x: fast.encode(x).latent_dist.parameters, video.requires_grad_())
        (a.square().sum() + b.square().sum()).backward()
        return [p.grad.clone() for p in fast.parameters()]

    wanted = gradients(lambda f, x: f(x))
    for got, exact in zip(gradients(lambda f, x: checkpoint(f, x, use_reentrant=False)), wanted, strict=True):
        assert torch.equal(got, exact)
    fast.train().enable_gradient_checkpointing()
    calls = []
    for module in (fast.encoder, fast.decoder):
        inner = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = lambda *a, inner=inner: calls.append(1) or inner(*a)
    for got, exact in zip(gradients(lambda f, x: f(x)), wanted, strict=True):
        assert torch.equal(got, exact)
    assert len(calls) > 8


def test_a_long_clip_takes_constant_memory_and_tells_its_progress():
    seen = []
    fast, _ = checks.accelerated(make("2.1"), progress=lambda done, total: seen.append((done, total)))
    lengths = []
    original = type(fast.decoder).forward

    def spy(self, x, *rest, **more):
        lengths.append(x.shape[2])
        return original(self, x, *rest, **more)

    type(fast.decoder).forward = spy
    try:
        with torch.no_grad():
            fast.decode(draw(1, 4, 6, 2, 2).float())
    finally:
        type(fast.decoder).forward = original
    assert lengths == [1] * 6 and seen == [(n, 21) for n in (1, 5, 9, 13, 17, 21)]
    with torch.no_grad():
        fast.encode(draw(1, 3, 9, 16, 16).float())
    assert seen[6:] == [(1, 3), (2, 3), (3, 3)]
    sora_fast.restore(fast)
    with torch.no_grad():
        fast.decode(draw(1, 4, 2, 2, 2).float())
    assert len(seen) == 9


def test_save_and_load(tmp_path):
    """save_pretrained of an accelerated model is the plain one's folder; from_pretrained reads it back."""
    vae = make("2.1")
    fast, _ = checks.accelerated(vae)
    fast.save_pretrained(tmp_path / "fast")
    vae.save_pretrained(tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "fast").iterdir())
    assert all((tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes() for name in files)
    loaded = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "fast")
    z = draw(1, 4, 2, 2, 2).float()
    with torch.no_grad():
        assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)


@torch.no_grad()
def test_clips_of_no_frames_are_refused():
    fast, _ = checks.accelerated(make("2.1"))
    for name, clip in (("encode", torch.randn(1, 3, 0, 16, 16)), ("decode", torch.randn(1, 4, 0, 2, 2))):
        with pytest.raises(ValueError) as caught:
            getattr(fast, name)(clip)
        assert_sentence(str(caught.value), f"AutoencoderKLWan.{name}")
