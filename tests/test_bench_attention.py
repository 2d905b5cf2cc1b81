"""The attention cases' counts and truth, and the providers that run on a CPU."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sora_fast import ops
from sora_fast.benchmarks import gate, peers_attention
from sora_fast.benchmarks.case import Provider
from sora_fast.benchmarks.specs import attention as spec
from sora_fast.benchmarks.specs.attention import AttentionCase, providers, truth_in_pieces
from sora_fast.testing.rule import tensors

CPU = torch.device("cpu")
VARLEN = [case for case in spec.QUICK if case.op == "varlen_attention"]
RAGGED, CROSS, GROUPED, BANDED = VARLEN
EQUAL = replace(RAGGED, label="equal", queries=(24, 24), keys=(24, 24))


def cases(*some):
    return pytest.mark.parametrize("case", some, ids=[case.label for case in some])


def provider(name) -> Provider:
    return next(p for p in providers("varlen_attention") if p.name == name)


def failures(case, provider, direction="backward"):
    call = lambda **inputs: provider.run(**provider.prepare(inputs))
    found = case.truth(case.inputs(CPU, 0), 0)
    if direction == "backward":
        return [str(c) for c in found.compare(call) if not c.passed]
    with torch.no_grad():
        return [str(c) for c in found.compare(call(**found.inputs)) if not c.passed]


# --------------------------------------------------------------------------------------------------------- counts
def test_labels_are_unique_and_every_op_has_cases():
    labels = [(case.op, case.label) for case in spec.CASES]
    assert len(set(labels)) == len(labels)
    assert {case.op for case in spec.CASES if "quick" in case.suites} == {
        "varlen_attention", "varlen_attention_forward", "varlen_attention_backward", "merge_attention"}
    assert all(case.dtype == torch.bfloat16 for case in spec.CASES if "full" in case.suites)
    assert [case.queries for case in spec.MODELS[:4]] == [(21 * 30 * 52,), (21 * 45 * 80,)] * 2
    sizes = {case.label.partition(",")[0]: case.queries for case in spec.MODELS}
    assert sizes["HunyuanVideo"] == (33 * 45 * 80,) and sizes["Mochi"] == (28 * 30 * 53,)
    assert sizes["CogVideoX-5B"] == (13 * 30 * 45 + 226,)
    assert [round(sum(sizes[f"mixed pack of {n}k"]) / 1024) for n in (32, 16)] == [32, 16]


def test_pairs_against_counting_every_pair():
    draw = random.Random(0)
    for trial in range(300):
        queries, keys = draw.randint(0, 9), draw.randint(0, 9)
        left, right = draw.randint(-1, 6), draw.randint(-1, 6)
        counted = sum((left < 0 or j >= i + keys - queries - left) and (right < 0 or j <= i + keys - queries + right)
                      for i in range(queries) for j in range(keys))
        assert spec._pairs(queries, keys, left, right) == counted, (trial, queries, keys, left, right)


@cases(*VARLEN, replace(BANDED, label="fewer keys", queries=(30, 5, 4), keys=(9, 5, 0)))
def test_the_pairs_of_a_pack_are_those_the_definition_shows(case):
    inputs = case.inputs(CPU, 0)
    shown = spec.reference.visible(inputs["cu_seqlens_q"], inputs["cu_seqlens_k"], sum(case.queries), sum(case.keys),
                                   case.causal, case.window, CPU)
    assert case.pairs() == int(shown.sum())
    assert case.blind == bool((~shown.any(1)).any())


@pytest.mark.parametrize("label", ["Wan 14B, 720p, 81 frames", "DiT-XL/2, 128 images", "16k, 64 heads on 8",
                                   "Wan 14B, 480p, cross attention to 512 text tokens"])
def test_flops_against_torchs_counter(label):
    """Matrix products of each sample on the meta device; the backward forms the scores once more."""
    case = next(case for case in spec.CASES if case.label == label)

    def counted(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    forward = backward = 0
    for queries, keys in zip(case.queries, case.keys, strict=True):
        q, k, v = (torch.empty(case.heads, rows, case.head_dim, device="meta", requires_grad=True)
                   for rows in (queries, keys, keys))
        out = []
        forward += counted(lambda q=q, k=k, v=v, out=out: out.append(torch.softmax(q @ k.mT, -1) @ v))
        backward += counted(lambda out=out: out[0].backward(torch.empty_like(out[0])))
        backward += counted(lambda q=q, k=k: q.detach() @ k.detach().mT)
    assert (case.flops("forward"), case.flops("backward")) == (forward, backward)


def stored(*values) -> int:
    """Bytes of the distinct memory behind tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(values)}.values())


