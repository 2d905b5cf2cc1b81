"""Backend "torch" of causal_conv3d and norm_act_conv3d: PyTorch's convolution of padded frames, cuDNN's or oneDNN's, as one
autograd node.
"""

import itertools
from math import prod

import torch
import torch.nn.functional as F

from ..dispatch import needs_grad, refuse_transforms
from ..first_order import apply, opaque
from ..kernels.convolution_folding import folded
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


def _pads(settings: ConvSettings, x, cache) -> tuple[int, int, int, int, int, int]:
    """left, right, top, bottom that the convolution does not pad itself; frames before and after, cut off where below 0."""
    around = settings.padding if _conv_padding(settings) == (0, 0, 0) else (0, 0, 0, 0)
    if _only_last_tap(settings, x, cache):
        return *around, 0, 0
    cached = 0 if cache is None else cache.shape[2]
    return *around, settings.kernel[0] - 1 - settings.lookahead - cached, settings.lookahead


def _pad(settings: ConvSettings, h, cache):
    pads = _pads(settings, h, cache)
    if not _replicates_input(settings):
        padded = h if cache is None else reference.history(h, cache)
        padded = F.pad(padded, pads) if any(pads) else padded
        padded = padded[:, :, settings.phase:] if settings.phase else padded
    else:
        padded = h if _only_last_tap(settings, h, cache) else reference.pad_time(
            h, cache, settings.kernel[0], settings.lookahead, settings.time_pad)[:, :, settings.phase :]
        u = settings.upsample
        if u > 1 and padded.is_cpu and padded.numel():  # in a fifth of the time that repeat_interleave takes
            padded = F.interpolate(padded, scale_factor=(1.0, float(u), float(u)), mode="nearest-exact")
        elif padded.is_cuda:  # channels last, like the convolution: avoids a second copy of the large tensor
            padded = reference.upsample_space(padded.movedim(1, -1), u, 2).movedim(-1, 1)
        else:
            padded = reference.upsample_space(padded, u)
        padded = reference.pad_space(padded, pads[:4], settings.space_pad)
    if padded.is_cuda:
        padded = padded.contiguous(memory_format=torch.channels_last_3d)
    return padded


def _unpad(settings: ConvSettings, dpadded, x, cache):
    """The way back through ``_pad``: gradients of the frames of cache and clip; ``dpadded`` may be modified in place."""
    *around, before, after = _pads(settings, x, cache)
    before -= settings.phase
    dframes = folded(dpadded, settings, 3, around)
    sizes = (max(before, 0), dframes.shape[2] - max(before, 0) - after, after)
    first, own, last = dframes.split(sizes, dim=2)
    if settings.time_pad == "replicate":
        own[:, :, :1] += first.sum(2, keepdim=True)
        own[:, :, -1:] += last.sum(2, keepdim=True)
    return F.pad(own, (0, 0, 0, 0, -before, 0)) if before < 0 else own


def _taps(settings: ConvSettings, h, cache, weight):
    return weight[:, :, -1:] if _only_last_tap(settings, h, cache) else weight


def _convolve(settings: ConvSettings, h, weight, bias, cache, residual):
    if settings.phase >= h.shape[2] or h.shape[0] == 0:  # no output frame; the reference keeps the autograd graph connected
        return reference.causal_conv3d(h, weight, bias, cache=cache, residual=residual, **settings.of_convolution)
    y = _conv3d(_pad(settings, h, cache), _taps(settings, h, cache, weight), bias, settings.stride, _conv_padding(settings))
    return y if residual is None else y + residual


def _by_frames(x, taps, stride) -> bool:
    """Whether to convolve frames as a batch, in 2-D, with a kernel of one frame.

    On a CPU this starts in half the time, which counts for one frame; of frames with channels last it takes no copies.
    """
    return (x.is_cpu and taps.shape[2] == 1 and (x.shape[2] == 1 or stride[0] == 1 and not x.is_contiguous()))


def _takes_onednn(x, weight) -> bool:
    """Whether oneDNN convolves it: not all that PyTorch hands to it by itself."""
    return (x.is_cpu and x.dtype == weight.dtype == torch.float32 and has_data(x)
            and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available())


