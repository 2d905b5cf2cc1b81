"""Backend "torch" of varlen_attention: PyTorch's scaled_dot_product_attention, or its FlashAttention-2 for packed rows."""

import functools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch._C import _len_torch_dispatch_stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch import Problem, device_name, needs_grad
from ..precision import cast, has_data
from ..reference import attention as reference


def unsupported(problem: Problem) -> list[str]:
    if problem.return_lse:
        return ["PyTorch's scaled_dot_product_attention does not return a differentiable log-sum-exp."]
    return []


def _heads_first(rows_NHE, samples: int = 1):
    """(S, H, L, E) of the rows of ``samples`` samples of one length."""
    rows, heads, width = rows_NHE.shape
    return rows_NHE.view(samples, rows // samples, heads, width).transpose(1, 2)


def _hooked(out, hook):
    """``out``, whose gradients cannot be derived again, with ``hook`` at its node."""
    if hook is not None and out.requires_grad:
        out.grad_fn.register_hook(hook)
    return out


def _sdpa(q, k, v, scale, mask_QK, sees_Q, hook):
    """(S, Q, H, E) of samples (S, H, L, E): 0 where ``sees_Q`` is False, rows that ``mask_QK`` does not mask either."""
    mask = None if mask_QK is None else mask_QK[None, None]
    out = _hooked(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), hook).transpose(1, 2)
    return out if sees_Q is None else torch.where(sees_Q[:, None, None], out, 0)


def _varlen_applies(device: str, dtype: torch.dtype, deterministic: bool) -> bool:
    """Whether torch.nn.attention.varlen (PyTorch's FlashAttention-2, sm_80 and later) supports this call."""
    return (device.startswith("cuda:sm") and int(device.removeprefix("cuda:sm")) >= 80 and not deterministic
            and dtype in (torch.float16, torch.bfloat16))


# From PyTorch 2.14 on varlen_attn hands rows of more than 128 without a window to cuDNN on sm_90 and sm_100. Its version
# there, 9.24, is wrong on samples without queries or keys (attention_peers.CUDNN).
VARLEN_MAY_BE_CUDNN = torch.__version__ >= (2, 14)


def _varlen(q, k, v, cu_q, cu_k, scale, window):
    from torch.nn.attention.varlen import varlen_attn

    if VARLEN_MAY_BE_CUDNN and window == (-1, -1):
        # A window as long as the row sees every key: FlashAttention treats it as no window, and cuDNN refuses it.
        # num_splits would turn cuDNN off in the forward only.
        window = (k.shape[0], -1)
    # max_seqlen sizes its grid. It is only a hint here, so pass the number of rows: CTAs past a sample's end exit
    return varlen_attn(q, k, v, cu_q, cu_k, q.shape[0], k.shape[0], scale=scale, window_size=window)


def note(problem: Problem) -> str:
    """For ``explain``: what PyTorch runs."""
    if not _varlen_applies(problem.device, problem.dtype, problem.deterministic):
        return ""
    kept = f" (kept from cuDNN, which PyTorch {torch.__version__} prefers, by a window as long as the row)"
    return f"FlashAttention-2 by torch.nn.attention.varlen{kept if VARLEN_MAY_BE_CUDNN else ''}"


def _deterministic_sdpa(q, k, v):
    """A context in which SDPA's gradients have the same bits every time.

    Its memory-efficient kernel and cuDNN's add up dq in any order, unless use_deterministic_algorithms is on: then they are
    left to PyTorch, else its composition of matrix products runs, with all scores in memory.
    """
    if q.is_cuda and needs_grad(q, k, v) and not torch.are_deterministic_algorithms_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def run(q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal, window, return_lse, deterministic, hook=None):
    """``hook``: as Backend.hooked has it."""
    queries, heads, width = q.shape
    keys, key_heads, _ = k.shape
    scale = width ** -0.5 if softmax_scale is None else softmax_scale
    if queries == 0 or keys == 0 or cu_seqlens_q.shape[0] == 1:
        return _hooked(_zero_output(q, k, v), hook)
    if key_heads != heads:
        copies = heads // key_heads
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    if q.is_cpu and has_data(cu_seqlens_q) and (cu_seqlens_k is cu_seqlens_q or has_data(cu_seqlens_k)):
        return _cpu_sample_by_sample(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, window, hook)
    q, k, v = (reference.without_tail(t, cu) for t, cu in
               ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k)))
    if _varlen_applies(device_name(q), q.dtype, deterministic):
        out = _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, (window[0], 0) if causal else window)
        return reference.without_tail(_hooked(out, hook), cu_seqlens_q)
    mask = reference.visible(cu_seqlens_q, cu_seqlens_k, queries, keys, causal, window, q.device)
    sees = mask.any(dim=1)
    mask |= ~sees[:, None]  # SDPA is undefined on rows that are masked altogether
    with _deterministic_sdpa(q, k, v) if deterministic else nullcontext():
        return _sdpa(_heads_first(q), _heads_first(k), _heads_first(v), scale, mask, sees, hook)[0]


