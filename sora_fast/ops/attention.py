"""varlen_attention, its raw forward and backward, and merge_attention: attention within each sample of a pack.

Nq query rows, Nk key rows, H heads, Hk key heads (Hk divides H), E head dim, S samples.
"""

from dataclasses import dataclass, replace

import torch

from .. import checks
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..measured import sizes
from ..pack import Pack, check_kind, check_pack
from ..precision import autocast
from ..reference import attention as reference
from . import attention_peers, attention_torch, attention_triton


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """``size``: of the queries, and of the keys of a sample on the average."""

    heads: int
    key_heads: int
    head_dim: int
    causal: bool
    window: tuple[int, int]
    return_lse: bool
    deterministic: bool
    size: tuple[int, ...] = ()


def _example(device: str, dtype: torch.dtype, grad: bool) -> AttentionProblem:
    return AttentionProblem(device, dtype, grad, heads=12, key_heads=12, head_dim=128, causal=False, window=(-1, -1),
                            return_lse=False, deterministic=False)


def _example_with_lse(device: str, dtype: torch.dtype, grad: bool) -> AttentionProblem:
    """The raw forward and backward have no autograd of their own."""
    return replace(_example(device, dtype, False), return_lse=True)


# ----------------------------------------------------------------------------------------------------- backends
# Installed peers come after "triton". The order here is that of the table; dispatch.ORDER decides the choice.
VARLEN_ATTENTION = Op("varlen_attention", "attention", _example, [
    attention_triton.ATTENTION,
    *attention_peers.ATTENTION,
    Backend("torch", attention_torch.run, attention_torch.unsupported, note=attention_torch.note, hooked=True),
    Backend("reference", reference.varlen_attention)], AttentionProblem)
VARLEN_ATTENTION_FORWARD = Op("varlen_attention_forward", "attention", _example_with_lse, [
    attention_triton.FORWARD,
    *attention_peers.FORWARD,
    Backend("reference", reference.varlen_attention_forward)], AttentionProblem)
VARLEN_ATTENTION_BACKWARD = Op("varlen_attention_backward", "attention", _example_with_lse, [
    attention_triton.BACKWARD,
    Backend("reference", reference.varlen_attention_backward)], AttentionProblem)
MERGE_ATTENTION = Op("merge_attention", "attention", _example, [
    Backend("torch", reference.merge_attention),  # elementwise: torch.compile fuses the definition as it is
    Backend("reference", reference.merge_attention)], AttentionProblem)
OPS = (VARLEN_ATTENTION, VARLEN_ATTENTION_FORWARD, VARLEN_ATTENTION_BACKWARD, MERGE_ATTENTION)
__all__ = ["merge_attention", "varlen_attention", "varlen_attention_backward", "varlen_attention_forward"]


# ------------------------------------------------------------------------------------------------------- checks
def _check(op: str, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window):
    """cu_seqlens of queries and keys."""
    checks.shape(op, "q", q, ("Nq", "H", "E"), "lay the samples of the pack one after the other in dimension 0")
    checks.shape(op, "k", k, ("Nk", "Hk", q.shape[2]), "keys have the queries' head dim")
    checks.shape(op, "v", v, tuple(k.shape), "values have the keys' shape")
    heads, key_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise checks.error(op, "a head dim of 16 to 256, a multiple of 8", head_dim,
                           "pad the heads with zeros and pass softmax_scale")
    if key_heads == 0 or heads % key_heads:
        raise checks.error(op, f"key heads that divide the {heads} query heads", key_heads, "repeat or drop heads")
    checks.floating(op, q=q, k=k, v=v)
    checks.same_device(op, q=q, k=k, v=v)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is not None and not isinstance(value, torch.Tensor):  # flash-attn's callers pass 0-d tensors too
            checks.whole(op, name, value)
    if softmax_scale is not None:
        checks.number(op, "softmax_scale", softmax_scale)
    checks.several(op, "window", window, "left, right")
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_kind(op, name, value)
    if cu_seqlens_k is None:
        checks.require(isinstance(cu_seqlens_q, Pack), op, "cu_seqlens_k beside cu_seqlens_q, or a Pack",
                       "cu_seqlens_q alone", "pass both, or the Pack of queries and keys")
    for name, value, given in (("q", q, cu_seqlens_q), ("k", k, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)):
        if isinstance(given, Pack):
            check_pack(op, given, **{name: value})
        else:
            checks.same_device(op, **{name: value, f"cu_seqlens_{name}": given})
    cu_seqlens_q, cu_seqlens_k = _cu_seqlens(op, q, k, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise checks.error(op, "cu_seqlens_q and cu_seqlens_k of one length",
                           f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}",
                           "every sample has queries and keys, possibly none of either")
    return cu_seqlens_q, cu_seqlens_k


