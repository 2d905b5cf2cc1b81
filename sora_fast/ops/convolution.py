"""causal_conv3d and norm_act_conv3d: causal 3-D convolution with a streaming cache, alone and after norm + act.

B batch, C channels, T frames, H height, W width; kT, kH, kW kernel, sT, sH, sW stride.
"""

from dataclasses import dataclass
from functools import partial

import torch

from .. import checks, env
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..environment import cudnn_version
from ..kernels.convolution_settings import ConvSettings
from ..measured import sizes
from ..precision import autocast, autocast_dtype, tf32_convolutions, wide_dtype
from ..reference import convolution as reference
from . import convolution_cuda, convolution_torch, convolution_triton, normalization


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


# ----------------------------------------------------------------------------------------------------- backends
def _torch_unsupported(problem: ConvolutionProblem) -> list[str]:
    return _cudnn_bugs(problem, problem.dtype)


def _reference(settings: ConvSettings, **tensors):
    run = reference.causal_conv3d if settings.norm is None else partial(reference.norm_act_conv3d, **settings.of_norm)
    return run(**tensors, **settings.of_convolution, return_cache=settings.return_cache)


def _reference_unsupported(problem: ConvolutionProblem) -> list[str]:
    """The definition convolves 16-bit tensors in float32, where a cuDNN that is wrong in 16 bits may be right."""
    return _cudnn_bugs(problem, torch.promote_types(problem.dtype, torch.float32))


_PLAIN = (Backend("torch", convolution_torch.run, _torch_unsupported),
          Backend("reference", _reference, _reference_unsupported))
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
