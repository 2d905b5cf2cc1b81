"""Stand-ins for the attention libraries: their signatures, and what they do with what they do not define.

They compute by the reference in float64 and round once. As the real ones, they leave rows past the end of cu_seqlens as the
memory was (NaN here), in outputs and in gradients, and multiply numbers of rows that they have masked by 0.
"""

import importlib.machinery
import sys
import types

import torch

from sora_fast import ops
from sora_fast.ops import attention_peers

installed = attention_peers.installed


def forget():
    """A fixture: what is planted is looked for anew, and not remembered."""
    installed.cache_clear()
    yield
    installed.cache_clear()


def plant(monkeypatch, name, **members):
    """A module under ``name`` with ``members``, and empty packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if end > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[:end - 1])], parts[end - 1], module, raising=False)
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)
    installed.cache_clear()


class _Attention(torch.autograd.Function):
    """``blind``: the log-sum-exp of rows without keys; ``poison``: NaN in the rows of samples without keys."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale, causal, window, blind, differentiable, poison):
        with torch.enable_grad():
            leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
            masked = 0 * sum(t.detach().sum() for t in leaves)  # NaN if any row, of any sample or of none, is not finite
            out, lse = ops.varlen_attention(*leaves, cu_q, cu_k, softmax_scale=scale, causal=causal, window=window,
                                            return_lse=True, backend="reference")
        ctx.leaves, ctx.outs, ctx.ends = leaves, (out, lse), (int(cu_q[-1]), int(cu_k[-1]))
        ctx.keyless = torch.repeat_interleave(cu_k.diff() == 0, cu_q.diff()).nonzero()[:, 0] if poison else slice(0, 0)
        out, lse = (out + masked).to(q.dtype), lse.float()
        lse = torch.where(torch.isneginf(lse), blind, lse)
        out[ctx.ends[0]:] = lse[:, ctx.ends[0]:] = torch.nan
        out[ctx.keyless] = torch.nan
        if not differentiable:
            ctx.mark_non_differentiable(lse)
        ctx.differentiable = differentiable
        return out.detach(), lse.detach()

    @staticmethod
    def backward(ctx, dout, dlse):
        outs = zip(ctx.outs, (dout.double(), dlse.double() if ctx.differentiable else None), strict=True)
        pairs = [(out, grad) for out, grad in outs if grad is not None]
        found = torch.autograd.grad([out for out, _ in pairs], ctx.leaves, [grad for _, grad in pairs], retain_graph=True)
        for grad, end in zip(found, (ctx.ends[0], ctx.ends[1], ctx.ends[1]), strict=True):
            grad[end:] = torch.nan
        found[0][ctx.keyless] = torch.nan
        return (*(grad.to(dout.dtype) for grad in found), *[None] * 8)


def attend(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, causal=False, window=(-1, -1), *, blind=-torch.inf,
           differentiable=False, poison=False):
    """out and lse, as a library would compute them from its own arguments."""
    assert type(max_q) is type(max_k) is int
    assert max_q >= int(cu_q.diff().max()) and max_k >= int(cu_k.diff().max())
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.dim() == k.dim() == v.dim() == 3
    assert q.shape[0] and k.shape[0] and len(cu_q) == len(cu_k) > 1  # each refuses an empty side, or no sample
    assert isinstance(window, tuple) and len(window) == 2
    return _Attention.apply(q, k, v, cu_q, cu_k, scale, causal, window, blind, differentiable, poison)


def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                 return_attn_probs=False, block_table=None):
    assert dropout_p == softcap == 0.0 and alibi_slopes is block_table is None
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1] and max(window_size) < 0:  # it folds groups of heads into rows then
        q.reshape(len(cu_seqlens_q) - 1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
                      blind=torch.inf)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                 softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                 window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                 sm_margin=0, return_attn_probs=False):
    assert seqused_q is seqused_k is qv is None and attention_chunk == 0
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size)
    return (out, lse) if return_attn_probs else out


