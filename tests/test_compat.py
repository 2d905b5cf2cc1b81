"""flash-attn's and xformers' interfaces on varlen_attention, and a model moved over by one changed import."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sora_fast import compat, ops
from sora_fast.compat import (
    BlockDiagonalMask,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    memory_efficient_attention,
)
from sora_fast.testing import assert_matches
from sora_fast.testing.rule import compare

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
    (lambda q: BlockDiagonalMask.from_seqlens([3]).make_local_attention(0), "BlockDiagonalCausalLocalAttentionMask"),
    (lambda q: BlockDiagonalMask.from_seqlens([3]).make_local_attention_from_bottomright(-1),
     "BlockDiagonalCausalLocalAttentionFromBottomRightMask"),
    (lambda q: BlockDiagonalMask.from_tensor_lists_qkv([q], [q, q]), "BlockDiagonalMask"),
    (lambda q: BlockDiagonalMask.from_tensor_lists_qkv([q[None]], [torch.stack([q, q])]), "BlockDiagonalMask"),
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


KINDS = {  # maker, keys that query i of Sq sees among Sk
    None: (lambda mask, window: mask, lambda i, j, queries, keys, window: True),
    "causal": (lambda mask, window: mask.make_causal(), lambda i, j, queries, keys, window: j <= i),
    "causal from bottom right": (lambda mask, window: mask.make_causal_from_bottomright(),
                                 lambda i, j, queries, keys, window: queries - 1 - i <= keys - 1 - j),
    "local": (lambda mask, window: mask.make_local_attention(window),
              lambda i, j, queries, keys, window: i - window < j <= i),
    "local from bottom right": (lambda mask, window: mask.make_local_attention_from_bottomright(window),
                                lambda i, j, queries, keys, window: 0 <= (keys - 1 - j) - (queries - 1 - i) < window),
}
BLOCKS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


@op_checks.drawn
@given(lengths=BLOCKS, kind=st.sampled_from(list(KINDS)), window=st.integers(1, 4))
def test_block_diagonal_masks(lengths, kind, window):
    """Equal to the dense mask, with blocks of unequal lengths and every alignment; gradients too."""
    if kind == "local":  # of fewer keys than queries it is refused
        lengths = [(min(a, b), b) for a, b in lengths]
    make, sees = KINDS[kind]
    mask = make(BlockDiagonalMask.from_seqlens([a for a, _ in lengths], [b for _, b in lengths]), window)
    queries, keys = sum(a for a, _ in lengths), sum(b for _, b in lengths)
    bias = torch.full((queries, keys), -torch.inf, dtype=torch.float64)
    first_q = first_k = 0
    for a, b in lengths:
        for i in range(a):
            for j in range(b):
                if sees(i, j, a, b, window):
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
    # what xformers' own object looks like from outside
    shared = dict(q_seqinfo=mask.q_seqinfo, k_seqinfo=mask.k_seqinfo)
    if "local" in (kind or ""):
        shared["_window_size"] = window
    theirs = type(type(mask).__name__, (SimpleNamespace,), {})(**shared)
    assert torch.equal(memory_efficient_attention(q[None], k[None], v[None], theirs)[0], got)


@op_checks.drawn
@given(lengths=BLOCKS, kind=st.sampled_from(list(KINDS)), window=st.integers(1, 4))
def test_masks_equal_those_of_xformers(lengths, kind, window):
    theirs = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed")
    if kind is not None:  # with fewer keys it raises, or leaves rows without any
        lengths = [(min(a, b), b) for a, b in lengths]
    seqlens = [a for a, _ in lengths], [b for _, b in lengths]
    ours = KINDS[kind][0](BlockDiagonalMask.from_seqlens(*seqlens), window)
    other = KINDS[kind][0](theirs.BlockDiagonalMask.from_seqlens(*seqlens, device=torch.device("cpu")), window)
    assert type(ours).__name__ == type(other).__name__
    shape = (2, sum(seqlens[0]), sum(seqlens[1]))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ours.materialize(shape, dtype), other.materialize(shape, dtype))
    q, k = (torch.randn(1, n, 2, 16) for n in shape[1:])
    assert torch.equal(memory_efficient_attention(q, k, k, other), memory_efficient_attention(q, k, k, ours))
    if sum(seqlens[0]):
        assert all(map(torch.equal, ours.split_kv(k), other.split_kv(k)))


def test_signature_of_memory_efficient_attention():
    parameters = inspect.signature(memory_efficient_attention).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty} == dict(
        attn_bias=None, p=0.0, scale=None, op=None, output_dtype=None, backend="auto")
    assert [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY] == [
        "query", "key", "value", "attn_bias", "p", "scale"]


def test_a_causal_mask_can_be_made_at_once():
    q = torch.randn(1, 9, 2, 16)
    want = BlockDiagonalMask.from_seqlens([4, 5]).make_causal().materialize((9, 9))
    for kind in ("BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"):
        mask = getattr(compat, kind).from_seqlens([4, 5])
        assert torch.equal(mask.materialize((9, 9)), want)
        moved = mask.to("meta")
        assert type(moved) is type(mask) and moved.k_seqinfo.seqstart.device.type == "meta"
        assert memory_efficient_attention(q, q, q, mask).shape == q.shape


def test_tensor_lists_of_queries_keys_and_values():
    queries, keys = ([torch.randn(2, a, 2, 16), torch.randn(1, b, 2, 16)] for a, b in ((3, 4), (5, 2)))
    mask, q, k, v = BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, keys)
    assert all(map(torch.equal, mask.split_queries(q), queries)) and all(map(torch.equal, mask.split_kv(v), keys))
    for got, x, y in zip(mask.split(memory_efficient_attention(q, k, v, mask)), queries, keys, strict=True):
        want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (x, y, y))).transpose(1, 2)
        torch.testing.assert_close(got, want)
    assert BlockDiagonalMask.from_tensor_lists_qkv(queries, keys)[3] is None


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
    fewer_keys = BlockDiagonalMask.from_seqlens([5, 4], [4, 5]).make_local_attention(2)
    for change in (dict(p=0.5), dict(op="cutlass"), dict(output_dtype=torch.float32), dict(attn_bias=fewer_keys)):
        with pytest.raises(NotImplementedError) as caught:
            memory_efficient_attention(q, q, q, **change)
        op_checks.assert_sentence(str(caught.value), "memory_efficient_attention")


@pytest.mark.parametrize("name, remedy", [
    ("LowerTriangularMask", "make_causal()"), ("LowerTriangularFromBottomRightMask", "make_causal_from_bottomright()"),
    ("LocalAttentionFromBottomRightMask", "make_local_attention_from_bottomright(window_size)"),
    ("BlockDiagonalCausalWithOffsetPaddedKeysMask", "make_causal_from_bottomright()"), ("BlockDiagonalPaddedKeysMask", "")])
def test_the_remedy_for_a_mask_hides_the_same_keys(name, remedy):
    q = torch.randn(1, 9, 2, 16)
    with pytest.raises(NotImplementedError) as caught:
        memory_efficient_attention(q, q, q, type(name, (), {})())
    assert str(caught.value).endswith(f"got a {name}; join the samples and pass BlockDiagonalMask.from_seqlens(lengths)"
                                      + f".{remedy}" * bool(remedy))
    op_checks.assert_sentence(str(caught.value), "memory_efficient_attention")
    lengths, window_size = [4, 5], 2  # noqa: F841 (the remedy's own names)
    memory_efficient_attention(q, q, q, eval(str(caught.value).rpartition("pass ")[2]))


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


# ------------------------------------------------------------------------------- a model moved over by its import alone
MODEL = """
import torch
from torch import nn

from flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func


class Block(nn.Module):
    '''Self-attention in a window, causal attention with fewer key heads, cross-attention to text of other lengths.'''

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.grouped = nn.Linear(width, 2 * width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(3 * width, width)

    def forward(self, x, text, cu_seqlens, cu_seqlens_text, max_seqlen, max_seqlen_text):
        qkv = self.qkv(x).view(-1, 3, self.heads, self.head_dim)
        near = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, 0.0, window_size=(3, 2))
        q, k, v = self.grouped(x).split([self.heads * self.head_dim] + [self.heads * self.head_dim // 2] * 2, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        before = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                                        max_seqlen_k=max_seqlen, dropout_p=0.0, softmax_scale=0.2, causal=True,
                                        window_size=(-1, -1), deterministic=True)
        kv = self.kv(text).view(-1, 2, self.heads, self.head_dim)
        cross, lse, _ = flash_attn_varlen_kvpacked_func(
            self.q(x).view(-1, self.heads, self.head_dim), kv, cu_seqlens, cu_seqlens_text, max_seqlen, max_seqlen_text,
            causal=True, return_attn_probs=True)
        return self.proj(torch.cat([near, before, cross], -1).flatten(1)), lse
"""


def flash_attn_stand_in(bottom_right=True):
    """The module flash_attn by its documentation, row by row: one softmax over the keys that a row is said to see."""
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):
        wide, share = max(q.dtype, torch.float32, key=lambda t: t.itemsize), q.shape[1] // k.shape[1]
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        outs, lses = [], []
        spans = [zip(cu.tolist()[:-1], cu.tolist()[1:], strict=True) for cu in (cu_seqlens_q, cu_seqlens_k)]
        for (a, b), (c, d) in zip(*spans, strict=True):
            shift = (d - c) - (b - a) if bottom_right else 0
            for i in range(b - a):
                first = max(0, i + shift - window_size[0]) if window_size[0] >= 0 else 0
                last = d - c if window_size[1] < 0 else min(d - c, i + shift + window_size[1] + 1)
                last = max(0, min(last, i + shift + 1) if causal else last)
                row_HE = q[a + i].to(wide)
                keys_KHE, values_KHE = (t[c + first:c + last].to(wide).repeat_interleave(share, 1) for t in (k, v))
                scores_HK = torch.einsum("he,khe->hk", row_HE, keys_KHE) * scale
                outs.append(torch.einsum("hk,khe->he", scores_HK.softmax(-1), values_KHE).to(q.dtype))
                lses.append(scores_HK.logsumexp(-1) if last > first else scores_HK.new_full((q.shape[1],), torch.inf))
        out, lse = torch.stack(outs), torch.stack(lses, 1)
        return (out, lse.detach(), None) if return_attn_probs else out

    def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, *args, **kwargs):
        return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)

    def flash_attn_varlen_kvpacked_func(q, kv, *args, **kwargs):
        return flash_attn_varlen_func(q, *kv.unbind(1), *args, **kwargs)

    module = ModuleType("flash_attn")
    for function in (flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func):
        setattr(module, function.__name__, function)
    return module


def trained(source, dtype, head_dim, monkeypatch, flash_attn=None):
    """Output and log-sum-exp of the block in ``source``, and the gradients of its input, text and weights, by name."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    namespace = {}
    exec(compile(source, "model", "exec"), namespace)
    torch.manual_seed(3)
    block = namespace["Block"](4 * head_dim, 4).bfloat16().to(dtype)
    x, text = (torch.randn(n, 4 * head_dim).bfloat16().to(dtype).requires_grad_() for n in (26, 21))
    lengths, text_lengths = (9, 1, 0, 16), (7, 4, 0, 10)
    cu, cu_text = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, text_lengths))
    out, lse = block(x, text, cu, cu_text, max(lengths), max(text_lengths))
    weights = dict(block.named_parameters())
    cotangent = torch.randn(out.shape).bfloat16().to(dtype)
    grads = torch.autograd.grad(out, [x, text, *weights.values()], cotangent)
    return dict(zip(["out", "lse", "x", "text", *weights], [out.detach(), lse, *grads], strict=True))


@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_moves_over_with_its_import(monkeypatch, dtype, head_dim):
    moved = MODEL.replace("from flash_attn import", "from sora_fast.compat import")
    assert sum(a != b for a, b in zip(MODEL.splitlines(), moved.splitlines(), strict=True)) == 1
    truth = trained(MODEL, torch.float64, head_dim, monkeypatch, flash_attn_stand_in())
    low = trained(MODEL, dtype, head_dim, monkeypatch, flash_attn_stand_in())
    got = trained(moved, dtype, head_dim, monkeypatch)
    blind = torch.isposinf(truth["lse"])
    assert blind.any() and torch.equal(torch.isneginf(got["lse"]), blind)  # +inf there, -inf here, as the docstring says
    for found in (truth, low):
        found["lse"] = torch.where(blind, -torch.inf, found["lse"])
    results = [compare(name, got[name], low[name], truth[name], rounds_p=True) for name in truth]
    assert not [str(result) for result in results if not result.passed]

    wrong = trained(MODEL, dtype, head_dim, monkeypatch, flash_attn_stand_in(bottom_right=False))
    failed = {name for name in truth if not compare(name, wrong[name], low[name], truth[name], rounds_p=True).passed}
    assert {"out", "x", "kv.weight"} <= failed
