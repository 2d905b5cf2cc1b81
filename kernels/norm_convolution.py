"""norm_act_conv3d: the kernels of normalization.py, then those of convolution.py, forward and backward.

The norm stores its output h once, and in the same launch the frames that the next chunk needs. h is freed after the call;
the backward recomputes it from x.
"""

from . import convolution, normalization
from .convolution_settings import ConvSettings


def forward(x, weight, bias, cache, residual, norm_weight, norm_bias, settings: ConvSettings, *, tf32, norm_config, config):
    """``(y, cache_out, stats)`` of convolution.forward and normalization.forward.

    Workspace: h, of x's size in weight's dtype.
    """
    h, cache_out, stats = normalization.forward(x, norm_weight, norm_bias, dtype=weight.dtype, config=norm_config,
                                                cache=cache, keep=settings.keep, **settings.of_norm)
    return convolution.forward(h, weight, bias, cache, residual, settings, tf32=tf32, config=config), cache_out, stats


def backward(dy, dcache_out, x, weight, cache, norm_weight, norm_bias, stats, settings: ConvSettings, *, wanted, tf32,
             norm_config, norm_backward_config, dgrad_config, wgrad_config):
    """``(dx, dweight, dcache, dnorm_weight, dnorm_bias)``; None where ``wanted``, five bools, is False.

    Workspace: h for dweight, its gradient for the others, and the workspaces of the two backwards.
    """
    want_x, want_weight, want_cache, want_norm_weight, want_norm_bias = wanted
    through_norm = (want_x, want_norm_weight, want_norm_bias)
    dweight = None
    if want_weight:
        h, _, _ = normalization.forward(x, norm_weight, norm_bias, dtype=weight.dtype, config=norm_config,
                                        **settings.of_norm)
        dweight = convolution.wgrad(dy, h, cache, weight, settings, tf32=tf32, config=wgrad_config)
        del h
    dh = dcache = dx = dnorm_weight = dnorm_bias = None
    if any(through_norm) or want_cache:
        dh, dcache = convolution.dgrad(dy, weight, dcache_out, x.shape, 0 if cache is None else cache.shape[2], settings,
                                       want_x=any(through_norm), want_cache=want_cache, tf32=tf32, config=dgrad_config)
    if any(through_norm):
        dx, dnorm_weight, dnorm_bias = normalization.backward(
            dh, x, norm_weight, norm_bias, stats, wanted=through_norm, config=norm_backward_config, **settings.of_norm)
    return dx, dweight, dcache, dnorm_weight, dnorm_bias
