"""What every family's configs depend on, and calls of its launchers at small widths: for tests where no kernel runs."""

import importlib
from functools import partial

import torch

from sora_fast.testing.launches import FAMILIES, attention, convolution, modulation, normalization, patches, rotary

GPUS = ("sm80-A100", "sm86-RTX-A6000", "sm89-L4", "sm90-H200", "sm100-B200", "sm103", "sm120")


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
B = torch.bfloat16
call_patches = partial(patches.embedding, 4, (1, 2, 2), 32, B, "sm90")
cut_patches = partial(patches.permutations, 4, (1, 2, 2), B)
call_modulation = partial(modulation.both, 16, B, B, B, "layer", False)


def call_rotary(tokens, fused=True, freqs="fixed", rows=True):
    rotary.both(2, 2, 24, B, "rms_head", "interleaved", freqs, ("weight",), fused, tokens, rows)


def call_normalization(size, norm, cached=0, keep=0, wanted=(True, True, True)):
    normalization.both(16, B, B, B, norm, 4, keep, True, size, cached, wanted)


def call_attention(queries, keys, samples, heads=2, key_heads=2, head_dim=16, gpu="sm90", **more):
    attention.both(head_dim, B, gpu, heads // key_heads, queries=queries, keys=keys, samples=samples, heads=heads, **more)


def calls_of_convolution(kernel):
    """Launches of one kernel at sizes that share nothing but channels."""
    for batch, *size, cached, phase in ((1, 4, 32, 32, 2, 0), (3, 1, 16, 48, 1, 0), (2, 17, 15, 33, 2, 1),
                                        (1, 16, 1, 17, 1, 3)):
        for gpu in ("sm80",) if kernel == "wgrad" else ("sm80", "sm90"):
            yield partial(convolution.run, 96, 96, B, gpu, cached, batch, size, (kernel,), phase=phase)
