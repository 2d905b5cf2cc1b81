"""Tiny models, two clips and their pack, for the tests of packs."""

import torch

from sora_fast import Pack
from sora_fast.models import MAE, DiT, DiTConfig, MAEConfig, Text, WanDiT, WanDiTConfig


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_dit(**changes):
    torch.manual_seed(0)
    return DiT(DiTConfig(width=32, depth=1, heads=2, in_channels=4, rope_axes=(4, 6, 6), **changes))


def tiny_wan():
    torch.manual_seed(0)
    return WanDiT(WanDiTConfig(width=32, depth=1, heads=2, mlp_width=32, in_channels=4, out_channels=4, text_width=8))


def tiny_mae():
    torch.manual_seed(0)
    return MAE(MAEConfig(in_channels=4, patch=(1, 2, 2), width=48, depth=1, decoder_width=48, decoder_depth=1))


CLIPS, STEPS = [draw(4, 3, 4, 6), draw(4, 1, 8, 4)], torch.tensor([300.0, 800.0])
GOOD = Pack.of(CLIPS, (1, 2, 2))  # 18 and 8 tokens
TEXT = Text(draw(5, 8), draw(2, 8), (2, 3))
