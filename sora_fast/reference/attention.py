"""Attention within each sample of a pack, samples of any lengths.

Nq query rows, Nk key rows, H heads, Hk key heads (Hk divides H), E head dim, S samples.
Row i of a sample with Sq queries and Sk keys sees key j where
``i + Sk - Sq - left <= j <= i + Sk - Sq + right`` (bottom-right aligned; a negative side is open; causal: right = 0).
"""

import torch

from ..precision import has_data, wide_dtype

__all__ = ["merge_attention", "varlen_attention", "varlen_attention_backward", "varlen_attention_forward"]


def visible(cu_q, cu_k, queries: int, keys: int, causal: bool, window, device):
    """(Nq, Nk) bool: key in the query's sample and in its window. Rows past the end of cu_seqlens see nothing."""
    left, right = window
    right = 0 if causal else right
    row_q = torch.arange(queries, device=device)
    row_k = torch.arange(keys, device=device)
    if cu_q.shape[0] == 1:  # no sample
        return torch.zeros((queries, keys), dtype=torch.bool, device=device)
    # The sample of a row is the last one that starts at or before it; empty samples share a start and hold no row.
    seg_q = torch.searchsorted(cu_q, row_q.to(cu_q.dtype), right=True) - 1
    seg_k = torch.searchsorted(cu_k, row_k.to(cu_k.dtype), right=True) - 1
    inside = (row_q < cu_q[-1])[:, None] & (row_k < cu_k[-1])[None, :]
    mask = inside & (seg_q[:, None] == seg_k[None, :])
    if left >= 0 or right >= 0:
        # j - (i + Sk - Sq) where i, j count from the sample's start = distance from both samples' ends
        last = cu_q.shape[0] - 2
        from_end_q = cu_q.long()[seg_q.clamp(max=last) + 1] - row_q
        from_end_k = cu_k.long()[seg_k.clamp(max=last) + 1] - row_k
        distance = from_end_q[:, None] - from_end_k[None, :]
        if left >= 0:
            mask = mask & (distance >= -left)
        if right >= 0:
            mask = mask & (distance <= right)
    return mask


def _heads_first(x_NHE, heads: int):
    return x_NHE.repeat_interleave(heads // x_NHE.shape[1], dim=1).transpose(0, 1)


def attend(q_NHE, k_NHE, v_NHE, mask_QK, scale: float):
    """The definition, for one block of queries and keys: out (Nq, H, E) and natural-log lse (H, Nq)."""
    heads = q_NHE.shape[1]
    q_HQE, k_HKE, v_HKE = _heads_first(q_NHE, heads), _heads_first(k_NHE, heads), _heads_first(v_NHE, heads)
    scores_HQK = (q_HQE @ k_HKE.transpose(1, 2) * scale).masked_fill(~mask_QK, -torch.inf)
    sees_Q = mask_QK.any(dim=1)
    if k_NHE.shape[0] == 0:
        top = scores_HQK.new_zeros((*scores_HQK.shape[:2], 1))
    else:
        top = torch.where(sees_Q[:, None], scores_HQK.amax(dim=-1, keepdim=True), 0).detach()
    p_HQK = torch.exp(scores_HQK - top)
    total = torch.where(sees_Q[:, None], p_HQK.sum(dim=-1, keepdim=True), 1)
    # rows that see nothing are 0 in the graph too, so that no gradient of theirs (NaN in a tail) reaches a key
    out_HQE = torch.where(sees_Q[:, None], (p_HQK / total) @ v_HKE, 0)
    lse_HQ = torch.where(sees_Q, (top + total.log()).squeeze(-1), -torch.inf)
    return out_HQE.transpose(0, 1), lse_HQ


def blocks(cu_q, cu_k, queries: int, keys: int, causal: bool, window, device):
    """Yield (query slice, key slice, mask) that cover the pack.

    Where lengths can be read there is one dense block per sample, so that no other sample's rows are touched at
    all; while a graph is traced they cannot, and the whole pack is one block under a block-diagonal mask.
    """
    if not has_data(cu_q):
        yield slice(0, queries), slice(0, keys), visible(cu_q, cu_k, queries, keys, causal, window, device)
        return
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        alone = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (b - a, d - c)]
        yield slice(a, b), slice(c, d), visible(*alone, b - a, d - c, causal, window, device)


