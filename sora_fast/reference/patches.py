"""Spacetime patches: latents to tokens and back.

N tokens, C channels, T frames, H height, W width; a sample has t x h x w tokens of pt x ph x pw pixels; D width.
(Tubelet embedding: ViViT, arXiv 2103.15691, section 3.2.)
"""

import torch

from ..precision import wide_dtype

__all__ = ["patch_embed", "unpatchify"]


def cut(latents, grids, patch, channels):
    """Flat buffer of samples (C, T, H, W) one after the other -> their patches (N, C * pt * ph * pw), tail 0."""
    pt, ph, pw = patch
    numel = channels * pt * ph * pw
    parts, start = [], 0
    for t, h, w in grids:
        end = start + t * h * w * numel
        sample = latents[start:end].reshape(channels, t, pt, h, ph, w, pw)
        parts.append(sample.permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, numel))
        start = end
    tail = (latents.shape[0] - start) // numel
    parts.append(latents.new_zeros((tail, numel)))
    return torch.cat(parts)


def patch_embed(latents, weight, bias=None, *, grids):
    """Tokens (N, D) of the flat buffer ``latents``; see ``sora_fast.ops.patch_embed``, which makes the buffer."""
    width, channels, *patch = weight.shape
    wide = wide_dtype(latents, weight, bias)
    tokens = cut(latents, grids, patch, channels).to(wide) @ weight.flatten(1).to(wide).t()
    if bias is not None:
        tokens = tokens + bias.to(wide)
    inside = sum(t * h * w for t, h, w in grids)
    in_sample = torch.arange(tokens.shape[0], device=tokens.device) < inside
    return torch.where(in_sample[:, None], tokens, 0).to(latents.dtype)


def unpatchify(tokens, grids, patch, channels):
    """Flat buffer of samples (C, T, H, W) from tokens (N, pt * ph * pw * C); see ``sora_fast.ops.unpatchify``."""
    pt, ph, pw = patch
    parts, start = [], 0
    for t, h, w in grids:
        sample = tokens[start : start + t * h * w].reshape(t, h, w, pt, ph, pw, channels)
        parts.append(sample.permute(6, 0, 3, 1, 4, 2, 5).reshape(-1))
        start += t * h * w
    parts.append(tokens.new_zeros((tokens.shape[0] - start) * tokens.shape[1]))
    return torch.cat(parts)