def _cu_seqlens(op: str, q, k, cu_seqlens_q, cu_seqlens_k):
    """cu_seqlens of queries and keys: those of a Pack, checked when it was built, or bare tensors, checked at each call."""
    if isinstance(cu_seqlens_q, Pack):
        if cu_seqlens_k is None:
            return cu_seqlens_q.cu_seqlens, cu_seqlens_q.cu_seqlens
        cu_seqlens_q = cu_seqlens_q.cu_seqlens
    else:
        checks.cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    if isinstance(cu_seqlens_k, Pack):
        return cu_seqlens_q, cu_seqlens_k.cu_seqlens
    checks.cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")
    return cu_seqlens_q, cu_seqlens_k


def _facts(q, k, grad, causal, window, return_lse, deterministic, samples: int = 1) -> tuple:
    """The fields of an AttentionProblem."""
    return (device_name(q), q.dtype, grad, q.shape[1], k.shape[1], q.shape[2], causal, tuple(window), return_lse,
            deterministic or torch.are_deterministic_algorithms_enabled(),
            sizes(q.shape[:1], k.shape[:1], samples=samples))


# ------------------------------------------------------------------------------------------------- public ops
def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *, softmax_scale=None,
                     causal=False, window=(-1, -1), return_lse=False, deterministic=False, backend="auto"):
    """``softmax(q k^T * scale) v`` within each sample of a pack.

    Args:
        q: (Nq, H, E), floating; E a multiple of 8 in 16..256.
        k: (Nk, Hk, E) of q's dtype; Hk divides H.
        v: (Nk, Hk, E) of q's dtype.
        cu_seqlens_q: (S + 1,) int32, cumulative sequence lengths from 0; or the Pack of its rows. Empty samples are allowed;
            rows past the end belong to no sample.
        cu_seqlens_k: (S + 1,) int32, or a Pack; None: the Pack of q serves both. For the keys of a pack's text pass
            ``pack, pack.text_cu_seqlens``.
        max_seqlen_q: int, length of the longest sample: a hint that never changes the result.
        max_seqlen_k: int, likewise.
        softmax_scale: float, default ``E ** -0.5``.
        causal: bool; sets right = 0 in ``window``.
        window: (left, right) ints; query i attends to key j if ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``
            (bottom-right aligned as in flash-attn; a negative side is unbounded).
        return_lse: bool, whether to return the log-sum-exp.
        deterministic: bool, bitwise reproducible gradients.
        backend: str; "auto", or "reference", "torch", "triton", or an installed library by name: "flash_attn",
            "flash_attn_3", "flash_attn_4", "xformers", "cudnn".

    Returns:
        out (Nq, H, E) in q's dtype (under autocast, in its dtype), 0 on rows without keys; with ``return_lse`` also the
        natural log-sum-exp (H, Nq), float32 (float64 for float64), -inf on rows without keys, differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> pack = Pack([(2, 4, 4), (1, 2, 4)])
    >>> q, k, v = torch.randn(3, 40, 6, 64)
    >>> ops.varlen_attention(q, k, v, pack).shape
    torch.Size([40, 6, 64])
    """
    op = "varlen_attention"
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    sides = window if type(window) is tuple else (window,)
    key = call_key(VARLEN_ATTENTION, backend, (q, k, v, cu_seqlens_q, cu_seqlens_k), type(max_seqlen_q), type(max_seqlen_k),
                   type(softmax_scale), causal, return_lse, deterministic, *sides, casts=True)
    plan = remembered(key)
    if plan is None:
        cu_seqlens_q, cu_seqlens_k = _check(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                            softmax_scale, window)
        q, k, v = autocast(q, k, v)
        checks.same_dtype(op, q=q, k=k, v=v)
        facts = _facts(q, k, needs_grad(q, k, v), causal, window, return_lse, deterministic, cu_seqlens_k.shape[0] - 1)
        plan = remember(key, VARLEN_ATTENTION.plan(facts, backend))
    else:
        if cu_seqlens_k is None:  # a Pack, as when this key was made: the common call, without a function in between
            cu_seqlens_q = cu_seqlens_k = cu_seqlens_q.cu_seqlens
        else:
            cu_seqlens_q, cu_seqlens_k = _cu_seqlens(op, q, k, cu_seqlens_q, cu_seqlens_k)
        q, k, v = autocast(q, k, v)
    return VARLEN_ATTENTION.run(plan, key, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                                softmax_scale=softmax_scale, causal=causal, window=tuple(window),
                                return_lse=return_lse, deterministic=deterministic)


