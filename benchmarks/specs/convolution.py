"""causal_conv3d and norm_act_conv3d at the sizes of published video VAEs, beside cuDNN.

B batch, C channels, T frames, H height, W width; kT, kH, kW kernel, sT, sH, sW stride.
"""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from sora_fast import ops, reference
from sora_fast.testing.draw import Draw

from ..case import FORWARD, Case, Provider
from ..providers import backends, compiled
from .normalization import PEERS, channels_last, norm_settings


@contextmanager
def sums_of_real_clips():
    """The definition's float32 convolutions made by oneDNN, as PyTorch has it do from 20,480 = B * C * T * H numbers on.

    Smaller clips, such as those of the quick suite, are unfolded into one product. Where a CPU has no AVX-512, oneDNN adds
    a window's products one after another, which at 96 channels errs 3.5 times as much (RMS) as that: by the rule, too much.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        yield
        return

    def conv3d(x, weight, bias=None, stride=(1, 1, 1)):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return F.conv3d(x, weight, bias, stride)
        if weight.shape[2] == 1:
            frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, stride[1:])
            return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)

    with mock.patch.object(reference.convolution, "F", SimpleNamespace(conv3d=conv3d, pad=F.pad)):
        yield


_CONV, _NORM_CONV = "causal_conv3d", "norm_act_conv3d"


@dataclass(frozen=True)
class ConvolutionCase(Case):
    """One convolution; ``cache`` counts the frames handed in, ``norm`` (of norm_act_conv3d) is "rms" or "group".

    Directions: ``dgrad`` is the gradient of all that is convolved, the cache's frames included, so that its products are
    the forward's; ``wgrad`` that of the weight with the bias's, as F.conv3d's own backward gives it; ``backward`` both.

    The truth is the whole reference. Its padded float64 copies take a few GB at the largest case here; if PyTorch had to
    unfold one (27 copies), that would take less than 64 GiB, and the test of this file holds every case to it.
    """

    in_channels: int
    out_channels: int
    frames: int
    height: int
    width: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int, int] | None = None  # left, right, top, bottom; None: half the kernel
    time_pad: str = "zeros"
    space_pad: str = "zeros"
    cache: int = 0
    upsample: int = 1  # height and width are those before it
    residual: bool = False
    return_cache: bool = False
    norm: str | None = None
    batch: int = 1

    @property
    def pads(self) -> tuple[int, int, int, int]:
        _, kh, kw = self.kernel
        return self.padding or (kw // 2, kw // 2, kh // 2, kh // 2)

    def truth(self, inputs, seed):
        with sums_of_real_clips():
            return super().truth(inputs, seed)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what goes in and comes out, by name."""
        (kt, kh, kw), (st, sh, sw), (left, right, top, bottom) = self.kernel, self.stride, self.pads
        image, u = (self.height, self.width), self.upsample
        out = (self.batch, self.out_channels, -(-self.frames // st), (u * self.height + top + bottom - kh) // sh + 1,
               (u * self.width + left + right - kw) // sw + 1)
        shapes = dict(x=(self.batch, self.in_channels, self.frames, *image),
                      weight=(self.out_channels, self.in_channels, *self.kernel), bias=(self.out_channels,), y=out)
        if self.cache:
            shapes |= dict(cache=(self.batch, self.in_channels, self.cache, *image))
        if self.residual:
            shapes |= dict(residual=out)
        if self.return_cache:
            shapes |= dict(cache_out=(self.batch, self.in_channels, min(kt - 1, self.cache + self.frames), *image))
        if self.norm:
            shapes |= dict(norm_weight=(self.in_channels,))
        if self.norm == "group":
            shapes |= dict(norm_bias=(self.in_channels,))
        return shapes

    def shape(self):
        return dict(B=self.batch, Cin=self.in_channels, Cout=self.out_channels, T=self.frames, H=self.height, W=self.width,
                    kernel=list(self.kernel), stride=list(self.stride), padding=list(self.pads), time_pad=self.time_pad,
                    space_pad=self.space_pad, cache=self.cache, upsample=self.upsample, residual=self.residual,
                    return_cache=self.return_cache, norm=self.norm)

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        fan_in = self.in_channels * math.prod(self.kernel)
        scales = dict(weight=fan_in**-0.5, bias=0.1, norm_weight=0.1, norm_bias=0.1)
        found = {}
        for name, shape in self.tensors().items():
            if name not in ("y", "cache_out"):
                tensor = draw(*shape, scale=scales.get(name, 1.0), mean=int(name == "norm_weight"))
                found[name] = channels_last(tensor) if tensor.dim() == 5 else tensor
        if self.norm:
            found |= norm_settings(self.norm)
        return found | dict(stride=self.stride, padding=self.pads, time_pad=self.time_pad, space_pad=self.space_pad,
                            upsample=self.upsample, return_cache=self.return_cache)

    def directions(self):
        present = self.tensors()
        named = lambda *names: tuple(name for name in names if name in present)
        found = {"forward": (), "backward": named("x", "cache", "weight", "bias", "residual", "norm_weight", "norm_bias")}
        if self.op == _CONV:
            found |= {"dgrad": named("x", "cache"), "wgrad": ("weight", "bias")}
        return found

    def flops(self, direction):
        """2 * outputs * Cin * kT * kH * kW, multiplications with padding counted as real ones; backward twice that."""
        shapes = self.tensors()
        products = 2 * math.prod(shapes["y"]) * math.prod(shapes["weight"][1:])
        return 2 * products if direction == "backward" else products

    def least_bytes(self, direction):
        """Every tensor read or written, once; a gradient is as large as what it belongs to, dy is dresidual."""
        read, written = {
            "forward": (("x", "cache", "weight", "bias", "residual", "norm_weight", "norm_bias"), ("y", "cache_out")),
            "dgrad": (("y", "cache_out", "weight"), ("x", "cache")),
            "wgrad": (("y", "x", "cache"), ("weight", "bias")),
            "backward": (("y", "cache_out", "x", "cache", "weight", "norm_weight", "norm_bias"),
                         ("x", "cache", "weight", "bias", "norm_weight", "norm_bias")),
        }[direction]
        shapes = self.tensors()
        return self.dtype.itemsize * sum(math.prod(shapes[name]) for name in (*read, *written) if name in shapes)


# -------------------------------------------------------------------------------------------------------------- peers
@contextmanager
def _searching():
    """cuDNN tries its plans and keeps the fastest, as ``torch.backends.cudnn.benchmark = True`` makes it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Convolution(torch.autograd.Function):
    """F.conv2d or F.conv3d under ``_searching`` in both directions: a backward runs when ``run`` has long returned."""

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        with _searching():
            return (F.conv3d if x.dim() == 5 else F.conv2d)(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        if needs_dx or needs_dweight:
            axes = len(ctx.stride)
            with _searching():
                dx, dweight, _ = torch.ops.aten.convolution_backward(
                    dy, *ctx.saved_tensors, None, ctx.stride, ctx.padding, [1] * axes, False, [0] * axes, 1,
                    (needs_dx, needs_dweight, False))
        if needs_dbias:  # cuDNN has no part in it within convolution_backward either; oneDNN's sum errs more
            dbias = dy.sum((0, *range(2, dy.dim())))
        return dx, dweight, dbias, None, None


def _frame_by_frame(x, weight, bias, stride, padding):
    """A kernel of one frame in 2-D, as VAEs do it: of channels_last_3d data the frames as a batch are a view."""
    y = _Convolution.apply(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, stride[1:], padding[1:])
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


_MODES = {"zeros": "constant", "replicate": "replicate", "reflect": "reflect"}


def _pad(seen, kernel_frames: int, added: int, padding, time_pad: str, space_pad: str, upsample: int, layout):
    """``seen`` (``added`` cached frames, then the clip) as it is convolved, and the zeros that cuDNN adds by itself."""
    if upsample > 1:  # frame by frame, as VAEs do it, which keeps channels last
        large = F.interpolate(seen.transpose(1, 2).flatten(0, 1), scale_factor=float(upsample), mode="nearest-exact")
        seen = large.unflatten(0, (seen.shape[0], seen.shape[2])).transpose(1, 2)
    left, right, top, bottom = padding
    itself = space_pad == "zeros" and left == right and top == bottom
    around = (0, 0, 0, 0) if itself else tuple(padding)
    before = kernel_frames - 1 - added
    if time_pad == space_pad:
        seen = F.pad(seen, (*around, before, 0), mode=_MODES[time_pad]) if before or any(around) else seen
    else:
        seen = F.pad(seen, (0, 0, 0, 0, before, 0), mode=_MODES[time_pad]) if before else seen
        seen = F.pad(seen, (*around, 0, 0), mode=_MODES[space_pad]) if any(around) else seen
    return seen.contiguous(memory_format=layout), (0, top, left) if itself else (0, 0, 0)


def _cudnn(x, weight, bias=None, *, stride, padding, time_pad, space_pad, cache=None, upsample=1, residual=None,
           return_cache=False, layout, convolve=_Convolution.apply):
    """Concatenate, repeat pixels, pad, convolve, add: what a VAE's code does around F.conv3d, all of it in the time."""
    kernel_frames = weight.shape[2]
    seen = x if cache is None else torch.cat([cache, x], dim=2)
    padded, zeros = _pad(seen, kernel_frames, seen.shape[2] - x.shape[2], padding, time_pad, space_pad, upsample,
                         layout)
    y = convolve(padded, weight, bias, stride, zeros)
    y = y if residual is None else y + residual
    return (y, seen[:, :, max(0, seen.shape[2] - kernel_frames + 1) :].clone()) if return_cache else y


def _laid_out(inputs: dict, layout) -> dict:
    wide = lambda value: isinstance(value, torch.Tensor) and value.dim() == 5
    return {name: value.contiguous(memory_format=layout) if wide(value) else value for name, value in inputs.items()}


def _padded_before(inputs: dict) -> dict:
    """``padding`` becomes what cuDNN adds by itself; x holds the rest and the cache."""
    given = _laid_out(inputs, torch.channels_last_3d)
    x, cache = given["x"], given.get("cache")
    seen = x if cache is None else torch.cat([cache, x], dim=2)
    x, zeros = _pad(seen, given["weight"].shape[2], seen.shape[2] - x.shape[2], given["padding"], given["time_pad"],
                    given["space_pad"], given["upsample"], torch.channels_last_3d)
    kept = {name: given[name] for name in ("weight", "bias", "stride", "residual") if name in given}
    return dict(x=x, padding=zeros, **kept)


def _cudnn_alone(x, weight, bias=None, *, stride, padding, residual=None):
    y = _Convolution.apply(x, weight, bias, stride, padding)
    return y if residual is None else y + residual


def _no_cudnn(case, direction, device) -> str:
    if device.type == "cuda":
        return "" if torch.backends.cudnn.is_available() else "This PyTorch was built without cuDNN."
    return "" if device.type == "cpu" else f"cuDNN runs on NVIDIA GPUs, and this device is of type {device.type}."


def _nothing_to_hand_on(case, direction, device) -> str:
    return _no_cudnn(case, direction, device) or (
        "This case returns a cache, which is the caller's part of the work, and here the convolution is timed alone."
        if case.return_cache else "")


def _several_frames(case, direction, device) -> str:
    return _no_cudnn(case, direction, device) or (
        "" if case.kernel[0] == case.stride[0] == 1 else
        f"A 2-D convolution has a kernel of one frame, and this case has {case.kernel[0]} with stride {case.stride[0]}.")


def _details(layout: str, padding: str):
    def details(case, device) -> dict:
        if device.type == "cpu":
            return dict(library="oneDNN, or PyTorch's own convolution where that does not apply", layout=layout,
                        padding=padding)
        return dict(library=f"cuDNN {torch.backends.cudnn.version()}", benchmark=True, layout=layout, padding=padding)
    return details


def _norm_then_cudnn(norm_act):
    def run(x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm, groups, eps, act, **convolution):
        h = norm_act(x, norm_weight, norm_bias, norm=norm, groups=groups, eps=eps, act=act)
        return _cudnn(h, weight, bias, layout=torch.channels_last_3d, **convolution)
    return run


def _either(*reasons):
    return lambda *asked: next((why for reason in reasons if (why := reason(*asked))), "")


def _compiled(op: str) -> Provider:
    """torch.compile of the composition in the inputs' dtype: the definition convolves in float32, as nobody would."""
    run = functools.cache(lambda: torch.compile(partial(getattr(ops, op), backend="torch"), dynamic=False, fullgraph=True))
    return replace(compiled(op), run=lambda **inputs: run()(**inputs),
                   unavailable=_either(compiled(op).unavailable, _compiler_fails))


def _compiler_fails(case, direction, device) -> str:
    lost = device.type == "cpu" and direction != FORWARD and case.space_pad == "replicate" and any(case.pads)
    return ("On a CPU the graph of torch.compile stops with an error in replication_pad2d_backward, whose strides are not "
            "those it was told (PyTorch 2.13)." if lost else "")


def providers(op: str) -> list[Provider]:
    """cuDNN goes first: PyTorch keeps a shape's plan whether it was searched or guessed, and the first found stays."""
    last, inside = torch.channels_last_3d, "in the time: concatenation and F.pad, zeros around a frame by the convolution"
    if op == _CONV:
        peers = [
            Provider("cudnn", partial(_cudnn, layout=last), partial(_laid_out, layout=last), _no_cudnn,
                     _details("channels_last_3d", inside)),
            Provider("cudnn_prepadded", _cudnn_alone, _padded_before, _nothing_to_hand_on,
                     _details("channels_last_3d", "not in the time: x holds the past and the padding already")),
            Provider("cudnn_2d", partial(_cudnn, layout=last, convolve=_frame_by_frame), partial(_laid_out, layout=last),
                     _several_frames, _details("channels_last", inside)),
            Provider("cudnn_ncdhw", partial(_cudnn, layout=torch.contiguous_format),
                     partial(_laid_out, layout=torch.contiguous_format), _no_cudnn, _details("NCDHW", inside)),
        ]
    else:
        peers = [Provider(f"{name}_cudnn", _norm_then_cudnn(norm_act), partial(_laid_out, layout=last),
                          _either(why, _no_cudnn), _details("channels_last_3d", inside)) for name, norm_act, why in PEERS]
    peers = [replace(peer, on_cpu=peer.name.replace("cudnn", "onednn")) for peer in peers]  # F.conv3d calls oneDNN there
    return [*peers, *backends(op), _compiled(op)]


# -------------------------------------------------------------------------------------------------------------- cases
def _case(label, channels, size, dtype=torch.bfloat16, suites=("full",), **options):
    return ConvolutionCase(_NORM_CONV if "norm" in options else _CONV, label, dtype, suites, *channels, *size, **options)


_QUICK = dict(suites=("quick",))
_QUICK32 = dict(dtype=torch.float32, **_QUICK)
_REPLICATE = dict(time_pad="replicate", space_pad="replicate")
_STREAM = dict(cache=2)  # the last kT - 1 frames of the chunk before

# Wan decodes one latent frame at a time, 1, 2 or 4 frames of its stages; HunyuanVideo a tile of 5, which is 9 or 17.
CASES = [
    _case("3x3x3, 96 channels, cache in and out", (96, 96), (2, 12, 16), **_QUICK32, cache=2, return_cache=True),
    _case("(1, 3, 3), stride 2, uneven padding", (48, 48), (2, 64, 96), **_QUICK32, kernel=(1, 3, 3), stride=(1, 2, 2),
          padding=(0, 1, 0, 1)),
    _case("(3, 1, 1), 48 to 96 channels, replicate", (48, 96), (3, 48, 64), **_QUICK32, kernel=(3, 1, 1), **_REPLICATE),
    _case("3x3x3, 32 channels, residual, 16 bits", (32, 32), (2, 12, 16), **_QUICK, cache=2, residual=True),
    _case("(1, 3, 3), 48 to 24 channels, upsampled", (48, 24), (2, 32, 48), **_QUICK32, kernel=(1, 3, 3), upsample=2),
    _case("3x3x3, 96 to 3 channels, replicate", (96, 3), (2, 32, 48), **_QUICK32, **_REPLICATE),

    _case("Wan 2.1, 480p, 96 channels", (96, 96), (4, 480, 832), **_STREAM),
    _case("Wan 2.1, 480p, 192 channels", (192, 192), (4, 240, 416), **_STREAM),
    _case("Wan 2.1, 480p, 384 channels", (384, 384), (2, 120, 208), **_STREAM),
    _case("Wan 2.1, 480p, 384 channels, one latent frame", (384, 384), (1, 60, 104), **_STREAM),
    _case("Wan 2.1, 480p, 96 channels, residual, cache in and out", (96, 96), (4, 480, 832), **_STREAM, residual=True,
          return_cache=True),
    _case("Wan 2.1, 480p, 192 channels, float32", (192, 192), (4, 240, 416), dtype=torch.float32, **_STREAM),
    _case("Wan 2.1, training on 17 frames of 256x256, 96 channels", (96, 96), (17, 256, 256)),
    _case("Wan 2.1, 480p, 384 to 192 channels after upsampling", (384, 192), (4, 240, 416), kernel=(1, 3, 3)),
    _case("Wan 2.1, 480p, 192 to 96 channels after upsampling", (192, 96), (4, 480, 832), kernel=(1, 3, 3)),
    _case("Wan 2.1, 480p, 384 to 192 channels, upsampled", (384, 192), (4, 120, 208), kernel=(1, 3, 3), upsample=2),
    _case("Wan 2.1, 480p, 192 to 96 channels, upsampled", (192, 96), (4, 240, 416), kernel=(1, 3, 3), upsample=2),
    _case("Wan 2.1, 480p, 384 to 192 channels, upsampled from a latent's size", (384, 192), (2, 60, 104), kernel=(1, 3, 3),
          upsample=2),
    _case("Wan 2.1, 480p, 192 to 384 channels", (192, 384), (2, 120, 208), **_STREAM),
    _case("Wan 2.1, 480p, 384 to 768 channels in time", (384, 768), (2, 120, 208), kernel=(3, 1, 1), **_STREAM),
    _case("Wan 2.1, 480p, decoder's last, 96 to 3 channels", (96, 3), (4, 480, 832), **_STREAM),
    _case("Wan 2.1, 480p, decoder's first, 16 to 384 channels", (16, 384), (1, 60, 104), **_STREAM),
    _case("Wan 2.1, 480p, encoder's first, 3 to 96 channels", (3, 96), (4, 480, 832), **_STREAM),
    _case("Wan 2.1, 480p, encoder's downsampling, 96 channels", (96, 96), (4, 480, 832), kernel=(1, 3, 3), stride=(1, 2, 2),
          padding=(0, 1, 0, 1)),
    _case("Wan 2.2 encoder, 480p, 160 channels", (160, 160), (4, 240, 416), **_STREAM),
    _case("Wan 2.2 decoder, 720p, 1024 channels", (1024, 1024), (2, 88, 160), **_STREAM),
    _case("CogVideoX, 480p, 256 channels", (256, 256), (8, 240, 360), time_pad="replicate", **_STREAM),
    _case("CogVideoX, 480p, 512 channels", (512, 512), (2, 60, 90), time_pad="replicate", **_STREAM),
    _case("HunyuanVideo, a tile, 128 channels", (128, 128), (17, 256, 256), **_REPLICATE),
    _case("HunyuanVideo, a tile, 256 channels after upsampling", (256, 256), (17, 256, 256), **_REPLICATE),
    _case("HunyuanVideo, a tile, 512 channels after upsampling", (512, 512), (9, 128, 128), **_REPLICATE),
    _case("HunyuanVideo, a tile, encoder's downsampling, 256 channels", (256, 256), (17, 128, 128), stride=(2, 2, 2),
          **_REPLICATE),
    _case("Mochi, one latent frame, 128 channels", (128, 128), (6, 480, 848), **_REPLICATE),

    _case("rms, 3x3x3, 96 channels, cache", (96, 96), (2, 12, 16), **_QUICK32, norm="rms", cache=2, return_cache=True),
    _case("group, 3x3x3, 32 channels, 16 bits", (32, 32), (2, 12, 16), **_QUICK, norm="group"),
    _case("Wan 2.1, 480p, 96 channels", (96, 96), (4, 480, 832), norm="rms", **_STREAM),
    _case("Wan 2.1, 480p, 192 channels", (192, 192), (4, 240, 416), norm="rms", **_STREAM),
    _case("Wan 2.1, 480p, 384 channels", (384, 384), (2, 120, 208), norm="rms", **_STREAM),
    _case("Wan 2.1, 480p, 96 channels, residual, cache in and out", (96, 96), (4, 480, 832), norm="rms", **_STREAM,
          residual=True, return_cache=True),
    _case("Wan 2.1, training on 17 frames of 256x256, 96 channels", (96, 96), (17, 256, 256), norm="rms"),
    _case("HunyuanVideo, a tile, 128 channels", (128, 128), (17, 256, 256), norm="group", **_REPLICATE),
]
