"""Backend "triton" of causal_conv3d and norm_act_conv3d."""

import torch

from .. import checks, configs
from ..dispatch import Backend, needs_grad
from ..reference import convolution as reference
from . import normalization, operators, triton_backend
from .convolution_call import NORM, SCHEMA, TENSORS, Settings, fake_forward, video


def _geometry(settings: Settings, weight):
    from ..kernels.convolution import Geometry  # imports Triton, which need not be there

    s = settings
    return Geometry(tuple(weight.shape[2:]), tuple(s.stride), tuple(s.padding), s.time_pad, s.space_pad, s.phase,
                    s.lookahead, s.upsample)


def _config_of_call(kernel, weight, settings):
    outputs, inputs, *size = weight.shape
    return triton_backend.config("convolution", kernel, weight.device, inputs, outputs, tuple(size), tuple(settings.stride),
                                 settings.upsample, settings.space_pad, weight.dtype).config


def _typical_config(problem) -> configs.Found:
    return triton_backend.config("convolution", "forward", problem.device, problem.in_channels, problem.out_channels,
                                 problem.kernel, problem.stride, problem.upsample, problem.space_pad, problem.dtype)


def _tf32() -> bool:
    # The switch of products, off unless asked for: cuDNN's own, for its convolutions, is on in PyTorch.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# ------------------------------------------------------------------------------------------------------------ the ops
def _forward(x, weight, bias, cache, residual, norm_weight, norm_bias, *settings):
    """[y], then cache_out where ``keep``, then the statistics of a group norm."""
    from ..kernels import convolution, norm_convolution

    s = Settings(*settings)
    common = dict(tf32=_tf32(), config=_config_of_call("forward", weight, s))
    if s.norm is None:
        y = convolution.forward(x, weight, bias, cache, residual, _geometry(s, weight), **common)
        made = [y, reference.next_cache(x, cache, s.keep) if s.keep else None]
    else:
        made = norm_convolution.forward(
            x, weight, bias, cache, residual, norm_weight, norm_bias, _geometry(s, weight), settings=s.of_norm, keep=s.keep,
            norm_config=normalization.config_of_call("forward", x, s.norm, s.act, weight.dtype), **common)
    return [t for t in made if t is not None]


def _backward(dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *settings):
    """The gradients that ``wanted`` asks for of (x, weight, bias, cache, norm_weight, norm_bias)."""
    from ..kernels import convolution, norm_convolution

    s = Settings(*settings)
    geometry = _geometry(s, weight)
    want_x, want_weight, want_bias, want_cache, want_norm_weight, want_norm_bias = wanted
    dgrad, wgrad = (_config_of_call(kernel, weight, s) for kernel in ("dgrad", "wgrad"))
    cached = 0 if cache is None else cache.shape[2]
    if s.norm is None:
        dx = dcache = dweight = None
        if want_x or want_cache:
            dx, dcache = convolution.dgrad(dy, weight, dcache_out, x.shape, cached, geometry, want_x=want_x,
                                           want_cache=want_cache, tf32=_tf32(), config=dgrad)
        if want_weight:
            dweight = convolution.wgrad(dy, x, cache, weight, geometry, tf32=_tf32(), config=wgrad)
        of_norm = (None, None)
    else:
        dx, dweight, dcache, *of_norm = norm_convolution.backward(
            dy, dcache_out, x, weight, cache, norm_weight, norm_bias, stats, geometry, settings=s.of_norm,
            wanted=(want_x, want_weight, want_cache, want_norm_weight, want_norm_bias), tf32=_tf32(),
            norm_config=normalization.config_of_call("forward", x, s.norm, s.act, weight.dtype),
            norm_backward_config=normalization.config_of_call("backward", x, s.norm, s.act, weight.dtype),
            dgrad_config=dgrad, wgrad_config=wgrad)
    dbias = dy.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype) if want_bias else None
    if want_cache and cached == 0:
        dcache = cache.new_zeros(cache.shape)
    return [t for t in (dx, dweight, dbias, dcache, *of_norm) if t is not None]


def _fake_backward(dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *settings):
    like = lambda t: video(t, t.dtype, *t.shape)
    made = (lambda: like(x), lambda: like(weight), lambda: bias.new_empty(bias.shape),
            lambda: like(cache), lambda: norm_weight.new_empty(norm_weight.shape),
            lambda: norm_bias.new_empty(norm_bias.shape))
    return [make() for make, want in zip(made, wanted, strict=True) if want]


operators.define(f"convolution_forward({TENSORS}, Tensor? residual, {NORM}, {SCHEMA}) -> Tensor[]", _forward,
                 fake_forward)
operators.define(f"convolution_backward(Tensor dy, Tensor? dcache_out, {TENSORS}, {NORM}, Tensor? stats, "
                 f"bool[] wanted, {SCHEMA}) -> Tensor[]", _backward, _fake_backward)


class _Convolution(torch.autograd.Function):
    """Saves x from before the norm, the group statistics and the inputs; nothing else of x's size."""

    @staticmethod
    def forward(ctx, x, weight, bias, cache, residual, norm_weight, norm_bias, save, settings):
        made = torch.ops.sora_fast.convolution_forward(x, weight, bias, cache, residual, norm_weight, norm_bias,
                                                       *settings.values())
        stats = made.pop() if settings.norm == "group" else None
        if save:
            ctx.save_for_backward(x, weight, bias, cache, norm_weight, norm_bias, stats)
            ctx.settings, ctx.shape = settings, made[0].shape
            ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx, dy, dcache_out=None):
        x, weight, bias, cache, norm_weight, norm_bias, stats = ctx.saved_tensors
        need_x, need_weight, need_bias, need_cache, need_residual, *need_norm = ctx.needs_input_grad[:7]
        wanted = [need_x, need_weight, need_bias, need_cache, *need_norm]
        given = dy
        if dy is None:  # only cache_out was used
            dy = weight.new_zeros(ctx.shape)
        with torch.no_grad():
            found = iter(torch.ops.sora_fast.convolution_backward(
                dy, dcache_out, x, weight, bias, cache, norm_weight, norm_bias, stats, wanted, *ctx.settings.values()))
        dx, dweight, dbias, dcache, *of_norm = [next(found) if want else None for want in wanted]
        return dx, dweight, dbias, dcache, given if need_residual else None, *of_norm, None, None


def _run(x, weight, bias, *, norm_weight=None, norm_bias=None, norm=None, groups=1, eps=0.0, act=None, cache, residual,
         return_cache, stride, padding, time_pad, space_pad, phase, lookahead, upsample):
    frames = weight.shape[2] - 1 if return_cache else 0
    settings = Settings(norm, groups, eps, act, frames, stride, tuple(padding), time_pad, space_pad, phase, lookahead,
                         upsample)
    tensors = (x, weight, bias, cache, residual, norm_weight, norm_bias)
    made = triton_backend.apply(_Convolution, *tensors, needs_grad(*tensors), settings)
    if return_cache and frames == 0:  # a kernel of one frame remembers none
        return made[0], x[:, :, :0].to(weight.dtype).clone()
    return made if return_cache else made[0]


def _unsupported(problem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    if problem.norm and problem.in_channels > normalization.WIDEST:
        reasons.append(f"Its norms hold all channels of a pixel in registers, at most {normalization.WIDEST:,}, and x has "
                       f"{checks.shown(problem.in_channels)}.")
    return reasons


CAUSAL_CONV3D = Backend("triton", _run, _unsupported, kernel="convolution", config=_typical_config)
NORM_ACT_CONV3D = Backend("triton", _run, _unsupported, kernel="norm_convolution", config=_typical_config)
