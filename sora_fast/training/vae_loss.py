"""What a VideoVAE is trained on: reconstruction, regularisation, and on request perception and an adversary.

One loss, one optimiser, one checkpoint: what teaches the VAE goes through a discriminator whose weights count as constants,
what teaches the discriminator sees a reconstruction that counts as one. (LDM: arXiv 2112.10752, appendix G; the adaptive
weight: VQGAN, arXiv 2012.09841, equation 7.)

B batch, T frames, H height, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..models import VideoVAE
from ..models.discriminator import PatchDiscriminator
from . import distributed

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LARGEST_WEIGHT = 1e4  # of the adaptive weight, where the adversary's gradient vanishes


def reconstruction_error(kind: str, reconstruction, video):
    """Mean over all elements of "l1" |x - y| or "l2" (x - y)^2, in float32."""
    error = reconstruction.float() - video.float()
    return error.abs().mean() if kind == "l1" else error.square().mean()


def adversary_losses(discriminator: nn.Module, reconstruction, video):
    """``(for_vae, for_discriminator)``: the hinge losses of arXiv 1705.02894, which share no gradient.

    The first has none for the discriminator's parameters, the second none for the reconstruction.
    """
    constants = {name: value.detach() for name, value in (*discriminator.named_parameters(), *discriminator.named_buffers())}
    for_vae = -functional_call(discriminator, constants, (reconstruction,)).float().mean()
    real, made = (discriminator(x).float() for x in (video, reconstruction.detach()))
    return for_vae, 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adaptive_weight(of_pixels, of_adversary, last_layer):
    """How much the adversary counts: the ratio of both losses' gradient norms at the decoder's last layer, a constant."""
    gradient = lambda loss: torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
    norms = [gradient(loss).norm() for loss in (of_pixels, of_adversary)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST_WEIGHT).detach()


class VAELoss:
    """``loss(video, noise, begun) -> value`` of a VideoVAE.

    Args:
        modules: ``vae``, and ``discriminator`` where there is an adversary.
        reconstruction: "l1" or "l2". kl: weight of the posterior's KL; both count per number of the clip, so that the weight
            means the same for every size (it is LDM's, whose both are sums); vq: of the codebook's loss, a mean.
        perceptual: ``perceptual(reconstruction, video) -> (B,) or scalar``, both (B, 3, T, H, W) in [-1, 1].
        adversarial: weight of the adversary, on top of the adaptive one; 0 for none. The adaptive weight is a ratio of this
            batch's own gradients, so with an adversary a step depends on how its crops are cut into batches.
    """

    def __init__(self, modules: nn.ModuleDict, *, reconstruction: str = "l1", kl: float = 1e-6, vq: float = 1.0,
                 perceptual: Perceptual | None = None, perceptual_weight: float = 1.0, adversarial: float = 0.0):
        self.modules, self.reconstruction, self.kl, self.vq = modules, reconstruction, kl, vq
        self.perceptual, self.perceptual_weight, self.adversarial = perceptual, perceptual_weight, adversarial

    def __call__(self, video, noise, begun: bool = True):
        """A scalar; ``begun``: whether the adversary takes part yet. Without gradients it never does."""
        vae = self.modules["vae"]
        reconstruction, regulariser = vae(video, noise)
        pixels = reconstruction_error(self.reconstruction, reconstruction, video)
        if self.perceptual is not None:
            pixels = pixels + self.perceptual_weight * self.perceptual(reconstruction, video).float().mean()
        weight = self.kl / video[0].numel() if vae.quantizer is None else self.vq
        total = pixels + weight * regulariser.mean()
        if not (self.adversarial and begun and torch.is_grad_enabled()):
            return total
        for_vae, for_discriminator = adversary_losses(self.modules["discriminator"], reconstruction, video)
        weight = adaptive_weight(pixels, for_vae, vae.decoder.head.weight)
        return total + self.adversarial * weight * for_vae + for_discriminator


def modules_of(vae: VideoVAE, adversarial: float) -> nn.ModuleDict:
    """What is trained: the VAE, and a discriminator where one takes part."""
    return nn.ModuleDict({"vae": vae} | ({"discriminator": PatchDiscriminator()} if adversarial else {}))


def count_together(quantizer, before) -> None:
    """Make every rank's ``counts`` what all of them have counted since ``before``."""
    if distributed.size() > 1:
        since = quantizer.counts - before
        torch.distributed.all_reduce(since)
        quantizer.counts.copy_(before + since)


@torch.no_grad()
def restart_codes(vae: VideoVAE, video, generator: torch.Generator) -> torch.Tensor:
    """Set codes unused since the last restart to latents of ``video``, which is rank 0's on all ranks.

    Returns how many, 0-dim int64 on the device: who reads it waits.
    """
    if distributed.size() > 1:
        video = video.clone()
        torch.distributed.broadcast(video, 0)
    return vae.quantizer.restart(vae.moments(video), generator=generator)
