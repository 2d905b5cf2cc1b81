"""The weights of diffusers' AutoencoderKLWan, by the names of VideoVAE: both have Wan 2.1's graph."""

import torch
from torch import nn

from sora_fast.models import VAEConfig, VideoVAE


def make_wan(config: VAEConfig):
    """diffusers' class at the sizes of ``config``, with its own random weights."""
    from diffusers import AutoencoderKLWan

    channels = config.latent_channels
    return AutoencoderKLWan(
        base_dim=config.width, z_dim=channels, dim_mult=list(config.multipliers), num_res_blocks=config.encoder_blocks,
        temperal_downsample=[time for _, time in config.resamples], scale_factor_temporal=config.time_factor,
        scale_factor_spatial=config.space_factor, latents_mean=list(config.latent_mean or [0.0] * channels),
        latents_std=list(config.latent_std or [1.0] * channels))


def wan_parameters(vae: VideoVAE, wan: nn.Module) -> dict[str, nn.Parameter]:
    """Our name of every parameter of ``wan``; shapes differ (2-D kernels, norms), the numbers' order does not."""
    modules = dict(wan.named_modules())
    ours = {module: name for name, module in vae.named_modules()}
    found = {}
    for module, name in _names(vae).items():
        theirs = modules[name]
        found[f"{ours[module]}.weight"] = theirs.weight if isinstance(module, nn.Conv3d) else theirs.gamma
        if module.bias is not None:
            found[f"{ours[module]}.bias"] = theirs.bias
    if len(found) != sum(1 for _ in wan.parameters()) or set(found) != {name for name, _ in vae.named_parameters()}:
        raise ValueError("bench: expected diffusers' AutoencoderKLWan to have the parameters of Wan 2.1, got others; "
                         "install diffusers 0.42")
    return found


@torch.no_grad()
def copy_weights(vae: VideoVAE, wan: nn.Module) -> None:
    """Our weights into theirs."""
    ours = dict(vae.named_parameters())
    for name, parameter in wan_parameters(vae, wan).items():
        parameter.copy_(ours[name].reshape(parameter.shape))


def _names(vae: VideoVAE) -> dict[nn.Module, str]:
    """Their name of each of our modules that hold weights."""
    names = {vae.to_moments: "quant_conv", vae.from_latents: "post_quant_conv"}

    def block(ours, theirs):
        names.update({getattr(ours, part): f"{theirs}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")})
        if ours.shortcut is not None:
            names[ours.shortcut] = f"{theirs}.conv_shortcut"

    def resample(ours, theirs):
        names[ours.space_conv] = f"{theirs}.resample.1"
        if ours.time_conv is not None:
            names[ours.time_conv] = f"{theirs}.time_conv"

    for side in ("encoder", "decoder"):
        ours = getattr(vae, side)
        names |= {ours.stem: f"{side}.conv_in", ours.norm: f"{side}.norm_out", ours.head: f"{side}.conv_out"}
        block(ours.middle.block1, f"{side}.mid_block.resnets.0")
        block(ours.middle.block2, f"{side}.mid_block.resnets.1")
        names |= {getattr(ours.middle.attention, part): f"{side}.mid_block.attentions.0.{part}"
                  for part in ("norm", "to_qkv", "proj")}
    place = 0  # the encoder's blocks and resamplers stand in one list
    for level in vae.encoder.levels:
        for part in level.blocks:
            block(part, f"encoder.down_blocks.{place}")
            place += 1
        if level.resample is not None:
            resample(level.resample, f"encoder.down_blocks.{place}")
            place += 1
    for depth, level in enumerate(vae.decoder.levels):
        for number, part in enumerate(level.blocks):
            block(part, f"decoder.up_blocks.{depth}.resnets.{number}")
        if level.resample is not None:
            resample(level.resample, f"decoder.up_blocks.{depth}.upsamplers.0")
    return names
