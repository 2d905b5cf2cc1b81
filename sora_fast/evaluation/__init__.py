"""How good a model is: reconstruction figures of a VAE, a DiT's loss over timesteps, Frechet distances of given features.

Pure PyTorch on the CPU or a GPU; what a figure means stands at its function. ``sora-fast eval`` prints them.
"""

from .metrics import ClipQuality, Quality, frechet, psnr, ssim, temporal_psnr
from .timesteps import TimestepLosses, loss_by_timestep

__all__ = ["ClipQuality", "Quality", "TimestepLosses", "frechet", "loss_by_timestep", "psnr", "ssim", "temporal_psnr"]
