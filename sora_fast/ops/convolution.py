"""causal_conv3d and norm_act_conv3d: causal 3-D convolution with a streaming cache, alone and after norm + act.

B batch, C channels, T frames, H height, W width; kT, kH, kW kernel, sT, sH, sW stride.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .. import checks, env
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, refuse_transforms, remember, remembered
from ..environment import cudnn_version
from ..first_order import apply, opaque
from ..kernels.convolution_settings import ConvSettings
from ..measured import sizes
from ..precision import (
    autocast,
    autocast_dtype,
    cast,
    emulated_on_cpu,
    has_data,
    tf32_convolutions,
    transformed,
    wide_dtype,
)
from ..reference import convolution as reference
from . import convolution_cuda, convolution_triton, normalization


@dataclass(frozen=True)
class ConvolutionProblem(Problem):
    """``norm`` is None for causal_conv3d; ``wide``: the dtype of the arithmetic; ``size``: of x's pixels, B T H W;
    ``cudnn``: the result of ``_cudnn``.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    time_pad: str
    space_pad: str
    lookahead: int
    upsample: int
    norm: str | None
    wide: torch.dtype = torch.float32
    size: tuple[int, ...] = ()
    cudnn: tuple[int, bool] = (0, False)


def _example(device: str, dtype: torch.dtype, grad: bool) -> ConvolutionProblem:
    return ConvolutionProblem(device, dtype, grad, 96, 96, (3, 3, 3), (1, 1, 1), "zeros", "zeros", 0, 1, None,
                              cudnn=_cudnn() if device.startswith("cuda") else (0, False))


# -------------------------------------------------------------------------------------------------------- cuDNN
@env.constant_in_graphs
def _cudnn() -> tuple[int, bool]:
    """The version of the cuDNN that PyTorch calls, 91900 for 9.19.0 (0: none), and whether it may take TF32."""
    version = cudnn_version() if torch.backends.cudnn.enabled else None
    return version or 0, tf32_convolutions()


def _cudnn_of(x) -> tuple[int, bool]:
    return _cudnn() if isinstance(x, torch.Tensor) and x.is_cuda else (0, False)


def _cudnn_bugs(problem: ConvolutionProblem, dtype: torch.dtype) -> list[str]:
    """Why cuDNN's 3-D convolution in ``dtype`` cannot be trusted here.

    16 bits: wrong on large inputs in 9.8 to 9.14 (pytorch#163539; PyTorch's workaround is for NCDHW tensors only, and ours
    are channels last). TF32: a broken kernel in 9.10.2 to 9.15, the affected cases are unknown (pytorch#167024).
    """
    version, tf32 = problem.cudnn
    found = f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}"
    package = f"nvidia-cudnn-cu{(torch.version.cuda or '13').partition('.')[0]}"
    if dtype in (torch.bfloat16, torch.float16) and 90800 <= version < 91500 and problem.kernel != (1, 1, 1):
        return [f"{found} was found, and 9.8 to 9.14 compute wrong 16-bit 3-D convolutions of large inputs: upgrade it (pip "
                f"install '{package}>=9.15') or use another backend."]
    if dtype == torch.float32 and tf32 and 91002 <= version < 91600:
        return [f"{found} was found, and 9.10.2 to 9.15 compute wrong 3-D convolutions in TF32, which is on: set "
                f"torch.backends.cudnn.conv.fp32_precision = 'ieee' or upgrade it (pip install '{package}>=9.16')."]
    return []


# ---------------------------------------------------------------------------------------------- backend "torch"
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


def _pad(settings: ConvSettings, h, cache):
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
    one_frame = _on_one_frame(x, taps)
    if one_frame:
        dy, x, taps, stride, padding = dy.squeeze(2), x.squeeze(2), taps.squeeze(2), stride[1:], padding[1:]
    ones, zeros = [1] * len(stride), [0] * len(stride)
    dx, dtaps, dbias = torch.ops.aten.convolution_backward(dy, x, taps, bias_sizes, stride, padding, ones, False, zeros, 1,
                                                           wanted)
    if one_frame:
        dx, dtaps = (None if t is None else t.unsqueeze(2) for t in (dx, dtaps))
    return dx, dtaps, dbias


