"""Backend "torch" of causal_conv3d and norm_act_conv3d: PyTorch's convolution of padded frames, cuDNN's or oneDNN's, as one
autograd node.
"""

from math import prod

import torch
import torch.nn.functional as F

from ..dispatch import needs_grad, refuse_transforms
from ..first_order import apply, opaque
from ..kernels.convolution_settings import ConvSettings
from ..precision import cast, emulated_on_cpu, has_data, transformed, wide_dtype
from ..reference import convolution as reference
from . import normalization


def _activate(settings: ConvSettings, x, norm_weight, norm_bias, dtype):
    """The convolution's input before it is rounded to ``dtype``: gradients of the halo are accumulated at this precision."""
    if settings.norm is None:
        return cast(x, wide_dtype(x)) if _replicates_input(settings) else x
    h = normalization.torch_norm_act(cast(x, wide_dtype(x)), norm_weight, norm_bias, **settings.of_norm)
    # under autocast the convolution's dtype may differ from x's, and norm_act alone would round to x's
    return h if x.dtype in (dtype, h.dtype) else h.to(x.dtype)


def _replicates_input(settings: ConvSettings) -> bool:
    return settings.time_pad == "replicate" or settings.space_pad != "zeros" or settings.upsample > 1


def _conv_padding(settings: ConvSettings) -> tuple[int, int, int]:
    """Symmetric zero padding in space, which the convolution itself does fastest."""
    left, right, top, bottom = settings.padding
    return (0, top, left) if settings.space_pad == "zeros" and left == right and top == bottom else (0, 0, 0)


def _only_last_tap(settings: ConvSettings, x, cache) -> bool:
    """Whether only the last time tap contributes, as for one frame after zeros: an image costs a 2-D convolution."""
    return (x.shape[2] == 1 and settings.time_pad == "zeros" and settings.lookahead == 0 and settings.phase == 0
            and (cache is None or cache.shape[2] == 0))


def _zeros_around(settings: ConvSettings, x, cache) -> tuple[int, ...]:
    """F.pad's left, right, top, bottom, before and after of the frames seen, where all padding is zeros; below 0 it cuts."""
    around = settings.padding if _conv_padding(settings) == (0, 0, 0) else (0, 0, 0, 0)
    if _only_last_tap(settings, x, cache):
        return *around, 0, 0
    cached = 0 if cache is None else cache.shape[2]
    before = settings.kernel[0] - 1 - settings.lookahead - cached - settings.phase
    return *around, before, settings.lookahead


def _padded(x, pads: tuple[int, ...]):
    return F.pad(x, pads) if any(pads) else x


def _pad(settings: ConvSettings, h, cache):
    if not _replicates_input(settings):
        padded = _padded(reference.history(h, cache), _zeros_around(settings, h, cache))
    else:
        padded = h if _only_last_tap(settings, h, cache) else reference.pad_time(
            h, cache, settings.kernel[0], settings.lookahead, settings.time_pad)[:, :, settings.phase :]
        if padded.device.type == "cuda":  # channels last, like the convolution: avoids a second copy of the large tensor
            padded = reference.upsample_space(padded.movedim(1, -1), settings.upsample, 2).movedim(-1, 1)
        else:
            padded = reference.upsample_space(padded, settings.upsample)
        if _conv_padding(settings) == (0, 0, 0):
            padded = reference.pad_space(padded, settings.padding, settings.space_pad)
    if padded.device.type == "cuda":
        padded = padded.contiguous(memory_format=torch.channels_last_3d)
    return padded


def _taps(settings: ConvSettings, h, cache, weight):
    return weight[:, :, -1:] if _only_last_tap(settings, h, cache) else weight


def _convolve(settings: ConvSettings, h, weight, bias, cache, residual):
    if settings.phase >= h.shape[2] or h.shape[0] == 0:  # no output frame; the reference keeps the autograd graph connected
        return reference.causal_conv3d(h, weight, bias, cache=cache, residual=residual, **settings.of_convolution)
    y = _conv3d(_pad(settings, h, cache), _taps(settings, h, cache, weight), bias, settings.stride, _conv_padding(settings))
    return y if residual is None else y + residual


def _on_one_frame(x, taps) -> bool:
    """Whether a 2-D convolution computes the same. On a CPU, small ones start in half the time."""
    return x.is_cpu and x.shape[2] == 1 and taps.shape[2] == 1


