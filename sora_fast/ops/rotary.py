"""qk_norm_rope: norm of queries and keys, and rotation by their place in the clip.

N tokens, H query heads, Hk key heads, E head dim, R rotated numbers of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import checks, configs
from ..dispatch import Backend, Op, Problem, device_name, needs_grad
from ..pack import Pack, check_kind, check_pack
from ..reference import rotary as reference
from ..reference.modulation import only_samples
from ..reference.precision import wide_dtype
from . import operators, triton_backend

NORMS = ("rms_head", "rms_all", "layer_head", None)


@dataclass(frozen=True)
class RotaryProblem(Problem):
    """``key_heads``: 0 without k; ``rotated``: R, 0 for no rotation; ``learned``: ``freqs`` replaces axes and theta.

    ``affine``: a weight or bias is given; ``moves``: coords need a gradient; ``wide``: what the call is computed in, float64
    if any tensor is float64, else float32.
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


def _example(device: str, dtype: torch.dtype, grad: bool) -> RotaryProblem:
    return RotaryProblem(device, dtype, grad, heads=12, key_heads=12, head_dim=128, norm="rms_all", affine=True, rotated=128,
                         pairing="interleaved", learned=False, moves=False,
                         wide=torch.promote_types(dtype, torch.float32))


# ---------------------------------------------------------------------------------------------- backend "torch"
def _torch_norm_rope(x, weight, bias, turn, norm, pairing, eps, rows):
    shape, width = x.shape, x.shape[1] * x.shape[2]
    wide = wide_dtype(x, weight, bias, turn)
    h = only_samples(x.reshape(-1, width).to(wide), rows)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if norm is not None:
        columns = (width,) if norm == "rms_all" else (shape[2],)
        h = h.reshape(-1, *columns) if norm == "rms_all" else h.reshape(shape)
        if norm == "layer_head":
            h = F.layer_norm(h, columns, None, None, eps)
            h = h if weight is None else h * weight
        else:
            h = F.rms_norm(h, columns, weight, eps)
        h = h if bias is None else h + bias
    h = h.reshape(shape)
    if turn is not None:
        h = reference.rotate(h, turn.to(wide), pairing)
    return only_samples(h.reshape(-1, width), rows).reshape(shape).to(x.dtype)


def _torch_qk_norm_rope(q, k, coords, *, q_weight, k_weight, q_bias, k_bias, norm, axes, theta, freqs, pairing, eps,
                        rows):
    turn = None
    if coords is not None:
        positions = (coords,) if coords.is_floating_point() else ()
        turn = reference.angles(only_samples(coords, rows), axes, theta, freqs,
                                wide_dtype(q, k, freqs, q_weight, k_weight, *positions))
    q_out = _torch_norm_rope(q, q_weight, q_bias, turn, norm, pairing, eps, rows)
    return q_out, None if k is None else _torch_norm_rope(k, k_weight, k_bias, turn, norm, pairing, eps, rows)


# --------------------------------------------------------------------------------------------- backend "triton"
WIDEST = 8192
_TENSORS = ("q", "k", "q_weight", "k_weight", "q_bias", "k_bias", "freqs")  # that have gradients, in the kernels' order


def _config_of_call(direction, q, k, q_weight, k_weight, q_bias, k_bias, coords, freqs, norm, pairing):
    there = next(t for t in (q, k) if t is not None)
    turned = None if coords is None else "fixed" if freqs is None else "learned"
    affine = any(t is not None for t in (q_weight, k_weight, q_bias, k_bias))
    return triton_backend.config("rotary", direction, there.device, heads=0 if q is None else q.shape[1],
                                 key_heads=0 if k is None else k.shape[1], head_dim=there.shape[2],
                                 tokens=configs.bucket(there.shape[0]), dtype=there.dtype, norm=norm, affine=affine,
                                 freqs=turned, pairing=pairing).config


def _typical_config(problem: RotaryProblem) -> configs.Found:
    turned = None if not problem.rotated else "learned" if problem.learned else "fixed"
    return triton_backend.config("rotary", "forward", problem.device, heads=problem.heads, key_heads=problem.key_heads,
                                 head_dim=problem.head_dim, tokens=32768, dtype=problem.dtype, norm=problem.norm,
                                 affine=problem.affine, freqs=turned, pairing=problem.pairing)


def _table(coords, freqs, axes, theta):
    """Frequencies as the kernels take them: learned, or the table of fixed ones."""
    from ..kernels import rotary as kernels

    if coords is None or freqs is not None:
        return freqs
    with torch.inference_mode(False):  # it is kept, and may serve a backward later
        return kernels.frequencies(tuple(axes), tuple(theta), coords.device)


