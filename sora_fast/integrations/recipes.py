"""Inputs for the model families that are covered: small ones, with tiny sizes of the models, that sora-fast validate --model
calls them with, and common ones, which have no memory and show setup what a model calls.

Input sizes come from the model's config, so they fit any checkpoint of the family.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """``tiny``: keywords of the class for a model of a few thousand parameters; ``calls(model, draw)``: (name, run) pairs.

    ``run(model, cast)`` gives a tensor; ``cast`` brings a drawn float64 tensor to the model's dtype and device.
    ``common``: as ``calls``, at the sizes of a video of 480 x 832.
    """

    tiny: dict
    calls: Callable
    common: Callable


def _autoencoder(space: Callable, time: int = 4, sizes=((2, 4, 4), (1, 4, 4))):
    """Encode and decode of a clip and of an image, of so many latent frames and pixels."""
    def calls(model, draw):
        channels = getattr(model.config, "z_dim", None) or model.config.latent_channels
        side, pixels = space(model), getattr(model.config, "in_channels", 3)
        patch = getattr(model.config, "patch_size", None) or 1
        made = []
        for what, (frames, height, width) in zip(("a clip", "an image"), sizes, strict=False):
            video = draw(1, pixels // patch**2, 1 + (frames - 1) * time, height * side, width * side)
            latents = draw(1, channels, frames, height, width)
            made += [(f"encode {what}",
                      lambda model, cast, video=video: model.encode(cast(video)).latent_dist.parameters),
                     (f"decode {what}",
                      lambda model, cast, latents=latents: model.decode(cast(latents)).sample)]
        return made
    return calls


def _transformer(inputs: Callable, sizes=((2, 3, 4, 3), (1, 1, 4, 3))):
    """One call on a clip, batch 2, and one on an image, or of other batches, frames and tokens in height and width."""
    def calls(model, draw):
        made = []
        for name, (batch, frames, height, width) in zip(("a clip, batch 2", "an image"), sizes, strict=False):
            given = inputs(model.config, draw, batch, frames, height, width)

            def run(model, cast, given=given):
                move = lambda x: cast(x) if x.is_floating_point() else x.to(next(model.parameters()).device)
                return model(return_dict=False, **{key: move(value) for key, value in given.items()})[0]

            made.append((name, run))
        return made
    return calls


def _timesteps(batch: int):
    return torch.arange(1, 1 + batch, device="cpu") * 300


def _wan(c, draw, batch, frames, height, width):
    pt, ph, pw = c.patch_size
    given = dict(hidden_states=draw(batch, c.in_channels, frames * pt, height * ph, width * pw), timestep=_timesteps(batch),
                 encoder_hidden_states=draw(batch, 512 if c.added_kv_proj_dim else 7, c.text_dim))
    if c.image_dim:
        given["encoder_hidden_states_image"] = draw(batch, 5, c.image_dim)
    return given


def _hunyuan(c, draw, batch, frames, height, width):
    mask = torch.ones(batch, 7, dtype=torch.int64, device="cpu")
    mask[-1, 4:] = 0
    sizes = frames * c.patch_size_t, height * c.patch_size, width * c.patch_size
    given = dict(hidden_states=draw(batch, c.in_channels, *sizes), timestep=_timesteps(batch),
                 encoder_hidden_states=draw(batch, 7, c.text_embed_dim), encoder_attention_mask=mask,
                 pooled_projections=draw(batch, c.pooled_projection_dim))
    return given | (dict(guidance=_timesteps(batch).double() * 10) if c.guidance_embeds else {})


def _cogvideox(c, draw, batch, frames, height, width):
    frames = frames if c.patch_size_t is None else frames * c.patch_size_t
    given = dict(hidden_states=draw(batch, frames, c.in_channels, c.sample_height, c.sample_width),
                 timestep=_timesteps(batch), encoder_hidden_states=draw(batch, c.max_text_seq_length, c.text_embed_dim))
    if c.use_rotary_positional_embeddings:
        tokens = frames // (c.patch_size_t or 1) * (c.sample_height // c.patch_size) * (c.sample_width // c.patch_size)
        angles = draw(tokens, c.attention_head_dim // 2).repeat_interleave(2, 1)
        given["image_rotary_emb"] = torch.stack([angles.cos(), angles.sin()])
    if c.ofs_embed_dim:
        given["ofs"] = draw(batch)
    return given


def _dit(c, draw, batch, frames, height, width):
    return dict(hidden_states=draw(batch, c.in_channels, c.sample_size, c.sample_size), timestep=_timesteps(batch),
                class_labels=torch.arange(batch, device="cpu") % c.num_embeds_ada_norm)


_WAN_VAE = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
_KL_VAE = dict(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
_spatial_ratio = lambda model: model.spatial_compression_ratio
_CLIP = ((5, 60, 104),)  # latent frames, height and width: 17 frames of 480 x 832


def _vae_recipe(tiny: dict, space: Callable) -> Recipe:
    return Recipe(tiny, _autoencoder(space), _autoencoder(space, sizes=_CLIP))


def _transformer_recipe(tiny: dict, inputs: Callable, frames: int = 21) -> Recipe:
    """A transformer; common are 81 frames of 480 x 832, a prompt and none."""
    return Recipe(tiny, _transformer(inputs), _transformer(inputs, ((2, frames, 30, 52),)))


RECIPES = {
    "AutoencoderKLWan": _vae_recipe(_WAN_VAE, _spatial_ratio),
    "AutoencoderKLQwenImage": _vae_recipe(_WAN_VAE, _spatial_ratio),
    "AutoencoderKLHunyuanVideo": _vae_recipe(_KL_VAE, _spatial_ratio),
    "AutoencoderKLCogVideoX": _vae_recipe(
        _KL_VAE | dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
                       sample_height=64, sample_width=64),
        lambda model: 2 ** (len(model.config.block_out_channels) - 1)),
    "WanTransformer3DModel": _transformer_recipe(
        dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
             freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64), _wan),
    "HunyuanVideoTransformer3DModel": _transformer_recipe(
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
             num_refiner_layers=1, patch_size=2, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6)),
        _hunyuan),
    "CogVideoXTransformer3DModel": _transformer_recipe(
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
             text_embed_dim=16, num_layers=2, sample_width=6, sample_height=8, sample_frames=9, max_text_seq_length=7,
             use_rotary_positional_embeddings=True), _cogvideox, 13),
    "DiTTransformer2DModel": _transformer_recipe(
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
             num_embeds_ada_norm=5), _dit),
}
