"""Small models learn: an autoencoder what is hidden, a DiT by every objective."""

import pytest
import test_training_tasks
import torch
from float64_checks import seeded
from training_checks import latent_clips

from sora_fast.models.mae import MAE, MAEConfig

pytestmark = [pytest.mark.full, pytest.mark.ci]


def test_it_learns_what_hides_behind_smooth_patches():
    """Ramps of random slope are told by a few of their patches: an error far below that of predicting the mean."""
    torch.manual_seed(0)
    model = MAE(MAEConfig(in_channels=1, patch=(1, 4, 4), width=48, depth=2, heads=2, decoder_width=48, decoder_depth=1,
                          decoder_heads=2, normalise_target=False))
    generator, optimiser = seeded(), torch.optim.Adam(model.parameters(), 3e-3)
    h, w = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    for _ in range(150):
        a, b = torch.randn(2, 32, 1, 1, 1, 1, generator=generator)
        clips = a * h + b * w
        out = model(clips, ratio=0.6, generator=generator)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    assert out.loss < 0.1 * clips.var()


@pytest.mark.parametrize("settings", [dict(prediction="noise", timesteps="uniform", shift="2"),
                                      dict(objective="ddpm", prediction="velocity")])
def test_dit_loss_falls(tmp_path, settings):
    test_training_tasks.test_dit_loss_falls(tmp_path, latent_clips(), settings)
