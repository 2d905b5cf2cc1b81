"""Calls of every family's launchers on tensors without memory, and what their configs depend on: for tests where no kernel
runs. A launch that ``aot.launches`` records is what Triton would compile.
"""

import importlib
from functools import partial

import torch

from sora_fast.kernels import attention, convolution, modulation, normalization, patches, rotary
from sora_fast.kernels.launch import dense
from sora_fast.testing.launches import FAMILIES

GPUS = ("sm80-A100", "sm86-RTX-A6000", "sm89-L4", "sm90-H200", "sm100-B200", "sm103", "sm120")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


CONFIGS = {family: importlib.import_module(f"sora_fast.kernels.{family}_config") for family in FAMILIES}
HEURISTICS = {family: module.HEURISTICS for family, module in CONFIGS.items()}


def config_of(family, kernel, *launch, gpu="sm90"):
    return HEURISTICS[family][kernel](CONFIGS[family].Launch(*launch), gpu)


# ------------------------------------------------------------------------------- what configs depend on
def launches(family):
    """(kernel, Launch) of models' shapes and of odd ones."""
    for kernel, launch in _launches(family):
        for each in HEURISTICS[family] if kernel is None else (kernel,):
            yield each, launch


def _launches(family):
    b, f, launch = torch.bfloat16, torch.float32, CONFIGS[family].Launch
    if family == "patches":
        for channels in (1, 3, 4, 12, 16, 48, 128):
            for patch in ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 3, 5), (1, 16, 16), (2, 16, 16), (1, 32, 32), (1, 1, 64)):
                for dtype in (b, f):
                    yield "permute", launch(1024, channels, patch[0] * patch[1], patch[2], dtype)
                    for width in (1, 37, 384, 1152, 5120):
                        for kernel in ("embed", "latents", "weight"):
                            yield kernel, launch(1024, width, channels * patch[0] * patch[1], patch[2], dtype)
    elif family == "modulation":
        for width in (1, 8, 16, 37, 384, 768, 1024, 1152, 1536, 1920, 3072, 5120, 6144, 8192):
            for x, y in ((b, None), (f, b)):
                yield None, launch(width, 1024, x, y, "layer", False)
    elif family == "rotary":
        for heads, head_dim in ((1, 2), (3, 17), (6, 64), (12, 128), (16, 72), (24, 128), (30, 64), (40, 128), (64, 128)):
            for norm, freqs in (("rms_all", "fixed"), (None, "fixed"), (None, "learned"), ("layer_head", None)):
                yield None, launch(heads, heads, head_dim, 1024, b, norm, norm is not None, freqs, "half")
    elif family == "normalization":
        for channels in (1, 3, 16, 48, 96, 160, 192, 384, 512, 1024, 2048):
            for pixels in (1, 2**13, 2**24):
                for norm in ("rms", "group"):
                    for dtype in (b, f):
                        yield None, launch(channels, pixels, norm, "silu", dtype, b)
    elif family == "attention":
        for head_dim in range(16, 257, 8):
            for dtype in (b, torch.float16, f):
                for band in (False, True):
                    yield None, launch(head_dim, dtype, 1, band)
    else:
        for channels in (3, 12, 16, 32, 48, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024):
            for other in (channels, 3, 96, 384):
                for dtype in (b, torch.float16, f):
                    yield None, launch(channels, other, (3, 3, 3), (1, 1, 1), 1, "zeros", dtype)
                    yield None, launch(channels, other, (1, 3, 3), (1, 2, 2), 1, "replicate", dtype)


# ----------------------------------------------------------------------------------------------- calls
def call_patches(tokens, samples, tail=0):
    """Both ops, forward and backward."""
    grids, cu_seqlens = meta(samples, 3, dtype=torch.int32), meta(samples + 1, dtype=torch.int32)
    weight, bias, latents = meta(32, 4, 1, 2, 2), meta(32), meta((tokens + tail) * 16)
    config = patches.ProductConfig(64, 32, 16, 4, 2)
    out = patches.embed(latents, weight, bias, grids, cu_seqlens, config=config)
    patches.embed_latents_gradient(out, weight, grids, cu_seqlens, config=config)
    patches.embed_weight_gradient(out, latents, weight, grids, cu_seqlens, want_weight=True, want_bias=True, config=config)
    cut_patches(tokens, samples, latents)


def cut_patches(tokens, samples, latents=None):
    """unpatchify forward, or, of ``latents``, its backward: the same kernel with another constant."""
    config = config_of("patches", "permute", 1024, 4, 2, 2, torch.bfloat16)
    grids, cu_seqlens = meta(samples, 3, dtype=torch.int32), meta(samples + 1, dtype=torch.int32)
    given = meta(tokens, 16) if latents is None else latents
    patches.permute(given, grids, cu_seqlens, (1, 2, 2), 4, back=latents is not None, config=config)


