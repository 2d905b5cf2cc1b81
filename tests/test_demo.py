"""The demo's number of steps, and what it says of its reconstructions."""

import pytest
import torch

from sora_fast.cli.demo_plan import DIT_STEPS, VAE_STEPS, plan
from sora_fast.cli.demo_stages import average_and_interpolate, quality

pytest.importorskip("av", reason="the demo extra is not installed")


def test_quality_and_baseline():
    real = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    off = (real.int() + torch.where(real > 127, -10, 10)).to(torch.uint8)
    psnr, ssim = quality(off, real)
    assert abs(psnr - 20 * torch.log10(torch.tensor(25.5)).item()) < 1e-6 and ssim < 1
    flat = torch.full((1, 3, 5, 16, 24), 0.25)
    assert torch.allclose(average_and_interpolate(flat, 4, 8), flat)
    first = torch.randn(1, 3, 5, 16, 24)
    changed = first.clone()
    changed[:, :, 1:] += 1
    same = average_and_interpolate(first, 4, 8)[:, :, :1]
    assert torch.equal(same, average_and_interpolate(changed, 4, 8)[:, :, :1])


def test_steps_follow_the_measured_speed():
    chosen = plan(0.5, 0.3, 4)
    assert (chosen.vae_steps, chosen.dit_steps) == (120, 600) and abs(chosen.training - 240) < 1e-9 < chosen.total - 240
    slow = plan(5.0, 3.0, 4)  # never fewer than the quality needs: it takes longer, and says so
    assert (slow.vae_steps, slow.dit_steps) == (VAE_STEPS[0], DIT_STEPS[0]) and slow.training == 60 * 5 + DIT_STEPS[0] * 3
    assert f"about {slow.training / 60:.1f} minutes of training" in slow.sentence()
    fast = plan(0.01, 0.01, 4)
    assert (fast.vae_steps, fast.dit_steps) == (VAE_STEPS[1], DIT_STEPS[1])
    assert plan(5.0, 3.0, 0) == plan(5.0, 3.0, 1e9) and plan(1.0, 1.0, 4, vae_steps=2, dit_steps=3).training == 5
