"""Inputs that break kernels, a few per op: ragged, empty, odd, strided, tailed with NaN.

``cases(op, dtype)`` yields (label, keyword arguments); the same serve the tests, ``validate`` and the benchmark's gate. On a
GPU calls at the sizes of models follow (model_cases.py).
"""

from collections.abc import Iterator

import torch

from .. import reference
from ..pack import Pack
from . import model_cases
from .draw import Draw

RAGGED = [(2, 3, 5), (0, 4, 4), (1, 1, 1), (1, 7, 3), (3, 2, 2)]  # 30 + 0 + 1 + 21 + 12 = 64 tokens


def _nan_tail(x, tokens):
    x = x.clone()
    x[tokens:] = float("nan")
    return x


def _modulation(op, draw) -> Iterator[tuple[str, dict]]:
    pack = Pack(RAGGED, device=draw.device)
    frames = Pack(RAGGED, modulation="frame", device=draw.device).pad_to(71)
    single = Pack([(1, 1, 1)], device=draw.device)
    settings = [
        ("layer, rows per sample, chunk(6) views", pack, 48, dict(norm="layer"), "chunk", draw.dtype),
        ("rms with weight, per frame, NaN tail, odd width", frames, 37, dict(norm="rms", weight=37), "own",
         torch.float32),
        ("layer, affine, float32 modulation", pack, 40, dict(norm="layer", weight=40, bias=40), "own", torch.float32),
        ("one token, one row", single, 8, dict(norm="rms"), "own", draw.dtype),
        ("rows None, one row for all", None, 33, dict(norm="layer"), "one", draw.dtype),
        ("rows None, one row per token", None, 16, dict(norm="rms", weight=16, bias=16), "token", draw.dtype),
    ]
    for label, layout, width, norm, form, modulation_dtype in settings:
        tokens = layout.num_tokens if layout else 13
        count = {"one": 1, "token": tokens}.get(form, layout.num_rows if layout else 1)
        table = draw(count, 6 * width, dtype=modulation_dtype)
        tables = table.chunk(6, dim=-1) if form == "chunk" else [t.contiguous() for t in table.chunk(6, dim=-1)]
        x, y = draw(tokens, width), draw(tokens, width)
        if layout is frames:
            x, y = _nan_tail(x, 64), _nan_tail(y, 64)
        arguments = dict(x=x, rows=layout.rows if layout else None)
        if op != "norm_modulate":
            arguments |= dict(y=y, gate=tables[2])
        if op != "gate_residual":
            arguments |= dict(shift=tables[0], scale=tables[1])
            arguments |= {n: (draw(v) if n in ("weight", "bias") else v) for n, v in norm.items()}
        yield label, arguments
    x32 = draw(64, 24, dtype=torch.float32) if draw.dtype != torch.float64 else draw(64, 24)
    if op == "norm_modulate":
        yield "no shift, no scale", dict(x=draw(64, 24), shift=None, scale=None, rows=None)
        yield "strided x", dict(x=draw(64, 48)[:, ::2], shift=draw(5, 24), scale=None, rows=pack.rows)
        yield "float32 residual stream", dict(x=x32, shift=draw(5, 24), scale=draw(5, 24), rows=pack.rows, dtype=draw.dtype)
    else:
        rest = dict(shift=draw(5, 24), scale=None) if op == "gate_residual_norm_modulate" else {}
        yield "float32 residual stream", dict(x=x32, y=draw(64, 24), gate=draw(5, 24), rows=pack.rows, **rest)


