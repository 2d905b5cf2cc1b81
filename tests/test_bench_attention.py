"""The attention cases' counts and truth, and the peers' adapters on planted modules with the real signatures."""

import importlib.machinery
import random
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils.flop_counter import FlopCounterMode

from sora_fast import ops
from sora_fast.benchmarks import gate, peers_attention
from sora_fast.benchmarks.case import Provider
from sora_fast.benchmarks.peers_attention import peers
from sora_fast.benchmarks.specs import attention as spec
from sora_fast.benchmarks.specs.attention import AttentionCase, providers, truth_in_pieces
from sora_fast.testing import truth
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


@pytest.mark.parametrize("most_scores", [1, 150, 2**26])
@cases(*VARLEN, replace(RAGGED, label="lse", return_lse=True), WITHOUT_KEYS,
       replace(WITHOUT_KEYS, label="window ahead", causal=False, window=(3, 5)),
       replace(WITHOUT_KEYS, label="only ahead", causal=False, window=(-1, 6), dtype=torch.bfloat16))
def test_the_truth_in_pieces_is_the_truth(case, most_scores):
    if most_scores == 1 and case is RAGGED:
        case = replace(case, queries=(17, 5), keys=(17, 5))  # one query at a time
    inputs = case.inputs(CPU, 0)
    whole = truth(case.op, inputs, names={"q", "k", "v"}, seed=3)
    found = truth_in_pieces(case, inputs, 3, most_scores=most_scores * case.heads // case.key_heads)
    assert found.scope == "every element"
    assert all(torch.equal(a, b) for a, b in zip(found.cotangents, whole.cotangents, strict=True))
    # float32 sums in another order, and perhaps another rounding to 16 bits at the end
    for kind, apart in (("ref", 4e-13), ("low", 5e-6 + (torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 0))):
        (outs, grads), (whole_outs, whole_grads) = getattr(found, kind), getattr(whole, kind)
        assert set(grads) == set(whole_grads)
        for name, a, b in [*(("out", a, b) for a, b in zip(outs, whole_outs, strict=True)),
                           *((name, grads[name], whole_grads[name]) for name in grads)]:
            assert a.dtype == b.dtype, (kind, name)
            torch.testing.assert_close(a, b, rtol=apart, atol=apart * float(b.detach()[b.isfinite()].abs().max()))


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


def test_compiled_attention_passes():
    case = replace(CROSS, queries=(10, 6), keys=(4, 6), head_dim=16)
    torch._dynamo.reset()
    assert failures(case, provider("compile")) == []


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


# -------------------------------------------------------------------------------------------------------- refusals
def on_gpu(monkeypatch, sm=(9, 0), missing=""):
    """A device that peers take for a GPU with all of them installed, or all but those whose reason is ``missing``."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    monkeypatch.setattr(peers_attention, "installed", lambda module: missing)
    return torch.device("cuda")


def refusals(case, device, direction="forward"):
    return {p.name: p.unavailable(case, direction, device) for p in peers()}


def test_on_a_cpu_only_sdpa_is_left():
    for case in VARLEN:
        found = refusals(case, CPU)
        assert found.pop("sdpa") == ""
        assert all(reason.endswith("needs a CUDA device.") for reason in found.values()), found


def test_on_a_gpu_with_everything_installed_equal_samples_run_everywhere(monkeypatch):
    device, case = on_gpu(monkeypatch), replace(EQUAL, dtype=torch.bfloat16)
    for direction in ("forward", "backward"):
        assert set(refusals(case, device, direction).values()) == {""}


def test_what_is_not_installed_says_so(monkeypatch):
    device, case = on_gpu(monkeypatch, missing="The package x is not installed."), replace(EQUAL, dtype=torch.bfloat16)
    found = refusals(case, device)
    assert {name for name, reason in found.items() if not reason} == {"sdpa", "sdpa_cudnn", "sdpa_flash", "varlen_attn"}
    assert all(reason in ("", "The package x is not installed.") for reason in found.values())
    monkeypatch.setattr(peers_attention, "installed", lambda module: "The package cudnn.sdpa is not installed."
                        if module == "cudnn.sdpa" else "")
    assert refusals(case, device)["cudnn_frontend"] == ("The installed cudnn has no module cudnn.sdpa; this peer is the "
                                                        "package nvidia-cudnn-frontend.")


ALL = {p.name for p in peers()} - {"sdpa"}
BF16 = replace(EQUAL, dtype=torch.bfloat16)
FORCED, LATER = {"sdpa_cudnn", "sdpa_flash"}, {"flash_attn_3", "flash_attn_4"}


@pytest.mark.parametrize("case, direction, sm, refusing", [
    (BF16, "forward", (7, 5), ALL),
    (BF16, "forward", (8, 0), LATER),
    (BF16, "forward", (10, 0), {"flash_attn_3"}),
    (EQUAL, "forward", (9, 0), ALL - {"flex"}),
    (replace(BF16, queries=(9, 5), keys=(9, 5)), "forward", (9, 0), FORCED),
    (replace(BF16, key_heads=2), "forward", (9, 0), {"xformers"}),
    (replace(BF16, causal=True), "forward", (9, 0), set()),
    (replace(BF16, causal=True, window=(7, 0)), "forward", (9, 0), FORCED | {"cudnn_frontend"}),
    (replace(BF16, window=(7, 3)), "forward", (9, 0), FORCED | {"cudnn_frontend", "xformers"}),
    (replace(BF16, keys=(9, 9), causal=True), "forward", (9, 0), FORCED | {"cudnn_frontend", "xformers"}),
    (replace(BF16, keys=(24, 0)), "forward", (9, 0), FORCED | {"cudnn_frontend", "xformers"}),
    (replace(BF16, return_lse=True), "forward", (9, 0), FORCED | {"sdpa", "xformers"}),
    (replace(BF16, return_lse=True), "backward", (9, 0), (ALL | {"sdpa"}) - {"flex", "flash_attn_4"}),
    (replace(BF16, return_lse=True, keys=(24, 0)), "forward", (9, 0),
     FORCED | {"sdpa", "xformers", "cudnn_frontend", "varlen_attn", "flash_attn"}),
])
def test_who_refuses_what(monkeypatch, case, direction, sm, refusing):
    found = refusals(case, on_gpu(monkeypatch, sm), direction)
    assert {name for name, reason in found.items() if reason} == refusing, found
    for reason in filter(None, found.values()):
        assert reason.endswith(".") and "\n" not in reason and len(reason) > 30, reason


def test_the_forward_of_flash_attention_3_alone(monkeypatch):
    device = on_gpu(monkeypatch)
    monkeypatch.setattr(peers_attention, "installed", lambda module: "The package flash_attn_interface is not installed."
                        if module == "flash_attn_interface" else "")
    fa3 = provider("flash_attn_3")
    assert fa3.unavailable(BF16, "forward", device) == ""
    assert fa3.unavailable(BF16, "backward", device).endswith("has no backward.")
    assert "window" in fa3.unavailable(replace(BF16, window=(3, 3)), "forward", device)
    assert "bfloat16 only" in fa3.unavailable(replace(BF16, dtype=torch.float16), "forward", device)
    assert fa3.details(BF16, device) == dict(module="fa3_fwd_interface")


# -------------------------------------------------------------------------------------------------- planted peers
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


def attend(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window=(-1, -1)):
    """out and lse by the reference, as a peer would compute them from its own arguments."""
    assert type(max_q) is type(max_k) is int
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.dim() == k.dim() == v.dim() == 3
    assert isinstance(window, tuple) and len(window) == 2
    return ops.varlen_attention(q, k, v, cu_q, cu_k, causal=causal, window=window, return_lse=True, backend="reference")


def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                 return_attn_probs=False, block_table=None):
    assert dropout_p == softcap == 0.0 and softmax_scale is alibi_slopes is block_table is None
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                 softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                 window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                 sm_margin=0, return_attn_probs=False):
    assert seqused_q is seqused_k is softmax_scale is qv is None and attention_chunk == 0
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size)
    return (out, lse) if return_attn_probs else out


def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                 softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
                 pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
                 block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
                 seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
                 gather_bwd_token_chunk=None):
    assert qv is min_seqlen_k is softmax_scale is None
    assert all(side is None or side >= 0 for side in window_size)
    window = tuple(-1 if side is None else side for side in window_size)
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window)
    return out, lse if return_lse else None


def cudnn_sdpa(query, key, value, *, scale=None, is_causal=False, causal_bottom_right=False, window_left=-1,
               window_right=-1, sinks=None, seq_len_q=None, seq_len_kv=None, cu_seqlens_q=None, cu_seqlens_kv=None,
               max_seqlen_q=0, max_seqlen_kv=0, return_lse=False):
    """lse (rows, heads, 1) of a pack, (samples, heads, rows, 1) of a batch; a causal mask is top-left unless asked."""
    assert scale is sinks is seq_len_q is seq_len_kv is None and (is_causal or not causal_bottom_right)
    if query.dim() == 3:
        assert causal_bottom_right or not is_causal or torch.equal(cu_seqlens_q, cu_seqlens_kv)
        out, lse = attend(query, key, value, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, is_causal)
        return (out, lse.t()[..., None]) if return_lse else out
    (samples, heads, rows, _), keys = query.shape, key.shape[2]
    assert causal_bottom_right or not is_causal or rows == keys
    flat = [t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (query, key, value)]
    ends = [torch.arange(samples + 1, dtype=torch.int32) * n for n in (rows, keys)]
    out, lse = attend(*flat, *ends, rows, keys, is_causal)
    out = out.view(samples, rows, heads, -1).transpose(1, 2)
    return (out, lse.view(heads, samples, rows).transpose(0, 1)[..., None]) if return_lse else out


class BlockDiagonalMask:
    causal, window_size = False, None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert all(type(n) is int for n in (*q_seqlen, *kv_seqlen)) and isinstance(device, torch.device)
        self = cls()
        self.queries, self.keys = q_seqlen, kv_seqlen
        return self

    def make_causal_from_bottomright(self):
        assert all(k >= q for q, k in zip(self.queries, self.keys, strict=True))
        self.causal = True
        return self

    def make_local_attention_from_bottomright(self, window_size):
        """Keys at a distance below ``window_size`` back from the diagonal."""
        self.window_size = window_size
        return self.make_causal_from_bottomright()


def xformers_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert query.dim() == 4 and query.shape[0] == 1 and query.shape[2] == key.shape[2] and p == 0.0
    bias = attn_bias
    window = (-1, -1) if bias.window_size is None else (bias.window_size - 1, -1)
    out, _ = attend(query[0], key[0], value[0], spec._ends(tuple(bias.queries), CPU), spec._ends(tuple(bias.keys), CPU),
                    max(bias.queries), max(bias.keys), bias.causal, window)
    return out[None]


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    """torch 2.13's; causal is the tuple (-1, 0) and nothing else."""
    assert query.shape[1] == key.shape[1] or enable_gqa
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, window_size)


