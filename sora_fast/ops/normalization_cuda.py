"""Backend "cuda" of norm_act, which also produces the input of the CUDA convolution."""

import torch

from .. import checks
from ..dispatch import Backend
from ..kernels.launch import dense
from . import cuda_backend, operators
from .operators import video

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/normalization.cuh
PADS = ("zeros", "replicate", "reflect")
MAX_CHANNELS = 1024


def launch(x, weight, bias, *, norm, eps, act, dtype, cache=None, keep=0, front=0, padding=(0, 0, 0, 0), space_pad="zeros"):
    """``(y, cache_out)``: x (B, C, T, H, W) after norm and act in ``dtype``, with its padding. Outside autograd.

    Args:
        norm: "rms", or None: x is copied. cache: (B, C, n, H, W) in ``dtype``, already normalised, the frames before x.
        keep: frames of cache_out, the last ones of cache and y; 0: None. front: 0, or n to prepend the cached frames to y.
        padding: (left, right, top, bottom) around every frame of y.

    Workspace: float32 copies of weight and bias, and of an x of another 16-bit dtype, which is then rounded only once.
    """
    batch, channels, frames, height, width = x.shape
    left, right, top, bottom = padding
    cached = 0 if cache is None else cache.shape[2]
    y = video(x, dtype, batch, channels, front + frames, top + height + bottom, left + width + right)
    cache_out = video(x, dtype, batch, channels, min(keep, cached + frames), height, width) if keep else None
    if y.numel() or cache_out is not None and cache_out.numel():
        x = dense(x if x.dtype in (torch.float32, dtype) else x.float())
        to_float32 = lambda vector: None if vector is None else vector.float().contiguous()
        cuda_backend.launch(
            "norm_act", y, x=x, cache=dense(cache) if cached else None, weight=to_float32(weight), bias=to_float32(bias),
            y=y, cache_out=cache_out, samples=batch, frames=frames, height=height, width=width, channels=channels,
            cached=cached, kept=0 if cache_out is None else cache_out.shape[2], front=front, left=left, right=right, top=top,
            bottom=bottom, space_pad=PADS.index(space_pad), x_dtype=DTYPES.index(x.dtype), y_dtype=DTYPES.index(dtype),
            rms=norm == "rms", silu=act == "silu", eps=eps)
    return y, cache_out


def _forward(x, weight, bias, eps, act):
    return launch(x, weight, bias, norm="rms", eps=eps, act=act, dtype=x.dtype)[0]


def _fake_forward(x, weight, bias, eps, act):
    return video(x, x.dtype, *x.shape)


_norm_act_cuda_forward = operators.define(
    "norm_act_cuda_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, str? act) -> Tensor",
    _forward, _fake_forward)


def _run(x, weight=None, bias=None, *, norm, groups, eps, act):
    return _norm_act_cuda_forward(x, weight, bias, eps, act)


def unsupported(norm: str | None, channels: int, dtype: torch.dtype) -> list[str]:
    """Reasons why the kernel does not support a norm."""
    reasons = []
    if norm not in (None, "rms"):
        reasons.append(f"Its norm is rms, and not {norm}.")
    vector = 4 if dtype == torch.float32 else 8
    if channels % vector or not 0 < channels <= MAX_CHANNELS:
        reasons.append(f"Its kernel takes multiples of {vector} channels up to {MAX_CHANNELS:,} in "
                       f"{str(dtype).removeprefix('torch.')}, and x has {checks.shown(channels)}.")
    return reasons


def _unsupported(problem) -> list[str]:
    reasons = cuda_backend.unsupported(problem, "normalization", problem.wide)
    if problem.wide != torch.float64 and problem.dtype not in DTYPES:
        reasons.append(f"Its kernel takes float32, bfloat16 and float16, and not "
                       f"{str(problem.dtype).removeprefix('torch.')}.")
    return reasons + unsupported(problem.norm, problem.channels, problem.dtype)


NORM_ACT = Backend("cuda", _run, _unsupported, kernel="normalization")
