"""The VAE's posterior: a sample by reparameterisation and its divergence from the unit normal.

B batch, C latent channels. (Kingma and Welling, arXiv 1312.6114, appendix B.)
"""

import torch

from ..precision import wide_dtype

__all__ = ["kl_sample"]


def kl_sample(moments, noise=None):
    """``z = mean + exp(logvar / 2) * noise`` and its KL; see ``sora_fast.ops.kl_sample``."""
    wide = wide_dtype(moments, noise)
    mean, logvar = moments.to(wide).chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    z = mean.clone() if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(wide)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
    return z.to(moments.dtype), kl.flatten(1).sum(dim=1).to(wide_dtype(moments))