def _rotary(op, draw) -> Iterator[tuple[str, dict]]:
    pack = Pack(RAGGED, device=draw.device)
    coords = pack.coords
    q, k = draw(64, 4, 24), draw(64, 2, 24)
    yield "rms_head, GQA, part rotated", dict(q=q, k=k, coords=coords, axes=(4, 8, 8), q_weight=draw(24),
                                              k_weight=draw(24))
    yield "rms_all, half pairing", dict(q=q, k=draw(64, 4, 24), coords=coords, axes=(8, 8, 8), norm="rms_all",
                                        q_weight=draw(96), k_weight=draw(96), pairing="half")
    yield "layer_head with bias, theta per axis", dict(
        q=q, k=k, coords=coords, axes=(0, 12, 12), norm="layer_head", q_weight=draw(24), k_weight=draw(24),
        q_bias=draw(24), k_bias=draw(24), theta=(1e4, 1e3, 256.0))
    yield "no norm, learned freqs per head", dict(q=q, k=draw(64, 4, 24), coords=coords, norm=None,
                                                  freqs=draw(3, 4, 12, dtype=torch.float32))
    yield "learned freqs, no heads", dict(q=q, k=k, coords=coords, freqs=draw(3, 9, dtype=torch.float32),
                                          pairing="half")
    yield "no rotation, other key length", dict(q=q, k=draw(17, 2, 24), coords=None, norm="rms_head")
    yield "no keys, strided q", dict(q=draw(64, 3, 4, 24)[:, 1], k=None, coords=coords, axes=(8, 8, 8))
    tail = pack.pad_to(70)
    yield "NaN tail with rows", dict(q=_nan_tail(draw(70, 4, 24), 64), k=_nan_tail(draw(70, 2, 24), 64),
                                     coords=tail.coords, axes=(8, 8, 8), q_weight=draw(24), rows=tail.rows)


def _attention(op, draw) -> Iterator[tuple[str, dict]]:
    def lengths(*numbers):
        return torch.tensor([0, *torch.tensor(numbers, device="cpu").cumsum(0)], dtype=torch.int32, device=draw.device)

    def make(label, lens_q, lens_k, heads, key_heads, head_dim, tail=0, **options):
        nq, nk = sum(lens_q) + tail, sum(lens_k) + tail
        q, k, v = draw(nq, heads, head_dim), draw(nk, key_heads, head_dim), draw(nk, key_heads, head_dim)
        if tail:
            q, k, v = _nan_tail(q, nq - tail), _nan_tail(k, nk - tail), _nan_tail(v, nk - tail)
        return label, dict(q=q, k=k, v=v, cu_seqlens_q=lengths(*lens_q), cu_seqlens_k=lengths(*lens_k),
                           max_seqlen_q=max(lens_q), max_seqlen_k=max(lens_k), **options)

    lse = dict(return_lse=True) if op == "varlen_attention" else {}
    yield make("self, ragged", [30, 0, 1, 21, 12], [30, 0, 1, 21, 12], 4, 4, 16)
    yield make("cross, GQA, empty keys, NaN tail", [5, 7, 1], [11, 0, 40], 4, 2, 24, tail=3)
    yield make("causal, more queries than keys", [9, 4], [5, 17], 2, 1, 32, causal=True)
    yield make("window", [33, 20], [29, 20], 2, 2, 16, window=(4, 2))
    yield make("log-sum-exp", [13, 3], [7, 0], 3, 3, 16, softmax_scale=0.3, **lse)
    packed = draw(40, 3, 2, 16)
    yield "strided slices of packed qkv", dict(
        q=packed[:, 0], k=packed[:, 1], v=packed[:, 2], cu_seqlens_q=lengths(15, 25), cu_seqlens_k=lengths(15, 25),
        max_seqlen_q=25, max_seqlen_k=25)


def _attention_backward(op, draw, forward=_attention) -> Iterator[tuple[str, dict]]:
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    for label, inputs in forward(op, draw):
        kept = {name: value for name, value in inputs.items() if not name.startswith("max_")}
        out, lse = reference.varlen_attention_forward(**kept)
        yield label, dict(dout=draw(*out.shape), dlse=draw(*lse.shape, dtype=lse.dtype), out=out, lse=lse, **inputs)
    if forward is not _attention:
        return
    kept = {name: kept[name] for name in names}
    yield "no gradient of lse", dict(dout=draw(*out.shape), dlse=None, out=out, lse=lse, **kept)


def _merge(op, draw) -> Iterator[tuple[str, dict]]:
    lses = [draw(3, 20, dtype=torch.promote_types(draw.dtype, torch.float32)) for _ in range(3)]
    lses[0][:, :7] = -torch.inf
    lses[1][:, 3:9] = -torch.inf
    lses[2][:, 5] = -torch.inf
    yield "three parts, some empty", dict(outs=[draw(20, 3, 16) for _ in range(3)], lses=lses)
    yield "one part", dict(outs=[draw(5, 1, 16)], lses=[draw(1, 5, dtype=lses[0].dtype)])


