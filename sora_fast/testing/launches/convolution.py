"""Launches of the convolution: channels of models, with each architecture's own tiles."""

from functools import partial

import torch

from ...kernels.convolution import Geometry, dgrad, forward, wgrad
from ...kernels.convolution_config import HEURISTICS, Launch, covered
from ...kernels.launch import dense


def _configs(inputs, outputs, dtype, gpu, kernel=(3, 3, 3), cached=0, **settings):
    """The geometry and each kernel's Config."""
    _, kh, kw = kernel
    padding = (kw // 2, kw // 2, kh // 2, kh // 2)
    geometry = Geometry(**dict(kernel=kernel, stride=(1, 1, 1), padding=padding, time_pad="zeros", space_pad="zeros",
                               phase=0, lookahead=0, upsample=1) | settings)
    launch = Launch(inputs, outputs, kernel, geometry.stride, geometry.upsample, geometry.space_pad, dtype)
    return geometry, {name: heuristic(launch, gpu) for name, heuristic in HEURISTICS.items()}


def padding_share(made: int, summed: int, tile: int, block: int) -> float:
    """Share of the matrix work that is on channels which do not exist: ``made`` x ``summed``, in ``tile`` x ``block``."""
    return 1 - made * summed / (covered(made, tile) * covered(summed, block))


def padding(inputs, outputs, dtype, gpu, settings) -> float:
    """The largest share of the three kernels' matrix work that is on channels which do not exist."""
    _, config = _configs(inputs, outputs, dtype, gpu, **settings)
    forward, dgrad, wgrad = config["forward"], config["dgrad"], config["wgrad"]
    return max(padding_share(outputs, inputs, forward.channels + forward.more, forward.block_k),
               padding_share(inputs, outputs, dgrad.channels + dgrad.more, dgrad.block_k),
               padding_share(outputs, inputs, wgrad.outputs, wgrad.inputs + wgrad.more))


def _all(inputs, outputs, dtype, gpu, cached=0, **settings):
    """Forward, dgrad and wgrad of 4 frames of 32 x 32 on tensors without memory."""
    geometry, config = _configs(inputs, outputs, dtype, gpu, **settings)
    make = lambda *shape: dense(torch.empty(shape, dtype=dtype, device="meta"))
    x, weight = make(1, inputs, 4, 32, 32), make(outputs, inputs, *geometry.kernel)
    cache, bias = make(1, inputs, cached, 32, 32), torch.empty(outputs, dtype=dtype, device="meta")
    y = forward(x, weight, bias, cache, make(1, outputs, *geometry.out_sizes(4, 32, 32)), geometry, tf32=False,
                config=config["forward"])
    dgrad(y, weight, cache if cached else None, x.shape, cached, geometry, want_x=True, want_cache=True, tf32=False,
          config=config["dgrad"])
    wgrad(y, x, cache, weight, geometry, tf32=False, config=config["wgrad"])


def aot_cases():
    bf16, f32 = torch.bfloat16, torch.float32
    gpus = {"sm80": (80,), "sm86": (86, 89), "sm90": (90,), "sm100": (100,), "sm120": (120,)}
    everywhere = [(96, 96, bf16, {}), (128, 128, bf16, dict(cached=2)), (160, 160, bf16, {}), (192, 192, bf16, {}),
                  (384, 384, bf16, dict(cached=2))]
    more = [(96, 96, f32, {}), (256, 256, torch.float16, {}), (384, 768, bf16, dict(kernel=(3, 1, 1), cached=2)),
            (192, 96, bf16, dict(kernel=(1, 3, 3), upsample=2)), (192, 192, bf16, dict(kernel=(1, 3, 3), stride=(1, 2, 2))),
            (128, 128, bf16, dict(time_pad="replicate", space_pad="replicate")), (16, 384, bf16, {}), (3, 96, bf16, {}),
            (96, 3, bf16, {})]
    for inputs, outputs, dtype, settings in everywhere + more:
        for gpu, ccs in gpus.items():
            if (inputs, outputs, dtype, settings) not in everywhere:
                if gpu not in ("sm80", "sm90"):
                    continue
            large = min(inputs, outputs) >= 64
            wants = dict(ccs=ccs, wants_wide=large)
            if dtype != f32:
                wants |= dict(wants_matrix=True)
            if dtype != f32 and gpu == "sm90" and large:
                wants |= dict(expected_drains=0, wants_shared=True)
            if gpu == "sm120":
                # ptxas 12.8 (Triton 3.6) stores a 0 beside each of the 6 loads by TMA and reads none again
                wants |= dict(box_kernel=dict(allowed_spills=6))
            options = [f"{name} {value}" for name, value in settings.items()]
            yield (", ".join([f"{inputs} to {outputs} {str(dtype).removeprefix('torch.')}", *options, gpu,
                              f"padding {padding(inputs, outputs, dtype, gpu, settings):.0%}"]),
                   partial(_all, inputs, outputs, dtype, gpu, **settings), wants)
