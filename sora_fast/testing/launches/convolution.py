"""Launches of the convolution: channels of models, with each architecture's own tiles."""

from functools import partial

import torch

from ... import ops
from ...kernels.convolution import dgrad, forward, wgrad
from ...kernels.convolution_config import HEURISTICS, Launch, covered
from ...kernels.convolution_settings import ConvSettings
from ...kernels.launch import dense


def _configs(in_channels, out_channels, dtype, gpu, kernel=(3, 3, 3), cached=0, **changes):
    """The settings and each kernel's Config."""
    _, kh, kw = kernel
    around = (kw // 2, kw // 2, kh // 2, kh // 2)
    settings = ConvSettings(**dict(kernel=kernel, stride=(1, 1, 1), padding=around, time_pad="zeros", space_pad="zeros",
                                   phase=0, lookahead=0, upsample=1) | changes)
    launch = Launch(in_channels, out_channels, kernel, settings.stride, settings.upsample, settings.space_pad, dtype)
    return settings, {name: heuristic(launch, gpu) for name, heuristic in HEURISTICS.items()}


def padding_share(made: int, summed: int, tile: int, block: int) -> float:
    """Share of the matrix work that is on channels which do not exist: ``made`` x ``summed``, in ``tile`` x ``block``."""
    return 1 - made * summed / (covered(made, tile) * covered(summed, block))


def padding(in_channels, out_channels, dtype, gpu, settings) -> float:
    """The largest share of the three kernels' matrix work that is on channels which do not exist."""
    _, config = _configs(in_channels, out_channels, dtype, gpu, **settings)
    forward, dgrad, wgrad = config["forward"], config["dgrad"], config["wgrad"]
    return max(padding_share(out_channels, in_channels, forward.channels + forward.extra, forward.block_k),
               padding_share(in_channels, out_channels, dgrad.channels + dgrad.extra, dgrad.block_k),
               padding_share(out_channels, in_channels, wgrad.out_channels + wgrad.extra_out,
                             wgrad.in_channels + wgrad.extra_in))


def run(in_channels, out_channels, dtype, gpu, cached=0, batch=1, size=(4, 32, 32), kernels=("forward", "dgrad", "wgrad"),
        **changes):
    """Forward, dgrad and wgrad on tensors without memory; ``size``: frames, height, width."""
    settings, config = _configs(in_channels, out_channels, dtype, gpu, **changes)
    make = lambda *shape: dense(torch.empty(shape, dtype=dtype, device="meta"))
    x, weight, dy = make(batch, in_channels, *size), make(out_channels, in_channels, *settings.kernel), make(
        batch, out_channels, *settings.out_sizes(*size))
    cache, bias = make(batch, in_channels, cached, *size[1:]), torch.empty(out_channels, dtype=dtype, device="meta")
    calls = dict(forward=partial(forward, x, weight, bias, cache, dy, settings),
                 dgrad=partial(dgrad, dy, weight, cache if cached else None, x.shape, cached, settings, want_x=True,
                               want_cache=True),
                 wgrad=partial(wgrad, dy, x, cache, weight, settings))
    for kernel in kernels:
        calls[kernel](tf32=False, config=config[kernel])


def aot_cases():
    bf16, f32 = torch.bfloat16, torch.float32
    gpus = {"sm80": (80,), "sm86": (86, 89), "sm90": (90,), "sm100": (100,), "sm120": (120,)}
    everywhere = [(96, 96, bf16, {}), (128, 128, bf16, dict(cached=2)), (160, 160, bf16, {}), (192, 192, bf16, {}),
                  (384, 384, bf16, dict(cached=2))]
    more = [(96, 96, f32, {}), (256, 256, torch.float16, {}), (384, 768, bf16, dict(kernel=(3, 1, 1), cached=2)),
            (192, 96, bf16, dict(kernel=(1, 3, 3), upsample=2)), (192, 192, bf16, dict(kernel=(1, 3, 3), stride=(1, 2, 2))),
            (128, 128, bf16, dict(time_pad="replicate", space_pad="replicate")), (16, 384, bf16, {}), (3, 96, bf16, {}),
            (96, 3, bf16, {})]
    for in_channels, out_channels, dtype, settings in everywhere + more:
        for gpu, ccs in gpus.items():
            if (in_channels, out_channels, dtype, settings) not in everywhere:
                if gpu not in ("sm80", "sm90"):
                    continue
            large = min(in_channels, out_channels) >= 64
            wants = dict(ccs=ccs, wants_wide=large)
            if dtype != f32:
                wants |= dict(wants_matrix=True)
            if dtype != f32 and gpu == "sm90" and large:
                wants |= dict(expected_drains=0, wants_shared=True)
            if gpu == "sm120":
                # ptxas 12.8 (Triton 3.6) stores a 0 beside each of the 6 loads by TMA and reads none again
                wants |= dict(tma_kernel=dict(allowed_spills=6))
            options = [f"{name} {value}" for name, value in settings.items()]
            yield (", ".join([f"{in_channels} to {out_channels} {str(dtype).removeprefix('torch.')}", *options, gpu,
                              f"padding {padding(in_channels, out_channels, dtype, gpu, settings):.0%}"]),
                   partial(run, in_channels, out_channels, dtype, gpu, **settings), wants)


def cuda_cases():
    """Of csrc's kernels: names, and calls on CPU tensors whose numbers are never read."""
    def call(in_channels, out_channels):
        x = dense(torch.empty(1, in_channels, 4, 32, 32, dtype=torch.bfloat16, device="cpu"))
        ops.causal_conv3d(x, x.new_empty(out_channels, in_channels, 3, 3, 3), backend="cuda")

    for in_channels, out_channels in ((96, 96), (128, 128), (160, 160), (192, 192), (384, 384), (256, 256)):
        yield f"{in_channels} to {out_channels} bfloat16", partial(call, in_channels, out_channels)
