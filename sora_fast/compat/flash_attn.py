"""flash-attn 2.8's varlen functions: its signatures, keyword names and defaults.

Two things differ, both on purpose. With ``return_attn_probs=True`` the third value is None: flash-attn returns its
dropout mask there, and there is no dropout here. The log-sum-exp of a row without keys is -inf (flash-attn 2 has
+inf), which is what merging partial attentions needs; it is differentiable.
Dropout, softcap, ALiBi and paged keys (block_table) are refused.
"""

import torch.nn.functional as F

from .. import checks, ops


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None, *, backend="auto"):
    """Attention within each sample of a pack, as ``flash_attn.flash_attn_varlen_func``.

    Args:
        q: (total_q, H, E). k, v: (total_k, Hk, E), Hk divides H; E up to 256. An E below 16 or no multiple of 8 is
            padded with zeros and cut again; the scale stays that of the true E.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1,). max_seqlen_q, max_seqlen_k: hints; no result depends on them.
        deterministic: bitwise reproducible gradients. backend: as in ``ops.varlen_attention``.
        softmax_scale: default ``E ** -0.5``. causal, window_size: bottom-right aligned.

    Returns:
        out (total_q, H, E); with ``return_attn_probs`` ``(out, lse, None)``, lse float32 (H, total_q), natural log,
        -inf on rows without keys.

    Raises:
        NotImplementedError: dropout_p, softcap, alibi_slopes or block_table. ValueError, TypeError: bad input.
    """
    return _attend("flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                   dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                   return_attn_probs, block_table, backend)


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False, *, backend="auto"):
    """``flash_attn_varlen_func`` on qkv (total, 3, H, E), used as it lies; the gradient is one packed tensor too.

    Other arguments as in ``flash_attn_varlen_func``.

    Raises:
        NotImplementedError: dropout_p, softcap or alibi_slopes. ValueError, TypeError: bad input.
    """
    op = "flash_attn_varlen_qkvpacked_func"
    checks.shape(op, "qkv", qkv, ("total", 3, "H", "E"), "stack q, k and v along dimension 1")
    q, k, v = qkv.unbind(1)
    return _attend(op, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
                   window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None, backend)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                                    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                    alibi_slopes=None, deterministic=False, return_attn_probs=False, *,
                                    backend="auto"):
    """``flash_attn_varlen_func`` on kv (total_k, 2, Hk, E), used as it lies.

    Other arguments as in ``flash_attn_varlen_func``.

    Raises:
        NotImplementedError: dropout_p, softcap or alibi_slopes. ValueError, TypeError: bad input.
    """
    op = "flash_attn_varlen_kvpacked_func"
    checks.shape(op, "kv", kv, ("total_k", 2, "Hk", "E"), "stack k and v along dimension 1")
    k, v = kv.unbind(1)
    return _attend(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                   causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None, backend)


def _attend(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table, backend):
    for name, value, neutral, remedy in (
            ("dropout_p", dropout_p, 0.0, "train without attention dropout"),
            ("softcap", softcap, 0.0, "use a model without soft-capped scores, or flash-attn itself"),
            ("alibi_slopes", alibi_slopes, None, "use a model without ALiBi, or flash-attn itself"),
            ("block_table", block_table, None, "pass contiguous keys and values")):
        if value is not neutral and (neutral is None or value != neutral):
            shown = value if neutral == 0.0 else f"a {type(value).__name__}"
            raise NotImplementedError(f"{op}: expected {name}={neutral}, got {shown}; {remedy}")
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.shape(op, name, value, ("total", "heads", "E"), "lay the samples one after the other in dimension 0")
    head_dim = q.shape[2]
    checks.require(0 < head_dim <= 256, op, "a head dim of 1 to 256", head_dim, "use more heads")
    missing = max(16, -(-head_dim // 8) * 8) - head_dim
    if missing:
        for name, value in (("k", k), ("v", v)):
            checks.shape(op, name, value, ("total_k", "Hk", head_dim), "keys and values have the queries' head dim")
        q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    result = ops.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                  softmax_scale=scale, causal=causal, window=tuple(window_size),
                                  return_lse=return_attn_probs, deterministic=deterministic, backend=backend)
    out, lse = result if return_attn_probs else (result, None)
    out = out[..., :head_dim] if missing else out
    return (out, lse, None) if return_attn_probs else out