@cases(*spec.QUICK, replace(EQUAL, label="with lse", return_lse=True), replace(CROSS, label="lse", return_lse=True))
def test_bytes_against_the_tensors_that_there_are(case):
    inputs = case.inputs(CPU, 0)
    inputs = {name: value for name, value in inputs.items() if tensors(value)} | (
        {} if case.op == "merge_attention" else dict(causal=case.causal, window=case.window))
    outs = getattr(ops, case.op)(**inputs, backend="reference",
                                 **({"return_lse": case.return_lse} if case.op == "varlen_attention" else {}))
    assert case.least_bytes("forward") == stored(inputs, [t.contiguous().clone() for t in tensors(outs)])
    assert case.flops("forward") == (10 if "backward" in case.op else 4) * case.pairs() * case.heads * case.head_dim \
        or case.op == "merge_attention"
    if "backward" not in case.directions():
        return
    names = case.directions()["backward"]
    leaves = [t.requires_grad_() for name in names for t in tensors(inputs[name])]
    options = dict(return_lse=case.return_lse) if case.op == "varlen_attention" else {}
    outs = tensors(getattr(ops, case.op)(**inputs, **options, backend="reference"))
    cotangents = [torch.ones_like(o).contiguous() for o in outs]
    grads = [g.contiguous().clone() for g in torch.autograd.grad(outs, leaves, cotangents)]
    kept = []
    if case.op == "varlen_attention":
        out, lse = ops.varlen_attention_forward(**inputs, backend="reference")
        kept = [out.contiguous().clone(), lse.contiguous().clone()]
    assert case.least_bytes("backward") == stored(inputs, cotangents, grads, kept)
    assert case.flops("backward") == 5 * case.flops("forward") // 2


# ---------------------------------------------------------------------------------------------------------- truth
WITHOUT_KEYS = AttentionCase("varlen_attention", "rows and samples without keys", torch.float32, (), (20, 7, 5, 0),
                             (9, 0, 30, 3), 4, 2, 16, causal=True, window=(4, -1), return_lse=True)


@cases(GROUPED, CROSS, replace(BANDED, label="lse", return_lse=True))
def test_one_wrong_element_fails_the_truth_in_pieces(case):
    inputs = case.inputs(CPU, 0)
    found = truth_in_pieces(case, inputs, 0, most_scores=300)
    right = partial(ops.varlen_attention, backend="reference")
    assert all(c.passed for c in found.compare(right))

    def wrong(**given):
        out = right(**given)
        outs = list(out) if case.return_lse else [out]
        spike = torch.zeros_like(outs[-1])
        spike[-1, -1] = 0.5  # one row of a head, or one number of the lse
        outs[-1] = outs[-1] + spike
        return tuple(outs) if case.return_lse else outs[0]

    assert [c.name for c in found.compare(wrong) if not c.passed] == ["output 1" if case.return_lse else "output"]
    turned = [c.name for c in found.compare(lambda **given: right(**given | dict(k=given["k"] * 1.02))) if not c.passed]
    assert {"d q", "d k"} <= set(turned)


def test_where_the_truth_is_dear_some_heads_stand_for_all():
    case = replace(GROUPED, heads=8, key_heads=4, head_dim=32, dtype=torch.float32, return_lse=True)
    inputs = case.inputs(CPU, 0)
    found = truth_in_pieces(case, inputs, 0, most_flops=1.0)
    assert found.scope == "key heads 0 and 3 of 4 with their query heads (4 of 8), every element"
    assert [tuple(t.shape) for t in found.ref[0]] == [(103, 4, 32), (4, 103)]
    assert {name: t.shape[1] for name, t in found.ref[1].items()} == {"q": 4, "k": 2, "v": 2}
    assert all(c.passed for c in found.compare(partial(ops.varlen_attention, backend="reference")))

    def wrong_in_head(head):
        def call(**given):
            out, lse = ops.varlen_attention(**given, backend="reference")
            spike = torch.zeros_like(out)
            spike[50, head] = 0.5
            return out + spike, lse
        return [c.name for c in found.compare(call) if not c.passed]

    assert wrong_in_head(7) == wrong_in_head(1) == ["output 0"]
    assert wrong_in_head(4) == []  # as the scope says


