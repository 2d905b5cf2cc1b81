"""A name or an argument of another library: the error says what it is called here."""

import copy
import pickle

import pytest
import torch

import sora_fast
from sora_fast import diffusion, models, nn, ops
from sora_fast.diffusion import FlowMatching
from sora_fast.models import DiT, DiTConfig, VideoVAE

TRIED = {
    "num_heads": (lambda: DiT(num_heads=4), TypeError, "write DiT(DiTConfig(heads=...))"),
    "num_heads of a preset": (lambda: DiT.preset("tiny", num_heads=4), TypeError, "got num_heads; write heads"),
    "num_heads of a layer": (lambda: nn.VarlenAttention(64, num_heads=4), TypeError, "got num_heads; write heads"),
    "in_channels": (lambda: DiT(in_channels=4), TypeError, "write DiT(DiTConfig(in_channels=...))"),
    "embed_dim": (lambda: DiT(embed_dim=384), TypeError, "write DiT(DiTConfig(width=...))"),
    "patch_size": (lambda: DiT(patch_size=2), TypeError, "write DiT(DiTConfig(patch=...))"),
    "patch_size of a layer": (lambda: nn.PatchEmbed3d(4, 64, patch_size=2), TypeError, "got patch_size; write patch"),
    "in_channels of the VAE": (lambda: VideoVAE(in_channels=3), TypeError, "write VideoVAE(VAEConfig(in_channels=...))"),
    "z_dim": (lambda: VideoVAE(z_dim=16), TypeError, "write VideoVAE(VAEConfig(latent_channels=...))"),
    "a typing slip": (lambda: models.MAE(widht=64), TypeError, "write MAE(MAEConfig(width=...))"),
    "no such word": (lambda: DiTConfig(qqq=1), TypeError, "expected width, depth, heads"),
    "prediction_type": (lambda: FlowMatching(prediction_type="x0"), TypeError, "write prediction"),
    "XL": (lambda: DiT.preset("XL"), ValueError, "write 'XL/2' or 'XL/4' or 'XL/8'"),
    "nn.DiTBlock": (lambda: nn.DiTBlock, AttributeError, "write sora_fast.models.DiTBlock"),
    "sora_fast.DiT": (lambda: sora_fast.DiT, AttributeError, "write sora_fast.models.DiT"),
    "ops.varlen_atention": (lambda: ops.varlen_atention, AttributeError, "write sora_fast.ops.varlen_attention"),
    "DiT.from_pretrained": (lambda: DiT.from_pretrained("a"), AttributeError, "write sora_fast.models.load_dit(path)"),
    "VideoVAE.from_pretrained": (lambda: VideoVAE.from_pretrained, AttributeError, "write sora_fast.models.load_vae(path)"),
    "loss": (lambda: FlowMatching().loss(None, [], text=None), TypeError, "write training_loss(model, objective, latents"),
}


@pytest.mark.parametrize("tried", TRIED)
def test_the_right_name_is_in_the_error(tried):
    call, kind, remedy = TRIED[tried]
    with pytest.raises(kind) as raised:
        call()
    sentence = str(raised.value)
    assert remedy in sentence and ": expected " in sentence and "\n" not in sentence and raised.value.__cause__ is None


def test_right_names_go_on_as_before():
    config = DiTConfig(heads=1, width=64)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert not hasattr(DiT, "from_pretrained") and models.DiTBlock(config).mlp.fc1.in_features == 64
    with pytest.raises(TypeError, match="unsupported operand"):  # raised inside a call that fits: it is kept
        FlowMatching().loss(torch.ones(1), None, None, None, None)
    assert diffusion.DDPM.loss.__doc__.startswith("Mean squared error")
