"""Backend "triton" of varlen_attention and of its raw forward and backward."""

import functools
from functools import partial

import torch

from .. import configs
from ..dispatch import Backend, Problem
from ..first_order import opaque
from ..kernels import arch
from ..precision import tf32_products
from . import operators, triton_backend


@functools.cache
def _kernels():
    """Imported at the first launch: they need Triton, which need not be there."""
    from ..kernels import attention

    return attention


def _config_of_call(kernel, q, k, causal, left, right):
    return triton_backend.config("attention", kernel, q.device, q.shape[2], q.dtype, q.shape[1] // k.shape[1],
                                 causal or left >= 0 or right >= 0).config


def _typical_config(problem) -> configs.Found:
    return triton_backend.config("attention", "forward", problem.device, problem.head_dim, problem.dtype,
                                 problem.heads // problem.key_heads, problem.causal or max(problem.window) >= 0)


def _options(q, softmax_scale, causal, left, right):
    return dict(scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale, causal=causal, window=(left, right),
                tf32=tf32_products())


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, left, right):
    config = _config_of_call("forward", q, k, causal, left, right)
    outputs = _kernels().forward(q, k, v, cu_seqlens_q, cu_seqlens_k, config=config,
                                 **_options(q, softmax_scale, causal, left, right))
    return [t for t in outputs if t is not None]


def _fake_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, left, right):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return [q.new_empty(q.shape), lse, *([lse.new_empty((2, *lse.shape))] if q.dtype == torch.float32 else [])]


def _backward(dout, dlse, q, k, v, out, lse, stats, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, left, right):
    dq, dkdv = (_config_of_call(kernel, q, k, causal, left, right) for kernel in ("dq", "dkdv"))
    return _kernels().backward(dout, dlse, q, k, v, out, lse, stats, cu_seqlens_q, cu_seqlens_k, dq_config=dq,
                               dkdv_config=dkdv, **_options(q, softmax_scale, causal, left, right))


def _fake_backward(dout, dlse, q, k, v, *arguments):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_PACK = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float? softmax_scale, bool causal, int left, int right"
_attention_forward = operators.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_PACK}) -> Tensor[]", _forward, _fake_forward)
_attention_backward = operators.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? stats, {_PACK}) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, out and lse (4 bytes per head and query, 12 for float32 inputs); the backward recomputes the scores."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
        out, lse, *stats = _attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
        ctx.save_for_backward(q, k, v, out, lse, *(stats or [None]), cu_seqlens_q, cu_seqlens_k)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @opaque
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, stats, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        with torch.no_grad():
            dout = torch.zeros_like(out) if dout is None else dout
            found = _attention_backward(dout, dlse, q, k, v, out, lse, stats, cu_seqlens_q, cu_seqlens_k, *ctx.options)
        wanted = [gradient if want else None for gradient, want in zip(found, ctx.needs_input_grad, strict=False)]
        return (*wanted, *[None] * (2 + len(ctx.options)))


def _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal, window, return_lse, deterministic):
    tensors = triton_backend.distinct((q, k, v, cu_seqlens_q, cu_seqlens_k))
    out, lse = triton_backend.apply(_Attention, *tensors, softmax_scale, causal, *window)
    return (out, lse) if return_lse else out


@torch.no_grad()
def _varlen_attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal, window):
    outputs = _attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, *window)
    return outputs[0], outputs[1]


@torch.no_grad()
def _varlen_attention_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal, window,
                               deterministic):
    dlse = None if dlse is None else dlse.float()
    return _attention_backward(dout.to(q.dtype), dlse, q, k, v, out.to(q.dtype), lse.float(), None, cu_seqlens_q,
                               cu_seqlens_k, softmax_scale, causal, *window)


def _unsupported(problem: Problem, backward: bool = False) -> list[str]:
    reasons, gpu = triton_backend.unsupported(problem, problem.dtype), problem.device.partition(":")[2]
    if ((problem.grad or backward) and problem.dtype == torch.float32 and problem.head_dim > 192 and gpu
            and arch.is_small(gpu)):
        reasons.append(f"Its backward in float32 takes 160 KB of shared memory for head dims above 192; {gpu} has 99 KB.")
    return reasons


ATTENTION, FORWARD, BACKWARD = (
    Backend("triton", run, unsupported, kernel="attention", config=_typical_config)
    for run, unsupported in ((_varlen_attention, _unsupported), (_varlen_attention_forward, _unsupported),
                             (_varlen_attention_backward, partial(_unsupported, backward=True))))