def _conv3d(x, weight, bias, stride, padding):
    if x.is_cpu and emulated_on_cpu(x.dtype):  # PyTorch emulates it by loops thirty times slower
        wide = (None if t is None else t.float() for t in (x, weight, bias))
        return _conv3d(*wide, stride, padding).to(x.dtype)
    if _on_one_frame(x, weight):
        return F.conv2d(x.squeeze(2), weight.squeeze(2), bias, stride[1:], padding[1:]).unsqueeze(2)
    # On a CPU F.conv3d uses oneDNN only above B * C * T * H = 20,480 elements and unfolds smaller clips (im2col): 85 MB and
    # five times the time for 64 channels of 4 x 48 x 64.
    if (x.is_cpu and x.dtype == weight.dtype == torch.float32 and has_data(x)
            and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()):
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _conv3d_backward(dy, x, taps, bias_sizes, stride, padding, wanted):
    # On a CPU PyTorch leaves oneDNN out of the backward of one clip of so few elements, but not out of a batch of frames.
    as_batch = x.is_cpu and taps.shape[2] == 1 and (x.shape[2] == 1 or max(stride) == 1 and prod(x.shape[:4]) <= 20480)
    if as_batch:
        batch = x.shape[0]
        dy, x = (t.transpose(1, 2).flatten(0, 1) for t in (dy, x))
        taps, stride, padding = taps.squeeze(2), stride[1:], padding[1:]
    ones, zeros = [1] * len(stride), [0] * len(stride)
    dx, dtaps, dbias = torch.ops.aten.convolution_backward(dy, x, taps, bias_sizes, stride, padding, ones, False, zeros, 1,
                                                           wanted)
    if as_batch:
        dx = None if dx is None else dx.unflatten(0, (batch, -1)).transpose(1, 2)
        dtaps = None if dtaps is None else dtaps.unsqueeze(2)
    return dx, dtaps, dbias


def _forward(settings: ConvSettings, x, weight, bias, cache, residual, norm_weight, norm_bias):
    h = cast(_activate(settings, x, norm_weight, norm_bias, weight.dtype), weight.dtype)
    cache_out = reference.next_cache(h, cache, settings.keep) if settings.return_cache else None
    return _convolve(settings, h, weight, bias, cache, residual), cache_out


class _SavesInput(torch.autograd.Function):
    """The convolution as one autograd node that saves x and recomputes norm, act and padding in the backward.

    PyTorch's own graph would save the norm's input and output, the activation's input and the padded copy.
    """

    @staticmethod
    def forward(ctx, settings, x, weight, bias, cache, residual, norm_weight, norm_bias):
        ctx.settings, ctx.has_bias = settings, bias is not None
        ctx.save_for_backward(x, weight, cache, norm_weight, norm_bias)
        ctx.set_materialize_grads(False)
        return _forward(settings, x, weight, bias, cache, residual, norm_weight, norm_bias)

    @staticmethod
    @opaque
    def backward(ctx, dy, dcache_out):
        settings, needs = ctx.settings, ctx.needs_input_grad
        refuse_transforms("causal_conv3d" if settings.norm is None else "norm_act_conv3d", (dy, dcache_out))
        x, weight, cache, norm_weight, norm_bias = ctx.saved_tensors
        needs_data, wants = (needs[1], needs[4]), (needs[2], ctx.has_bias and needs[3])
        if settings.norm is None and not _replicates_input(settings):
            dx, dcache, *of_weight = _backward_of_zeros(settings, x, weight, cache, dy, dcache_out, needs_data, wants)
            of_norm = None, None
        else:
            leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in
                      zip((x, cache, norm_weight, norm_bias), (needs[1], needs[4], needs[6], needs[7]), strict=True)]
            (dx, dcache, *of_norm), *of_weight = _backward_by_graph(settings, leaves, weight, dy, dcache_out, wants)
        dweight, dbias = (None if t is None else t.to(weight.dtype) for t in of_weight)
        return (None, dx, dweight, dbias, dcache, dy if needs[5] else None, *of_norm)