def _forward(q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, norm, axes, theta, pairing, eps):
    from ..kernels import rotary as kernels

    config = _config_of_call("forward", q, k, q_weight, k_weight, q_bias, k_bias, coords, freqs, norm, pairing)
    made = kernels.forward(q, k, coords, q_weight, k_weight, q_bias, k_bias, _table(coords, freqs, axes, theta), rows,
                           norm=norm, pairing=pairing, eps=eps, config=config)
    return [t for t in made if t is not None]


def _fake_forward(q, k, *settings):
    return [t.new_empty(t.shape) for t in (q, k) if t is not None]


def _backward(d_q, d_k, q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, norm, axes, theta, pairing, eps,
              wanted):
    from ..kernels import rotary as kernels

    config = _config_of_call("backward", d_q, d_k, q_weight, k_weight, q_bias, k_bias, coords, freqs, norm, pairing)
    found = kernels.backward(d_q, d_k, q, k, coords, q_weight, k_weight, q_bias, k_bias, _table(coords, freqs, axes, theta),
                             rows, norm=norm, pairing=pairing, eps=eps, wanted=wanted, config=config)
    return [t for t in found if t is not None]


def _fake_backward(d_q, d_k, q, k, coords, q_weight, k_weight, q_bias, k_bias, freqs, rows, norm, axes, theta, pairing, eps,
                   wanted):
    inputs = (d_q, d_k, q_weight, k_weight, q_bias, k_bias, freqs)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want]


_SETTINGS = ("Tensor? coords, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? freqs, "
             "Tensor? rows, str? norm, int[] axes, float[] theta, str pairing, float eps")
# What is there of q and k; the gradients that are wanted of q, k, their weights, their biases and freqs.
operators.define(f"rotary_forward(Tensor q, Tensor? k, {_SETTINGS}) -> Tensor[]", _forward, _fake_forward)
operators.define(f"rotary_backward(Tensor? d_q, Tensor? d_k, Tensor? q, Tensor? k, {_SETTINGS}, bool[] wanted) "
                 f"-> Tensor[]", _backward, _fake_backward)


