"""What the kernel backends of the convolutions share: the settings of a call, and the outputs that it makes."""

from dataclasses import dataclass

import torch

from ..reference import convolution as reference


def out_sizes(kernel, stride, padding, phase, upsample, frames, height, width) -> tuple[int, int, int]:
    """T', H', W' of the output of a clip of T, H, W."""
    left, right, top, bottom = padding
    (_, kh, kw), (st, sh, sw) = kernel, stride
    return (max(0, -(-(frames - phase) // st)), (upsample * height + top + bottom - kh) // sh + 1,
            (upsample * width + left + right - kw) // sw + 1)


@dataclass(frozen=True)
class Settings:
    """What of a call is no tensor, in the order of SCHEMA."""

    norm: str | None
    groups: int
    eps: float
    act: str | None
    keep: int  # frames of cache_out; 0: it is not wanted
    stride: tuple[int, int, int]
    padding: tuple[int, int, int, int]
    time_pad: str
    space_pad: str
    phase: int
    lookahead: int
    upsample: int

    def values(self) -> tuple:
        # each by its name: torch.compile of PyTorch 2.11 does not go through vars()
        return (self.norm, self.groups, self.eps, self.act, self.keep, self.stride, self.padding, self.time_pad,
                self.space_pad, self.phase, self.lookahead, self.upsample)

    @property
    def of_norm(self) -> dict:
        return dict(norm=self.norm, groups=self.groups, eps=self.eps, act=self.act)

    def out_sizes(self, weight, x) -> tuple[int, int, int]:
        return out_sizes(weight.shape[2:], self.stride, self.padding, self.phase, self.upsample, *x.shape[2:])


SCHEMA = ("str? norm, int groups, float eps, str? act, int keep, int[] stride, int[] padding, str time_pad, "
          "str space_pad, SymInt phase, int lookahead, int upsample")
TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? cache"
NORM = "Tensor? norm_weight, Tensor? norm_bias"


def video(like, dtype, batch, channels, *sizes):
    """An empty (B, C, T, H, W) in channels_last_3d memory."""
    return like.new_empty((batch, *sizes, channels), dtype=dtype).permute(0, 4, 1, 2, 3)


def fake_forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings):
    """[y], then cache_out where ``keep``, then the statistics of a group norm, without numbers."""
    s = Settings(*settings)
    batch, channels, frames, height, width = x.shape
    made = [video(x, weight.dtype, batch, weight.shape[0], *s.out_sizes(weight, x))]
    if s.keep:
        seen = frames + (0 if cache is None else cache.shape[2])
        if s.norm is None:
            made.append(reference.next_cache(x, cache, s.keep))
        else:
            made.append(video(x, weight.dtype, batch, channels, min(seen, s.keep), height, width))
    if s.norm == "group":
        made.append(x.new_empty((2, batch, s.groups), dtype=torch.float32))
    return made
