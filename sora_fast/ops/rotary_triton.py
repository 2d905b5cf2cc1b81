"""Backend "triton" of qk_norm_rope."""

import functools
from functools import partial

import torch

from .. import checks, configs
from ..dispatch import Backend
from ..first_order import opaque
from ..to_device import outside_pools
from . import operators, triton_backend

MAX_WIDTH = 8192  # elements of all heads of a token, which a program holds in registers
_TENSORS = ("q", "k", "q_weight", "k_weight", "q_bias", "k_bias", "freqs")  # those with gradients, in the kernels' order


@functools.cache
def _kernels():
    """Imported at the first launch: they need Triton, which need not be there."""
    from ..kernels import rotary

    return rotary


def _config_of_call(direction, q, k, q_weight, k_weight, q_bias, k_bias, coords, freqs, norm, pairing):
    there = k if q is None else q
    turned = None if coords is None else "fixed" if freqs is None else "learned"
    affine = not (q_weight is None and k_weight is None and q_bias is None and k_bias is None)
    return triton_backend.config("rotary", direction, there.device, heads=0 if q is None else q.shape[1],
                                 key_heads=0 if k is None else k.shape[1], head_dim=there.shape[2],
                                 tokens=configs.bucket(there.shape[0]), dtype=there.dtype, norm=norm, affine=affine,
                                 freqs=turned, pairing=pairing).config


def _typical_config(problem) -> configs.Found:
    turned = None if not problem.rotated else "learned" if problem.learned else "fixed"
    return triton_backend.config("rotary", "forward", problem.device, heads=problem.heads, key_heads=problem.key_heads,
                                 head_dim=problem.head_dim, tokens=32768, dtype=problem.dtype, norm=problem.norm,
                                 affine=problem.affine, freqs=turned, pairing=problem.pairing)


def _table(coords, freqs, axes, theta):
    """Frequencies for the kernels: the learned ones, or a table of fixed ones."""
    if coords is None or freqs is not None:
        return freqs
    return _fixed(tuple(axes), tuple(theta), coords.device)


@functools.cache
@torch.inference_mode(False)  # an ordinary tensor: it is cached, and a later backward may use it
def _fixed(axes: tuple[int, ...], theta: tuple[float, ...], device: torch.device) -> torch.Tensor:
    make = partial(_kernels().frequencies, axes, theta, device)
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("qk_norm_rope: expected axes and theta that were used once before a CUDA graph is captured, got "
                           "new ones; make the call once before the capture")
    return outside_pools(make)


def _forward(q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, norm, axes, theta, pairing, eps):
    config = _config_of_call("forward", q, k, q_weight, k_weight, q_bias, k_bias, coords, freqs, norm, pairing)
    outputs = _kernels().forward(q, k, coords, q_weight, k_weight, q_bias, k_bias, _table(coords, freqs, axes, theta), rows,
                                 norm=norm, pairing=pairing, eps=eps, config=config)
    return [t for t in outputs if t is not None]


def _fake_forward(q, k, *settings):
    return [t.new_empty(t.shape) for t in (q, k) if t is not None]


def _backward(d_q, d_k, q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, norm, axes, theta, pairing, eps,
              wanted):
    config = _config_of_call("backward", d_q, d_k, q_weight, k_weight, q_bias, k_bias, coords, freqs, norm, pairing)
    found = _kernels().backward(d_q, d_k, q, k, coords, q_weight, k_weight, q_bias, k_bias,
                                _table(coords, freqs, axes, theta), rows, norm=norm, pairing=pairing, eps=eps, wanted=wanted,
                                config=config)
    return [t for t in found if t is not None]


def _fake_backward(d_q, d_k, q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, norm, axes, theta, pairing, eps,
                   wanted):
    inputs = (d_q, d_k, q_weight, k_weight, q_bias, k_bias, freqs)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want]


_SETTINGS = ("Tensor? coords, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? freqs, "
             "Tensor? rows, str? norm, int[] axes, float[] theta, str pairing, float eps")
# Forward: q, and k if given. Backward: the wanted gradients of q, k, their weights, their biases and freqs.
_rotary_forward = operators.define(f"rotary_forward(Tensor q, Tensor? k, {_SETTINGS}) -> Tensor[]", _forward, _fake_forward)
_rotary_backward = operators.define(
    f"rotary_backward(Tensor? d_q, Tensor? d_k, Tensor? q, Tensor? k, {_SETTINGS}, bool[] wanted) -> Tensor[]",
    _backward, _fake_backward)


class _Rotary(torch.autograd.Function):
    """Saves q and k as given, strided views too, and no statistics; without norm and learned freqs not even q and k."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, q_bias, k_bias, freqs, coords, rows, norm, axes, theta, pairing, eps):
        affine = (q_weight, k_weight, q_bias, k_bias)
        outputs = _rotary_forward(q, k, coords, *affine, freqs, rows, norm, axes, theta, pairing, eps)
        needed = norm is not None or freqs is not None
        ctx.save_for_backward(*((q, k) if needed else (None, None)), coords, *affine, freqs, rows)
        ctx.settings = (norm, axes, theta, pairing, eps)
        ctx.set_materialize_grads(False)  # no zeros are made for unused outputs
        return tuple(outputs)

    @staticmethod
    @opaque
    def backward(ctx, d_q, d_k=None):
        wanted = list(ctx.needs_input_grad[:len(_TENSORS)])
        for place, name in enumerate(_TENSORS):
            d_out = {"q": d_q, "k": d_k}.get(name[0])  # freqs get a gradient from either
            wanted[place] = wanted[place] and (name == "freqs" or d_out is not None)
        gradients = [None] * len(_TENSORS)
        if any(wanted) and not (d_q is None and d_k is None):
            with torch.no_grad():
                found = iter(_rotary_backward(d_q, d_k, *ctx.saved_tensors, *ctx.settings, wanted))
            gradients = [next(found) if want else None for want in wanted]
        return (*gradients, *[None] * 7)


def _run(q, k, coords, *, q_weight, k_weight, q_bias, k_bias, norm, axes, theta, freqs, pairing, eps, rows, tail):
    rotated = 0 if coords is None else sum(axes) if freqs is None else 2 * freqs.shape[-1]
    if rotated == 0:
        coords = freqs = None
    bases = theta if isinstance(theta, (tuple, list)) else (theta,) * 3
    axes, bases = ([], []) if coords is None or freqs is not None else (list(axes), [float(base) for base in bases])
    tensors = triton_backend.distinct((q, k, q_weight, k_weight, q_bias, k_bias, freqs, coords, rows))
    outputs = triton_backend.apply(_Rotary, *tensors, norm, axes, bases, pairing, eps)
    return outputs[0], outputs[1] if k is not None else None


def _unsupported(problem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    heads = max(problem.heads, problem.key_heads)
    padded = configs.bucket(heads) * configs.bucket(problem.head_dim)
    if padded > MAX_WIDTH:
        reasons.append(f"Its kernels hold all heads of a token in registers, at most {MAX_WIDTH:,} elements, and "
                       f"{checks.shown(heads)} heads of {checks.shown(problem.head_dim)} are {checks.shown(padded)}, both "
                       f"rounded up to powers of two.")
    if problem.moves:
        reasons.append("Its kernels give coords no gradient; pass coords.detach() if none is needed.")
    return reasons


QK_NORM_ROPE = Backend("triton", _run, _unsupported, kernel="rotary", config=_typical_config)
