"""Backend "triton" of causal_conv3d and norm_act_conv3d."""

import functools

import torch

from .. import checks, configs
from ..dispatch import Backend, needs_grad
from ..first_order import opaque
from ..kernels.convolution_settings import ConvSettings
from ..precision import tf32_products
from ..reference import convolution as reference
from . import normalization_triton, operators, triton_backend
from .convolution_outputs import FORWARD, NORM, TENSORS, fake_forward, settings_of
from .operators import video


@functools.cache
def _kernels():
    """Imported at the first launch: they need Triton, which need not be there."""
    from ..kernels import convolution, norm_convolution

    return convolution, norm_convolution


def _config_of_call(kernel, weight, settings: ConvSettings):
    outputs, inputs = weight.shape[:2]
    return triton_backend.config("convolution", kernel, weight.device, inputs, outputs, settings.kernel, settings.stride,
                                 settings.upsample, settings.space_pad, weight.dtype).config


def _typical_config(problem) -> configs.Found:
    return triton_backend.config("convolution", "forward", problem.device, problem.in_channels, problem.out_channels,
                                 problem.kernel, problem.stride, problem.upsample, problem.space_pad, problem.dtype)


# ------------------------------------------------------------------------------------------------------------ the ops
def _forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings):
    """[y], then cache_out if ``keep``, then the statistics of a group norm."""
    convolution, norm_convolution = _kernels()
    s = settings_of(weight, *settings)
    common = dict(tf32=tf32_products(), config=_config_of_call("forward", weight, s))
    if s.norm is None:
        y = convolution.forward(x, weight, bias, cache, residual, s, **common)
        outputs = [y, reference.next_cache(x, cache, s.keep) if s.keep else None]
    else:
        norm_config = normalization_triton.config_of_call("forward", x, s.norm, s.act, weight.dtype)
        outputs = norm_convolution.forward(x, weight, bias, cache, residual, norm_weight, norm_bias, s,
                                           norm_config=norm_config, **common)
    return [t for t in outputs if t is not None]


def _backward(dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *settings):
    """Those gradients of (x, weight, bias, cache, norm_weight, norm_bias) that are ``wanted``."""
    convolution, norm_convolution = _kernels()
    s = settings_of(weight, *settings)
    want_x, want_weight, want_bias, want_cache, want_norm_weight, want_norm_bias = wanted
    dgrad, wgrad = (_config_of_call(kernel, weight, s) for kernel in ("dgrad", "wgrad"))
    cached = 0 if cache is None else cache.shape[2]
    if s.norm is None:
        dx = dcache = dweight = None
        if want_x or want_cache:
            dx, dcache = convolution.dgrad(dy, weight, dcache_out, x.shape, cached, s, want_x=want_x,
                                           want_cache=want_cache, tf32=tf32_products(), config=dgrad)
        if want_weight:
            dweight = convolution.wgrad(dy, x, cache, weight, s, tf32=tf32_products(), config=wgrad)
        of_norm = (None, None)
    else:
        dx, dweight, dcache, *of_norm = norm_convolution.backward(
            dy, dcache_out, x, weight, cache, norm_weight, norm_bias, stats, s,
            wanted=(want_x, want_weight, want_cache, want_norm_weight, want_norm_bias), tf32=tf32_products(),
            norm_config=normalization_triton.config_of_call("forward", x, s.norm, s.act, weight.dtype),
            norm_backward_config=normalization_triton.config_of_call("backward", x, s.norm, s.act, weight.dtype),
            dgrad_config=dgrad, wgrad_config=wgrad)
    dbias = dy.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype) if want_bias else None
    if want_cache and cached == 0:
        dcache = cache.new_zeros(cache.shape)
    return [t for t in (dx, dweight, dbias, dcache, *of_norm) if t is not None]


def _fake_backward(dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *settings):
    like = lambda t: video(t, t.dtype, *t.shape)
    outputs = (lambda: like(x), lambda: like(weight), lambda: bias.new_empty(bias.shape),
               lambda: like(cache), lambda: norm_weight.new_empty(norm_weight.shape),
               lambda: norm_bias.new_empty(norm_bias.shape))
    return [make() for make, want in zip(outputs, wanted, strict=True) if want]


_convolution_forward = operators.define(f"convolution_forward{FORWARD}", _forward, fake_forward)
_convolution_backward = operators.define(
    f"convolution_backward(Tensor dy, Tensor? dcache_out, {TENSORS}, {NORM}, Tensor? stats, bool[] wanted, "
    f"{ConvSettings.SCHEMA}) -> Tensor[]", _backward, _fake_backward)


class _Convolution(torch.autograd.Function):
    """Saves x as it is before the norm, the group statistics and the other inputs; nothing else of x's size."""

    @staticmethod
    def forward(ctx, x, weight, bias, cache, residual, norm_weight, norm_bias, save, settings):
        outputs = _convolution_forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings.values)
        stats = outputs.pop() if settings.norm == "group" else None
        if save:
            ctx.save_for_backward(x, weight, bias, cache, norm_weight, norm_bias, stats)
            ctx.settings, ctx.shape = settings, outputs[0].shape
            ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @opaque
    def backward(ctx, dy, dcache_out=None):
        x, weight, bias, cache, norm_weight, norm_bias, stats = ctx.saved_tensors
        need_x, need_weight, need_bias, need_cache, need_residual, *need_norm = ctx.needs_input_grad[:7]
        wanted = [need_x, need_weight, need_bias, need_cache, *need_norm]
        given = dy
        if dy is None:  # only cache_out was used
            dy = weight.new_zeros(ctx.shape)
        with torch.no_grad():
            found = iter(_convolution_backward(
                dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *ctx.settings.values))
        dx, dweight, dbias, dcache, *of_norm = [next(found) if want else None for want in wanted]
        return dx, dweight, dbias, dcache, given if need_residual else None, *of_norm, None, None


def _run(settings: ConvSettings, *, x, weight, bias, cache, residual, norm_weight=None, norm_bias=None):
    tensors = (x, weight, bias, cache, residual, norm_weight, norm_bias)
    outputs = triton_backend.apply(_Convolution, *triton_backend.distinct(tensors), needs_grad(*tensors), settings)
    if settings.return_cache and settings.keep == 0:  # a kernel of one frame has no cache
        return outputs[0], x[:, :, :0].to(weight.dtype).clone()
    return outputs if settings.return_cache else outputs[0]


def _unsupported(problem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    if problem.norm and problem.in_channels > normalization_triton.MAX_WIDTH:
        reasons.append("Its norms hold all channels of a pixel in registers, at most "
                       f"{normalization_triton.MAX_WIDTH:,}, and x has {checks.shown(problem.in_channels)}.")
    return reasons


CAUSAL_CONV3D = Backend("triton", _run, _unsupported, kernel="convolution", config=_typical_config)
NORM_ACT_CONV3D = Backend("triton", _run, _unsupported, kernel="norm_convolution", config=_typical_config)
