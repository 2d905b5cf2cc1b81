"""varlen_attention, its raw forward and backward, merge_attention."""

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import ops, reference
from sora_fast.explanation import all_ops
from sora_fast.ops.attention import AttentionProblem
from sora_fast.testing import assert_matches

OPS = ("varlen_attention", "varlen_attention_forward", "varlen_attention_backward", "merge_attention")

test_error_rule = op_checks.error_rule(OPS)


def offsets(*lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


def good(op):
    q, k, v = torch.randn(9, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    inputs = dict(q=q, k=k, v=v, cu_seqlens_q=offsets(4, 0, 5), cu_seqlens_k=offsets(3, 2, 3))
    if op == "varlen_attention_backward":
        out, lse = ops.varlen_attention_forward(**inputs)
        return dict(dout=torch.randn_like(out), dlse=torch.randn_like(lse), out=out, lse=lse, **inputs)
    return inputs


RAGGED = OPS[:3]
test_every_tensor_is_checked = op_checks.every_tensor_is_checked(RAGGED, good)


def _table():
    cu = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)
    table = []
    for op in RAGGED:
        table += [
            (op, "q of rank 2", dict(q=torch.zeros(9, 64)), ("q", "(Nq, H, E)", "(9, 64)")),
            (op, "another head dim of k", dict(k=torch.zeros(8, 2, 24)), ("k", "24")),
            (op, "v of another length", dict(v=torch.zeros(7, 2, 16)), ("v", "(8, 2, 16)", "(7, 2, 16)")),
            (op, "key heads that do not divide", dict(k=torch.zeros(8, 3, 16), v=torch.zeros(8, 3, 16)), ("4", "3")),
            (op, "k in another dtype", dict(k=torch.zeros(8, 2, 16).double()), ("k", "float32", "float64")),
            (op, "cu_seqlens in int64", dict(cu_seqlens_q=cu(0, 4, 4, 9).long()), ("cu_seqlens_q", "int32", "int64")),
            (op, "cu_seqlens that fall", dict(cu_seqlens_q=cu(0, 5, 4, 9)), ("never to fall", "got 5 before 4")),
            (op, "cu_seqlens_k that fall", dict(cu_seqlens_k=cu(0, 5, 4, 8)), ("cu_seqlens_k", "never to fall")),
            (op, "cu_seqlens from 1", dict(cu_seqlens_q=cu(1, 4, 4, 9)), ("start at 0", "got 1")),
            (op, "cu_seqlens beyond the rows", dict(cu_seqlens_q=cu(0, 4, 4, 1024)),
             ("must not end beyond q's 9 rows", "got 1,024")),
            (op, "cu_seqlens_k beyond the rows", dict(cu_seqlens_k=cu(0, 4, 4, 9)), ("beyond k's 8 rows", "got 9")),
            (op, "no number in cu_seqlens", dict(cu_seqlens_q=cu()), ("cu_seqlens_q", "no number")),
            (op, "another number of samples", dict(cu_seqlens_k=cu(0, 8)), ("one length", "4 and 2")),
            (op, "window of one", dict(window=(3,)), ("window", "(3,)")),
            (op, "window as a number", dict(window=3), ("window",)),
            (op, "window of floats", dict(window=(1.5, 0)), ("window", "1.5")),
            (op, "scale as text", dict(softmax_scale="0.1"), ("softmax_scale",)),
            (op, "scale as a tensor", dict(softmax_scale=torch.ones(())), ("softmax_scale",)),
            (op, "max_seqlen as text", dict(max_seqlen_q="9"), ("max_seqlen_q",)),
        ]
        for width in (8, 20, 264):
            table.append((op, f"head dim {width}", lambda a, width=width: {
                name: torch.zeros(*value.shape[:2], width) for name, value in a.items() if name in
                ("q", "k", "v", "out", "dout")}, ("16 to 256", str(width))))
    table += [
        ("varlen_attention_backward", "dout of another shape", dict(dout=torch.zeros(9, 4, 24)), ("dout",)),
        ("varlen_attention_backward", "lse transposed", dict(lse=torch.zeros(9, 4)), ("lse", "(4, 9)", "(9, 4)")),
        ("varlen_attention_backward", "dlse of another shape", dict(dlse=torch.zeros(4, 8)), ("dlse", "(4, 9)")),
    ]
    return table


test_refusals = op_checks.refusals(_table(), good)


@pytest.mark.parametrize("outs, lses, part", [
    ([], [], "0 outs and 0 lses"),
    ([torch.zeros(3, 2, 4)], [], "1 outs and 0 lses"),
    ([torch.zeros(3, 2, 4)], [torch.zeros(3, 2)], "(2, 3)"),
    ([torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)], [torch.zeros(2, 3)] * 2, "outs[1]"),
    ([torch.zeros(3, 2, 4), torch.zeros(3, 2, 4).half()], [torch.zeros(2, 3)] * 2, "outs[1]"),
    ([torch.zeros(3, 2, 4).int()], [torch.zeros(2, 3)], "int32"),
    ([torch.zeros(3, 2, 4, device="meta"), torch.zeros(3, 2, 4)], [torch.zeros(2, 3)] * 2, "device"),
    ([None], [torch.zeros(2, 3)], "NoneType"),
    (torch.zeros(3, 2, 4), [torch.zeros(2, 3)], "list"),
    (3, 4, "list"),
])
def test_merge_refusals(outs, lses, part):
    op_checks.assert_refused(lambda: ops.merge_attention(outs, lses), "merge_attention", part)