def _convolution(op, draw) -> Iterator[tuple[str, dict]]:
    def make(label, x, kernel, out, cache=None, bias=True, residual=None, **options):
        channels = x[1]
        arguments = dict(x=draw(*x), weight=draw(out, channels, *kernel) / (channels * kernel[0]) ** 0.5,
                         bias=draw(out) if bias else None, **options)
        if cache is not None:
            arguments["cache"] = draw(x[0], channels, cache, *x[3:])
        if residual is not None:
            arguments["residual"] = draw(*residual)
        if op == "norm_act_conv3d":
            arguments |= dict(norm_weight=draw(channels), norm_bias=draw(channels) if bias else None)
            if channels % 4 == 0 and channels < 96:
                arguments |= dict(norm="group", groups=4, act=None)
        return label, arguments

    # a dozen channels, or the rule would judge the norm's gradients by a few numbers
    yield make("3x3x3", (2, 13, 4, 6, 5), (3, 3, 3), 7)
    yield make("cache of 2, residual, cache_out", (1, 16, 3, 5, 7), (3, 3, 3), 6, cache=2, residual=(1, 6, 3, 5, 7),
               return_cache=True)
    yield make("cache of 1, replicate, reflect", (2, 12, 3, 5, 4), (3, 3, 3), 3, cache=1, time_pad="replicate",
               space_pad="reflect")
    yield make("strides and phase", (1, 11, 6, 7, 8), (3, 3, 3), 5, stride=(2, 2, 2), phase=1, return_cache=True)
    yield make("one frame, replicate space", (2, 11, 1, 5, 6), (3, 3, 3), 4, space_pad="replicate", return_cache=True)
    yield make("(1, 3, 3), uneven padding, stride 2", (1, 14, 2, 6, 8), (1, 3, 3), 4, stride=(1, 2, 2),
               padding=(0, 1, 0, 1))
    yield make("(3, 1, 1), no bias", (1, 16, 5, 3, 2), (3, 1, 1), 12, bias=False)
    yield make("lookahead", (1, 13, 4, 5, 5), (3, 3, 3), 2, lookahead=1, time_pad="replicate")
    yield make("upsampled, cache, residual, cache_out", (1, 16, 3, 3, 4), (3, 3, 3), 5, cache=2, residual=(1, 5, 3, 6, 8),
               upsample=2, return_cache=True)
    yield make("upsampled by 3, (1, 3, 3), reflect, stride 2", (1, 11, 2, 2, 3), (1, 3, 3), 4, stride=(1, 2, 2),
               space_pad="reflect", upsample=3)
    yield make("1x1x1", (2, 12, 2, 3, 3), (1, 1, 1), 3, return_cache=True)
    if draw.on_gpu:
        yield from _model_convolutions(make)


def _model_convolutions(make) -> Iterator[tuple[str, dict]]:
    """Channels of models, which other kernels take than a dozen does; minutes of a CPU."""
    for channels, out in ((96, 96), (128, 128), (160, 160), (192, 192), (256, 256), (384, 384), (96, 192), (160, 128)):
        yield make(f"{channels} to {out}, cache, residual, cache_out", (1, channels, 2, 9, 18), (3, 3, 3), out, cache=2,
                   residual=(1, out, 2, 9, 18), return_cache=True)
    yield make("96, an image", (2, 96, 1, 17, 16), (3, 3, 3), 96, return_cache=True)
    yield make("96, cache of 1, replicate", (2, 96, 2, 9, 20), (3, 3, 3), 96, cache=1, time_pad="replicate",
               space_pad="replicate", return_cache=True)
    yield make("128, reflect, no bias", (1, 128, 4, 8, 9), (3, 3, 3), 128, space_pad="reflect", bias=False)
    yield make("192, (3, 1, 1), stride 2 in time, phase 1", (1, 192, 5, 6, 20), (3, 1, 1), 192, cache=2, stride=(2, 1, 1),
               phase=1, return_cache=True)
    yield make("384 to 192, (1, 3, 3), uneven padding", (1, 384, 2, 12, 33), (1, 3, 3), 192, padding=(0, 1, 2, 1))
    yield make("160, lookahead", (1, 160, 3, 5, 33), (3, 3, 3), 160, lookahead=1, time_pad="replicate")
    yield make("256, 1x1x1", (3, 256, 2, 3, 3), (1, 1, 1), 512)