def _zero_output(q, k, v):
    """Zeros for queries without keys; part of the graph, so that gradients are zeros. Reads no element of q, k or v."""
    never = torch.zeros((), dtype=torch.bool, device=q.device)
    return torch.where(never, q, torch.zeros((), dtype=q.dtype, device=q.device)) + k[:0].sum() + v[:0].sum()


def _cpu_sample_by_sample(q, k, v, cu_q, cu_k, scale, causal, window, hook):
    """On a CPU the lengths are known: one dense SDPA per sample, or one batched SDPA if all have the same shape.

    A sample's rows only meet rows of the same sample.
    """
    given = q.dtype
    # Up to a thousand tokens 16-bit SDPA on a CPU is no faster than float32, and its backward is ten times slower at lengths
    # such as 250 (27 ms instead of 2.3 ms, 3 heads of 64, torch 2.13).
    if given is not torch.float32 and given is not torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    dtype = q.dtype
    left, right = window[0], 0 if causal else window[1]
    masked = left >= 0 or right >= 0
    ends_q = cu_q.tolist()
    ends_k = ends_q if cu_k is cu_q else cu_k.tolist()
    samples, queries, keys = len(ends_q) - 1, q.shape[0], k.shape[0]
    if _equal_lengths(ends_q) and (ends_k is ends_q or _equal_lengths(ends_k)):
        if ends_q[-1] == queries and ends_k[-1] == keys:
            mask = _mask(queries // samples, keys // samples, left, right, dtype) if masked else (None, None)
            out = _sdpa(_heads_first(q, samples), _heads_first(k, samples), _heads_first(v, samples), scale, *mask, hook)
            return cast(out.flatten(0, 1), given)
        parts = ((0, ends_q[-1], 0, ends_k[-1]),)
    else:
        samples, parts = 1, zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    outs = []
    computed = False  # whether some attention ran, so that gradients reach q, k and v
    for a, b, c, d in parts:
        if b == a:
            continue
        if d == c:
            outs.append(torch.zeros_like(q[a:b]))
            continue
        mask = _mask((b - a) // samples, (d - c) // samples, left, right, dtype) if masked else (None, None)
        out = _sdpa(*(_heads_first(t, samples) for t in (q[a:b], k[c:d], v[c:d])), scale, *mask, hook)
        outs.append(out.flatten(0, 1))
        computed = True
    if ends_q[-1] < queries or not computed:
        outs.append(_hooked(_zero_output(q[ends_q[-1]:], k, v), hook))
    return cast(outs[0] if len(outs) == 1 else torch.cat(outs), given)


def _equal_lengths(ends: list[int]) -> bool:
    """Whether all samples have the same length."""
    return ends == list(range(0, ends[-1] + 1, ends[1] or 1))


def _mask(queries: int, keys: int, left: int, right: int, dtype: torch.dtype):
    """(Q, K) to add to a sample's scores, and (Q,) bool, which queries see a key, or None for all."""
    small = queries * keys <= 2**18 and not _len_torch_dispatch_stack()  # 1 MB, and no tensor of a mode is kept
    return (_kept_mask if small else _make_mask)(queries, keys, left, right, dtype)


def _make_mask(queries: int, keys: int, left: int, right: int, dtype: torch.dtype):
    from_end = lambda count: torch.arange(-count, 0, device="cpu", dtype=torch.int32)
    distance = from_end(keys)[None, :] - from_end(queries)[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden if left < 0 else hidden | (distance < -left)
    hidden = hidden if right < 0 else hidden | (distance > right)
    # all keys may be to the right of the first queries' windows; SDPA is undefined on rows that are masked altogether
    blind = queries - keys - right if right >= 0 else 0
    hidden[:max(blind, 0)] = False
    mask = torch.zeros(hidden.shape, dtype=dtype, device="cpu").masked_fill_(hidden, -torch.inf)
    return mask, torch.arange(queries, device="cpu") >= blind if blind > 0 else None


_kept_mask = functools.lru_cache(maxsize=32)(torch.inference_mode(False)(_make_mask))  # a backward saves it
