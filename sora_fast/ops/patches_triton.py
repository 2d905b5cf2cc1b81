"""Backend "triton" of patch_embed and unpatchify."""

import functools
from functools import partial
from math import prod

import torch
import torch.nn.functional as F

from .. import checks, configs
from ..dispatch import Backend
from ..first_order import opaque
from ..precision import has_data
from ..to_device import to_device
from . import operators, triton_backend
from .uploads import uploaded_grids

LONGEST_RUN = 64


@functools.cache
def _kernels():
    """Imported at the first launch: they need Triton, which need not be there."""
    from ..kernels import patches

    return patches


def _copies(like, sizes):
    # copies, because a traced graph may reuse the memory of an op's outputs
    grids = tuple(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    return [table.clone() for table in uploaded_grids(grids, like.device)]


def _fake_copies(like, sizes):
    samples = len(sizes) // 3
    return [like.new_empty(shape, dtype=torch.int32) for shape in ((samples, 3), (samples + 1,))]


def _on_device(grids, pack, like) -> tuple[torch.Tensor, torch.Tensor]:
    """``grids`` (S, 3) and ``cu_seqlens`` (S + 1,), int32 on ``like``'s device: the pack's, computed there, or uploaded."""
    device = like.device
    if pack is not None and pack.kept is None and pack.device == device:
        return pack.grids_device, pack.cu_seqlens
    if isinstance(grids, torch.Tensor):
        grids = to_device(grids.to(torch.int32), device)
        return grids, F.pad(grids.prod(1).cumsum(0), (1, 0)).to(torch.int32)
    if not has_data(like):
        # uploaded when the graph runs: while it is traced, sizes may be symbols and tensors fake
        return tuple(_patches_grids(like.new_empty(0), [n for grid in grids for n in grid]))
    return uploaded_grids(grids, device)


def _config(kernel: str, x, tokens: int, width: int, rows: int, run: int) -> configs.Found:
    """``x``: a tensor or a PatchesProblem, for its device and dtype."""
    return triton_backend.config("patches", kernel, x.device, configs.bucket(tokens), width, rows, run, x.dtype)


def _gemm_config(kernel: str, x, tokens: int, weight):
    return _config(kernel, x, tokens, weight.shape[0], prod(weight.shape[1:4]), weight.shape[4]).config


def _typical_config(kernel: str, problem) -> configs.Found:
    return _config(kernel, problem, 32768, problem.width, problem.rows, problem.run)


def _embed(latents, weight, bias, grids, cu_seqlens):
    config = _gemm_config("embed", latents, latents.shape[0] // prod(weight.shape[1:]), weight)
    return _kernels().embed(latents, weight, bias, grids, cu_seqlens, config=config)


def _fake_embed(latents, weight, bias, grids, cu_seqlens):
    return latents.new_empty((latents.shape[0] // prod(weight.shape[1:]), weight.shape[0]))


def _embed_backward(d_out, latents, weight, grids, cu_seqlens, wanted):
    want_latents, want_weight, want_bias = wanted
    found = []
    if want_latents:
        config = _gemm_config("latents", d_out, d_out.shape[0], weight)
        found.append(_kernels().embed_latents_gradient(d_out, weight, grids, cu_seqlens, config=config))
    if want_weight or want_bias:
        config = _gemm_config("weight", d_out, d_out.shape[0], weight)
        found += _kernels().embed_weight_gradient(d_out, latents, weight, grids, cu_seqlens, want_weight=want_weight,
                                                  want_bias=want_bias, config=config)
    return [t for t in found if t is not None]


def _fake_embed_backward(d_out, latents, weight, grids, cu_seqlens, wanted):
    shapes = (latents.shape, weight.shape, weight.shape[:1])
    return [latents.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _permute(source, grids, cu_seqlens, patch, channels, to_tokens):
    tokens = source.numel() // (channels * prod(patch))
    config = _config("permute", source, tokens, channels, patch[0] * patch[1], patch[2]).config
    return _kernels().permute(source, grids, cu_seqlens, patch, channels, to_tokens=to_tokens, config=config)


def _fake_permute(source, grids, cu_seqlens, patch, channels, to_tokens):
    numel = channels * prod(patch)
    return source.new_empty((source.shape[0] // numel, numel) if to_tokens else (source.shape[0] * numel,))


# sizes: t, h, w of every sample, concatenated. Backward: the wanted gradients of latents, weight and bias.
_patches_grids = operators.define("patches_grids(Tensor like, SymInt[] sizes) -> Tensor[]", _copies, _fake_copies)
_patch_embed_forward = operators.define(
    "patch_embed_forward(Tensor latents, Tensor weight, Tensor? bias, Tensor grids, Tensor cu_seqlens) -> Tensor",
    _embed, _fake_embed)
_patch_embed_backward = operators.define(
    "patch_embed_backward(Tensor d_out, Tensor latents, Tensor weight, Tensor grids, Tensor cu_seqlens, "
    "bool[] wanted) -> Tensor[]", _embed_backward, _fake_embed_backward)
_patches_permute = operators.define(
    "patches_permute(Tensor source, Tensor grids, Tensor cu_seqlens, int[] patch, int channels, "
    "bool to_tokens) -> Tensor", _permute, _fake_permute)


class _PatchEmbed(torch.autograd.Function):
    """Saves the flat latents, the weight and the grids; no im2col matrix."""

    @staticmethod
    def forward(ctx, latents, weight, bias, grids, cu_seqlens):
        ctx.save_for_backward(latents, weight, grids, cu_seqlens)
        return _patch_embed_forward(latents, weight, bias, grids, cu_seqlens)

    @staticmethod
    @opaque
    def backward(ctx, d_out):
        wanted = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            found = iter(_patch_embed_backward(d_out, *ctx.saved_tensors, wanted))
        return (*(next(found) if want else None for want in wanted), None, None)


class _Unpatchify(torch.autograd.Function):
    """A permutation, whose gradient is the inverse permutation."""

    @staticmethod
    def forward(ctx, tokens, grids, cu_seqlens, patch, channels):
        ctx.save_for_backward(grids, cu_seqlens)
        ctx.patch, ctx.channels = patch, channels
        return _patches_permute(tokens, grids, cu_seqlens, patch, channels, False)

    @staticmethod
    @opaque
    def backward(ctx, d_flat):
        with torch.no_grad():
            d_tokens = _patches_permute(d_flat, *ctx.saved_tensors, ctx.patch, ctx.channels, True)
        return d_tokens, None, None, None, None


def _patch_embed(latents, weight, bias, *, grids, pack):
    tensors = triton_backend.distinct((latents, weight, bias))
    return triton_backend.apply(_PatchEmbed, *tensors, *_on_device(grids, pack, latents))


def _unpatchify(tokens, grids, pack, patch, channels):
    return triton_backend.apply(_Unpatchify, tokens, *_on_device(grids, pack, tokens), list(patch), channels)


def _unsupported(problem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.dtype)
    if problem.run > LONGEST_RUN:
        reasons.append(f"Its kernels take patches of at most {LONGEST_RUN} elements along w, and these have "
                       f"{checks.shown(problem.run)}.")
    return reasons


PATCH_EMBED, UNPATCHIFY = (
    Backend("triton", run, _unsupported, kernel="patches", config=partial(_typical_config, kernel))
    for run, kernel in ((_patch_embed, "embed"), (_unpatchify, "permute")))
