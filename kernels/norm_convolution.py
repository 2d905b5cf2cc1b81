"""norm_act_conv3d: the kernels of normalization.py and convolution.py in a row, forward and backward.

The norm writes what the convolution reads, once, and in the same launch the frames that the next chunk needs. It lives as
long as the call: the backward makes it again from x.
"""

from . import convolution, normalization
from .convolution_settings import ConvSettings


def forward(x, weight, bias, cache, residual, norm_weight, norm_bias, settings: ConvSettings, *, tf32, norm_config, config):
    """``(y, cache_out, stats)``: of convolution.forward and normalization.forward.

    Workspace: the convolved frames, of x's size in weight's dtype.
    """
    h, cache_out, stats = normalization.forward(x, norm_weight, norm_bias, dtype=weight.dtype, config=norm_config,
                                                cache=cache, keep=settings.keep, **settings.of_norm)
    return convolution.forward(h, weight, bias, cache, residual, settings, tf32=tf32, config=config), cache_out, stats


def backward(dy, dcache_out, x, weight, cache, norm_weight, norm_bias, stats, settings: ConvSettings, *, wanted, tf32,
             norm_config, norm_backward_config, dgrad_config, wgrad_config):
    """``(dx, dweight, dcache, dnorm_weight, dnorm_bias)``, None for those that ``wanted``, five bools, leaves out.

    Workspace: the convolved frames where dweight is wanted, their gradient where another is, and those of the parts.
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
