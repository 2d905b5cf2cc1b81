"""Sizes of models, for every family's cases: tokens in t, h, w of a clip behind the model's VAE and patch.

Wan: arXiv 2503.20314, HunyuanVideo: 2412.03603, CogVideoX: 2408.06072, DiT: 2212.09748, Mochi 1: Genmo's release notes.
"""

from math import prod

Grid = tuple[int, int, int]

DIT_256 = (1, 16, 16)  # 256 x 256 image: 256 tokens
DIT_512 = (1, 32, 32)
LTX_480 = (16, 15, 22)  # 121 frames of 480 x 704: 5,280
OPEN_SORA_256 = (33, 16, 16)  # 129 frames of 256 x 256: 8,448
COGVIDEOX_480 = (13, 30, 45)  # 49 frames of 480 x 720: 17,550
WAN22_720 = (31, 22, 40)  # 121 frames of 704 x 1280, VAE factor 16: 27,280
WAN_480 = (21, 30, 52)  # 81 frames of 480 x 832: 32,760
MOCHI_480 = (28, 30, 53)  # 163 frames of 480 x 848: 44,520
WAN_720 = (21, 45, 80)  # 81 frames of 720 x 1280: 75,600
OPEN_SORA_768 = (33, 48, 48)  # 129 frames of 768 x 768: 76,032
HUNYUAN_720 = (33, 45, 80)  # 129 frames of 720 x 1280: 118,800
# At 480 x 832, under Wan's factors: clips of 33 and 17 frames, and an image.
WAN_33, WAN_17, WAN_IMAGE = (9, 30, 52), (5, 30, 52), (1, 30, 52)
# Both clips or the shorter one, with images at 480p and of 512 and 256 pixels squared.
MIXED_32K = (WAN_33, WAN_17, *(WAN_IMAGE,) * 4, *(DIT_512,) * 4, *(DIT_256,) * 2)
MIXED_16K = (WAN_17, *(WAN_IMAGE,) * 3, *(DIT_512,) * 3, *(DIT_256,) * 2)
# Clips of 33 and 17 frames and seven images in four aspects: the 32,760 tokens of one Wan clip.
MIXED_480 = (WAN_33, (5, 52, 30), *(WAN_IMAGE,) * 3, *((1, 52, 30),) * 2, (1, 39, 40), (1, 40, 39))
# Clips of 33 and 17 frames, photos, upright and small ones.
MIXED_720 = (WAN_33, (5, 40, 40), (1, 45, 80), WAN_IMAGE, (1, 52, 30), DIT_512)
# 24 images of 256 pixels in three aspects and four clips of 17 frames: 8,104 tokens.
MIXED_256 = (*(DIT_256,) * 12, *((1, 14, 18),) * 6, *((1, 20, 12),) * 6, *((5, 10, 8),) * 2, *((5, 16, 8),) * 2)
# Images of 256 to 768 pixels and two small clips.
MIXED_IMAGES = ((5, 16, 16), (3, 16, 24), *(DIT_256,) * 24, *((1, 12, 20),) * 8, DIT_512, (1, 24, 40), (1, 40, 24),
                (1, 48, 32))
# For a CPU core: 480 + 168 + 1 + 256 tokens.
MIXED_SMALL = ((3, 10, 16), (1, 12, 14), (1, 1, 1), (1, 16, 16))


def lengths(*grids: Grid) -> tuple[int, ...]:
    """Tokens of each sample."""
    return tuple(map(prod, grids))


def latent(channels: int, grid: Grid, patch: Grid = (1, 2, 2)) -> tuple[int, ...]:
    """(C, T, H, W) of the latents that are ``grid`` tokens."""
    return (channels, *(n * p for n, p in zip(grid, patch, strict=True)))