class _Rotary(torch.autograd.Function):
    """Saves q and k as they are, views included, and no statistics; neither where there is no norm and no learned freqs."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, q_bias, k_bias, freqs, coords, rows, norm, axes, theta, pairing, eps):
        affine = (q_weight, k_weight, q_bias, k_bias)
        made = torch.ops.sora_fast.rotary_forward(q, k, coords, *affine, freqs, rows, norm, axes, theta, pairing, eps)
        needed = norm is not None or freqs is not None
        ctx.save_for_backward(*((q, k) if needed else (None, None)), coords, *affine, freqs, rows)
        ctx.settings = (norm, axes, theta, pairing, eps)
        ctx.set_materialize_grads(False)  # an output that nobody uses costs nothing
        return tuple(made)

    @staticmethod
    def backward(ctx, d_q, d_k=None):
        wanted = list(ctx.needs_input_grad[:len(_TENSORS)])
        for place, name in enumerate(_TENSORS):
            came = {"q": d_q, "k": d_k}.get(name[0])  # freqs take theirs from what there is
            wanted[place] = wanted[place] and (name == "freqs" or came is not None)
        gradients = [None] * len(_TENSORS)
        if any(wanted) and not (d_q is None and d_k is None):
            with torch.no_grad():
                found = iter(torch.ops.sora_fast.rotary_backward(d_q, d_k, *ctx.saved_tensors, *ctx.settings, wanted))
            gradients = [next(found) if want else None for want in wanted]
        return (*gradients, *[None] * 7)


def _triton(q, k, coords, *, q_weight, k_weight, q_bias, k_bias, norm, axes, theta, freqs, pairing, eps, rows):
    rotated = 0 if coords is None else sum(axes) if freqs is None else 2 * freqs.shape[-1]
    if rotated == 0:
        coords = freqs = None
    bases = theta if isinstance(theta, (tuple, list)) else (theta,) * 3
    axes, bases = ([], []) if coords is None or freqs is not None else (list(axes), [float(base) for base in bases])
    made = triton_backend.apply(_Rotary, q, k, q_weight, k_weight, q_bias, k_bias, freqs, coords, rows, norm, axes, bases,
                                pairing, eps)
    return made[0], made[1] if k is not None else None


def _triton_unsupported(problem: RotaryProblem) -> list[str]:
    reasons = triton_backend.unsupported(problem, problem.wide)
    heads = max(problem.heads, problem.key_heads)
    padded = configs.bucket(heads) * configs.bucket(problem.head_dim)
    if padded > WIDEST:
        reasons.append(f"Its kernels hold all heads of a token in registers, at most {WIDEST:,} numbers, and "
                       f"{checks.shown(heads)} heads of {checks.shown(problem.head_dim)} are {checks.shown(padded)}, both "
                       f"rounded up to powers of two.")
    if problem.moves:
        reasons.append("Its kernels give coords no gradient; pass coords.detach() if none is needed.")
    return reasons


QK_NORM_ROPE = Op("qk_norm_rope", "rotary", _example, [
    Backend("triton", _triton, _triton_unsupported, kernel="rotary", config=_typical_config),
    Backend("torch", _torch_qk_norm_rope), Backend("reference", reference.qk_norm_rope)])
OPS = (QK_NORM_ROPE,)


# ------------------------------------------------------------------------------------------------- public op
def qk_norm_rope(q, k, coords, *, q_weight=None, k_weight=None, q_bias=None, k_bias=None, norm="rms_head",
                 axes=(44, 42, 42), theta=1e4, freqs=None, pairing="interleaved", eps=1e-6, rows=None,
                 backend="auto"):
    """Norm of q and k, then rotary position embedding over time, height and width.

    Args:
        q: (N, H, E). k: (N, Hk, E) of q's dtype, or None.
        coords: (N, 3) t, h, w of each token, int or float; or the Pack of the N tokens, whose rows are then taken too;
            None: no rotation (then k may have another length).
        q_weight, k_weight, q_bias, k_bias: of the norm: (E,), or (H * E,) / (Hk * E,) for ``"rms_all"``; or None.
        norm: ``"rms_head"`` or ``"layer_head"`` over each head, ``"rms_all"`` over all heads together, None: none.
        axes: even numbers of rotated entries for t, h, w; they sum to R <= E, the other E - R pass through. Axis a of
            size d has the angles ``coords[:, a] * theta_a ** (-2 j / d)``, j < d / 2, axes one after the other.
        theta: a float, or one per axis.
        freqs: float (3, R/2) or (3, H, R/2) in place of axes and theta: angle i of head h is the sum over a of
            ``coords[:, a] * freqs[a, h, i]``; it has a gradient.
        pairing: ``"interleaved"`` turns entries (2i, 2i + 1), ``"half"`` (i, i + R/2), each by angle i.
        rows: (N,) int32; tokens with -1 belong to no sample: output 0, gradient 0, contents never read. Or the Pack.

    Returns:
        (q, k) in their dtype and shapes; k is None where none was given. Angles are computed in at least float32.

    Source: RoPE, arXiv 2104.09864; QK-norm, arXiv 2302.05442; freqs as in Mochi 1.
    """
    op = "qk_norm_rope"
    checks.shape(op, "q", q, ("N", "H", "E"), "split the heads first, as in x.unflatten(-1, (heads, -1))")
    check_kind(op, "coords", coords)
    check_kind(op, "rows", rows)
    packed = isinstance(coords, Pack) or isinstance(rows, Pack)
    if packed:
        coords, rows = _of_pack(op, q, coords, rows)
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
            checks.shape(op, name, value, (width,), f"norm={norm!r} has one number per normalised entry")
    rotated = 0
    if coords is not None:
        checks.shape(op, "coords", coords, (tokens, 3), "one t, h, w per token")
        checks.require(coords.dtype != torch.bool and not coords.is_complex(), op, "coords of an int or float dtype",
                       coords.dtype, "pass Pack.coords")
        rotated = _check_angles(op, q, k, axes, theta, freqs)
    if rows is not None and not packed:  # a pack's were checked when it was made
        checks.rows(op, rows, tokens, None)
    checks.number(op, "eps", eps)
    affine = (q_weight, k_weight, q_bias, k_bias)
    positions = coords if coords is not None and coords.is_floating_point() else None
    problem = RotaryProblem(device_name(q), q.dtype, needs_grad(q, k, *affine, freqs, coords), heads,
                            0 if k is None else k.shape[1], head_dim, norm, any(t is not None for t in affine), rotated,
                            pairing, freqs is not None, needs_grad(coords), wide_dtype(q, k, *affine, freqs, positions))
    return QK_NORM_ROPE.run(problem, backend, q=q, k=k, coords=coords, q_weight=q_weight, k_weight=k_weight,
                            q_bias=q_bias, k_bias=k_bias, norm=norm, axes=axes, theta=theta, freqs=freqs,
                            pairing=pairing, eps=eps, rows=rows)


def _of_pack(op: str, q, coords, rows):
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
    checks.require(all(size % 2 == 0 for size in axes), op, f"{name} as three even numbers", axes,
                   "give the rotated entries of t, h and w")
    bases = theta if isinstance(theta, (tuple, list)) else (theta,) * 3
    checks.require(len(bases) == 3, op, "theta as a number or three", theta, "give one per axis")
    for base in bases:
        checks.number(op, "theta", base)
        checks.require(base > 0, op, "theta above 0", base, "it is the base of a power, usually 10,000")
    _check_rotated(op, sum(axes), head_dim)
    return sum(axes)


def _check_rotated(op: str, rotated: int, head_dim: int) -> None:
    if rotated > head_dim:
        raise checks.error(op, f"at most the {head_dim} entries of a head to be rotated", rotated,
                           "make axes (or freqs) smaller, because they sum to the head dim or less")