def _conv3d(x, weight, bias, stride, padding):
    if x.is_cpu and emulated_on_cpu(x.dtype):  # PyTorch emulates it by loops thirty times slower
        wide = (None if t is None else t.float() for t in (x, weight, bias))
        return _conv3d(*wide, stride, padding).to(x.dtype)
    if _by_frames(x, weight, stride):
        y = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight.squeeze(2), bias, stride[1:], padding[1:])
        return y.view(x.shape[0], x.shape[2], *y.shape[1:]).transpose(1, 2)
    # On a CPU F.conv3d uses oneDNN only above B * C * T * H = 20,480 elements and unfolds smaller clips (im2col): 85 MB and
    # five times the time for 64 channels of 4 x 48 x 64.
    if _takes_onednn(x, weight):
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _conv3d_backward(dy, x, taps, bias_sizes, stride, padding, wanted):
    """Gradients of x, taps and bias, those that are ``wanted``."""
    backward = torch.ops.aten.convolution_backward
    if _by_frames(x, taps, stride):
        dx, dtaps, dbias = backward(*(t.transpose(1, 2).flatten(0, 1) for t in (dy, x)), taps.squeeze(2), bias_sizes,
                                    stride[1:], padding[1:], [1] * 2, False, [0] * 2, 1, wanted)
        dx = None if dx is None else dx.view(x.shape[0], x.shape[2], *dx.shape[1:]).transpose(1, 2)
        return dx, None if dtaps is None else dtaps.unsqueeze(2), dbias
    unfolded = _unfolded(x, taps, stride)
    if unfolded <= 2**18:
        return backward(dy, x, taps, bias_sizes, stride, padding, [1] * 3, False, [0] * 3, 1, wanted)
    dx, dtaps, dbias = _dx_by_frames(dy, x, taps, padding) if wanted[0] else None, None, None
    if wanted[1] and unfolded > 2**22:
        dtaps, dbias = _dtaps_by_taps(dy, x, taps, padding), dy.sum((0, 2, 3, 4)) if wanted[2] else None
    elif any(wanted[1:]):
        wanted = (False, *wanted[1:])
        _, dtaps, dbias = backward(dy, x, taps, bias_sizes, stride, padding, [1] * 3, False, [0] * 3, 1, wanted)
    return dx, dtaps, dbias


def _unfolded(x, taps, stride) -> int:
    """Elements that PyTorch's backward unfolds a clip to, which takes up to ten times as long as what goes around it.

    0 where it does not, or where there is nothing to go around with. It leaves oneDNN out for one clip of up to 20,480
    elements along B, C, T and H.
    """
    small = x.shape[0] == max(stride) == 1 and prod(x.shape[:4]) <= 20480
    return x.numel() * prod(taps.shape[2:]) if small and max(taps.shape[3:]) > 1 and _takes_onednn(x, taps) else 0


def _dx_by_frames(dy, x, taps, padding):
    """A 2-D convolution of a batch of frames for each frame of the kernel, with stride 1: oneDNN takes those."""
    count, dx = dy.shape[2], None
    dy_frames = dy.transpose(1, 2).flatten(0, 1)
    for k in range(taps.shape[2]):
        frames = x[:, :, k:k + count].transpose(1, 2).flatten(0, 1)
        dframes, _, _ = torch.ops.aten.convolution_backward(dy_frames, frames, taps[:, :, k], None, [1] * 2, padding[1:],
                                                            [1] * 2, False, [0] * 2, 1, (True, False, False))
        dframes = dframes.unflatten(0, (x.shape[0], count)).transpose(1, 2)
        if count == x.shape[2]:
            return dframes
        dx = x.new_zeros(x.shape) if dx is None else dx
        dx[:, :, k:k + count] += dframes
    return dx


