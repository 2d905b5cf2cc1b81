"""diffusers' AutoencoderKLWan as a peer of VideoVAE: both have Wan 2.1's graph, and the same numbers here."""

import torch
from torch import nn

from sora_fast.models import VAEConfig, VideoVAE
from sora_fast.models.checkpoints import vae_description, vae_keys


def make_wan(config: VAEConfig):
    """diffusers' class at the sizes of ``config``, with its own random weights."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(vae_description(config))


def wan_parameters(vae: VideoVAE, wan: nn.Module) -> dict[str, nn.Parameter]:
    """Our name of every parameter of ``wan``; shapes differ (2-D kernels, norms), the numbers' order does not."""
    theirs = dict(wan.named_parameters())
    names = {ours: name for ours, [(name, _)] in vae_keys(vae, "diffusers").items()}
    if set(names.values()) != set(theirs) or set(names) != {name for name, _ in vae.named_parameters()}:
        raise ValueError("bench: expected diffusers' AutoencoderKLWan to have the parameters of Wan 2.1, got others; "
                         "install diffusers 0.42")
    return {ours: theirs[name] for ours, name in names.items()}


@torch.no_grad()
def copy_weights(vae: VideoVAE, wan: nn.Module) -> None:
    """Our weights into theirs."""
    ours = dict(vae.named_parameters())
    for name, parameter in wan_parameters(vae, wan).items():
        parameter.copy_(ours[name].reshape(parameter.shape))
