"""patch_embed and unpatchify: latents to tokens and back, samples of any sizes in one flat buffer.

N tokens, C channels, D width; a sample has t x h x w tokens of pt x ph x pw pixels.
"""

from dataclasses import dataclass
from math import prod

import torch

from .. import checks, measured
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..pack import Pack, host_grids, token_grid
from ..precision import autocast, linear, no_autocast
from ..reference import patches as reference
from . import patches_triton


@dataclass(frozen=True)
class PatchesProblem(Problem):
    """``width``: D, or C for unpatchify; ``rows`` per patch, C * pt * ph or pt * ph, of ``run`` elements along w each.

    ``sizes_hidden``: grids is a tensor in a traced graph. ``size``: the bucket of the latents' elements, or of N.
    """

    width: int
    rows: int
    run: int
    sizes_hidden: bool
    size: tuple[int, ...] = ()


def _embed_example(device: str, dtype: torch.dtype, grad: bool) -> PatchesProblem:
    return PatchesProblem(device, dtype, grad, width=1536, rows=32, run=2, sizes_hidden=False)


def _permute_example(device: str, dtype: torch.dtype, grad: bool) -> PatchesProblem:
    return PatchesProblem(device, dtype, grad, width=16, rows=2, run=2, sizes_hidden=False)