def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                 softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
                 pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
                 block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
                 seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
                 gather_bwd_token_chunk=None):
    assert qv is min_seqlen_k is None
    assert all(side is None or side >= 0 for side in window_size)
    window = tuple(-1 if side is None else side for side in window_size)
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window,
                      differentiable=True)
    return out, lse if return_lse else None


CUDNN = 92500


def cudnn_sdpa(query, key, value, *, scale=None, is_causal=False, causal_bottom_right=False, window_left=-1,
               window_right=-1, sinks=None, seq_len_q=None, seq_len_kv=None, cu_seqlens_q=None, cu_seqlens_kv=None,
               max_seqlen_q=0, max_seqlen_kv=0, return_lse=False):
    """lse (rows, heads, 1) of a pack, (samples, heads, rows, 1) of a batch; a causal mask is top-left unless asked."""
    assert sinks is seq_len_q is seq_len_kv is None and (is_causal or not causal_bottom_right)
    assert return_lse or not query.requires_grad
    if query.dim() == 3:
        assert causal_bottom_right or not is_causal or torch.equal(cu_seqlens_q, cu_seqlens_kv)
        out, lse = attend(query, key, value, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, is_causal,
                          poison=sys.modules["cudnn"].backend_version() < 92500)
        return (out, lse.t()[..., None]) if return_lse else out
    (samples, heads, rows, _), keys = query.shape, key.shape[2]
    assert causal_bottom_right or not is_causal or rows == keys
    flat = [t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (query, key, value)]
    ends = [torch.arange(samples + 1, dtype=torch.int32) * n for n in (rows, keys)]
    out, lse = attend(*flat, *ends, rows, keys, scale, is_causal)
    out = out.view(samples, rows, heads, -1).transpose(1, 2)
    return (out, lse.view(heads, samples, rows).transpose(0, 1)[..., None]) if return_lse else out


class BlockDiagonalMask:
    causal, window_size = False, None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert all(type(n) is int for n in (*q_seqlen, *kv_seqlen)) and isinstance(device, torch.device)
        assert len(q_seqlen) == len(kv_seqlen)
        self = cls()
        self.queries, self.keys = q_seqlen, kv_seqlen
        return self

    def make_causal_from_bottomright(self):
        for place, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            if keys < queries:
                raise ValueError(f"Block #{place} has num_keys={keys} and num_queries={queries}.")
        self.causal = True
        return self

    def make_local_attention_from_bottomright(self, window_size):
        """Keys at a distance below ``window_size`` back from the diagonal."""
        assert window_size > 0
        self.window_size = window_size
        return self.make_causal_from_bottomright()


def xformers_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert query.dim() == 4 and query.shape[0] == 1 and query.shape[2] == key.shape[2] and p == 0.0
    bias = attn_bias
    assert min(bias.queries) > 0 and min(bias.keys) > 0  # not defined otherwise
    assert query.shape[1] == sum(bias.queries) and key.shape[1] == value.shape[1] == sum(bias.keys)
    window = (-1, -1) if bias.window_size is None else (bias.window_size - 1, -1)
    ends = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (bias.queries, bias.keys))
    out, _ = attend(query[0], key[0], value[0], *ends, max(bias.queries), max(bias.keys), scale, bias.causal, window)
    return out[None]


def plant_all(monkeypatch):
    plant(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func=flash_attn_2)
    plant(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_3)
    plant(monkeypatch, "flash_attn.cute.interface", flash_attn_varlen_func=flash_attn_4)
    plant(monkeypatch, "cudnn.sdpa.fwd.torch_op")
    plant(monkeypatch, "cudnn", sdpa_torch=cudnn_sdpa, backend_version=lambda: CUDNN)
    plant(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    plant(monkeypatch, "xformers.ops", memory_efficient_attention=xformers_attention)
