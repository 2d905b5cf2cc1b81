"""flash-attn's and xformers' interfaces on varlen_attention."""

import inspect
from types import SimpleNamespace

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sora_fast import ops
from sora_fast.compat import (
    BlockDiagonalMask,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    memory_efficient_attention,
)
from sora_fast.testing import assert_matches

CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
TAIL = dict(dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
            deterministic=False, return_attn_probs=False)


def dense(q, k, v, bias_HQK, scale=None):
    """Softmax over a dense bias; rows that see nothing are 0. q (Nq, H, E)."""
    scores = torch.einsum("qhe,khe->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias_HQK
    return torch.einsum("hqk,khe->qhe", torch.softmax(scores, -1).nan_to_num(0.0), v)


# --------------------------------------------------------------------------------------------------- flash-attn
@pytest.mark.parametrize("fn, first", [
    (flash_attn_varlen_func, ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
    (flash_attn_varlen_qkvpacked_func, ("qkv", "cu_seqlens", "max_seqlen")),
    (flash_attn_varlen_kvpacked_func, ("q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
])
def test_signatures_of_flash_attn(fn, first):
    parameters = inspect.signature(fn).parameters
    want = {**dict.fromkeys(first, inspect.Parameter.empty), **TAIL}
    if fn is flash_attn_varlen_func:
        want["block_table"] = None
    ours = {name: p.default for name, p in parameters.items() if name != "backend"}
    assert list(ours.items()) == list(want.items())
    assert parameters["backend"].default == "auto" and parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("causal, window", [(False, (-1, -1)), (True, (-1, -1)), (False, (2, 1)), (True, (1, -1))])
def test_flash_attn_is_varlen_attention(causal, window, backend):
    q, k, v = torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    want = ops.varlen_attention(q, k, v, CU, CU, causal=causal, window=window, softmax_scale=0.2, backend=backend)
    options = dict(softmax_scale=0.2, causal=causal, window_size=window, backend=backend)
    assert torch.equal(flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, **options), want)
    kv = torch.stack([k, v], 1)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, kv, CU, CU, 5, 5, **options), want)
    qkv = torch.stack([q[:, :2], k, v], 1).requires_grad_()
    want = ops.varlen_attention(q[:, :2], k, v, CU, CU, causal=causal, window=window, softmax_scale=0.2,
                                backend=backend)
    got = flash_attn_varlen_qkvpacked_func(qkv, CU, 5, **options)
    assert torch.equal(got, want)
    got.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_return_attn_probs():
    q = torch.randn(9, 2, 16).bfloat16()
    keys = torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    out, lse, nothing = flash_attn_varlen_func(q, q, q, CU, keys, 5, 5, return_attn_probs=True)
    assert nothing is None and lse.dtype == torch.float32 and lse.shape == (2, 9)
    assert torch.isneginf(lse[:, 4:]).all() and torch.isfinite(lse[:, :4]).all() and not out[4:].any()


@pytest.mark.parametrize("head_dim", (1, 8, 12, 16, 20, 59, 111))
def test_odd_head_dims_keep_their_own_scale(head_dim):
    q, k, v = (torch.randn(9, 2, head_dim, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = BlockDiagonalMask.from_seqlens([4, 0, 5]).materialize((9, 9), torch.float64)
    want = dense(q, k, v, mask)
    for got in (flash_attn_varlen_func(q, k, v, CU, CU, 5, 5),
                flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, return_attn_probs=True)[0],
                memory_efficient_attention(q[None], k[None], v[None], BlockDiagonalMask.from_seqlens([4, 0, 5]))[0]):
        assert got.shape == q.shape
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, k, v)),
                                   torch.autograd.grad(dense(q, k, v, mask).square().sum(), (q, k, v)))


@pytest.mark.parametrize("change, part", [
    (dict(dropout_p=0.1), "dropout_p"), (dict(softcap=30.0), "softcap"),
    (dict(alibi_slopes=torch.ones(2)), "alibi_slopes"), (dict(block_table=torch.zeros(1, 1)), "block_table")])
def test_refused_features(change, part):
    q = torch.randn(9, 2, 16)
    with pytest.raises(NotImplementedError) as caught:
        flash_attn_varlen_func(q, q, q, CU, CU, 5, 5, **change)
    op_checks.assert_sentence(str(caught.value), "flash_attn_varlen_func")
    assert part in str(caught.value)


@pytest.mark.parametrize("call, op", [
    (lambda q: flash_attn_varlen_func(q[0], q, q, CU, CU, 5, 5), "flash_attn_varlen_func"),
    (lambda q: flash_attn_varlen_func(q, q[..., :12], q, CU, CU, 5, 5), "varlen_attention"),
    (lambda q: flash_attn_varlen_func(q[..., :12], q, q, CU, CU, 5, 5), "flash_attn_varlen_func"),
    (lambda q: flash_attn_varlen_func(q, q, q, CU.long(), CU, 5, 5), "varlen_attention"),
    (lambda q: flash_attn_varlen_func(torch.zeros(9, 1, 264), q, q, CU, CU, 5, 5), "flash_attn_varlen_func"),
    (lambda q: flash_attn_varlen_qkvpacked_func(q, CU, 5), "flash_attn_varlen_qkvpacked_func"),
    (lambda q: flash_attn_varlen_kvpacked_func(q, q, CU, CU, 5, 5), "flash_attn_varlen_kvpacked_func"),
    (lambda q: memory_efficient_attention(q[0], q, q), "memory_efficient_attention"),
    (lambda q: memory_efficient_attention(q, q[:, :, :8], q), "memory_efficient_attention"),
    (lambda q: memory_efficient_attention(q, q, q, BlockDiagonalMask.from_seqlens([9])), "memory_efficient_attention"),
    (lambda q: memory_efficient_attention(q[None, 0], q[None, 0], q[None, 0], BlockDiagonalMask.from_seqlens([3])),
     "memory_efficient_attention"),
    (lambda q: BlockDiagonalMask.from_seqlens([3, -1]), "BlockDiagonalMask"),
    (lambda q: BlockDiagonalMask.from_seqlens([3], [3, 1]), "BlockDiagonalMask"),
    (lambda q: BlockDiagonalMask.from_seqlens([3]).materialize((4, 4)), "BlockDiagonalMask.materialize"),
    (lambda q: BlockDiagonalMask.from_seqlens([3]).split(q), "BlockDiagonalMask.split"),
])
def test_bad_input(call, op):
    op_checks.assert_refused(lambda: call(torch.randn(9, 2, 16)), op)