def _normalization(op, draw) -> Iterator[tuple[str, dict]]:
    yield "rms, silu", dict(x=draw(2, 12, 3, 5, 4), weight=draw(12))
    yield "rms, Wan's eps, no act", dict(x=draw(1, 7, 2, 3, 3), weight=draw(7), bias=draw(7), eps=1e-24, act=None)
    yield "group", dict(x=draw(2, 12, 3, 5, 4), weight=draw(12), bias=draw(12), norm="group", groups=4)
    yield "group without weight, strided", dict(x=draw(2, 6, 3, 5, 8)[..., ::2], norm="group", groups=3)
    if draw.on_gpu:
        for channels in (8, 48, 96, 160, 384, 1024):
            yield f"rms, {channels} channels", dict(x=draw(2, channels, 3, 7, 9), weight=draw(channels), bias=draw(channels))


def _latents(op, draw) -> Iterator[tuple[str, dict]]:
    yield "sample", dict(moments=draw(3, 8, 2, 3, 5), noise=draw(3, 4, 2, 3, 5))
    yield "mean", dict(moments=draw(2, 2, 1), noise=None)
    low = draw(2, 4, 7) * torch.tensor([1, 1, 40, 40], device=draw.device).to(draw.dtype)[:, None]
    low[:, 2:] = -low[:, 2:].abs()
    yield "clamped below", dict(moments=low, noise=draw(2, 2, 7))
    if draw.dtype != torch.float16:  # exp(20) is beyond float16, and so is the gradient
        yield "clamped above", dict(moments=-low, noise=draw(2, 2, 7, dtype=torch.float32) * 1e-4)


def _patches(op, draw) -> Iterator[tuple[str, dict]]:
    grids, patch, channels = tuple(RAGGED), (1, 2, 2), 3
    numel = 12
    if op == "patch_embed":
        weight, bias = draw(20, channels, *patch), draw(20)
        yield "flat, ragged", dict(latents=draw(64 * numel), weight=weight, bias=bias, grids=grids)
        yield "flat with NaN tail", dict(latents=_nan_tail(draw(67 * numel), 64 * numel), weight=weight, bias=bias,
                                         grids=grids)
        yield "patch (2, 4, 1), no bias", dict(latents=draw(3 * 6 * 16), weight=draw(5, 2, 2, 4, 1), bias=None,
                                               grids=((1, 2, 3), (3, 1, 4)))
    else:
        yield "ragged", dict(tokens=draw(64, numel), grids=grids, patch=patch, channels=channels, flat=True)
        yield "NaN tail", dict(tokens=_nan_tail(draw(70, 24), 64), grids=grids, patch=(2, 2, 2), channels=3, flat=True)


_MAKERS = {
    "patch_embed": _patches, "unpatchify": _patches,
    "norm_modulate": _modulation, "gate_residual": _modulation, "gate_residual_norm_modulate": _modulation,
    "qk_norm_rope": _rotary,
    "varlen_attention": _attention, "varlen_attention_forward": _attention,
    "varlen_attention_backward": _attention_backward, "merge_attention": _merge,
    "causal_conv3d": _convolution, "norm_act_conv3d": _convolution,
    "norm_act": _normalization,
    "kl_sample": _latents,
}


def cases(op: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0,
          models: bool | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (label, keyword arguments) for ``op`` with tensors of ``dtype``.

    Args:
        op: name of an op. dtype: of its tensors. seed: of their numbers.
        device: may be "emulated:sm90". models: whether calls at the sizes of models follow; None: on a real GPU, as they
            take minutes of a CPU.

    Raises:
        ValueError: an unknown op.
    """
    if op not in _MAKERS:
        raise ValueError(f"cases: expected one of {', '.join(_MAKERS)}, got {op!r}; name an op of sora_fast.ops")
    draw = Draw(device, seed, dtype, alike=True)
    yield from _MAKERS[op](op, draw)
    if not (str(device).startswith("cuda") if models is None else models):
        return
    if op == "varlen_attention_backward":
        yield from _attention_backward(op, draw, model_cases.attention)
    elif op in model_cases.MAKERS:
        yield from model_cases.MAKERS[op](op, draw)