def varlen_attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *,
                             softmax_scale=None, causal=False, window=(-1, -1), backend="auto"):
    """Raw forward for ring attention: ``varlen_attention(..., return_lse=True)`` without autograd.

    Args:
        q: (Nq, H, E), floating; E a multiple of 8 in 16..256.
        k: (Nk, Hk, E) of q's dtype; Hk divides H.
        v: (Nk, Hk, E) of q's dtype.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, or a Pack, as in ``varlen_attention``.
        max_seqlen_q, max_seqlen_k: ints, hints that never change the result.
        softmax_scale, causal, window: float, bool, (left, right), as in ``varlen_attention``.
        backend: str; "auto", or "reference", "triton" by name; or an installed library, as in ``varlen_attention``.

    Returns:
        out (Nq, H, E) in q's dtype, lse (H, Nq) float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> q, k, v = torch.randn(3, 5, 2, 16)
    >>> ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> out, lse = ops.varlen_attention_forward(q, k, v, ends, ends)
    >>> out.shape, lse.shape
    (torch.Size([5, 2, 16]), torch.Size([2, 5]))
    """
    op = "varlen_attention_forward"
    cu_seqlens_q, cu_seqlens_k = _check(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                                        window)
    q, k, v = autocast(q, k, v)
    checks.same_dtype(op, q=q, k=k, v=v)
    plan = VARLEN_ATTENTION_FORWARD.plan(_facts(q, k, False, causal, window, True, False), backend)
    return VARLEN_ATTENTION_FORWARD.run(plan, None, q=q, k=k,
                                        v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                                        softmax_scale=softmax_scale, causal=causal, window=tuple(window))