# ----------------------------------------------------------------------------------------------------- xformers
def test_without_a_bias_every_batch_element_is_a_sample():
    q, k, v = (torch.randn(3, n, 2, 16, dtype=torch.float64) for n in (5, 7, 7))
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(memory_efficient_attention(q, k, v), want)
    torch.testing.assert_close(memory_efficient_attention(q, k, v, None, 0.0, 16**-0.5, backend="reference"), want)
    flat = memory_efficient_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0])
    torch.testing.assert_close(flat, want[:, :, 0])


class BlockDiagonalCausalMask(SimpleNamespace):
    """What xformers' own object looks like from outside."""


@op_checks.drawn
@given(lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
       kind=st.sampled_from((None, "top-left", "bottom-right")))
def test_block_diagonal_masks(lengths, kind):
    """Equal to the dense mask, with blocks of unequal lengths and every alignment; gradients too."""
    mask = BlockDiagonalMask.from_seqlens([a for a, _ in lengths], [b for _, b in lengths])
    if kind is not None:
        mask = mask.make_causal() if kind == "top-left" else mask.make_causal_from_bottomright()
    queries, keys = sum(a for a, _ in lengths), sum(b for _, b in lengths)
    bias = torch.full((queries, keys), -torch.inf, dtype=torch.float64)
    first_q = first_k = 0
    for a, b in lengths:
        for i in range(a):
            for j in range(b):
                if kind is None or j <= i + (b - a if kind == "bottom-right" else 0):
                    bias[first_q + i, first_k + j] = 0
        first_q, first_k = first_q + a, first_k + b
    assert torch.equal(mask.materialize((1, 2, queries, keys), torch.float64), bias.expand(1, 2, -1, -1))
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.float64).requires_grad_() for n in (queries, keys, keys))
    got = memory_efficient_attention(q[None], k[None], v[None], mask)[0]
    sees = torch.isfinite(bias).any(1)
    want = dense(q, k, v, bias.masked_fill(~sees[:, None], 0)) * sees[:, None, None]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, k, v)),
                               torch.autograd.grad(want.square().sum(), (q, k, v)))
    if kind == "top-left":
        theirs = BlockDiagonalCausalMask(q_seqinfo=mask.q_seqinfo, k_seqinfo=mask.k_seqinfo)
        assert torch.equal(memory_efficient_attention(q[None], k[None], v[None], theirs)[0], got)


def test_tensor_lists():
    tensors = [torch.randn(2, 3, 2, 16), torch.randn(1, 5, 2, 16), torch.randn(1, 0, 2, 16)]
    mask, joined = BlockDiagonalMask.from_tensor_list(tensors)
    assert joined.shape == (1, 11, 2, 16) and mask.q_seqinfo.seqstart.tolist() == [0, 3, 6, 11, 11]
    assert all(map(torch.equal, mask.split(joined), tensors))
    out = mask.make_causal().split(memory_efficient_attention(joined, joined, joined, mask.make_causal()))
    for got, x in zip(out, tensors, strict=True):
        want = F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(got, want)
    parts = BlockDiagonalMask.from_seqlens([4, 7]).split(joined)
    assert [p.shape[:2] for p in parts] == [(1, 4), (1, 7)]


def test_refused_masks():
    q = torch.randn(1, 9, 2, 16)
    for bias in (torch.zeros(1, 2, 9, 9), object(), SimpleNamespace(q_seqinfo=None)):
        with pytest.raises(NotImplementedError) as caught:
            memory_efficient_attention(q, q, q, bias)
        op_checks.assert_sentence(str(caught.value), "memory_efficient_attention")
    with pytest.raises(NotImplementedError, match="memory_efficient_attention: expected p=0.0, got 0.5; "):
        memory_efficient_attention(q, q, q, p=0.5)


def test_wrong_kernels_fail():
    """Top-left taken for bottom-right, where lengths differ."""
    q, k, v = torch.randn(9, 2, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
    mask = BlockDiagonalMask.from_seqlens([4, 5], [3, 4])
    cu_q, cu_k = mask.q_seqinfo.seqstart, mask.k_seqinfo.seqstart
    inputs = dict(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)

    def call(mask):
        return lambda q, k, v, **rest: memory_efficient_attention(q[None], k[None], v[None], mask)[0]

    assert_matches("varlen_attention", call(mask.make_causal_from_bottomright()), inputs, grads=False)
    with pytest.raises(AssertionError, match="varlen_attention"):
        assert_matches("varlen_attention", call(mask.make_causal()), inputs, grads=False)
