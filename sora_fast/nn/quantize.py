"""VectorQuantizer: latents as entries of a learned codebook.

B batch, C channels, K codes, N latent vectors (B times the sizes after C).
"""

from typing import NamedTuple

import torch
from torch import nn

from .. import checks
from ..precision import no_autocast, transformed, wide_dtype
from ..to_device import to_device

_ROWS = 4096  # vectors whose distances are held at once: 128 MiB of float32 with 8,192 codes


class Quantized(NamedTuple):
    """``latent`` (B, C, ...), exactly codebook entries, in the input's dtype; ``codes`` (B, ...) int64; ``loss`` (B,)."""

    latent: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor


class VectorQuantizer(nn.Module):
    """Every latent vector to its nearest code, with the gradient passed straight through.

    The codebook is a Parameter that learns by gradient, not a running average: then data-parallel training, averaged
    weights and recomputed activations need no rules of their own.

    ``counts`` (K,) int64, a buffer: how often each code was used in training mode since the last ``restart``.

    Args:
        codes: K. channels: C.
        commitment: weight beta of the loss that keeps the encoder near its codes.

    Raises:
        ValueError, TypeError: settings that do not fit; when called, z of another shape than (B, C, ...).

    Source: VQ-VAE, arXiv 1711.00937, equations 1 to 3; in latent diffusion: arXiv 2112.10752, section 3.1.
    """

    def __init__(self, codes: int, channels: int, commitment: float = 0.25):
        super().__init__()
        checks.whole("VectorQuantizer", "codes", codes, 1)
        checks.whole("VectorQuantizer", "channels", channels, 1)
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes))
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.int64))

    def forward(self, z) -> Quantized:
        """z (B, C, ...) -> Quantized.

        ``loss`` is ``|sg(z) - e|^2 + beta |z - sg(e)|^2`` averaged over a sample's elements, in at least float32; the
        gradient of ``latent`` goes to z unchanged, and to no code.
        """
        checks.tensor("VectorQuantizer", "z", z)
        checks.floating("VectorQuantizer", z=z)
        if z.dim() < 2 or z.shape[1] != self.codebook.shape[1]:
            raise ValueError(f"VectorQuantizer: expected z of shape (B, {self.codebook.shape[1]}, ...), got "
                             f"{tuple(z.shape)}; its channels are dimension 1")
        with no_autocast(z.device.type):
            wide = wide_dtype(z, self.codebook)
            vectors = z.movedim(1, -1).to(wide)
            codes = nearest(vectors.detach().flatten(0, -2), self.codebook.detach().to(wide))
            if self.training and transformed():
                raise NotImplementedError("VectorQuantizer: expected evaluation mode in a function that torch.func "
                                          "transforms, where counts cannot change, got training mode; call .eval() before")
            if self.training:
                self.counts.scatter_add_(0, codes, torch.ones_like(codes))
            entries = self.codebook.to(wide)[codes].unflatten(0, vectors.shape[:-1])
            per_number = (vectors.detach() - entries).square() + self.commitment * (vectors - entries.detach()).square()
            loss = per_number.flatten(1).sum(1) / max(per_number[:1].numel(), 1)
            latent = entries.detach().movedim(-1, 1).to(z.dtype) + (z - z.detach())  # the second term is 0: bitwise e
        return Quantized(latent, codes.unflatten(0, vectors.shape[:-1]), loss)

    def lookup(self, codes):
        """Codes (B, ...) int64 to their entries (B, C, ...)."""
        checks.integers("VectorQuantizer.lookup", "codes", codes, (torch.int64,))
        return self.codebook[codes].movedim(-1, 1)

    def usage(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fraction of codes used since the last restart, and their perplexity (1: a single code; K: uniform); 0-dim."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        return (self.counts > 0).double().mean(), torch.exp(torch.special.entr(share).sum())

    @torch.no_grad()
    def restart(self, z, *, least: int = 1, generator: torch.Generator | None = None) -> torch.Tensor:
        """Set codes used fewer than ``least`` times since the last restart to random vectors of z (B, C, ...); count anew.

        Before the first step, when none has been used, it starts the codebook from data. The optimiser's averages of these
        codes are left as they are. The draw is on the CPU, from ``generator``: a seed gives the same codes on every device.

        Returns:
            How many codes were set, 0-dim int64. Vectors repeat only where more codes than vectors are wanted.
        """
        checks.tensor("VectorQuantizer.restart", "z", z)
        vectors = z.movedim(1, -1).flatten(0, -2)
        if vectors.shape[0] == 0 or vectors.shape[1] != self.codebook.shape[1]:
            raise ValueError(f"VectorQuantizer.restart: expected at least one vector (B, {self.codebook.shape[1]}, ...), "
                             f"got {tuple(z.shape)}; pass what forward takes")
        order = to_device(torch.randperm(vectors.shape[0], generator=generator, device="cpu"), z.device)
        dead = self.counts < least
        rank = (dead.cumsum(0) - 1).clamp(min=0) % vectors.shape[0]
        drawn = vectors[order[rank]].to(self.codebook.dtype)
        self.codebook.copy_(torch.where(dead[:, None], drawn, self.codebook))
        self.counts.zero_()
        return dead.sum()


def nearest(vectors_NC, codebook_KC) -> torch.Tensor:
    """The nearest code (N,) by Euclidean distance, computed from differences; ties go to the first.

    The expansion to a GEMM would lose the differences of close codes to cancellation, and to TF32 if it is on.
    """
    distance = lambda rows: torch.cdist(rows, codebook_KC, compute_mode="donot_use_mm_for_euclid_dist")
    parts = [distance(rows).argmin(1) for rows in vectors_NC.split(_ROWS)] if vectors_NC.shape[0] else []
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=vectors_NC.device)