def varlen_attention_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None,
                              max_seqlen_k=None, *, softmax_scale=None, causal=False, window=(-1, -1),
                              deterministic=False, backend="auto"):
    """Raw backward for ring attention, without autograd.

    Args:
        dout: (Nq, H, E), the gradient of out.
        dlse: (H, Nq), the gradient of lse, or None.
        q: (Nq, H, E), as in the forward.
        k: (Nk, Hk, E), as in the forward.
        v: (Nk, Hk, E), as in the forward.
        out: (Nq, H, E) of this attention, or of attention over a superset of these keys (each step of ring attention passes
            the global one).
        lse: (H, Nq), likewise.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, or a Pack, as in ``varlen_attention``.
        max_seqlen_q, max_seqlen_k: ints, hints that never change the result.
        softmax_scale, causal, window: float, bool, (left, right), as in ``varlen_attention``.
        deterministic: bool, bitwise reproducible gradients.
        backend: str; "auto", or "reference", "triton" by name.

    Returns:
        dq (Nq, H, E), dk (Nk, Hk, E), dv (Nk, Hk, E) in their tensors' dtypes.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> q, k, v = torch.randn(3, 5, 2, 16)
    >>> ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> out, lse = ops.varlen_attention_forward(q, k, v, ends, ends)
    >>> dq, dk, dv = ops.varlen_attention_backward(torch.ones_like(out), None, q, k, v, out, lse, ends, ends)
    """
    op = "varlen_attention_backward"
    cu_seqlens_q, cu_seqlens_k = _check(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                                        window)
    checks.same_dtype(op, q=q, k=k, v=v)
    checks.shape(op, "dout", dout, tuple(q.shape), "it is the gradient of out")
    checks.shape(op, "out", out, tuple(q.shape), "pass the forward's out")
    checks.shape(op, "lse", lse, (q.shape[1], q.shape[0]), "pass the forward's lse")
    if dlse is not None:
        checks.shape(op, "dlse", dlse, (q.shape[1], q.shape[0]), "it is the gradient of lse")
    checks.floating(op, dout=dout, out=out, lse=lse, dlse=dlse)
    checks.same_device(op, q=q, dout=dout, out=out, lse=lse, dlse=dlse)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    plan = VARLEN_ATTENTION_BACKWARD.plan(_facts(q, k, False, causal, window, True, deterministic), backend)
    return VARLEN_ATTENTION_BACKWARD.run(
        plan, None, dout=dout, dlse=dlse, q=q, k=k, v=v, out=out, lse=lse, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, softmax_scale=softmax_scale, causal=causal, window=tuple(window),
        deterministic=deterministic)


def merge_attention(outs, lses, *, backend="auto"):
    """Merge attention over disjoint sets of keys into attention over their union.

    Args:
        outs: list of (N, H, E), one floating dtype.
        lses: list of (H, N), natural log-sum-exps; -inf where a part had no keys.
        backend: str; "auto", or "reference", "torch" by name.

    Returns:
        out (N, H, E) in their dtype, lse (H, N); out 0 and lse -inf where no part had keys.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> q, k, v = torch.randn(3, 5, 2, 16)
    >>> ends = torch.tensor([0, 5], dtype=torch.int32)
    >>> whole = ops.varlen_attention(q, k, v, ends, ends)
    >>> some, others = (torch.tensor([0, n], dtype=torch.int32) for n in (3, 2))
    >>> out1, lse1 = ops.varlen_attention(q, k[:3], v[:3], ends, some, return_lse=True)
    >>> out2, lse2 = ops.varlen_attention(q, k[3:], v[3:], ends, others, return_lse=True)
    >>> out, lse = ops.merge_attention([out1, out2], [lse1, lse2])
    >>> torch.allclose(out, whole, atol=1e-5)
    True
    """
    op = "merge_attention"
    checks.sequence(op, "outs", outs, "tensors (N, H, E)")
    checks.sequence(op, "lses", lses, "tensors (H, N)")
    checks.require(len(outs) == len(lses) and len(outs) > 0, op, "as many lses as outs, at least one",
                   f"{len(outs)} outs and {len(lses)} lses", "pass both results of every part")
    for place, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        expected = tuple(outs[0].shape) if place else ("N", "H", "E")
        checks.shape(op, f"outs[{place}]", out, expected, "parts agree in shape")
        checks.shape(op, f"lses[{place}]", lse, (out.shape[1], out.shape[0]), "lse is (H, N)")
        checks.floating(op, **{f"outs[{place}]": out, f"lses[{place}]": lse})
        checks.same_device(op, **{"outs[0]": outs[0], f"outs[{place}]": out, f"lses[{place}]": lse})
        checks.same_dtype(op, **{"outs[0]": outs[0], f"outs[{place}]": out})
    q = outs[0]
    plan = MERGE_ATTENTION.plan(_facts(q, q, needs_grad(*outs, *lses), False, (-1, -1), True, False), backend)
    return MERGE_ATTENTION.run(plan, None, outs=list(outs), lses=list(lses))