def test_small_packs_use_the_truth_and_large_ones_its_pieces(monkeypatch):
    case, used = replace(CROSS, queries=(6, 4), keys=(3, 5)), []
    monkeypatch.setattr(spec, "truth_in_pieces", lambda *_: used.append("pieces"))
    assert case.truth(case.inputs(CPU, 0), 0).scope == "every element" and not used
    monkeypatch.setattr(spec, "WHOLE_SCORES", case.scores() - 1)
    case.truth(case.inputs(CPU, 0), 0)
    assert used == ["pieces"]


# ------------------------------------------------------------------------------------------------------ providers
def test_every_quick_case_passes_with_what_runs_on_a_cpu():
    seen = set()
    for case in spec.QUICK:
        found = case.truth(case.inputs(CPU, 0), 0)
        for one in providers(case.op):
            if one.compiled or any(one.unavailable(case, d, CPU) for d in case.directions()):
                continue
            verdicts = gate.check(case, one, found, CPU, tuple(case.directions()))
            assert {v.status for v in verdicts.values()} == {"PASSED"}, (case.label, one.name, verdicts)
            seen.add((case.op, one.name))
    assert {name for op, name in seen if op == "varlen_attention"} == {"torch", "reference", "sdpa"}
    assert {name for op, name in seen if op == "merge_attention"} == {"torch", "reference"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cases(EQUAL, replace(EQUAL, label="equal, causal", causal=True), replace(EQUAL, label="one window", window=(3, 1)),
       replace(EQUAL, label="equal, more keys, causal", keys=(29, 29), causal=True), CROSS, BANDED, GROUPED,
       replace(BANDED, label="rows without keys", queries=(20, 5), keys=(9, 5)))
def test_sdpa_gives_the_truth(case, dtype):
    assert failures(replace(case, dtype=dtype), provider("sdpa")) == []


def test_sdpa_of_equal_samples_moves_nothing():
    inputs = provider("sdpa").prepare(replace(EQUAL, causal=True).inputs(CPU, 0))
    plan = inputs["plan"]
    assert plan.place_q is plan.mask is plan.sees is None and plan.is_causal
    batch = peers_attention._batch(inputs["q"], plan.samples, plan.longest_q, plan.place_q)
    assert batch.data_ptr() == inputs["q"].data_ptr() and batch.shape == (2, 4, 24, 64)
    details = provider("sdpa").details(EQUAL, CPU)
    assert details == dict(kernel="flash_attention", batch="a view")
    assert provider("sdpa").details(RAGGED, CPU)["batch"].startswith("padded from 168 to 384 queries")


def test_a_forced_kernel_is_forced(monkeypatch):
    asked = []
    real = peers_attention.sdpa_kernel
    monkeypatch.setattr(peers_attention, "sdpa_kernel", lambda kernel: asked.append(kernel.name) or real(kernel))
    assert failures(EQUAL, provider("sdpa_flash")) == []
    with pytest.raises(RuntimeError):  # no CPU has cuDNN's
        provider("sdpa_cudnn").run(**provider("sdpa_cudnn").prepare(EQUAL.inputs(CPU, 0)))
    assert set(asked) == {"FLASH_ATTENTION", "CUDNN_ATTENTION"}


def test_definitions_whose_scores_do_not_fit_say_how_large_they_are():
    large = next(case for case in spec.CASES if case.label == "Wan 14B, 720p, 81 frames")
    for name in ("reference", "compile"):
        assert "scores of 914.5 GB each" in provider(name).unavailable(large, "forward", CPU)
        assert provider(name).unavailable(RAGGED, "forward", CPU) == ""
    pack = next(case for case in spec.CASES if case.label == "DiT-XL/2, 128 images")  # the lengths help only the one
    assert provider("reference").unavailable(pack, "forward", CPU) == ""
    assert "68.7 GB" in provider("compile").unavailable(pack, "forward", CPU)
