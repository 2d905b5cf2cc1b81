"""The kernels of varlen_attention and of its raw forward and backward, executed by the emulator."""

import itertools
from functools import partial

import op_checks
import pytest
import test_emulated_core
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, Misled
from kernel_inputs import DTYPES, offsets
from kernel_inputs import attention as pack_of
from kernel_inputs import attention_tiles as tiles
from op_checks import gradients, same_bits, with_grad

from sora_fast import ops, reference
from sora_fast.kernels import attention as kernels
from sora_fast.testing import assert_matches, cases

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

OPS = ("varlen_attention", "varlen_attention_forward", "varlen_attention_backward")
NAN = float("nan")


def on_kernel(op="varlen_attention", **options):
    return partial(getattr(ops, op), backend="triton", **options)


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_error_rule(op, dtype):
    for _, inputs in cases(op, dtype):
        assert_matches(op, on_kernel(op), inputs, grads=op == "varlen_attention")
    if op == "varlen_attention":  # a gradient of stride 0
        assert_matches(op, on_kernel(op), inputs, flat_cotangent=True)


HEAD_DIMS = (16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256)
GROUPS = (1, 4, 8)
MASKS = {"full": {}, "causal": dict(causal=True), "window": dict(window=(17, 5)), "left": dict(window=(40, -1)),
         "causal window": dict(causal=True, window=(64, -1))}
LENGTHS = ((1, 1), (1, 239), (3, 799), (113, 203), (128, 217), (1023, 1024))