def without_tail(x_NHE, cu):
    in_sample = torch.arange(x_NHE.shape[0], device=x_NHE.device) < cu[-1]
    return torch.where(in_sample[:, None, None], x_NHE, torch.zeros((), dtype=x_NHE.dtype, device=x_NHE.device))


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, softmax_scale=None,
                     causal=False, window=(-1, -1), return_lse=False, deterministic=False):
    """``out [, lse]``; see ``sora_fast.ops.varlen_attention``. ``max_seqlen`` is not used: it is a hint."""
    wide = wide_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_NHE = without_tail(q.to(wide), cu_seqlens_q)
    k_NHE, v_NHE = without_tail(k.to(wide), cu_seqlens_k), without_tail(v.to(wide), cu_seqlens_k)
    outs, lses, done = [], [], 0
    for rows, cols, mask in blocks(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal, window, q.device):
        out, lse = attend(q_NHE[rows], k_NHE[cols], v_NHE[cols], mask, scale)
        outs.append(out)
        lses.append(lse)
        done = rows.stop
    # the tail: zeros already; all three inputs stay in the graph, with gradients of 0, where there is nothing else
    outs.append(q_NHE[done:] * 0 + (k_NHE[:0].sum() + v_NHE[:0].sum()))
    lses.append(q_NHE.new_full((q.shape[1], q.shape[0] - done), -torch.inf))
    out = torch.cat(outs).to(q.dtype)
    return (out, torch.cat(lses, dim=1)) if return_lse else out


def varlen_attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, **options):
    """``out, lse`` without autograd."""
    with torch.no_grad():
        return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options)


@torch.no_grad()
def varlen_attention_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None,
                              max_seqlen_k=None, *, softmax_scale=None, causal=False, window=(-1, -1),
                              deterministic=False):
    """``dq, dk, dv`` from ``out`` and ``lse``, which may be those of a larger attention (ring attention).

    With P = exp(scores - lse): dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse).
    """
    wide = wide_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads, key_heads = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
    q_NHE, out_NHE, dout_NHE = (without_tail(t.to(wide), cu_seqlens_q) for t in (q, out, dout))
    k_NHE, v_NHE = (without_tail(t.to(wide), cu_seqlens_k) for t in (k, v))
    for rows, cols, mask in blocks(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal, window, q.device):
        q_HQE, o_HQE, do_HQE = (_heads_first(t[rows], heads) for t in (q_NHE, out_NHE, dout_NHE))
        k_HKE, v_HKE = (_heads_first(t[cols], heads) for t in (k_NHE, v_NHE))
        lse_HQ1 = lse[:, rows, None].to(wide)
        shown = mask & torch.isfinite(lse_HQ1)
        p_HQK = torch.where(shown, torch.exp(q_HQE @ k_HKE.transpose(1, 2) * scale - lse_HQ1), 0)
        row_term = (do_HQE * o_HQE).sum(-1, keepdim=True)
        if dlse is not None:
            row_term = row_term - torch.where(torch.isfinite(lse_HQ1), dlse[:, rows, None].to(wide), 0)
        ds_HQK = p_HQK * (do_HQE @ v_HKE.transpose(1, 2) - row_term) * scale
        share = (key_heads, heads // key_heads, -1, q.shape[-1])
        dq[rows] = (ds_HQK @ k_HKE).transpose(0, 1)
        dk[cols] = (ds_HQK.transpose(1, 2) @ q_HQE).reshape(share).sum(1).transpose(0, 1)
        dv[cols] = (p_HQK.transpose(1, 2) @ do_HQE).reshape(share).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def merge_attention(outs, lses):
    """Attention over the union of keys from attentions over its parts; see ``sora_fast.ops.merge_attention``."""
    wide = wide_dtype(*outs)
    lse_PHN = torch.stack([lse.to(wide) for lse in lses])
    top = lse_PHN.amax(dim=0)
    sees = top > -torch.inf
    top = torch.where(sees, top, 0).detach()
    parts_PHN = torch.exp(torch.where(sees, lse_PHN, -torch.inf) - top)
    total_HN = torch.where(sees, parts_PHN.sum(dim=0), 1)
    share_PNH1 = (parts_PHN / total_HN).transpose(1, 2)[..., None]
    values = torch.where(share_PNH1 > 0, torch.stack([out.to(wide) for out in outs]), 0)
    out = (share_PNH1 * values).sum(dim=0)
    lse = torch.where(sees, top + total_HN.log(), -torch.inf)
    return out.to(outs[0].dtype), lse