def _dtaps_by_taps(dy, x, taps, padding, most: int = 512):
    """Matrix products for each tap, of one clip with stride 1, without a copy: what a tap sees is x from some pixel on.

    oneDNN is as fast, but adds up pixel after pixel, which errs ten times as much; so would one product of all pixels of few
    channels. Here ``most`` pixels at a time are added up, and then the sums.
    """
    _, top, left = padding
    x = F.pad(x, (left, left, top, top))
    (_, cin, _, height, width), (_, cout, _, high, wide) = x.shape, dy.shape
    kt, kh, kw = taps.shape[2:]
    dy = F.pad(dy, (0, width - wide, 0, height - high)).view(cout, -1)  # as wide as x: 0 in between
    count = -(-dy.shape[1] // most)
    pixels = -(-dy.shape[1] // count)
    dy = F.pad(dy, (0, count * pixels - dy.shape[1])).view(cout, count, pixels).transpose(0, 1)
    last = ((kt - 1) * height + kh - 1) * width + kw - 1
    x = F.pad(x.reshape(cin, -1), (0, max(last + count * pixels - x.numel() // cin, 0)))
    dtaps = taps.new_empty(kt, kh, kw, cout, cin)
    for t, h, w in itertools.product(range(kt), range(kh), range(kw)):
        start = (t * height + h) * width + w
        seen = x[:, start:start + count * pixels].unflatten(1, (count, pixels)).permute(1, 2, 0)
        torch.sum(torch.bmm(dy, seen), 0, out=dtaps[t, h, w])
    return dtaps.permute(3, 4, 0, 1, 2).contiguous()


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
        x, weight, cache, *of_norm = ctx.saved_tensors
        needs_of_norm = (needs[1], *needs[6:])
        leaves = [None if t is None else t.detach().requires_grad_(settings.norm is not None and need)
                  for t, need in zip((x, *of_norm), needs_of_norm, strict=True)]
        with torch.enable_grad():
            h = _activate(settings, *leaves, weight.dtype)
        wanted = (any(needs_of_norm), needs[4], needs[2], ctx.has_bias and needs[3])
        with torch.no_grad():
            dh, dcache, dweight, dbias = _backward(settings, h.detach(), weight.detach(), cache, dy, dcache_out, wanted)
        grads = [None, None, None]
        if h.requires_grad and dh is not None:
            found = iter(torch.autograd.grad(h, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad], dh))
            grads = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        elif dh is not None:
            grads[0] = cast(dh, x.dtype)
        return None, grads[0], dweight, dbias, dcache, dy if needs[5] else None, *grads[1:]


def _backward(settings: ConvSettings, h, weight, cache, dy, dcache_out, wanted):
    """Gradients of h, in its dtype, and of cache, weight and bias in theirs; None where not ``wanted`` or nothing came."""
    dframes = dh = dcache = dweight = dbias = None
    of_frames, cached = any(wanted[:2]), 0 if cache is None else cache.shape[2]
    if dy is not None:
        padded = _pad(settings, h, None if cache is None else cast(cache, h.dtype))
        taps = _taps(settings, h, cache, weight)
        # A replicated frame or pixel accumulates several gradients. On a CPU, where float32 convolutions cost little more,
        # they are not rounded before that sum.
        dtype = h.dtype if _replicates_input(settings) and dy.is_cpu else weight.dtype
        if dy.is_cpu and emulated_on_cpu(dtype):
            dtype = torch.float32
        # dy in the memory format of the input: else a copy, and on CUDA the slower NCDHW kernels
        layout = torch.contiguous_format if padded.is_contiguous() else torch.channels_last_3d
        dpadded, dtaps, dbias = _conv3d_backward(
            cast(dy.contiguous(memory_format=layout), dtype), cast(cast(padded, weight.dtype), dtype), cast(taps, dtype),
            [taps.shape[0]] if wanted[3] else None, settings.stride, _conv_padding(settings), (of_frames, *wanted[2:]))
        if wanted[2]:
            missing = weight.shape[2] - taps.shape[2]
            dweight = cast(F.pad(dtaps, (0, 0, 0, 0, missing, 0)) if missing else dtaps, weight.dtype)
        dbias = cast(dbias, weight.dtype)
        if of_frames:
            dframes = _unpad(settings, cast(dpadded, h.dtype), h, cache)
    if of_frames and dcache_out is not None:
        if dframes is None:
            dframes = h.new_zeros((*h.shape[:2], cached + h.shape[2], *h.shape[3:]))
        dframes[:, :, dframes.shape[2] - dcache_out.shape[2]:] += dcache_out
    if dframes is not None:
        dcache = cast(dframes[:, :, :cached], cache.dtype) if wanted[1] else None
        dh = (dframes[:, :, cached:] if cached else dframes) if wanted[0] else None
    return dh, dcache, dweight, dbias


def run(settings: ConvSettings, *, x, weight, bias, cache, residual, norm_weight=None, norm_bias=None):
    tensors = (x, weight, bias, cache, residual, norm_weight, norm_bias)
    nothing_comes_out = settings.phase >= x.shape[2] or x.shape[0] == 0
    # torch.func transforms take no custom autograd.Function
    plain = nothing_comes_out or torch.compiler.is_compiling() or transformed()
    y, cache_out = (apply(_SavesInput, settings, *tensors) if needs_grad(*tensors) and not plain
                    else _forward(settings, *tensors))
    return (y, cache_out) if settings.return_cache else y