def test_a_backward_that_has_no_room_on_small_gpus_is_refused():
    """Before it is launched; tests/test_aot_everywhere.py has what it takes."""
    of = lambda op, head_dim, gpu, dtype, grad: all_ops()[op].backends["triton"].unsupported(AttentionProblem(
        f"cuda:{gpu}", dtype, grad, 4, 4, head_dim, False, (-1, -1), False, False))
    for gpu, small in (("sm80", False), ("sm86", True), ("sm89", True), ("sm90", False), ("sm100", False), ("sm120", True)):
        for head_dim in (192, 200, 224, 256):
            room = not small or head_dim == 192
            for op, grad in (("varlen_attention", True), ("varlen_attention_backward", False)):
                assert (of(op, head_dim, gpu, torch.float32, grad) == []) is room
                assert not of(op, head_dim, gpu, torch.bfloat16, grad)
            assert not of("varlen_attention", head_dim, gpu, torch.float32, False)


def test_refused_backends_say_why():
    inputs = good("varlen_attention")
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        ops.varlen_attention(**inputs, return_lse=True, backend="torch")
    with pytest.raises(NotImplementedError, match="varlen_attention_forward.*'torch'.*'reference'"):
        ops.varlen_attention_forward(**inputs, backend="torch")


# ---------------------------------------------------------------------------------------------------- gradcheck
CU_Q, CU_K = offsets(2, 0, 1, 1), offsets(1, 2, 3, 0)


def _seen(result):
    """Out and the finite part of lse: a row without keys is -inf at every input."""
    out, lse = result
    return out, lse[torch.isfinite(lse)]


test_gradcheck = op_checks.gradchecks([
    ("plain", lambda q, k, v: reference.varlen_attention(q, k, v, CU_Q, CU_K),
     (double(4, 2, 3), double(6, 1, 3), double(6, 1, 3) + 1)),
    ("causal, lse", lambda q, k, v: _seen(reference.varlen_attention(q, k, v, CU_Q, CU_K, causal=True,
                                                                     return_lse=True)),
     (double(4, 2, 3), double(6, 2, 3), double(6, 2, 3) + 1)),
    ("window, scale, tail", lambda q, k, v: _seen(reference.varlen_attention(
        q, k, v, CU_Q, CU_K, window=(1, 0), softmax_scale=0.7, return_lse=True)),
     (double(5, 2, 3), double(8, 1, 3), double(8, 1, 3) + 1)),
    ("merge", lambda a, b, la, lb: reference.merge_attention([a, b], [la, lb]),
     (double(3, 2, 2), double(3, 2, 2) + 1, double(2, 3), double(2, 3) + 1)),
    ("merge with an empty part", lambda a, b, la, lb: _seen(reference.merge_attention(
        [a, b], [la.masked_fill(EMPTY_A, -torch.inf), lb.masked_fill(EMPTY_B, -torch.inf)])),
     (double(3, 2, 2), double(3, 2, 2) + 1, double(2, 3), double(2, 3) + 1)),
])
EMPTY_A = torch.tensor([[True, True, False], [False, False, True]])
EMPTY_B = torch.tensor([[True, False, False], [False, True, True]])


