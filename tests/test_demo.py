"""What the demo says of its reconstructions."""


import pytest
import torch

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
