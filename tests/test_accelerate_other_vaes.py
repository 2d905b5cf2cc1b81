"""AutoencoderKLHunyuanVideo and AutoencoderKLCogVideoX of diffusers, and plain nn.Sequential pairs, accelerated."""

import copy

import accelerate_checks as checks
import pytest
import torch
from accelerate_checks import draw
from torch import nn

import sora_fast

diffusers = pytest.importorskip("diffusers")

HUNYUAN = dict(block_out_channels=(8, 12, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
COG = dict(block_out_channels=(8, 12, 12, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
           sample_height=64, sample_width=64,
           down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
MODELS = {"hunyuan": (diffusers.AutoencoderKLHunyuanVideo, HUNYUAN),
          "hunyuan without attention": (diffusers.AutoencoderKLHunyuanVideo, HUNYUAN | dict(mid_block_add_attention=False)),
          "cogvideox": (diffusers.AutoencoderKLCogVideoX, COG)}


def make(name, seed=0):
    kind, config = MODELS[name]
    return checks.randomise(kind(**config), seed).eval()


def encode(vae, video):
    return [vae.encode(video).latent_dist.parameters]


def decode(vae, z):
    return [vae.decode(z).sample]


@pytest.mark.parametrize("name, frames, grads", [("hunyuan", 5, True), ("cogvideox", 9, True), ("cogvideox", 17, False)])
def test_it_is_as_right_as_the_original(name, frames, grads):
    """17 frames: CogVideoX in chunks with its caches, HunyuanVideo in tiles of time that blend."""
    vae = make(name)
    checks.assert_catches(*checks.assert_accelerates(vae, encode, dict(video=draw(2, 3, frames, 16, 24)), grads=grads))
    z = draw(2, 4, 1 + (frames - 1) // 4, 2, 3, seed=1)
    checks.assert_catches(*checks.assert_accelerates(vae, decode, dict(z=z), grads=grads))


def test_what_is_swapped():
    """The norms, convolutions and resamplers of both; a changed subclass and a hooked child are left."""
    for name, kinds in (("hunyuan", {"CausalConv3d", "ResnetBlockCausal3D", "UpsampleCausal3D", "MidBlock3D", "Encoder3D",
                                     "Decoder3D"}),
                        ("cogvideox", {"CausalConv3d", "SpatialNorm3D", "ResnetBlock3D", "Upsample3D", "Downsample3D"})):
        vae = make(name)
        prefix = "HunyuanVideo" if name == "hunyuan" else "CogVideoX"
        _, report = checks.accelerated(vae)
        assert kinds == {row.kind.removeprefix(prefix) for row in report.swapped}
        block = vae.encoder.mid_block.resnets[0]
        block.__class__ = type("Altered", (type(block),), {})
        vae.encoder.mid_block.resnets[1].conv1.register_forward_hook(lambda m, i, o: o)
        notes = {row.name: row.note for row in sora_fast.accelerate(vae).left}
        assert f"an altered {prefix}" in notes["encoder.mid_block.resnets.0"]
        assert "hook" in notes["encoder.mid_block.resnets.1"]


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_a_hook_on_an_activation_acts(name):
    """Before and after accelerate: what is fused into a convolution is computed apart again."""
    wan = lambda: checks.randomise(diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1))
    vae = wan() if name == "wan" else make(name)
    fast, early = checks.accelerated(vae)[0], copy.deepcopy(vae)
    for model in (vae, fast, early):
        model.encoder.mid_block.resnets[0].nonlinearity.register_forward_hook(lambda module, inputs, output: 2 * output)
    sora_fast.accelerate(early)
    video = draw(1, 3, 1, 16, 16).float()
    with torch.no_grad():
        wanted, *got = (model.eval().encode(video).latent_dist.parameters for model in (vae, fast, early))
    assert all((each - wanted).norm() <= 1e-5 * wanted.norm() for each in got)


def test_pairs_in_a_sequential():
    """GroupNorm and SiLU, and padding towards the past with its convolution, in anybody's model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.ZeroPad3d((1, 1, 1, 1, 2, 0)), nn.Conv3d(3, 8, 3)), nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()),
        nn.Sequential(nn.ReplicationPad3d((1, 1, 1, 1, 2, 0)), nn.Conv3d(8, 8, 3, stride=(1, 2, 2))),
        nn.Sequential(nn.ZeroPad3d((1, 1, 1, 1, 1, 1)), nn.Conv3d(8, 4, 3)), nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()))
    checks.randomise(model)
    report = sora_fast.accelerate(model)
    assert [row.name for row in report.swapped] == ["0", "1", "2"] and report.rows[0].note == "a container"
    sora_fast.restore(model)
    checks.assert_catches(*checks.assert_accelerates(model, lambda m, x: [m(x)], dict(x=draw(2, 3, 4, 6, 5))))
    image = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    checks.assert_accelerates(checks.randomise(image), lambda m, x: [m(x)], dict(x=draw(2, 4, 6, 5)))


def test_other_autoencoders_are_named_as_known():
    vae = diffusers.AutoencoderKLLTXVideo(block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
                                          layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
                                          latent_channels=4)
    report = sora_fast.accelerate(vae)
    assert not report.swapped and "not covered yet" in report.rows[0].note
