"""norm_act: norm and activation of video features, at the sizes of published video VAEs.

B batch, C channels, T frames, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sora_fast.testing.draw import Draw

from ..case import Case, Provider
from ..providers import backends, compiled

WAN_EPS = 1e-24  # Wan divides by the length of the vector: nothing inside the mean but a guard against 0 / 0
GROUPS, GROUP_EPS = 32, 1e-6


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """On a GPU as a fast VAE keeps its data, (B, T, H, W, C) in memory; elsewhere unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.is_cuda else tensor


def norm_settings(norm: str) -> dict:
    return dict(norm=norm, groups=GROUPS, eps=WAN_EPS if norm == "rms" else GROUP_EPS, act="silu")


@dataclass(frozen=True)
class NormalizationCase(Case):
    """norm_act on (batch, channels, frames, height, width); ``rms`` has a weight, ``group`` a weight and a bias."""

    channels: int
    frames: int
    height: int
    width: int
    norm: str = "rms"
    batch: int = 1

    def shape(self):
        return dict(B=self.batch, C=self.channels, T=self.frames, H=self.height, W=self.width, **norm_settings(self.norm))

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        x = channels_last(draw(self.batch, self.channels, self.frames, self.height, self.width))
        affine = dict(weight=draw(self.channels, scale=0.1, mean=1))
        if self.norm == "group":
            affine |= dict(bias=draw(self.channels, scale=0.1))
        return dict(x=x, **affine, **norm_settings(self.norm))

    def directions(self):
        return {"forward": (), "backward": ("x", "weight", "bias") if self.norm == "group" else ("x", "weight")}

    def least_bytes(self, direction):
        """Forward reads x and writes y; backward reads x and dy and writes dx; the affine numbers and their gradients.

        x counts once for ``group`` too, whose statistics are needed before its first output: a chip that does not hold x
        in its cache reads it twice and cannot reach this floor. Saved statistics (two numbers a group) are not counted.
        """
        x = self.batch * self.channels * self.frames * self.height * self.width
        affine = self.channels * (2 if self.norm == "group" else 1)
        return self.dtype.itemsize * (2 * x + affine if direction == "forward" else 3 * x + 2 * affine)


# -------------------------------------------------------------------------------------------------------------- peers
def _affine(x, weight, bias):
    x = x if weight is None else x * weight[:, None, None, None]
    return x if bias is None else x + bias[:, None, None, None]


def _silu(x, act):
    return F.silu(x) if act == "silu" else x


def _normalize(x, weight=None, bias=None, *, norm, groups, eps, act):
    """Wan's and HunyuanVideo 1.5's own composition, rounding to x's dtype after each step."""
    return _silu(_affine(F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5, weight, bias), act)


def _rms_norm(x, weight=None, bias=None, *, norm, groups, eps, act):
    """Of channels_last data the last dimension is the channels', without a copy."""
    h = F.rms_norm(x.movedim(1, -1), (x.shape[1],), weight, eps).movedim(-1, 1)
    return _silu(_affine(h, None, bias), act)


def _group_norm(x, weight=None, bias=None, *, norm, groups, eps, act):
    """PyTorch's kernel on a GPU works in NCDHW: of channels_last data it makes a copy, and its result stays so."""
    return _silu(F.group_norm(x, groups, weight, bias, eps), act)


def _only(norm: str, function: str) -> Callable:
    def unavailable(case, direction, device):
        return "" if case.norm == norm else f"{function} is the norm {norm!r}, and this case has {case.norm!r}."
    return unavailable


# name, function with norm_act's arguments, and what it cannot do; convolution.py puts a convolution behind each
PEERS = (("normalize", _normalize, _only("rms", "F.normalize")), ("rms_norm", _rms_norm, _only("rms", "F.rms_norm")),
         ("group_norm", _group_norm, _only("group", "F.group_norm")))


def providers(op: str) -> list[Provider]:
    return [*backends(op), compiled(op), *(Provider(name, run, unavailable=why) for name, run, why in PEERS)]


# -------------------------------------------------------------------------------------------------------------- cases
def _case(label, channels, frames, height, width, norm="rms", dtype=torch.bfloat16, suites=("full",), batch=1):
    return NormalizationCase("norm_act", label, dtype, suites, channels, frames, height, width, norm, batch)


_QUICK = dict(dtype=torch.float32, suites=("quick",))

CASES = [
    _case("rms, 96 channels, small", 96, 2, 20, 24, **_QUICK),
    _case("group, 64 channels, two small clips", 64, 2, 15, 24, "group", **_QUICK, batch=2),
    _case("rms, 96 channels, small, 16 bits", 96, 2, 20, 24, suites=("quick",)),
    _case("Wan 2.1, 480p, 96 channels", 96, 4, 480, 832),
    _case("Wan 2.1, 480p, 192 channels", 192, 4, 240, 416),
    _case("Wan 2.1, 480p, 384 channels", 384, 2, 120, 208),
    _case("Wan 2.2 encoder, 480p, 160 channels", 160, 4, 240, 416),
    _case("Wan 2.2 decoder, 720p, 1024 channels", 1024, 2, 88, 160),
    _case("Wan 2.1, 480p, 96 channels, float32", 96, 4, 480, 832, dtype=torch.float32),
    _case("CogVideoX encoder, 480p, 256 channels, groups", 256, 4, 240, 360, "group"),
    _case("HunyuanVideo, a tile, 128 channels, groups", 128, 17, 256, 256, "group"),
    _case("HunyuanVideo, a tile, 512 channels, groups", 512, 9, 128, 128, "group"),
]
