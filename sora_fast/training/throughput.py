"""How much of a device a run uses: floating-point operations of a token, and the rate of the device.

Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B) is the work that the model asks for, over what the device
could do in that time. Tail tokens and recomputed activations are no work of the model.
"""

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod

import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ..precision import emulated_on_cpu

SIDE = {"cuda": 8192, "cpu": 768}  # of the matrices that are multiplied: 1.1 TFLOP and 0.9 GFLOP a product
SECONDS = 0.15


def count(compute: Callable[[], torch.Tensor], recomputed: Sequence[nn.Module] = ()) -> tuple[torch.Tensor, float]:
    """The loss of ``compute()`` after its backward, and the FLOPs of both.

    Args:
        recomputed: modules whose forward the backward makes again (gradient checkpointing), which is not counted.

    Counted are matrix products, convolutions and attention: ATen's, and our Triton kernels'. Attention kernels of other
    packages are not seen.
    """
    _ours()
    again, began = [], []
    with FlopCounterMode(display=False) as counter, ExitStack() as hooks:
        for module in recomputed:
            hooks.callback(module.register_forward_pre_hook(
                lambda *_: began.append(counter.get_total_flops())).remove)
            hooks.callback(module.register_forward_hook(
                lambda *_: again.append(counter.get_total_flops() - began.pop())).remove)
        with set_checkpoint_early_stop(False):  # so that the backward makes all of a forward again, neither more nor less
            loss = compute()
        twice = sum(again)
        loss.backward()
        return loss, float(counter.get_total_flops() - twice)


@functools.cache
def _ours() -> None:
    """Formulas for the ops of our Triton backends that multiply matrices."""
    from .. import ops  # noqa: F401 (defines them)

    ours = torch.ops.sora_fast
    register_flop_formula(ours.attention_forward, get_raw=True)(attention_forward)
    register_flop_formula(ours.attention_backward, get_raw=True)(attention_backward)
    register_flop_formula(ours.convolution_forward)(convolution_forward)
    register_flop_formula(ours.convolution_backward)(convolution_backward)
    register_flop_formula(ours.patch_embed_forward)(patch_embed_forward)
    register_flop_formula(ours.patch_embed_backward)(patch_embed_backward)


def _pairs(cu_seqlens_q, cu_seqlens_k) -> int:
    return int((cu_seqlens_q.long().diff() * cu_seqlens_k.long().diff()).sum())


def attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, out_val=None, **kwargs) -> int:
    """Two products over the pairs of each sample; windows and causal masks are counted as if open."""
    return 4 * q.shape[1] * q.shape[2] * _pairs(cu_seqlens_q, cu_seqlens_k)


def attention_backward(dout, dlse, q, k, v, out, lse, parts, cu_seqlens_q, cu_seqlens_k, *options, out_val=None,
                       **kwargs) -> int:
    """Four products; the scores, which the kernel makes again, are recomputation."""
    return 8 * q.shape[1] * q.shape[2] * _pairs(cu_seqlens_q, cu_seqlens_k)


def convolution_forward(x, weight, *arguments, out_shape=None, **kwargs) -> int:
    out = out_shape[0]
    return 2 * out[0] * prod(out[2:]) * prod(weight)


def convolution_backward(dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *settings,
                         out_shape=None, **kwargs) -> int:
    """One product for each of the gradients of x and of the weight."""
    return 2 * dy[0] * prod(dy[2:]) * prod(weight) * (bool(wanted[0]) + bool(wanted[1]))


def patch_embed_forward(latents, weight, *arguments, out_shape=None, **kwargs) -> int:
    return 2 * out_shape[0] * prod(weight)


def patch_embed_backward(d_out, latents, weight, grids, cu_seqlens, wanted, *arguments, out_shape=None, **kwargs) -> int:
    return 2 * d_out[0] * prod(weight) * (bool(wanted[0]) + bool(wanted[1]))


def pick_precision(name: str, device: torch.device) -> str:
    """"bf16" or "fp32": "auto" is bfloat16 where the device has instructions for it, which is where it is fast."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and not emulated_on_cpu(torch.bfloat16)
    return "bf16" if fast else "fp32"


@functools.cache
def peak(device: torch.device, precision: str, threads: int) -> float:
    """FLOPs a second of a large matrix product on ``device`` with ``threads`` CPU threads; nan where it cannot be measured.

    In float32 for "fp32"; for "bf16" in bfloat16, or in float32 where that is faster (CPUs that only emulate it).
    """
    side = SIDE.get(device.type, 2048)
    dtypes = (torch.float32,) if precision == "fp32" else (torch.bfloat16, torch.float32)
    try:
        return max(_rate(side, dtype, device) for dtype in dtypes)
    except RuntimeError:  # no memory for it, or no such dtype
        return float("nan")


def _rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def wait():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)

    a @ b
    wait()
    start, best = time.perf_counter(), 0.0
    while time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best