def _torch_forward(settings: ConvSettings, x, weight, bias, cache, residual, norm_weight, norm_bias):
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
        return _torch_forward(settings, x, weight, bias, cache, residual, norm_weight, norm_bias)

    @staticmethod
    @opaque
    def backward(ctx, dy, dcache_out):
        settings, needs = ctx.settings, ctx.needs_input_grad
        refuse_transforms("causal_conv3d" if settings.norm is None else "norm_act_conv3d", (dy, dcache_out))
        x, weight, cache, norm_weight, norm_bias = (
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, (needs[1], needs[2], needs[4], needs[6], needs[7]), strict=True))
        data = [t for t in (x, cache, norm_weight, norm_bias) if t is not None and t.requires_grad]
        grads = {}
        dweight = dbias = None
        with torch.enable_grad():
            h = _activate(settings, x, norm_weight, norm_bias, weight.dtype)
            frames = None if cache is None else cache.to(h.dtype)
            outputs, cotangents = [], []
            if dcache_out is not None:
                outputs.append(reference.next_cache(h, frames, settings.keep))
                cotangents.append(dcache_out.to(h.dtype))
            if dy is not None:
                padded = _pad(settings, h, frames)
                taps = _taps(settings, h, frames, weight).detach()
                # A replicated frame or pixel accumulates several gradients. On a CPU, where float32 convolutions cost
                # little more, they are not rounded before that sum.
                on_cpu = dy.device.type == "cpu"
                dtype = h.dtype if _replicates_input(settings) and on_cpu else weight.dtype
                if on_cpu and emulated_on_cpu(dtype):
                    dtype = torch.float32
                # dy in the memory format of the input: else a copy, and on CUDA the slower NCDHW kernels
                layout = torch.contiguous_format if padded.is_contiguous() else torch.channels_last_3d
                dpadded, dtaps, dbias = _conv3d_backward(
                    dy.contiguous(memory_format=layout).to(dtype), padded.detach().to(weight.dtype).to(dtype),
                    taps.to(dtype), [taps.shape[0]] if ctx.has_bias else None, settings.stride, _conv_padding(settings),
                    (bool(data), needs[2], ctx.has_bias and needs[3]))
                if needs[2]:
                    missing = weight.shape[2] - taps.shape[2]
                    dweight = (F.pad(dtaps, (0, 0, 0, 0, missing, 0)) if missing else dtaps).to(weight.dtype)
                if dbias is not None:
                    dbias = dbias.to(weight.dtype)
                outputs.append(padded)
                cotangents.append(None if dpadded is None else dpadded.to(h.dtype))
            pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
            if data and pairs:
                found = torch.autograd.grad([o for o, _ in pairs], data, [g for _, g in pairs], allow_unused=True)
                grads = {id(leaf): grad for leaf, grad in zip(data, found, strict=True)}
        return (None, grads.get(id(x)), dweight, dbias, grads.get(id(cache)), dy if needs[5] else None,
                grads.get(id(norm_weight)), grads.get(id(norm_bias)))


def _torch(settings: ConvSettings, *, x, weight, bias, cache, residual, norm_weight=None, norm_bias=None):
    tensors = (x, weight, bias, cache, residual, norm_weight, norm_bias)
    nothing_comes_out = settings.phase >= x.shape[2] or x.shape[0] == 0
    # torch.func transforms take no custom autograd.Function
    plain = nothing_comes_out or torch.compiler.is_compiling() or transformed()
    y, cache_out = (apply(_SavesInput, settings, *tensors) if needs_grad(*tensors) and not plain
                    else _torch_forward(settings, *tensors))
    return (y, cache_out) if settings.return_cache else y


def _torch_unsupported(problem: ConvolutionProblem) -> list[str]:
    return _cudnn_bugs(problem, problem.dtype)


def _reference(settings: ConvSettings, **tensors):
    run = reference.causal_conv3d if settings.norm is None else partial(reference.norm_act_conv3d, **settings.of_norm)
    return run(**tensors, **settings.of_convolution, return_cache=settings.return_cache)


def _reference_unsupported(problem: ConvolutionProblem) -> list[str]:
    """The definition convolves 16-bit tensors in float32, where a cuDNN that is wrong in 16 bits may be right."""
    return _cudnn_bugs(problem, torch.promote_types(problem.dtype, torch.float32))