def _covering(*axes):
    """Rows of which every pair of values from two axes is in one: greedy, always the same."""
    places = list(itertools.combinations(range(len(axes)), 2))
    pairs_of = lambda row: {(a, row[a], b, row[b]) for a, b in places}
    missing = {pair for row in itertools.product(*axes) for pair in pairs_of(row)}
    rows = []
    while missing:
        rows.append(max(itertools.product(*axes), key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows


# each row compiles its own kernels: fewer values here, the others in test_other_head_dims and kernels/PROOF.md
FEWER = (16, 40, 72, 128, 256), GROUPS, tuple(MASKS), LENGTHS[:-1]
PAIRS = _covering(*FEWER)
PRODUCT = list(itertools.product(HEAD_DIMS, GROUPS, MASKS, LENGTHS))


def test_all_pairs_are_there():
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in PAIRS} == set(itertools.product(FEWER[a], FEWER[b]))
    assert len(PAIRS) < 30


def _agrees(head_dim, group, mask, lengths, dtype):
    """The sample of these lengths between two small ones, one of them without keys, and a tail of NaN."""
    queries, keys = lengths
    # of 1 or 3 queries several heads: a row's error is one draw, and the rule compares the sizes of draws
    key_heads = max(8 // group, 1) if queries <= 3 else 1
    inputs = pack_of((2, queries, 3), (0, keys, 5), group * key_heads, key_heads, head_dim, tail=2, dtype=dtype,
                     return_lse=True, **MASKS[mask])
    # several tiles in each direction, and none so large that its PTX takes longer to compile than to run
    sizes = {1: (16, 64), 3: (16, 128), 113: (64, 64), 128: (64, 128), 1023: (128, 128)}[queries]
    with tiles(*(sizes if head_dim <= 128 and dtype != torch.float32 else (16, 32))):  # others: shared memory of a GPU
        assert_matches("varlen_attention", on_kernel(), inputs)


@pytest.mark.parametrize("head_dim, group, mask, lengths", PAIRS, ids=str)
def test_pairs(head_dim, group, mask, lengths):
    dtype = DTYPES[(HEAD_DIMS.index(head_dim) + GROUPS.index(group) + LENGTHS.index(lengths)) % 2]
    _agrees(head_dim, group, mask, lengths, dtype)


def test_other_head_dims():
    for head_dim in (24, 48, 56, 80, 96, 104, 136, 160, 192, 224):
        dtype = DTYPES[head_dim // 8 % 2]
        inputs = pack_of((17, 0, 40), (29, 4, 33), 2, 1, head_dim, tail=1, dtype=dtype, return_lse=True, causal=True)
        with tiles(32, 32):
            assert_matches("varlen_attention", on_kernel(), inputs)


@pytest.mark.parametrize("head_dim, dtype, options", [
    (72, torch.float32, dict(tma=True)), (96, torch.float16, dict(split=False)), (128, torch.float16, dict(tma=True)),
    (40, torch.float32, dict(tma=True, split=False))], ids=str)
def test_other_configs(head_dim, dtype, options):
    """What the heuristics choose on some GPUs: tiles by descriptors, heads in one chunk."""
    inputs = pack_of((5, 0, 37, 3), (9, 4, 41, 0), 2, 1, head_dim, tail=2, dtype=dtype, return_lse=True, causal=True)
    with tiles(16, 32, **options):
        assert_matches("varlen_attention", on_kernel(), inputs)


@settings(op_checks.drawn, max_examples=12)
@given(samples=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=0, max_size=64),
       tail=st.integers(0, 3), group=st.sampled_from((1, 2)), causal=st.booleans(), left=st.integers(-1, 9),
       right=st.integers(-1, 9), block=st.sampled_from(((16, 16), (16, 32), (32, 16), (64, 32))))
def test_drawn(samples, tail, group, causal, left, right, block):
    """Packs of 0 to 64 samples with empty ones on either side; few heads, for there are programs enough."""
    samples = samples if sum(q + k for q, k in samples) < 160 else [(q % 4, k % 4) for q, k in samples]
    inputs = pack_of([q for q, _ in samples], [k for _, k in samples], group, 1, 16, tail=tail, causal=causal,
                     window=(left, right), return_lse=True)
    with tiles(*block):
        op_checks.assert_close_to_reference("varlen_attention", on_kernel(), inputs)


def test_64_samples():
    """One of them long and in the middle, every fifth without keys, every seventh without queries."""
    queries = [0 if n % 7 == 0 else 3 + n % 4 for n in range(64)]
    keys = [0 if n % 5 == 0 else 2 + n % 6 for n in range(64)]
    queries[33], keys[33] = 90, 70
    with tiles(32, 32):
        assert_matches("varlen_attention", on_kernel(), pack_of(queries, keys, 1, 1, 24, tail=5, return_lse=True))


# ------------------------------------------------------------------------------------------------------ identities
def test_halves_merge_to_the_whole():
    inputs = pack_of((33, 20), (40, 26), head_dim=40)
    whole = on_kernel("varlen_attention_forward")(**inputs)
    parts = []
    for rows, keys in (((*range(17), *range(40, 52)), (17, 12)), ((*range(17, 40), *range(52, 66)), (23, 14))):
        half = inputs | dict(k=inputs["k"][list(rows)], v=inputs["v"][list(rows)], cu_seqlens_k=offsets(*keys))
        parts.append(on_kernel("varlen_attention_forward")(**half))
    merged = ops.merge_attention(*map(list, zip(*parts, strict=True)))
    for a, b in zip(whole, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # the backward of a ring: each step has its own keys and the whole's out and lse
    dout, dlse = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    want = reference.varlen_attention_backward(dout, dlse, inputs["q"], inputs["k"], inputs["v"], *whole,
                                               inputs["cu_seqlens_q"], inputs["cu_seqlens_k"])
    total = 0
    for rows, keys in (((*range(17), *range(40, 52)), (17, 12)), ((*range(17, 40), *range(52, 66)), (23, 14))):
        half = inputs | dict(k=inputs["k"][list(rows)], v=inputs["v"][list(rows)], cu_seqlens_k=offsets(*keys))
        dq, dk, dv = on_kernel("varlen_attention_backward")(dout=dout, dlse=dlse, out=whole[0], lse=whole[1], **half)
        total = total + dq
        torch.testing.assert_close(dk, want[1][list(rows)], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dv, want[2][list(rows)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, want[0], rtol=1e-4, atol=1e-5)


def test_order_of_keys_does_not_matter():
    inputs = pack_of((21, 30), (45, 33), head_dim=24)
    moved = torch.cat([torch.randperm(45), 45 + torch.randperm(33)])
    other = inputs | dict(k=inputs["k"][moved], v=inputs["v"][moved])
    (fresh, leaves), (turned, turned_leaves) = with_grad(inputs), with_grad(other)
    with tiles(16, 16):
        out, out2 = on_kernel()(**fresh), on_kernel()(**turned)
        found, found2 = gradients(out, leaves), gradients(out2, turned_leaves)
    torch.testing.assert_close(out, out2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["q"], found2["q"], rtol=1e-5, atol=1e-5)
    for name in ("k", "v"):
        torch.testing.assert_close(found[name][moved], found2[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", (-0.7, 0.0, 3.0, 1e-8))
def test_any_scale(scale):
    inputs = pack_of((9, 14), (12, 20), head_dim=24, softmax_scale=scale, causal=True, return_lse=True)
    op_checks.assert_close_to_reference("varlen_attention", on_kernel(), inputs)


# -------------------------------------------------------------------------------------------- what is read and written
def test_isolation_of_tiles_by_descriptors():
    test_emulated_core.test_isolation_of_attention(tma=True)


@pytest.mark.parametrize("blocks", ((16, 16), (64, 32)))
def test_nothing_outside_is_read_or_written(blocks, monkeypatch):
    """Scratch that starts as NaN, numbers of others around every input, samples of all kinds."""
    inputs = pack_of((13, 0, 21, 5), (9, 4, 30, 0), 2, 1, 24, return_lse=True)
    for name in ("q", "k", "v"):
        value = inputs[name]
        room = torch.full((value.shape[0] + 4, value.shape[1] + 2, value.shape[2] + 8), NAN)
        inputs[name] = room[2:-2, 1:-1, :24].copy_(value)
    guarded = Guarded()
    monkeypatch.setattr(kernels, "torch", guarded)
    with tiles(*blocks):
        assert_matches("varlen_attention", on_kernel(), inputs)
    assert len(guarded.buffers) == 5 + 3 + 1 + 4  # out, lse, parts, tiles; dq, dk, dv, rows of lse and delta, tiles twice
    guarded.assert_whole()


def test_strided_views_are_taken_as_they_are(monkeypatch):
    """Slices of a packed qkv, heads first, part of a concatenation (also as dout), rows that start at odd addresses."""
    seen = []
    run = kernels.rows_dense
    monkeypatch.setattr(kernels, "rows_dense", lambda t: seen.append(t) or run(t))
    cu = offsets(11, 0, 22)
    packed, wide, odd = torch.randn(33, 3, 2, 24), torch.randn(33, 2 * 24 + 40), torch.randn(33 * 2 * 24 + 1)[1:]
    heads_first = torch.randn(2, 33, 24).transpose(0, 1)
    part = wide[:, :48].view(33, 2, 24)
    for q, k, v in ((packed[:, 0], packed[:, 1], packed[:, 2]), (heads_first, part, odd.view(33, 2, 24))):
        inputs = dict(q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu)
        out, lse = on_kernel("varlen_attention_forward")(**inputs)
        want = {name: value.contiguous() for name, value in inputs.items()}
        assert_matches("varlen_attention_forward", on_kernel("varlen_attention_forward"), inputs, grads=False)
        got = on_kernel("varlen_attention_backward")(dout=part, dlse=None, out=out, lse=lse, **inputs)
        expected = on_kernel("varlen_attention_backward")(dout=part.contiguous(), dlse=None, out=out, lse=lse, **want)
        assert all(same_bits(a, b) and a.is_contiguous() for a, b in zip(got, expected, strict=True))
    assert seen and all(run(t) is t for t in seen)
    flat = torch.ones(()).expand(33, 2, 24)
    assert run(flat) is not flat and run(flat).is_contiguous()


def test_one_sample_beyond_two_to_the_31_numbers():
    """Rows so far apart that offsets within a sample need 64 bits; what lies between is never given memory."""
    base = torch.empty(3 * 2**30 + 64, dtype=torch.float16)
    k = base.as_strided((4, 1, 16), (2**30, 16, 1))
    k.copy_(torch.randn(4, 1, 16))
    q = torch.randn(5, 1, 16, dtype=torch.float16)
    inputs = dict(q=q, k=k, v=k, cu_seqlens_q=offsets(5), cu_seqlens_k=offsets(4))
    out, lse = on_kernel("varlen_attention_forward")(**inputs)
    want = reference.varlen_attention_forward(q, k.contiguous(), k.contiguous(), offsets(5), offsets(4))
    torch.testing.assert_close(lse, want[1])
    torch.testing.assert_close(out, want[0], rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------------- autograd
def test_twenty_runs_have_the_same_bits():
    inputs = pack_of((17, 3), (21, 6), 2, 1, 24, return_lse=True, deterministic=True)
    runs = []
    for _ in range(20):
        fresh, leaves = with_grad(inputs)
        outs = on_kernel()(**fresh)
        runs.append((*outs, *gradients(outs, leaves).values()))
    assert all(same_bits(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("wrong", ("last key tile dropped", "another sample's keys", "last tile of queries dropped",
                                   "last tile of keys dropped"))
def test_wrong_kernels_fail(wrong, monkeypatch):
    inputs = pack_of((20, 20, 33), (20, 20, 33), 2, 2, 16, return_lse=True)
    with tiles(16, 16):
        assert_matches("varlen_attention", on_kernel(), inputs)
        if wrong == "last key tile dropped":  # the samples end a tile early
            cut = offsets(20, 20, 32)
            wrongly = lambda cu_seqlens_k, **rest: on_kernel()(cu_seqlens_k=cut, **rest)
        elif wrong == "another sample's keys":
            order = torch.cat([torch.arange(20, 40), torch.arange(20), torch.arange(40, 73)])
            wrongly = lambda k, v, **rest: on_kernel()(k=k[order], v=v[order], **rest)
        else:
            kernel = "dq_kernel" if "queries" in wrong else "dkdv_kernel"
            monkeypatch.setattr(kernels, kernel, Misled(getattr(kernels, kernel)))
            monkeypatch.setattr(kernels, "torch", Guarded())  # what is not written must not hold an earlier call's numbers
            wrongly = on_kernel()
        with pytest.raises(AssertionError, match="varlen_attention"):
            assert_matches("varlen_attention", wrongly, inputs)