# ---------------------------------------------------------------------------------------------- backend "torch"
def _element_index(grids_S3, tokens: int, patch, channels: int, device):
    """Flat-buffer index of every element of every patch, (N, C, pt, ph, pw), and which tokens are in a sample (N,)."""
    pt, ph, pw = patch
    grids_S3 = grids_S3.to(device=device, dtype=torch.int64)
    ends_S = grids_S3.prod(1).cumsum(0)
    token_N = torch.arange(tokens, device=device)
    in_sample_N = token_N < ends_S[-1]
    sample_N = torch.searchsorted(ends_S, token_N, right=True).clamp(max=ends_S.shape[0] - 1)
    t_N, h_N, w_N = (size.clamp(min=1) for size in grids_S3[sample_N].unbind(1))
    first_N = ends_S[sample_N] - grids_S3.prod(1)[sample_N]
    inner_N = torch.where(in_sample_N, token_N - first_N, 0)
    start_N = first_N * (channels * pt * ph * pw)
    corner_N = ((inner_N // (h_N * w_N)) * pt * (h_N * ph) + (inner_N // w_N % h_N) * ph) * (w_N * pw) + (
        inner_N % w_N) * pw
    c, dt, dh, dw = (torch.arange(n, device=device) for n in (channels, pt, ph, pw))
    row_N = (w_N * pw)[:, None, None, None, None]
    plane_N = row_N * (h_N * ph)[:, None, None, None, None]
    index = c[:, None, None, None] * (t_N * pt)[:, None, None, None, None] * plane_N
    index = index + dt[:, None, None] * plane_N + dh[:, None] * row_N + dw
    return index + (start_N + corner_N)[:, None, None, None, None], in_sample_N


def _runs(grids) -> list[tuple[int, int, int, int]]:
    """Run-length encoding of grids: (count, t, h, w). (torch.compile does not trace groupby over symbols.)"""
    runs = []
    for t, h, w in grids:
        if runs and runs[-1][1:] == (t, h, w):
            runs[-1] = (runs[-1][0] + 1, t, h, w)
        else:
            runs.append((1, t, h, w))
    return runs


def _split(x, runs, numel):
    """``x`` in parts of ``runs``, with ``numel`` elements for each token, and how many are left over.

    Slices would each have a gradient as large as x.
    """
    if len(runs) == 1 and prod(runs[0]) * numel == x.shape[0]:
        return (x,), 0
    *parts, rest = x.split([*(prod(run) * numel for run in runs), x.shape[0] - sum(prod(run) for run in runs) * numel])
    return parts, rest.shape[0]


def _patchify(latents, grids, patch, channels):
    """``reference.cut``, batched over runs of samples of one size."""
    pt, ph, pw = patch
    numel = channels * pt * ph * pw
    runs, parts = _runs(grids), []
    clips, left = _split(latents, runs, numel)
    for (samples, t, h, w), clip in zip(runs, clips, strict=True):
        cut = clip.reshape(samples, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        parts.append(cut.reshape(samples * t * h * w, numel))
    if left or not parts:
        parts.append(latents.new_zeros((left // numel, numel)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _merge_patches(tokens, grids, patch, channels):
    """``reference.unpatchify``, batched over runs of samples of one size."""
    pt, ph, pw = patch
    runs, parts = _runs(grids), []
    tokens_of_runs, left = _split(tokens, runs, 1)
    for (samples, t, h, w), run in zip(runs, tokens_of_runs, strict=True):
        clips = run.reshape(samples, t, h, w, pt, ph, pw, channels)
        # always a copy: with one token of one pixel per sample, reshape(-1) would return a view of tokens
        parts.append(clips.permute(0, 7, 1, 4, 2, 5, 3, 6).clone(memory_format=torch.contiguous_format).view(-1))
    if left or not parts:
        parts.append(tokens.new_zeros(left * tokens.shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _torch_patch_embed(latents, weight, bias, *, grids, pack):
    width, channels, *patch = weight.shape
    if isinstance(grids, torch.Tensor):
        tokens = latents.shape[0] // prod(weight.shape[1:])
        index, in_sample = _element_index(grids, tokens, patch, channels, latents.device)
        patches = torch.where(in_sample[:, None], latents[torch.where(in_sample[:, None], index.flatten(1), 0)], 0)
    else:
        patches = _patchify(latents, grids, patch, channels)
        count, in_samples = patches.shape[0], sum([t * h * w for t, h, w in grids])
        in_sample = None if in_samples == count else torch.arange(count, device=latents.device) < in_samples
    out = linear(patches, weight.flatten(1), bias)
    # needed even without a bias: the gradient of a tail token, which may be NaN, must not reach the weight
    return out if in_sample is None else torch.where(in_sample[:, None], out, 0)


def _torch_unpatchify(tokens, grids, pack, patch, channels):
    if not isinstance(grids, torch.Tensor):
        return _merge_patches(tokens, grids, patch, channels)
    index, in_sample = _element_index(grids, tokens.shape[0], patch, channels, tokens.device)
    index = index.permute(0, 2, 3, 4, 1).flatten(1)  # a token's elements are in (pt, ph, pw, C) order
    total = tokens.shape[0] * tokens.shape[1]
    # the tail is scattered to one spare element past the end, which is cut off
    flat = tokens.new_zeros(total + 1).scatter(0, torch.where(in_sample[:, None], index, total).flatten(),
                                               tokens.flatten())
    return flat[:total]


def _reference_unsupported(problem: PatchesProblem) -> list[str]:
    if problem.sizes_hidden:
        return ["The reference cuts sample by sample and cannot see the values of a grids tensor while a graph is "
                "traced; pass grids as a tuple of triples there."]
    return []


def _reference_patch_embed(latents, weight, bias, *, grids, pack):
    return reference.patch_embed(latents, weight, bias, grids=grids)


def _reference_unpatchify(tokens, grids, pack, patch, channels):
    return reference.unpatchify(tokens, grids, patch, channels)


PATCH_EMBED = Op("patch_embed", "patches", _embed_example, [
    patches_triton.PATCH_EMBED, Backend("torch", _torch_patch_embed),
    Backend("reference", _reference_patch_embed, _reference_unsupported)], PatchesProblem)
UNPATCHIFY = Op("unpatchify", "patches", _permute_example, [
    patches_triton.UNPATCHIFY, Backend("torch", _torch_unpatchify),
    Backend("reference", _reference_unpatchify, _reference_unsupported)], PatchesProblem)
OPS = (PATCH_EMBED, UNPATCHIFY)
__all__ = ["patch_embed", "unpatchify"]


# ------------------------------------------------------------------------------------------------- public ops
def _sizes(op: str, grids):
    """Host triples; in a traced graph a Pack's ``grids_device`` or a CPU tensor, so that sizes do not become constants."""
    compiling = torch.compiler.is_compiling()
    if compiling and isinstance(grids, Pack):
        return grids.grids_device  # no copy to the device inside the graph
    if compiling and isinstance(grids, torch.Tensor):
        checks.require(grids.device.type == "cpu", op, "grids as host data", grids.device.type,
                       "keep sizes on the host")
        checks.integers(op, "grids", grids, (torch.int64, torch.int32))
        checks.shape(op, "grids", grids, ("S", 3), "one row of t, h, w per sample")
        return grids
    return host_grids(op, grids)


def _check_pack_tokens(op: str, pack: Pack, tokens: int, what: str) -> None:
    """Require exactly the pack's tokens, tail included: with a stale pack, tokens would be mistaken for tail."""
    if pack.kept is not None:
        raise checks.error(op, "the pack of whole samples", "one that has dropped tokens", "pass the pack before keep()")
    if tokens != pack.num_tokens:
        raise checks.error(op, f"{what} for each of the pack's {checks.shown(pack.num_tokens)} tokens",
                           f"those of {checks.shown(tokens)}", "pass the pack of these samples, as "
                           "Pack.of(latents, patch) makes it, with pad_to where there is a tail")


def _grids_of(op: str, latents, channels: int, patch) -> tuple:
    """The grids of a batch or list of clips."""
    if isinstance(latents, torch.Tensor):
        checks.shape(op, "latents", latents, ("B", channels, "T", "H", "W"),
                     "pass a batch, a list of (C, T, H, W), or a flat buffer with grids")
        return (token_grid(op, latents.shape[-3:], patch, "{} of latents to be"),) * latents.shape[0]
    checks.sequence(op, "latents", latents, "clips (C, T, H, W)")
    grids = []
    for index, clip in enumerate(latents):
        checks.shape(op, f"latents[{index}]", clip, (channels, "T", "H", "W"), "each clip is (C, T, H, W)")
        checks.same_dtype(op, **{"latents[0]": latents[0], f"latents[{index}]": clip})
        checks.same_device(op, **{"latents[0]": latents[0], f"latents[{index}]": clip})
        grids.append(token_grid(op, clip.shape[-3:], patch, f"{{}} of latents[{index}] to be"))
    return tuple(grids)


def _flat(latents, like):
    """A batch or list of clips as one flat buffer; an empty list gets ``like``'s dtype."""
    if isinstance(latents, torch.Tensor):
        return latents.reshape(-1)
    flat = [clip.reshape(-1) for clip in latents] or [like.new_zeros(0)]
    with no_autocast(flat[0].device.type):
        return torch.cat(flat)


def _check_embed(op: str, latents, weight, bias, grids):
    """Checks all but devices and dtypes; returns the grids, host triples or a tensor in a traced graph."""
    checks.shape(op, "weight", weight, ("D", "C", "pt", "ph", "pw"), "use the weight of a Conv3d")
    width, channels, *patch = weight.shape
    numel = prod(weight.shape[1:])
    if numel == 0:
        raise checks.error(op, "a weight of at least one element per token", checks.show_shape(weight.shape),
                           "use the weight of a Conv3d")
    if bias is not None:
        checks.shape(op, "bias", bias, (width,), "one element per column of the tokens")
    if grids is None:
        if isinstance(latents, torch.Tensor) and latents.dim() == 1:
            raise ValueError(f"{op}: expected grids with a flat buffer, got None; pass the tokens in t, h, w of every "
                             f"sample")
        return _grids_of(op, latents, channels, patch)
    checks.shape(op, "latents", latents, ("numel",), "with grids, pass one flat buffer of all samples")
    sizes = _sizes(op, grids)
    if latents.shape[0] % numel:
        raise checks.error(op, f"a flat buffer of whole patches of {numel} elements",
                           f"{checks.shown(latents.shape[0])} elements",
                           "end the buffer (and its tail) on a whole patch")
    if isinstance(grids, Pack):
        _check_pack_tokens(op, grids, latents.shape[0] // numel, f"a flat buffer of {numel} elements")
    elif not isinstance(sizes, torch.Tensor):
        needed = numel * sum(t * h * w for t, h, w in sizes)
        if latents.shape[0] < needed:
            raise checks.error(op, f"at least the {checks.shown(needed)} elements that grids requires",
                               checks.shown(latents.shape[0]), "pass the grids of this buffer")
    return sizes


def patch_embed(latents, weight, bias=None, *, grids=None, backend="auto"):
    """Tokens from spacetime patches: what ``Conv3d`` with kernel = stride = patch computes, on samples of any sizes.

    Args:
        latents: (B, C, T, H, W); a list of (C, T, H, W); or, with ``grids``, a flat 1-D buffer of the concatenated samples
            (C, T, H, W), possibly with a tail.
        weight: (D, C, pt, ph, pw).
        bias: (D,), or None.
        grids: host data, the tokens in t, h, w of each sample: triples, an int CPU tensor (S, 3), or a Pack; for a flat
            buffer only, where it is required. In a traced graph pass a Pack or a CPU tensor to keep sizes dynamic.
        backend: str; "auto", or "reference", "torch", "triton" by name.

    Returns:
        (N, D) in latents' dtype (under autocast, in its dtype), tokens in t, h, w order, samples concatenated; tail tokens
        are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; sizes that the patch does not divide.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> clip, image = torch.randn(4, 2, 8, 8), torch.randn(4, 1, 4, 8)
    >>> ops.patch_embed([clip, image], torch.randn(32, 4, 1, 2, 2)).shape
    torch.Size([40, 32])
    """
    op, key = "patch_embed", None
    pack = grids if isinstance(grids, Pack) else None
    if grids is None or pack is not None:  # other grids are looked at every time
        clips = latents if isinstance(latents, (tuple, list)) else (latents,)
        key = call_key(PATCH_EMBED, backend, (*clips, weight, bias, grids), type(latents), casts=True)
    found = remembered(key)
    if found is None:
        sizes = _check_embed(op, latents, weight, bias, grids)
    else:
        plan, sizes = found
        sizes = sizes if pack is None else pack.grids
    latents = _flat(latents, weight) if grids is None else latents
    if found is None:
        checks.floating(op, latents=latents, weight=weight, bias=bias)
        checks.same_device(op, latents=latents, weight=weight, bias=bias)
    latents, weight, bias = autocast(latents, weight, bias)
    if found is None:
        checks.same_dtype(op, latents=latents, weight=weight, bias=bias)
        width, channels, pt, ph, pw = weight.shape
        facts = (device_name(latents), latents.dtype, needs_grad(latents, weight, bias), width, channels * pt * ph, pw,
                 isinstance(sizes, torch.Tensor), measured.sizes(latents.shape))
        plan = PATCH_EMBED.plan(facts, backend)
        remember(key, (plan, sizes))
    return PATCH_EMBED.run(plan, key, latents=latents, weight=weight, bias=bias, grids=sizes, pack=pack)


def unpatchify(tokens, grids, patch, channels, *, flat=False, backend="auto"):
    """Tokens back to clips: the inverse layout of ``patch_embed``.

    Args:
        tokens: (N, pt * ph * pw * C), a token's elements in (pt, ph, pw, C) order as in facebookresearch/DiT.
        grids: host data as in ``patch_embed`` (a CUDA tensor raises); tokens beyond them are tail.
        patch: (pt, ph, pw) ints.
        channels: int C.
        flat: bool; return the flat buffer (tail 0) instead of views of it, for traced code.
        backend: str; "auto", or "reference", "torch", "triton" by name.

    Returns:
        list of (C, T, H, W), views of one flat buffer, in tokens' dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> clips = ops.unpatchify(torch.randn(40, 16), [(2, 4, 4), (1, 2, 4)], patch=(1, 2, 2), channels=4)
    >>> [tuple(clip.shape) for clip in clips]
    [(4, 2, 8, 8), (4, 1, 4, 8)]
    """
    pack = grids if isinstance(grids, Pack) else None
    key = None if pack is None else call_key(UNPATCHIFY, backend, (tokens, pack), patch, channels, flat)
    plan = remembered(key)
    if plan is None:
        sizes, facts = _check_unpatchify("unpatchify", tokens, grids, patch, channels, flat)
        plan = remember(key, UNPATCHIFY.plan(facts, backend))
    else:
        sizes = pack.grids
    patch = tuple(patch)
    buffer = UNPATCHIFY.run(plan, key, tokens=tokens, grids=sizes, pack=pack, patch=patch, channels=channels)
    return buffer if flat else _clips(buffer, sizes, patch, channels)


def _check_unpatchify(op: str, tokens, grids, patch, channels, flat) -> tuple:
    """The sizes of ``grids``, and the fields of a PatchesProblem."""
    checks.several(op, "patch", patch, "pt, ph, pw", 1)
    checks.whole(op, "channels", channels, 1)
    pt, ph, pw = patch
    checks.shape(op, "tokens", tokens, ("N", pt * ph * pw * channels), "a token has pt * ph * pw * C elements")
    checks.floating(op, tokens=tokens)
    sizes = _sizes(op, grids)
    if isinstance(grids, Pack):
        _check_pack_tokens(op, grids, tokens.shape[0], "a row")
    elif not isinstance(sizes, torch.Tensor):
        needed = sum(t * h * w for t, h, w in sizes)
        if tokens.shape[0] < needed:
            raise checks.error(op, f"at least the {checks.shown(needed)} tokens that grids requires",
                               checks.shown(tokens.shape[0]), "pass the grids of these tokens")
    if isinstance(sizes, torch.Tensor):
        checks.require(flat, op, "flat=True with a grids tensor in a traced graph", "flat=False",
                       "cut the buffer into clips outside the graph")
    return sizes, (device_name(tokens), tokens.dtype, needs_grad(tokens), channels, pt * ph, pw,
                   isinstance(sizes, torch.Tensor), measured.sizes(tokens.shape[:1]))


def clips(buffer, grids, patch, channels: int) -> list[torch.Tensor]:
    """Views (C, T, H, W) of the samples in a flat buffer; ``grids`` as in ``patch_embed``."""
    return _clips(buffer, host_grids("clips", grids), patch, channels)


def _clips(buffer, grids, patch, channels: int) -> list[torch.Tensor]:
    pt, ph, pw = patch
    views, start = [], 0
    for t, h, w in grids:
        size = channels * t * pt * h * ph * w * pw
        views.append(buffer[start : start + size].view(channels, t * pt, h * ph, w * pw))
        start += size
    return views