def _backward_of_padded(settings: ConvSettings, dy, x, cache, weight, padded, dtype, wants):
    """Gradients of ``padded``, weight and bias, computed in ``dtype``; ``wants``: which of the three."""
    if dy.is_cpu and emulated_on_cpu(dtype):
        dtype = torch.float32
    taps = _taps(settings, x, cache, weight)
    # dy in the memory format of the input: else a copy, and on CUDA the slower NCDHW kernels
    layout = torch.contiguous_format if padded.is_contiguous() else torch.channels_last_3d
    dpadded, dtaps, dbias = _conv3d_backward(
        cast(dy.contiguous(memory_format=layout), dtype), cast(cast(padded, weight.dtype), dtype), cast(taps, dtype),
        [taps.shape[0]] if wants[2] else None, settings.stride, _conv_padding(settings), wants)
    missing = weight.shape[2] - taps.shape[2]
    return dpadded, F.pad(dtaps, (0, 0, 0, 0, missing, 0)) if missing and wants[1] else dtaps, dbias


def _backward_of_zeros(settings: ConvSettings, x, weight, cache, dy, dcache_out, needs, wants):
    """Gradients of x, cache, weight and bias, where all that goes before the convolution is zeros around the frames."""
    dseen = dweight = dbias = dx = dcache = None
    cached = 0 if cache is None else cache.shape[2]
    with torch.no_grad():
        if dy is not None:
            dseen, dweight, dbias = _backward_of_padded(
                settings, dy, x, cache, weight, _pad(settings, x, None if cache is None else cast(cache, x.dtype)),
                weight.dtype, (any(needs), *wants))
            if any(needs):
                dseen = cast(_padded(dseen, tuple(-side for side in _zeros_around(settings, x, cache))), x.dtype)
        if any(needs):
            if dcache_out is not None:
                shape = (*x.shape[:2], cached + x.shape[2], *x.shape[3:])
                dseen = x.new_zeros(shape) if dseen is None else dseen
                kept = dcache_out.shape[2]
                dseen[:, :, dseen.shape[2] - kept:] += cast(dcache_out, x.dtype)
            if dseen is not None:
                dx = dseen[:, :, cached:] if needs[0] else None
                dcache = cast(dseen[:, :, :cached], cache.dtype) if needs[1] else None
    return dx, dcache, dweight, dbias


def _backward_by_graph(settings: ConvSettings, leaves, weight, dy, dcache_out, wants):
    """Gradients of ``leaves`` = x, cache, norm_weight, norm_bias, by autograd through what goes before the convolution; of
    weight and bias.
    """
    x, cache, norm_weight, norm_bias = leaves
    data = [t for t in leaves if t is not None and t.requires_grad]
    dweight = dbias = None
    grads = {}
    with torch.enable_grad():
        h = _activate(settings, x, norm_weight, norm_bias, weight.dtype)
        frames = None if cache is None else cache.to(h.dtype)
        outputs, cotangents = [], []
        if dcache_out is not None:
            outputs.append(reference.next_cache(h, frames, settings.keep))
            cotangents.append(dcache_out.to(h.dtype))
        if dy is not None:
            padded = _pad(settings, h, frames)
            # A replicated frame or pixel accumulates several gradients. On a CPU, where float32 convolutions cost little
            # more, they are not rounded before that sum.
            dtype = h.dtype if _replicates_input(settings) and dy.is_cpu else weight.dtype
            dpadded, dweight, dbias = _backward_of_padded(settings, dy, h, frames, weight.detach(), padded.detach(), dtype,
                                                          (bool(data), *wants))
            outputs.append(padded)
            cotangents.append(None if dpadded is None else dpadded.to(h.dtype))
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if data and pairs:
            found = torch.autograd.grad([o for o, _ in pairs], data, [g for _, g in pairs], allow_unused=True)
            grads = {id(leaf): grad for leaf, grad in zip(data, found, strict=True)}
    return [grads.get(id(leaf)) for leaf in leaves], dweight, dbias


def run(settings: ConvSettings, *, x, weight, bias, cache, residual, norm_weight=None, norm_bias=None):
    tensors = (x, weight, bias, cache, residual, norm_weight, norm_bias)
    nothing_comes_out = settings.phase >= x.shape[2] or x.shape[0] == 0
    # torch.func transforms take no custom autograd.Function
    plain = nothing_comes_out or torch.compiler.is_compiling() or transformed()
    y, cache_out = (apply(_SavesInput, settings, *tensors) if needs_grad(*tensors) and not plain
                    else _forward(settings, *tensors))
    return (y, cache_out) if settings.return_cache else y