def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                     window_size=(-1, -1)):
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, window_size)


def _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, window_size):
    out, lse = attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window=window_size)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def planted(monkeypatch):
    plant(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func=flash_attn_2)
    plant(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_3)
    plant(monkeypatch, "flash_attn.cute.interface", flash_attn_varlen_func=flash_attn_4)
    plant(monkeypatch, "cudnn.sdpa.fwd.torch_op")
    plant(monkeypatch, "cudnn", sdpa_torch=cudnn_sdpa, backend_version=lambda: 91900)
    plant(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    plant(monkeypatch, "xformers.ops", memory_efficient_attention=xformers_attention)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


ADAPTED = [
    EQUAL, CROSS, GROUPED, BANDED, replace(EQUAL, label="equal, causal", causal=True),
    replace(RAGGED, label="window", window=(5, 2)),
    replace(RAGGED, label="causal window", causal=True, window=(5, -1)),
    replace(RAGGED, label="more keys, causal", queries=(30, 12), keys=(35, 40), causal=True),
    replace(EQUAL, label="equal, more keys, causal, lse", keys=(31, 31), causal=True, return_lse=True),
    replace(RAGGED, label="lse", return_lse=True),
]
PLANTED = ["varlen_attn", "flash_attn", "flash_attn_3", "flash_attn_4", "cudnn_frontend", "xformers"]


@pytest.mark.parametrize("name", PLANTED)
def test_an_adapter_gives_the_truth_where_its_peer_does(monkeypatch, name):
    planted(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    peer, ran = provider(name), 0
    for case in ADAPTED:
        as_16_bits = replace(case, dtype=torch.bfloat16)  # what the peer is asked; what it computes here is the reference
        if peer.unavailable(as_16_bits, "forward", torch.device("cuda")):
            continue
        assert failures(case, peer, "forward") == [], case.label
        if not peer.unavailable(as_16_bits, "backward", torch.device("cuda")):
            assert failures(case, peer) == [], case.label
        ran += 1
    assert ran >= 4


def test_an_adapter_that_drops_the_mask_would_fail(monkeypatch):
    planted(monkeypatch)
    deaf = lambda *args, causal, window_size, **more: flash_attn_2(*args, **more)
    plant(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func=deaf)
    assert failures(EQUAL, provider("flash_attn")) == []
    assert failures(BANDED, provider("flash_attn"), "forward")


def test_varlen_attn_before_it_had_a_flag_for_grouped_heads(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_2_11)
    assert failures(GROUPED, provider("varlen_attn")) == []


def test_the_forward_wheel_is_called_where_flash_attention_3_is_not_whole(monkeypatch):
    called = []
    plant(monkeypatch, "fa3_fwd_interface", flash_attn_varlen_func=lambda *a, **k: called.append(1) or flash_attn_3(*a, **k))
    assert failures(GROUPED, provider("flash_attn_3"), "forward") == [] and called


def test_an_older_flash_attention_3_returns_the_log_sum_exp_unasked(monkeypatch):
    def older(*args, causal=False, window_size=(-1, -1)):
        return flash_attn_3(*args, causal=causal, window_size=window_size, return_attn_probs=True)

    plant(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=older)
    assert failures(BANDED, provider("flash_attn_3")) == []


def test_cudnn_says_how_it_was_called(monkeypatch):
    planted(monkeypatch)
    assert provider("cudnn_frontend").details(EQUAL, CPU) == dict(backend_version=91900, batch="a view")
    assert provider("cudnn_frontend").details(RAGGED, CPU)["batch"] == "ragged"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@cases(EQUAL, CROSS, GROUPED, BANDED, replace(EQUAL, label="one sample", queries=(40,), keys=(33,)))
def test_flex_attention_is_asked_for_the_right_mask(monkeypatch, case):
    """Uncompiled, forward: on a CPU it has no backward."""
    peers_attention._compiled_flex.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    try:
        assert failures(case, provider("flex"), "forward") == []
    finally:
        peers_attention._compiled_flex.cache_clear()