_PLAIN = (Backend("torch", _torch, _torch_unsupported), Backend("reference", _reference, _reference_unsupported))
CAUSAL_CONV3D = Op("causal_conv3d", "convolution", _example, [
    convolution_cuda.CONVOLUTION, convolution_triton.CAUSAL_CONV3D, *_PLAIN], ConvolutionProblem)
NORM_ACT_CONV3D = Op("norm_act_conv3d", "convolution", _example, [
    convolution_cuda.CONVOLUTION, convolution_triton.NORM_ACT_CONV3D, *_PLAIN], ConvolutionProblem)
OPS = (CAUSAL_CONV3D, NORM_ACT_CONV3D)
__all__ = ["causal_conv3d", "norm_act_conv3d"]


# ------------------------------------------------------------------------------------------------------- checks
TIME_PADS = ("zeros", "replicate")
SPACE_PADS = ("zeros", "replicate", "reflect")


def _settings(op: str, x, weight, bias, cache, residual, *, stride, padding, time_pad, space_pad, phase, lookahead,
              upsample, return_cache, **norm) -> ConvSettings:
    """Checks everything except dtypes and ``norm``."""
    checks.shape(op, "x", x, ("B", "Cin", "T", "H", "W"), "an image is a clip of one frame: x[:, :, None]")
    checks.shape(op, "weight", weight, ("Cout", "Cin", "kT", "kH", "kW"), "use the weight of a Conv3d")
    checks.whole(op, "upsample", upsample, 1)
    batch, channels, frames = x.shape[:3]
    checks.shape(op, "weight", weight, ("Cout", channels, "kT", "kH", "kW"),
                 "its second size is x's channels (groups are not supported)")
    kt, kh, kw = weight.shape[2:]
    if bias is not None:
        checks.shape(op, "bias", bias, (weight.shape[0],), "one element per output channel")
    stride = stride if isinstance(stride, (tuple, list)) else (stride,) * 3
    checks.several(op, "stride", stride, "sT, sH, sW", 1)
    padding = (kw // 2, kw // 2, kh // 2, kh // 2) if padding is None else padding
    checks.several(op, "padding", padding, "left, right, top, bottom", 0)
    stride, padding = tuple(stride), tuple(padding)
    checks.choice(op, "time_pad", time_pad, TIME_PADS)
    checks.choice(op, "space_pad", space_pad, SPACE_PADS)
    left, right, top, bottom = padding
    height, width = x.shape[3] * upsample, x.shape[4] * upsample  # of the convolution's input
    if kt * kh * kw == 0:
        raise checks.error(op, "a kernel of 1 or more along every axis", f"{kt} x {kh} x {kw}", "pass a larger weight")
    if space_pad == "reflect" and not (max(left, right) < width and max(top, bottom) < height):
        raise checks.error(op, f"reflect padding smaller than the frame's {height} x {width}", padding, "pad less")
    if space_pad == "replicate" and height * width == 0 and any(padding):
        raise checks.error(op, "at least one pixel to replicate", f"frames of {height} x {width}",
                           "use larger frames, or space_pad='zeros'")
    if height + top + bottom < kh or width + left + right < kw:
        raise checks.error(op, f"padded frames at least as large as the {kh} x {kw} kernel",
                           f"{height + top + bottom} x {width + left + right}", "pad more, or use larger frames")
    checks.whole(op, "phase", phase, 0)
    checks.whole(op, "lookahead", lookahead, 0)
    if lookahead >= kt:
        raise checks.error(op, f"lookahead of at most the kernel's {kt} frames less one", lookahead, "use less lookahead")
    if cache is not None:
        checks.shape(op, "cache", cache, (batch, channels, "frames", *x.shape[3:]),
                     "use the cache_out of the last call")
        if cache.shape[2] > kt - 1:
            raise checks.error(op, f"a cache of at most kT - 1 = {kt - 1} frames", cache.shape[2],
                               "pass cache[:, :, -(kT - 1):]")
    if lookahead and (cache is not None or return_cache):
        raise checks.error(op, "no cache with lookahead, because future frames cannot be streamed",
                           f"lookahead={lookahead}", "run the whole clip at once")
    if lookahead and frames == 0:
        raise checks.error(op, "at least one frame with lookahead", frames, "pass frames")
    settings = ConvSettings((kt, kh, kw), stride, padding, time_pad, space_pad, phase, lookahead, upsample,
                            bool(return_cache), **norm)
    if residual is not None:
        out = settings.out_sizes(*x.shape[2:])
        checks.shape(op, "residual", residual, (batch, weight.shape[0], *out), "it is added to the output")
    return settings


def _facts(x, weight, settings: ConvSettings, grad: bool, wide: torch.dtype) -> tuple:
    """The fields of a ConvolutionProblem."""
    s = settings
    return (device_name(x), weight.dtype, grad, x.shape[1], weight.shape[0], s.kernel, s.stride, s.time_pad, s.space_pad,
            s.lookahead, s.upsample, s.norm, wide, sizes((x.shape[0], *x.shape[2:])), _cudnn_of(x))


def causal_conv3d(x, weight, bias=None, *, stride=1, padding=None, time_pad="zeros", space_pad="zeros", cache=None,
                  phase=0, lookahead=0, upsample=1, residual=None, return_cache=False, backend="auto"):
    """Causal 3-D convolution, with its cache of past frames passed in and out for streaming.

    Args:
        x: (B, Cin, T, H, W), floating; T = 0 is allowed (no output).
        weight: (Cout, Cin, kT, kH, kW) of x's dtype.
        bias: (Cout,), or None.
        stride: int, or (sT, sH, sW). Outputs are at frames ``phase``, ``phase + sT``, ... of x, possibly none.
        padding: (left, right, top, bottom) pixels, default (kW // 2, kW // 2, kH // 2, kH // 2).
        time_pad: str, before the first frame: "zeros", or "replicate" of that frame.
        space_pad: str; "zeros", "replicate" or "reflect".
        cache: (B, Cin, <= kT - 1, H, W), the frames before x: the ``cache_out`` of the previous call; or None.
        phase: int, the frame of x with the first output.
        lookahead: int, future frames that an output depends on, for models that are not causal; past the clip's end they are
            padded by ``time_pad``. Not with a cache.
        upsample: int u: nearest-neighbour upsampling of every frame by u x u before padding and convolution. Padding and
            stride count upsampled pixels; ``cache`` and ``cache_out`` hold frames before upsampling.
        residual: (B, Cout, T', H', W') that is added to the output, or None.
        return_cache: bool, whether to return ``cache_out``.
        backend: str; "auto", or "reference", "torch", "triton", "cuda" by name.

    Returns:
        y (B, Cout, T', H', W') in x's dtype (under autocast, in its dtype); with ``return_cache`` also ``cache_out``,
        the last kT - 1 frames (or all, if there were fewer), not a view, differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit, dilation and groups among them.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> x, weight = torch.randn(1, 3, 9, 16, 16), torch.randn(8, 3, 3, 3, 3)
    >>> whole = ops.causal_conv3d(x, weight)
    >>> first, cache = ops.causal_conv3d(x[:, :, :4], weight, return_cache=True)
    >>> rest = ops.causal_conv3d(x[:, :, 4:], weight, cache=cache)
    >>> torch.allclose(whole, torch.cat([first, rest], dim=2), atol=1e-4)
    True
    """
    op = "causal_conv3d"
    key = call_key(CAUSAL_CONV3D, backend, (x, weight, bias, cache, residual), stride, padding, time_pad, space_pad, phase,
                   lookahead, upsample, return_cache, *_cudnn_of(x), casts=True)
    found = remembered(key)
    if found is None:
        settings = _settings(op, x, weight, bias, cache, residual, stride=stride, padding=padding, time_pad=time_pad,
                             space_pad=space_pad, phase=phase, lookahead=lookahead, upsample=upsample,
                             return_cache=return_cache)
        checks.floating(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual)
        checks.same_device(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual)
    x, weight, bias, cache, residual = autocast(x, weight, bias, cache, residual)
    if found is None:
        checks.same_dtype(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual)
        facts = _facts(x, weight, settings, needs_grad(x, weight, bias, cache, residual), wide_dtype(x, weight))
        found = remember(key, (CAUSAL_CONV3D.plan(facts, backend), settings))
    plan, settings = found
    return CAUSAL_CONV3D.run(plan, key, settings=settings, x=x, weight=weight, bias=bias, cache=cache, residual=residual)


def norm_act_conv3d(x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm="rms", groups=32, eps=1e-6,
                    act="silu", stride=1, padding=None, time_pad="zeros", space_pad="zeros", cache=None, phase=0,
                    lookahead=0, upsample=1, residual=None, return_cache=False, backend="auto"):
    """``causal_conv3d(norm_act(x))`` as one autograd node, which saves x and no other tensor of its size.

    ``cache`` and ``cache_out`` hold frames after norm and activation. (The backend "reference", traced graphs and torch.func
    transforms use the plain composition, where PyTorch decides what is saved.)

    Args:
        x: (B, Cin, T, H, W), floating.
        weight: (Cout, Cin, kT, kH, kW) of x's dtype.
        bias: (Cout,), or None.
        norm_weight: (Cin,) of the norm, any floating dtype, or None.
        norm_bias: (Cin,) of the norm, any floating dtype, or None.
        norm: str; "rms" or "group", as in ``norm_act``.
        groups: int that divides Cin, for "group".
        eps: float under the square root.
        act: str "silu", or None.
        stride: int, or (sT, sH, sW). Outputs are at frames ``phase``, ``phase + sT``, ... of x, possibly none.
        padding: (left, right, top, bottom) pixels, default (kW // 2, kW // 2, kH // 2, kH // 2).
        time_pad: str, before the first frame: "zeros", or "replicate" of that frame.
        space_pad: str; "zeros", "replicate" or "reflect".
        cache: (B, Cin, <= kT - 1, H, W), the frames before x: the ``cache_out`` of the previous call; or None.
        phase: int, the frame of x with the first output.
        lookahead: int, future frames that an output depends on, for models that are not causal; past the clip's end they are
            padded by ``time_pad``. Not with a cache.
        upsample: int u: nearest-neighbour upsampling of every frame by u x u before padding and convolution. Padding and
            stride count upsampled pixels; ``cache`` and ``cache_out`` hold frames before upsampling.
        residual: (B, Cout, T', H', W') that is added to the output, or None.
        return_cache: bool, whether to return ``cache_out``.
        backend: str; "auto", or "reference", "torch", "triton", "cuda" by name.

    Returns:
        y, or ``(y, cache_out)``, as ``causal_conv3d``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> x, weight = torch.randn(1, 16, 5, 8, 8), torch.randn(8, 16, 3, 3, 3)
    >>> ops.norm_act_conv3d(x, weight, norm_weight=torch.ones(16)).shape
    torch.Size([1, 8, 5, 8, 8])
    """
    op, tensors = "norm_act_conv3d", (x, weight, bias, norm_weight, norm_bias, cache, residual)
    key = call_key(NORM_ACT_CONV3D, backend, tensors, norm, groups, eps, act, stride, padding, time_pad, space_pad, phase,
                   lookahead, upsample, return_cache, *_cudnn_of(x), casts=True)
    found = remembered(key)
    if found is None:
        normalization.check(op, x, norm_weight, norm_bias, norm, groups, eps, act, prefix="norm_")
        settings = _settings(op, x, weight, bias, cache, residual, stride=stride, padding=padding, time_pad=time_pad,
                             space_pad=space_pad, phase=phase, lookahead=lookahead, upsample=upsample,
                             return_cache=return_cache, norm=norm, groups=groups, eps=eps, act=act)
        checks.floating(op, weight=weight, bias=bias, cache=cache, residual=residual)
        checks.same_device(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual)
    # x is normalised in its own dtype; the convolution's input has the dtype that F.conv3d would cast it to
    weight, bias, cache, residual = autocast(weight, bias, cache, residual)
    if found is None:
        convolved = x if autocast_dtype(x) is None or x.dtype == torch.float64 else weight
        checks.same_dtype(op, x=convolved, weight=weight, bias=bias, cache=cache, residual=residual)
        facts = _facts(x, weight, settings, needs_grad(*tensors), wide_dtype(x, weight, norm_weight, norm_bias))
        found = remember(key, (NORM_ACT_CONV3D.plan(facts, backend), settings))
    plan, settings = found
    return NORM_ACT_CONV3D.run(plan, key, settings=settings, x=x, weight=weight, bias=bias, norm_weight=norm_weight,
                               norm_bias=norm_bias, cache=cache, residual=residual)