# ---------------------------------------------------------------------------------------------------- exactness
def by_row(q, k, v, cu_q, cu_k, scale, causal, window):
    """Row by row, key by key, in Python's own numbers."""
    heads, copies = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full((heads, q.shape[0]), -torch.inf, dtype=q.dtype)
    left, right = window
    if causal:
        right = 0
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True):
        for i in range(b - a):
            at = i + (d - c) - (b - a)
            seen = [j for j in range(d - c) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)]
            for h in range(heads):
                if seen:
                    keys = [c + j for j in seen]
                    scores = (k[keys, h // copies] @ q[a + i, h]) * scale
                    lse[h, a + i] = torch.logsumexp(scores, 0)
                    out[a + i, h] = torch.softmax(scores, 0) @ v[keys, h // copies]
    return out, lse


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("causal, window", [(False, (-1, -1)), (True, (-1, -1)), (False, (2, 1)), (True, (2, 5)),
                                            (False, (0, -1)), (False, (-1, 0)), (False, (0, 0))])
def test_row_by_row(causal, window, backend):
    lengths_q, lengths_k = (5, 0, 3, 1, 7, 4), (5, 4, 0, 1, 3, 9)
    q, k, v = double(22, 4, 16), double(24, 2, 16), double(24, 2, 16) + 1  # two rows of tail each
    cu_q, cu_k = offsets(*lengths_q), offsets(*lengths_k)
    want, want_lse = by_row(q, k, v, cu_q, cu_k, 0.3, causal, window)
    options = dict(softmax_scale=0.3, causal=causal, window=window)
    got = ops.varlen_attention(q, k, v, cu_q, cu_k, 7, 9, **options, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if backend != "torch":
        out, lse = ops.varlen_attention(q, k, v, cu_q, cu_k, **options, return_lse=True, backend=backend)
        torch.testing.assert_close((out, lse), (want, want_lse), rtol=1e-12, atol=1e-12)
        raw_out, raw_lse = ops.varlen_attention_forward(q, k, v, cu_q, cu_k, **options, backend=backend)
        assert torch.equal(raw_out, out) and torch.equal(raw_lse, lse)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_indexing_bit_for_bit(dtype, backend):
    """A window of one key gives back that key's value: which key, which head and which sample is then exact."""
    lengths = (3, 0, 5, 1)
    q, k = torch.randn(11, 4, 16).to(dtype), torch.randn(11, 2, 16).to(dtype)
    v = torch.arange(11 * 2)[:, None].expand(-1, 16).reshape(11, 2, 16).to(dtype)
    out = ops.varlen_attention(q, k, v, offsets(*lengths), offsets(*lengths), window=(0, 0), backend=backend)
    want = v.repeat_interleave(2, dim=1)
    want[9:] = 0
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_max_seqlen_is_a_hint(backend):
    inputs = good("varlen_attention")
    want = ops.varlen_attention(**inputs, backend=backend)
    for hint in (0, 1, 10**6, None):
        assert torch.equal(ops.varlen_attention(**inputs, max_seqlen_q=hint, max_seqlen_k=hint, backend=backend), want)


def test_dtypes_and_packed_slices():
    for dtype in op_checks.DTYPES:
        qkv = torch.randn(9, 3, 2, 16).to(dtype).requires_grad_()
        out, lse = ops.varlen_attention(*qkv.unbind(1), offsets(4, 5), offsets(4, 5), return_lse=True)
        assert out.dtype == dtype and lse.shape == (2, 9)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (out.sum() + lse.sum()).backward()
        assert qkv.grad.dtype == dtype and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("dlse", (True, False))
def test_raw_backward_is_the_gradient(dlse):
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in good("").items()}
    fresh, leaves = with_grad(inputs)
    out, lse = ops.varlen_attention(**fresh, causal=True, return_lse=True)
    dout = torch.randn_like(out)
    dlse = torch.where(torch.isfinite(lse), torch.randn_like(lse), 0) if dlse else None
    outs = ([out, lse], [dout, dlse]) if dlse is not None else ([out], [dout])
    want = torch.autograd.grad(*[outs[0], list(leaves.values()), outs[1]])
    got = ops.varlen_attention_backward(dout, dlse, inputs["q"], inputs["k"], inputs["v"], out.detach(), lse.detach(),
                                        inputs["cu_seqlens_q"], inputs["cu_seqlens_k"], causal=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not any(t.requires_grad for t in got)


def test_ring_of_key_parts():
    """Parts merged forward, and backward with the global out and lse, are the whole attention."""
    q, k, v = double(9, 4, 16), double(20, 2, 16), double(20, 2, 16) + 1
    cu_q, whole = offsets(4, 0, 5), offsets(10, 0, 10)
    parts = [(torch.cat([torch.arange(a, b), torch.arange(10 + a, 10 + b)]), offsets(b - a, 0, b - a))
             for a, b in ((0, 3), (3, 3), (3, 10))]
    want_out, want_lse = ops.varlen_attention_forward(q, k, v, cu_q, whole)
    pieces = [ops.varlen_attention_forward(q, k[at], v[at], cu_q, cu) for at, cu in parts]
    out, lse = ops.merge_attention([p[0] for p in pieces], [p[1] for p in pieces])
    torch.testing.assert_close((out, lse), (want_out, want_lse), rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(out)
    want = ops.varlen_attention_backward(dout, None, q, k, v, out, lse, cu_q, whole)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at, cu in parts:
        piece = ops.varlen_attention_backward(dout, None, q, k[at], v[at], out, lse, cu_q, cu)
        dq += piece[0]
        dk[at], dv[at] = piece[1], piece[2]
    torch.testing.assert_close((dq, dk, dv), want, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- autocast
@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_is_that_of_sdpa(low):
    cu = offsets(9)
    for dtype in op_checks.DTYPES:
        q, k, v = (torch.randn(9, 2, 16).to(dtype) for _ in range(3))
        with torch.autocast("cpu", low):
            want = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)
            got = ops.varlen_attention(q, k, v, cu, cu)
            exact = ops.varlen_attention(q, k, v, cu, cu, backend="reference")
            raw, lse = ops.varlen_attention_forward(q, k, v, cu, cu)
            mixed = None if dtype == torch.float64 else ops.varlen_attention(q.float(), k.to(low), v, cu, cu)
        assert got.dtype == want.dtype == exact.dtype == raw.dtype
        assert got.dtype == (torch.float64 if dtype == torch.float64 else low)
        # cast as SDPA casts; then computed in float32 and rounded once, where SDPA also rounds P
        once = F.scaled_dot_product_attention(*(
            (t if dtype == torch.float64 else t.to(low).float()).transpose(0, 1)[None] for t in (q, k, v)))
        assert same_bits(got, once[0].transpose(0, 1).to(got.dtype))
        assert (got - want).abs().max() <= 2 * torch.finfo(got.dtype).eps * want.abs().max()
        assert mixed is None or mixed.dtype == low
        # the reference's own products stay in float32 under autocast
        cast = [t if dtype == torch.float64 else t.to(low) for t in (q, k, v)]
        plain, plain_lse = reference.varlen_attention(*cast, cu, cu, return_lse=True)
        assert same_bits(exact, plain) and same_bits(raw, plain) and same_bits(lse, plain_lse)


# ---------------------------------------------------------------------------------------------------- isolation
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_isolation(backend, poison):
    lengths_q, lengths_k = (4, 0, 3, 5), (2, 3, 3, 6)
    cu_q, cu_k = offsets(*lengths_q), offsets(*lengths_k)
    inputs = dict(q=torch.randn(14, 2, 16), k=torch.randn(16, 2, 16), v=torch.randn(16, 2, 16))

    def outcome(change):
        fresh, leaves = with_grad(inputs)
        if change:
            with torch.no_grad():
                fresh["q"][4:7] += poison
                fresh["k"][5:8] += poison
                fresh["v"][5:8] -= poison
        outs = op_checks.tensors(ops.varlen_attention(**fresh, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend,
                                                      return_lse=backend == "reference", deterministic=True))
        out = outs[0]
        total = out.sum() + sum(torch.where(torch.isneginf(o), 0, o).sum() for o in outs[1:])
        total.backward()
        return outs, {name: leaf.grad for name, leaf in leaves.items()}

    (want, want_grads), (got, got_grads) = outcome(False), outcome(True)
    keep_q = torch.tensor([i not in range(4, 7) for i in range(14)])
    keep_k = torch.tensor([i not in range(5, 8) for i in range(16)])
    assert not same_bits(want[0], got[0]), "the poison reached nothing"
    assert same_bits(want[0][keep_q], got[0][keep_q])
    for a, b in zip(want[1:], got[1:], strict=True):
        assert same_bits(a[:, keep_q], b[:, keep_q])
    for name, keep in (("q", keep_q), ("k", keep_k), ("v", keep_k)):
        assert same_bits(want_grads[name][keep], got_grads[name][keep]), name


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("lengths_q, lengths_k, tail", [
    ((), (), 0), ((), (), 3), ((0,), (0,), 0), ((2,), (0,), 0), ((0,), (2,), 0), ((2, 1), (0, 0), 3), ((1,), (1,), 0),
    ((0, 0), (3, 0), 2)])
def test_empty_and_nan_tail(lengths_q, lengths_k, tail, backend):
    q, k, v = (torch.randn(sum(n) + tail, 2, 16) for n in (lengths_q, lengths_k, lengths_k))
    for t, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k)):
        t[sum(n):] = float("nan")
        t.requires_grad_()
    out = ops.varlen_attention(q, k, v, offsets(*lengths_q), offsets(*lengths_k), backend=backend)
    assert out.shape == q.shape and torch.isfinite(out).all()
    assert not out[sum(lengths_q):].any()
    cotangent = torch.ones_like(out)
    cotangent[sum(lengths_q):] = float("nan")
    out.backward(cotangent)
    for t in (q, k, v):
        assert t.grad is not None and torch.isfinite(t.grad).all()
    if backend == "reference":
        lse = ops.varlen_attention_forward(q, k, v, offsets(*lengths_q), offsets(*lengths_k))[1]
        assert lse.shape == (2, q.shape[0]) and torch.isneginf(lse[:, sum(lengths_q):]).all()


def test_merge_never_reads_an_empty_part():
    out = torch.randn(3, 2, 16)
    nothing, gone = torch.full_like(out, float("nan")), torch.full((2, 3), -torch.inf)
    parts = [t.requires_grad_() for t in (out, nothing)]
    lses = [torch.randn(2, 3).requires_grad_(), gone.requires_grad_()]
    merged, lse = ops.merge_attention(parts, lses)
    assert same_bits(merged.detach(), out.detach()) and same_bits(lse.detach(), lses[0].detach())
    (merged.sum() + lse.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in (*parts, *lses))


def test_packed_is_alone():
    lengths = (5, 9, 1)
    q, k, v = (torch.randn(15, 2, 16) for _ in range(3))
    packed = ops.varlen_attention(q, k, v, offsets(*lengths), offsets(*lengths), causal=True)
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        alone = ops.varlen_attention(q[part], k[part], v[part], offsets(n), offsets(n), causal=True)
        assert same_bits(packed[part], alone)
        start += n


# --------------------------------------------------------------------------------------------- drawn and wrong
@op_checks.drawn
@given(lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=5), tail=st.integers(0, 2),
       copies=st.sampled_from((1, 2, 3)), head_dim=st.sampled_from((16, 24, 40)), causal=st.booleans(),
       window=st.tuples(st.integers(-1, 4), st.integers(-1, 4)), dtype=st.sampled_from(op_checks.DTYPES),
       lse=st.booleans())
def test_drawn_packs(lengths, tail, copies, head_dim, causal, window, dtype, lse):
    lengths_q, lengths_k = [a for a, _ in lengths], [b for _, b in lengths]
    draw = lambda rows, heads: torch.randn(rows + tail, heads, head_dim, dtype=torch.float64).to(dtype)
    inputs = dict(q=draw(sum(lengths_q), 2 * copies), k=draw(sum(lengths_k), 2), v=draw(sum(lengths_k), 2),
                  cu_seqlens_q=offsets(*lengths_q), cu_seqlens_k=offsets(*lengths_k), causal=causal, window=window,
                  return_lse=lse)
    # A row that sees one key has a gradient of exactly 0, of which the rule allows no rounding: an absolute bound there
    op_checks.assert_close_to_reference("varlen_attention", ops.varlen_attention, inputs, grads=False)
    results = []
    for fn in (ops.varlen_attention, reference.varlen_attention):
        fresh, leaves = with_grad(inputs)
        results.append(op_checks.gradients(fn(**fresh), leaves))
    loose = max(4 * torch.finfo(dtype).eps, 1e-12)
    for name, want in results[1].items():
        torch.testing.assert_close(results[0][name], want, rtol=20 * loose, atol=20 * loose)
    if dtype == torch.float64:
        want = by_row(*(inputs[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")), head_dim**-0.5, causal,
                      window)
        got = ops.varlen_attention(**{**inputs, "return_lse": True})
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_wrong_kernels_fail():
    """Causal off by one key; a dropped last row; heads swapped."""
    inputs = dict(q=torch.randn(9, 4, 16).bfloat16(), k=torch.randn(9, 2, 16).bfloat16(),
                  v=torch.randn(9, 2, 16).bfloat16(), cu_seqlens_q=offsets(4, 5), cu_seqlens_k=offsets(4, 5))
    wrong = (
        lambda **a: ops.varlen_attention(**a, window=(-1, 1)),
        lambda **a: torch.cat([ops.varlen_attention(**a, causal=True)[:-1], torch.zeros(1, 4, 16).bfloat16()]),
        lambda **a: ops.varlen_attention(**{**a, "k": a["k"].flip(1)}, causal=True),
    )
    for kernel in wrong:
        with pytest.raises(AssertionError, match="varlen_attention"):
            assert_matches("varlen_attention", lambda causal, kernel=kernel, **a: kernel(**a),
                           inputs | dict(causal=True))
