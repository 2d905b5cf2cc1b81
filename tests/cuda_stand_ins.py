"""Stand-ins for the launchers of sora_fast._C, on CPU memory: what a kernel reads and writes, from the same fields.

They are slow and say nothing about device code. They hold the Python side to its word: addresses, strides, sizes.
"""

import ctypes

import torch

from sora_fast.reference import convolution as reference
from sora_fast.reference.normalization import norm_act as reference_norm_act

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # NormActType of csrc/normalization.cuh
PADS = ("zeros", "replicate", "reflect")  # NormActPad


def at(address, shape, dtype=torch.bfloat16, strides=None):
    """A tensor over memory that another owns; ``strides`` in numbers."""
    if strides is None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def video(address, samples, frames, height, width, channels, stride=None, dtype=torch.bfloat16):
    """(B, C, T, H, W) of channels-last memory."""
    frame = height * width * channels
    strides = (frames * frame if stride is None else stride, frame, width * channels, channels, 1)
    return at(address, (samples, frames, height, width, channels), dtype, strides).movedim(-1, 1)


def norm_act(*, x, cache, weight, bias, y, cache_out, samples, frames, height, width, channels, cached, kept, front, left,
             right, top, bottom, space_pad, x_dtype, y_dtype, rms, silu, eps):
    x_dtype, y_dtype = DTYPES[x_dtype], DTYPES[y_dtype]
    seen = video(x, samples, frames, height, width, channels, dtype=x_dtype)
    numbers = lambda address: at(address, (channels,), torch.float32) if address else None
    h = reference_norm_act(seen.float(), numbers(weight), numbers(bias), norm="rms", groups=1, eps=eps,
                           act="silu" if silu else None).to(y_dtype) if rms else seen.to(y_dtype)
    earlier = video(cache, samples, cached, height, width, channels, dtype=y_dtype) if cached else h[:, :, :0]
    whole = torch.cat([earlier, h], 2)
    padded = reference.pad_space(whole[:, :, cached - front:], (left, right, top, bottom), PADS[space_pad])
    video(y, samples, front + frames, top + height + bottom, left + width + right, channels, dtype=y_dtype).copy_(padded)
    if cache_out:
        video(cache_out, samples, kept, height, width, channels, dtype=y_dtype).copy_(whole[:, :, cached + frames - kept:])


def causal_conv3d(*, x, cache, weight, bias, residual, y, samples, frames, height, width, in_channels, cached, x_stride,
                  cache_stride, out_frames, out_height, out_width, out_channels, kt, kh, kw, stride_t, phase, lookahead, top,
                  left, replicate):
    size = (height, width, in_channels)
    earlier = video(cache, samples, cached, *size, cache_stride) if cached else None
    taps = at(weight, (out_channels, kt, kh, kw, in_channels)).movedim(-1, 1)
    padding = (left, out_width - 1 + kw - width - left, top, out_height - 1 + kh - height - top)
    made = reference.causal_conv3d(
        video(x, samples, frames, *size, x_stride).double(), taps.double(), stride=(stride_t, 1, 1), padding=padding,
        cache=None if earlier is None else earlier.double(), phase=phase, lookahead=lookahead,
        time_pad="replicate" if replicate else "zeros")
    out = lambda address: video(address, samples, out_frames, out_height, out_width, out_channels)
    if bias:
        made = made + at(bias, (out_channels,), torch.float32)[:, None, None, None]
    if residual:
        made = made + out(residual).double()
    out(y).copy_(made)


def launch(name, like, **fields):
    """In the place of sora_fast.ops.cuda_backend.launch: tensors become addresses, and no GPU is asked."""
    held = {key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
    {"norm_act": norm_act, "causal_conv3d": causal_conv3d}[name](**held)
