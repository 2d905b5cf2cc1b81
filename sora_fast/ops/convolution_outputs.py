"""What the convolution's kernel backends share: the schema of their forwards, and its fake implementation."""

import functools

import torch

from ..kernels.convolution_settings import ConvSettings
from ..reference import convolution as reference
from .operators import video

TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? cache"
NORM = "Tensor? norm_weight, Tensor? norm_bias"
FORWARD = f"({TENSORS}, Tensor? residual, {NORM}, {ConvSettings.SCHEMA}) -> Tensor[]"


@functools.lru_cache(maxsize=1024)
def _settings(*values) -> ConvSettings:
    return ConvSettings(*values)


def settings_of(weight, stride, padding, *others) -> ConvSettings:
    """``ConvSettings.of`` a launch's arguments, which come again and again."""
    return _settings(tuple(weight.shape[2:]), tuple(stride), tuple(padding), *others)


def fake_forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings):
    """[y], then cache_out if ``keep``, then the statistics of a group norm."""
    s = ConvSettings.of(weight, *settings)
    batch, channels, frames, height, width = x.shape
    made = [video(x, weight.dtype, batch, weight.shape[0], *s.out_sizes(frames, height, width))]
    if s.keep:
        seen = frames + (0 if cache is None else cache.shape[2])
        if s.norm is None:
            made.append(reference.next_cache(x, cache, s.keep))
        else:
            made.append(video(x, weight.dtype, batch, channels, min(seen, s.keep), height, width))
    if s.norm == "group":
        made.append(x.new_empty((2, batch, s.groups), dtype=torch.float32))
    return made
