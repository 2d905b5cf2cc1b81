"""qk_norm_rope: norm of queries and keys, and rotary embedding by their position in the clip.

N tokens, H query heads, Hk key heads, E head dim, R rotated channels per head.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import checks
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..measured import sizes
from ..pack import Pack, check_kind, check_pack
from ..precision import cast, has_data, wide_dtype
from ..reference import rotary as reference
from ..reference.modulation import only_samples
from . import rotary_triton

NORMS = ("rms_head", "rms_all", "layer_head", None)


@dataclass(frozen=True)
class RotaryProblem(Problem):
    """``key_heads``: 0 without k; ``rotated``: R, 0 for no rotation; ``learned``: ``freqs`` replaces axes and theta.

    ``affine``: a weight or bias is given; ``moves``: coords need a gradient; ``wide``: the dtype of the arithmetic, float64
    if any tensor is float64, else float32; ``size``: of N.
    """

    heads: int
    key_heads: int
    head_dim: int
    norm: str | None
    affine: bool
    rotated: int
    pairing: str
    learned: bool
    moves: bool
    wide: torch.dtype
    size: tuple[int, ...] = ()


def _example(device: str, dtype: torch.dtype, grad: bool) -> RotaryProblem:
    return RotaryProblem(device, dtype, grad, heads=12, key_heads=12, head_dim=128, norm="rms_all", affine=True, rotated=128,
                         pairing="interleaved", learned=False, moves=False,
                         wide=torch.promote_types(dtype, torch.float32))


# ---------------------------------------------------------------------------------------------- backend "torch"
@dataclass(frozen=True)
class _CosSin:
    """Cached ``_cos_sin`` of ``settings`` and of ``coords`` at ``version``."""

    coords: weakref.ref
    version: int
    settings: tuple
    cos_sin: tuple


_cached: _CosSin | None = None


def _cos_sin(coords, axes, theta, freqs, dtype, pairing) -> tuple:
    """Cosines and sines (N, 1 or H, P) of all angles; or, for ``_rotate``, one tensor of complex numbers."""
    angles = reference.angles(coords, axes, theta, freqs, dtype)
    if pairing == "interleaved" and not torch.compiler.is_compiling():  # graphs fuse real arithmetic, and not complex
        return (torch.complex(angles.cos(), angles.sin()),)
    return angles.cos(), angles.sin()


def _cached_cos_sin(coords, axes, theta, dtype, pairing) -> tuple:
    """The same for fixed frequencies, cached for the next layer, which has the same coords. On CPUs only: on a GPU the cache
    would have to handle streams and CUDA graphs.
    """
    global _cached
    if not coords.is_cpu or not has_data(coords) or coords.is_inference():
        return _cos_sin(coords, axes, theta, None, dtype, pairing)
    settings = (tuple(axes), tuple(theta) if isinstance(theta, list) else theta, dtype, pairing)
    last = _cached
    if (last is not None and last.coords() is coords and last.version == coords._version  # not changed in place since
            and last.settings == settings):
        return last.cos_sin
    with torch.inference_mode(False):  # a backward may save it later
        cos_sin = _cos_sin(coords, axes, theta, None, dtype, pairing)
    if has_data(cos_sin[0]):
        _cached = _CosSin(weakref.ref(coords, _drop_cached), coords._version, settings, cos_sin)
    return cos_sin


def _drop_cached(coords: weakref.ref) -> None:
    """Drop the cached tables with their coords."""
    global _cached
    if _cached is not None and _cached.coords is coords:
        _cached = None


def _rotate(x_NHE, cos_sin, pairing):
    """``reference.rotate`` by what ``_cos_sin`` returns."""
    pairs, rest = cos_sin[0].shape[-1], None
    if 2 * pairs < x_NHE.shape[-1]:
        x_NHE, rest = x_NHE[..., : 2 * pairs], x_NHE[..., 2 * pairs :]
    if len(cos_sin) == 1:  # one product in place of nine kernels
        rotated = torch.view_as_real(_complex(x_NHE) * cos_sin[0]).flatten(-2)
    else:
        cos, sin = cos_sin
        interleaved = pairing == "interleaved"
        a, b = (x_NHE[..., 0::2], x_NHE[..., 1::2]) if interleaved else (x_NHE[..., :pairs], x_NHE[..., pairs:])
        a, b = a * cos - b * sin, a * sin + b * cos
        rotated = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    return rotated if rest is None else torch.cat([rotated, rest], dim=-1)


def _complex(x_NHE):
    """Channels (2i, 2i + 1) as one complex number, in place where strides allow."""
    tokens, heads, channels = x_NHE.shape
    n, h, e = x_NHE.stride()
    if e != 1 or (n | h | x_NHE.storage_offset()) % 2:
        x_NHE = x_NHE.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x_NHE.view(tokens, heads, channels // 2, 2))


def _torch_norm_rope(x, weight, bias, cos_sin, norm, pairing, eps, rows, wide):
    shape, width = x.shape, x.shape[1] * x.shape[2]
    h, weight, bias = cast(x, wide), cast(weight, wide), cast(bias, wide)
    if rows is not None:
        h = only_samples(h.reshape(-1, width), rows).reshape(shape)
    if norm == "rms_all":
        h = F.rms_norm(h.reshape(-1, width), (width,), weight, eps)
        h = (h if bias is None else h + bias).reshape(shape)
    elif norm is not None:
        if norm == "layer_head":
            h = F.layer_norm(h, shape[2:], None, None, eps)
            h = h if weight is None else h * weight
        else:
            h = F.rms_norm(h, shape[2:], weight, eps)
        h = h if bias is None else h + bias
    if cos_sin is not None:
        h = _rotate(h, cos_sin, pairing)
    if rows is not None:
        h = only_samples(h.reshape(-1, width), rows).reshape(shape)
    return cast(h, x.dtype)


def _torch_qk_norm_rope(q, k, coords, *, q_weight, k_weight, q_bias, k_bias, norm, axes, theta, freqs, pairing, eps,
                        rows, tail):
    cos_sin, rows = None, rows if tail else None
    moves = coords is not None and coords.is_floating_point()
    wide = wide_dtype(q, k, freqs, q_weight, k_weight, q_bias, k_bias, coords if moves else None)
    if coords is not None and rows is None and freqs is None and not coords.requires_grad:
        cos_sin = _cached_cos_sin(coords, axes, theta, wide, pairing)
    elif coords is not None:  # of tokens outside every sample none is read, nor reaches the gradient of freqs
        cos_sin = _cos_sin(coords if rows is None else only_samples(coords, rows), axes, theta, freqs, wide, pairing)
    q_out = _torch_norm_rope(q, q_weight, q_bias, cos_sin, norm, pairing, eps, rows, wide)
    return q_out, None if k is None else _torch_norm_rope(k, k_weight, k_bias, cos_sin, norm, pairing, eps, rows, wide)


def _reference_qk_norm_rope(*, tail, **arguments):
    return reference.qk_norm_rope(**arguments)  # it handles tails itself


QK_NORM_ROPE = Op("qk_norm_rope", "rotary", _example, [
    rotary_triton.QK_NORM_ROPE, Backend("torch", _torch_qk_norm_rope), Backend("reference", _reference_qk_norm_rope)],
    RotaryProblem)
OPS = (QK_NORM_ROPE,)
__all__ = ["qk_norm_rope"]


# ------------------------------------------------------------------------------------------------- public op
def qk_norm_rope(q, k, coords, *, q_weight=None, k_weight=None, q_bias=None, k_bias=None, norm="rms_head",
                 axes=None, theta=1e4, freqs=None, pairing="interleaved", eps=1e-6, rows=None,
                 backend="auto"):
    """Norm of q and k, then rotary position embedding over time, height and width.

    Args:
        q: (N, H, E), floating.
        k: (N, Hk, E) of q's dtype, or None.
        coords: (N, 3) t, h, w of each token, int or float; or the Pack of the N tokens, whose rows are then taken too;
            None: no rotation (then k may have another length).
        q_weight: (E,) of the norm, or (H * E,) for "rms_all"; or None.
        k_weight: (E,), or (Hk * E,) for "rms_all"; or None.
        q_bias: (E,), or (H * E,) for "rms_all"; or None.
        k_bias: (E,), or (Hk * E,) for "rms_all"; or None.
        norm: str; "rms_head" or "layer_head" over each head, "rms_all" over all heads together; None: none.
        axes: (d_t, d_h, d_w) even numbers of rotated channels; they sum to R <= E, the other E - R pass through. None: Wan's
            share of the first 128 channels, (44, 42, 42) of a head of 128, (24, 20, 20) of 64. Axis a of size d has the
            angles ``coords[:, a] * theta_a ** (-2 j / d)`` in radians, j < d / 2, axes concatenated.
        theta: float, or one per axis.
        freqs: float32 (3, R/2) or (3, H, R/2) in place of axes and theta: angle i of head h is the sum over a of
            ``coords[:, a] * freqs[a, h, i]``; it has a gradient.
        pairing: str; "interleaved" rotates channels (2i, 2i + 1), "half" (i, i + R/2), each by angle i.
        eps: float, added to the mean square or variance.
        rows: (N,) int32; tokens with -1 belong to no sample: output 0, gradient 0, never read. Or the Pack.
        backend: str; "auto", or "reference", "torch", "triton" by name.

    Returns:
        (q, k) in their dtype and shapes; k is None if it was not given. Angles are computed in at least float32.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> pack = Pack([(2, 4, 4), (1, 2, 4)])
    >>> q, k = ops.qk_norm_rope(torch.randn(40, 6, 64), torch.randn(40, 2, 64), pack, q_weight=torch.ones(64))
    >>> q.shape, k.shape
    (torch.Size([40, 6, 64]), torch.Size([40, 2, 64]))

    Source: RoPE, arXiv 2104.09864; QK-norm, arXiv 2302.05442; freqs as in Mochi 1.
    """
    if axes is None and isinstance(q, torch.Tensor) and q.dim() == 3:
        axes = reference.default_axes(q.shape[-1])
    key = call_key(QK_NORM_ROPE, backend, (q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows), norm, pairing,
                   axes, theta, eps)
    plan = remembered(key)
    if plan is None:
        facts = _check(q, k, coords, q_weight, k_weight, q_bias, k_bias, norm, axes, theta, freqs, pairing, eps, rows)
        plan = remember(key, QK_NORM_ROPE.plan(facts, backend))
    coords, rows, tail = _coords_and_rows("qk_norm_rope", q, coords, rows, key)
    return QK_NORM_ROPE.run(plan, key, q=q, k=k, coords=coords, q_weight=q_weight, k_weight=k_weight,
                            q_bias=q_bias, k_bias=k_bias, norm=norm, axes=axes, theta=theta, freqs=freqs,
                            pairing=pairing, eps=eps, rows=rows, tail=tail)


def _coords_and_rows(op: str, q, coords, rows, key):
    """coords (N, 3) and rows (N,) of a call, or None, and whether some rows may be -1.

    The rows of a Pack were checked when it was built.
    """
    if isinstance(coords, Pack):
        coords, rows = coords.coords, coords
    if isinstance(rows, Pack):
        return coords, rows.rows, key is None or rows.tail  # one graph for packs with a tail and without
    return coords, rows, rows is not None and checks.rows(op, rows, q.shape[0], None)


def _check(q, k, coords, q_weight, k_weight, q_bias, k_bias, norm, axes, theta, freqs, pairing, eps, rows) -> tuple:
    """Checks all but the values of ``rows``; returns the fields of a RotaryProblem."""
    op = "qk_norm_rope"
    checks.shape(op, "q", q, ("N", "H", "E"), "split the heads first, as in x.unflatten(-1, (heads, -1))")
    check_kind(op, "coords", coords)
    check_kind(op, "rows", rows)
    if isinstance(coords, Pack) or isinstance(rows, Pack):
        coords, rows = _from_pack(op, q, coords, rows)
    checks.choice(op, "norm", norm, NORMS)
    checks.choice(op, "pairing", pairing, ("interleaved", "half"))
    checks.floating(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, freqs=freqs)
    checks.same_device(op, q=q, k=k, coords=coords, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias,
                       k_bias=k_bias, freqs=freqs, rows=rows)
    checks.same_dtype(op, q=q, k=k)
    tokens, heads, head_dim = q.shape
    if k is not None:
        length = tokens if coords is not None or rows is not None else "Nk"
        checks.shape(op, "k", k, (length, "Hk", head_dim), "k has q's head dim, and its length where they are rotated")
    for name, value, owner in (("q_weight", q_weight, q), ("q_bias", q_bias, q), ("k_weight", k_weight, k),
                               ("k_bias", k_bias, k)):
        if value is not None:
            what = "k=None" if owner is None else "norm=None"
            checks.require(owner is not None and norm is not None, op, f"no {name} without its tensor and a norm",
                           f"{name} with {what}", f"leave {name} out")
            width = owner.shape[1] * head_dim if norm == "rms_all" else head_dim
            checks.shape(op, name, value, (width,), f"norm={norm!r} has one element per normalised channel")
    rotated = 0
    if coords is not None:
        checks.shape(op, "coords", coords, (tokens, 3), "one t, h, w per token")
        checks.require(coords.dtype != torch.bool and not coords.is_complex(), op, "coords of an int or float dtype",
                       coords.dtype, "pass Pack.coords")
        rotated = _check_angles(op, q, k, axes, theta, freqs)
    checks.number(op, "eps", eps)
    affine = (q_weight, k_weight, q_bias, k_bias)
    positions = coords if coords is not None and coords.is_floating_point() else None
    return (device_name(q), q.dtype, needs_grad(q, k, *affine, freqs, coords), heads, 0 if k is None else k.shape[1],
            head_dim, norm, any(t is not None for t in affine), rotated, pairing, freqs is not None, needs_grad(coords),
            wide_dtype(q, k, *affine, freqs, positions), sizes((tokens,)))


def _from_pack(op: str, q, coords, rows):
    """coords and rows of a call in which at least one is a Pack."""
    if isinstance(coords, Pack):
        checks.require(rows is None or rows is coords, op, "no rows beside a Pack, which has them", "both",
                       "pass the Pack alone")
        rows = coords
    check_pack(op, rows, q=q)
    return coords.coords if coords is rows else coords, rows.rows


def _check_angles(op: str, q, k, axes, theta, freqs) -> int:
    """Axes, theta or freqs fit the heads; returns R."""
    _, heads, head_dim = q.shape
    if freqs is not None:
        if freqs.dim() == 3:
            checks.shape(op, "freqs", freqs, (3, heads, "R/2"), "give frequencies per axis, head and pair")
            if k is not None and k.shape[1] != heads:
                raise checks.error(op, f"as many key heads as the {heads} query heads with freqs per head", k.shape[1],
                                   "use freqs of shape (3, R/2), or repeat k's heads")
        else:
            checks.shape(op, "freqs", freqs, (3, "R/2"), "give frequencies per axis and pair")
        rotated = 2 * freqs.shape[-1]
    else:
        return check_axes(op, axes, theta, head_dim)
    _check_rotated(op, rotated, head_dim)
    return rotated


def check_axes(op: str, axes, theta, head_dim: int, name: str = "axes") -> int:
    """``axes`` (under that ``name``) and ``theta`` fit a head; returns R."""
    checks.several(op, name, axes, "t, h, w", 0)
    if axes[0] % 2 or axes[1] % 2 or axes[2] % 2:
        raise checks.error(op, f"{name} as three even numbers", axes, "give the rotated channels of t, h and w")
    bases = theta if isinstance(theta, (tuple, list)) else (theta,)
    checks.require(bases is not theta or len(bases) == 3, op, "theta as a number or three", theta, "give one per axis")
    for base in bases:
        checks.number(op, "theta", base)
        checks.require(base > 0, op, "theta above 0", base, "it is the base of a power, usually 10,000")
    _check_rotated(op, sum(axes), head_dim)
    return sum(axes)


def _check_rotated(op: str, rotated: int, head_dim: int) -> None:
    if rotated > head_dim:
        raise checks.error(op, f"at most the {head_dim} channels of a head to be rotated", rotated,
                           "make axes (or freqs) smaller, because they sum to the head dim or less")