def call_modulation(tokens, count, rows=True):
    """Forward and backward of the fused op."""
    x, tables = meta(tokens, 16), meta(count, 6 * 16).chunk(6, dim=-1)[:3]
    at = meta(tokens, dtype=torch.int32) if rows else None
    launch = 16, 1024, x.dtype, x.dtype, "layer", False
    x_new, h, stats = modulation.forward(x, x, *tables, at, None, None, norm="layer", eps=1e-6, save=True, dtype=x.dtype,
                                         config=config_of("modulation", "forward", *launch))
    modulation.backward(x_new, h, x_new, x, *tables, at, None, None, stats, norm="layer", wanted=[True] * 5 + [False] * 2,
                        config=config_of("modulation", "backward", *launch))


def call_rotary(tokens, layout="product", learned=False, rows=True):
    """Forward and backward; q and k as parts of one product, or heads before tokens."""
    if layout == "product":
        q, k, _ = meta(tokens, 3, 2, 24).unbind(1)
    else:
        q, k = meta(2, tokens, 24).transpose(0, 1), meta(2, tokens, 24).transpose(0, 1)
    coords, at = meta(tokens, 3, dtype=torch.int32), meta(tokens, dtype=torch.int32) if rows else None
    freqs = meta(3, 2, 12, dtype=torch.float32) if learned else meta(3, 12, dtype=torch.float32)
    launch = 2, 2, 24, 1024, q.dtype, "rms_head", True, "learned" if learned else "fixed", "interleaved"
    rest = (coords, meta(24), meta(24), None, None, freqs, at)
    settings = dict(norm="rms_head", pairing="interleaved", eps=1e-6)
    outs = rotary.forward(q, k, *rest, **settings, config=config_of("rotary", "forward", *launch))
    rotary.backward(*outs, q, k, *rest, **settings, wanted=[True] * 4 + [False] * 2 + [learned],
                    config=config_of("rotary", "backward", *launch))


def call_normalization(shape, norm, cached=None, keep=0, wanted=(True, True, True)):
    """Forward, with a cache and without, and backward."""
    batch, frames, height, width = shape
    video = lambda frames: meta(batch, frames, height, width, 16).movedim(-1, 1)
    x, weight = video(frames), meta(16)
    launch = 16, 2**20, norm, "silu", x.dtype, x.dtype
    facts = dict(norm=norm, groups=4, eps=1e-24, act="silu")
    y, _, stats = normalization.forward(
        x, weight, weight, dtype=x.dtype, config=config_of("normalization", "forward", *launch),
        cache=None if cached is None else video(cached), keep=keep, **facts)
    normalization.backward(y, x, weight, weight, stats, wanted=wanted,
                           config=config_of("normalization", "backward", *launch), **facts)


def call_attention(queries, keys, samples, heads=2, key_heads=2, head_dim=16, pitch=None, gpu="sm90", **mask):
    """Forward and backward; ``pitch``: elements from one token to the next."""
    pitch = pitch or heads * head_dim
    cut = lambda rows, count: torch.empty_strided((rows, count, head_dim), (pitch, head_dim, 1), dtype=torch.bfloat16,
                                                  device="meta")
    q, k, cu = cut(queries, heads), cut(keys, key_heads), meta(samples + 1, dtype=torch.int32)
    launch = head_dim, q.dtype, heads // key_heads, bool(mask)
    options = dict(scale=0.1, causal=False, window=(-1, -1), tf32=False) | mask
    config, dq_config, dkdv_config = (config_of("attention", kernel, *launch, gpu=gpu)
                                       for kernel in ("forward", "dq", "dkdv"))
    out, lse, parts = attention.forward(q, k, k, cu, cu, config=config, **options)
    attention.backward(out, lse, q, k, k, out, lse, parts, cu, cu, dq_config=dq_config, dkdv_config=dkdv_config, **options)


def calls_of_convolution(op):
    """Launches of one kernel at sizes that share nothing but channels."""
    for batch, frames, height, width, cached, phase in ((1, 4, 32, 32, 2, 0), (3, 1, 16, 48, 1, 0), (2, 17, 15, 33, 2, 1),
                                                        (1, 16, 1, 17, 1, 3)):
        geometry = convolution.Geometry((3, 3, 3), (1, 1, 1), (1, 1, 1, 1), "zeros", "zeros", phase, 0, 1)
        make = lambda *shape: dense(meta(*shape))
        x, weight = make(batch, 96, frames, height, width), make(96, 96, 3, 3, 3)
        cache = make(batch, 96, cached, height, width)
        dy = make(batch, 96, *geometry.out_sizes(frames, height, width))
        launch = 96, 96, (3, 3, 3), (1, 1, 1), 1, "zeros", torch.bfloat16
        for gpu in ("sm80", "sm90"):
            config = config_of("convolution", op, *launch, gpu=gpu)
            if op == "forward":
                yield partial(convolution.forward, x, weight, None, cache, dy, geometry, tf32=False, config=config)
            elif op == "dgrad":
                yield partial(convolution.dgrad, dy, weight, cache, x.shape, cached, geometry, want_x=True, want_cache=True,
                              tf32=False, config=config)
            elif gpu == "sm80":
                yield partial(convolution.wgrad, dy, x, cache, weight, geometry, tf32=False, config=config)
