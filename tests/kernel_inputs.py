"""Small random inputs of every family, and tiles for them: what tests of kernels share."""

from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod

import torch

from sora_fast import configs, ops
from sora_fast.kernels import attention_config, convolution_config, normalization_config, rotary_config

DTYPES = (torch.float32, torch.bfloat16)


def on_kernel(op, **options):
    return partial(getattr(ops, op), backend="triton", **options)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------ modulation
def modulation(op, rows, tokens, count, width, *, norm="layer", affine=False, x=torch.float32, y=None, table=None):
    """``count`` modulation rows; dtypes of x, of y and of the table of modulation."""
    inputs = dict(x=draw(tokens, width, dtype=x), rows=rows)
    if op != "norm_modulate":
        inputs |= dict(y=draw(tokens, width, dtype=y or x), gate=draw(count, width, dtype=table or x))
    if op != "gate_residual":
        inputs |= {name: draw(count, width, dtype=table or x) for name in ("shift", "scale")} | dict(norm=norm)
        # a norm of one number is all cancellation: keep it away from division by nearly 0
        inputs |= dict(eps=1e-6 if width > 1 else 0.1)
        if affine:
            inputs |= dict(weight=draw(width, dtype=x), bias=draw(width, dtype=x))
    return inputs


# --------------------------------------------------------------------------------------------------- normalization
def normalization(shape, *, norm="rms", groups=1, act="silu", x=torch.float32, weight=torch.float32, bias=None, last=False):
    """``weight`` and ``bias`` are dtypes, or None for none; ``last``: x in channels_last_3d."""
    # few numbers in a norm are all cancellation: keep it away from division by nearly 0
    inputs = dict(x=draw(*shape, dtype=x), norm=norm, groups=groups, act=act, eps=0.1)
    if last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last_3d)
    vectors = dict(weight=weight, bias=bias)
    return inputs | {name: draw(shape[1], dtype=dtype) for name, dtype in vectors.items() if dtype is not None}


@contextmanager
def normalization_tiles(pixels):
    """All kernels with tiles of ``pixels``, and runs of four of them or of a quarter of a sample."""
    config = normalization_config.Config(warps=1, pixels=pixels, programs=1)
    with (configs.override("normalization", "forward", config), configs.override("normalization", "backward", config)):
        yield


# ---------------------------------------------------------------------------------------------------------- rotary
def rotary(tokens, heads=4, key_heads=2, head_dim=12, *, norm="rms_head", angles="part", pairing="interleaved",
           affine="both", dtype=torch.float32, whole=True, rows=None):
    """``angles``: "full", "part" (of the head dim), "learned", "per head" or None; ``affine``: "", "weight" or "both";
    ``key_heads``: 0 for no k; ``whole``: coords are ints."""
    inputs = dict(q=draw(tokens, heads, head_dim, dtype=dtype),
                  k=draw(tokens, key_heads, head_dim, dtype=dtype) if key_heads else None, norm=norm, pairing=pairing,
                  rows=rows, coords=None)
    if angles is not None:
        inputs["coords"] = torch.randint(0, 40, (tokens, 3)) if whole else 20 * draw(tokens, 3)
    pairs = head_dim // 2 - 1
    if angles in ("full", "part"):
        inputs["axes"] = (2, 0, head_dim // 2 * 2 - 2) if angles == "full" else (0, 2, 2 * pairs - 2)
        inputs["theta"] = (1e4, 100.0, 77.0)
    elif angles is not None:
        inputs["freqs"] = draw(3, *([heads] if angles == "per head" else []), pairs)
    if norm is not None:
        for name in {"": (), "weight": ("weight",), "both": ("weight", "bias")}[affine]:
            for side, count in (("q", heads), ("k", key_heads)):
                if count:
                    inputs[f"{side}_{name}"] = draw(count * head_dim if norm == "rms_all" else head_dim, dtype=dtype)
    return inputs


@contextmanager
def rotary_tiles(tokens=16):
    """Few programs, and runs of more than one step."""
    with (configs.override("rotary", "forward", rotary_config.ForwardConfig(warps=1, tokens=tokens)),
          configs.override("rotary", "backward", rotary_config.BackwardConfig(warps=1, tokens=tokens, programs=1))):
        yield


# ------------------------------------------------------------------------------------------------------- attention
def offsets(*lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


def attention(queries, keys, heads=2, key_heads=2, head_dim=16, *, tail=0, dtype=torch.float32, **options):
    """``tail`` rows of NaN behind the samples on both sides."""
    rows = lambda count, heads: draw(count + tail, heads, head_dim, dtype=dtype)
    q, k, v = rows(sum(queries), heads), rows(sum(keys), key_heads), rows(sum(keys), key_heads)
    if tail:
        for t in (q, k, v):
            t[-tail:] = float("nan")
    return dict(q=q, k=k, v=v, cu_seqlens_q=offsets(*queries), cu_seqlens_k=offsets(*keys), **options)


@contextmanager
def attention_tiles(m, n, **options):
    """Tiles of ``m`` queries and ``n`` keys in all three kernels."""
    with ExitStack() as stack:
        for kernel in attention_config.HEURISTICS:
            stack.enter_context(configs.override("attention", kernel, attention_config.Config(m, n, 4, 1, **options)))
        yield


# ----------------------------------------------------------------------------------------------------- convolution
def convolution(op, **more):
    inputs = dict(x=draw(2, 8, 2, 3, 4), weight=draw(6, 8, 3, 3, 3), bias=draw(6), cache=draw(2, 8, 2, 3, 4),
                  residual=draw(2, 6, 2, 3, 4), return_cache=True)
    if op == "norm_act_conv3d":
        inputs |= dict(norm_weight=draw(8), norm_bias=draw(8))
    return inputs | more


@contextmanager
def convolution_tiles(pixels=32, channels=32, block_k=32, extra=0, tma=False, wgrad=(32, 32, 0, 32), programs=4,
                      **wgrad_options):
    """Small tiles: the PTX of a product of large ones takes longer to compile than many programs to run."""
    config = convolution_config.Config(pixels, channels, extra, block_k, 4, 2, tma)
    with ExitStack() as stack:
        for kernel in ("forward", "dgrad"):
            stack.enter_context(configs.override("convolution", kernel, config))
        wgrad = convolution_config.WgradConfig(*wgrad, 4, 2, programs, **wgrad_options, tma=tma)
        stack.enter_context(configs.override("convolution", "wgrad", wgrad))
        yield


# --------------------------------------------------------------------------------------------------------- patches
GRIDS = ((2, 1, 3), (0, 2, 2), (1, 1, 1), (1, 2, 2))  # 6 + 0 + 1 + 4 tokens


def patches(op, grids, tail=0, channels=3, patch=(1, 2, 2), width=20, bias=True, dtype=torch.float32, small=False):
    """The flat forms, small integers with ``small``; the tail is NaN."""
    def make(*shape):
        return torch.randint(-2, 3, shape).to(dtype) if small else draw(*shape, dtype=dtype)

    tokens, numbers = sum(map(prod, grids)), channels * prod(patch)
    whole = torch.cat([make(tokens, numbers), torch.full((tail, numbers), float("nan"), dtype=dtype)])
    if op == "unpatchify":
        return dict(tokens=whole, grids=grids, patch=patch, channels=channels, flat=True)
    return dict(latents=whole.flatten(), weight=make(width, channels, *patch), bias=make(width) if bias else None,
                grids=grids)
