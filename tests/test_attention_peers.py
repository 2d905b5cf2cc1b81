"""The installed peers as backends of varlen_attention, on planted libraries that misbehave where the real ones do.

The device check alone is patched: CPU tensors are taken for those of an H200.
"""

import functools
import random
import sys
from dataclasses import replace

import planted_peers
import pytest
import torch

import sora_fast
from sora_fast import ops
from sora_fast.ops import attention, attention_peers
from sora_fast.ops.attention import VARLEN_ATTENTION, VARLEN_ATTENTION_FORWARD, AttentionProblem
from sora_fast.reference.attention import visible
from sora_fast.testing import assert_matches

NAMES = ("flash_attn", "flash_attn_3", "flash_attn_4", "cudnn", "xformers")
forget = pytest.fixture(autouse=True)(planted_peers.forget)


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    for op, peers in ((VARLEN_ATTENTION, attention_peers.ATTENTION), (VARLEN_ATTENTION_FORWARD, attention_peers.FORWARD)):
        for backend in peers:
            monkeypatch.setitem(op.backends, backend.name, backend)


@pytest.fixture
def gpu(monkeypatch):
    planted_peers.plant_all(monkeypatch)
    monkeypatch.setattr(attention, "device_name", lambda tensor: "cuda:sm90")


def pack(queries, keys, heads=4, key_heads=4, head_dim=32, tail=0, dtype=torch.bfloat16, **options):
    """Arguments of varlen_attention; ``tail`` rows past the end hold NaN."""
    draw = torch.Generator().manual_seed(0)
    make = lambda lengths, count: torch.cat([
        torch.randn(sum(lengths), count, head_dim, generator=draw),
        torch.full((tail, count, head_dim), torch.nan)]).to(dtype)
    ends = lambda lengths: torch.tensor([0, *lengths]).cumsum(0).int()
    return dict(q=make(queries, heads), k=make(keys, key_heads), v=make(keys, key_heads), cu_seqlens_q=ends(queries),
                cu_seqlens_k=ends(keys), **options)


def peer(name, op="varlen_attention"):
    return functools.partial(getattr(ops, op), backend=name)


# ------------------------------------------------------------------------------------------------------- our contract
RAGGED = ((17, 0, 5, 1, 30, 0), (17, 0, 5, 1, 30, 0))
CROSS = ((20, 7, 0, 5, 1), (9, 0, 6, 30, 3))
CASES = {  # label: arguments, and who refuses them
    "a pack with a tail": (dict(queries=RAGGED[0], keys=RAGGED[1], tail=6), ""),
    "one sample": (dict(queries=(33,), keys=(40,), head_dim=72), ""),
    "float16, scaled": (dict(queries=RAGGED[0], keys=RAGGED[1], dtype=torch.float16, softmax_scale=0.3), ""),
    "samples without queries or keys": (dict(queries=CROSS[0], keys=CROSS[1], tail=3), ""),
    "no sample has keys": (dict(queries=(3, 2), keys=(0, 0), tail=2), ""),
    "no rows of keys": (dict(queries=(3, 2), keys=(0, 0)), ""),
    "no rows of queries": (dict(queries=(0, 0), keys=(4, 2)), ""),
    "no sample": (dict(queries=(), keys=(), tail=4), ""),
    "grouped heads": (dict(queries=CROSS[0], keys=CROSS[1], heads=6, key_heads=2, tail=2), "xformers"),
    "one row of grouped heads among three samples": (dict(queries=(0, 1, 0), keys=(2, 3, 0), key_heads=1), "xformers"),
    "causal": (dict(queries=RAGGED[0], keys=RAGGED[1], causal=True, tail=2), "cudnn"),
    "causal, rows without keys": (dict(queries=CROSS[0], keys=CROSS[1], causal=True, tail=5), "cudnn"),
    "a window before the diagonal, rows without keys": (
        dict(queries=CROSS[0], keys=CROSS[1], window=(4, 0), tail=5), "cudnn"),
    "causal and a window": (dict(queries=CROSS[0], keys=CROSS[1], causal=True, window=(2, 3), tail=5), "cudnn"),
    "a window": (dict(queries=CROSS[0], keys=CROSS[1], window=(3, 2), tail=1), "cudnn xformers"),
    "a window open to the left": (dict(queries=CROSS[0], keys=CROSS[1], window=(-1, 2)), "cudnn xformers"),
    "a window open to the right": (dict(queries=CROSS[0], keys=CROSS[1], window=(2, -1)), "cudnn xformers"),
}


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients(gpu, name, label):
    options, refusing = CASES[label]
    inputs = pack(**options)
    if name in refusing.split():
        with pytest.raises(NotImplementedError, match=f"backend '{name}' was asked for by name"):
            peer(name)(**inputs)
        return
    assert len(assert_matches("varlen_attention", peer(name), inputs)) == 4
    assert_matches("varlen_attention", peer(name), inputs, flat_cotangent=True)


@pytest.mark.parametrize("label", [label for label, (_, refusing) in CASES.items() if "cudnn" not in refusing]
                         + ["causal, rows without keys", "a window"])
@pytest.mark.parametrize("name", NAMES[:4])
def test_log_sum_exp(gpu, name, label):
    """-inf on rows without keys and in the tail; differentiable where a gradient is asked for, else refused."""
    inputs = pack(**CASES[label][0])
    if name == "cudnn" and "cudnn" in CASES[label][1]:
        return
    options = dict(return_lse=True)
    with torch.no_grad():
        out, lse = peer(name)(**inputs, **options)
        assert_matches("varlen_attention", (out, lse), inputs | options)
        assert_matches("varlen_attention_forward", peer(name, "varlen_attention_forward")(**inputs), inputs)
    if name == "flash_attn_4":
        assert_matches("varlen_attention", peer(name), inputs | options)
        return
    with pytest.raises(NotImplementedError, match="does not differentiate its log-sum-exp"):
        peer(name)(**inputs | dict(q=inputs["q"].clone().requires_grad_()), **options)


def test_the_log_sum_exp_alone_has_a_gradient(gpu):
    inputs = pack(*CROSS, tail=3)
    grads = []
    for name in ("flash_attn_4", "reference"):
        leaves = [inputs[letter].clone().requires_grad_() for letter in "qk"]  # v has no part in it
        _, lse = peer(name)(**inputs | dict(zip("qk", leaves, strict=True)), return_lse=True)
        grads.append(torch.autograd.grad(torch.where(lse.isfinite(), lse, 0).sum(), leaves))
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference)
    assert grads[0][0].any()


@pytest.mark.parametrize("name", NAMES)
def test_only_wanted_gradients(gpu, name):
    inputs = pack(*CROSS, tail=3)
    inputs["k"].requires_grad_()
    out = peer(name)(**inputs)
    out.float().square().sum().backward()
    assert inputs["k"].grad.isfinite().all() and not inputs["k"].grad[-3:].any()
    assert inputs["q"].grad is inputs["v"].grad is None
    assert not peer(name)(**{**inputs, "k": inputs["k"].detach()}).requires_grad


def test_unmasked_rows_are_those_of_the_definition():
    draw = random.Random(0)
    for trial in range(200):
        lengths = [[draw.choice((0, 0, 1, 2, 3, 7)) for _ in range(draw.randint(0, 4))] for _ in "qk"]
        lengths[1] = (lengths[1] + [0] * 4)[:len(lengths[0])]
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in lengths)
        queries, keys = sum(lengths[0]) + draw.randint(0, 2), sum(lengths[1]) + draw.randint(0, 2)
        causal, window = draw.random() < 0.3, (draw.randint(-1, 3), draw.randint(-1, 3))
        shown = visible(cu_q, cu_k, queries, keys, causal, window, "cpu")
        left, right = attention_peers.left_right(causal, window)
        valid_q = attention_peers._unmasked_rows(cu_q, cu_k, queries, right)
        valid_k = attention_peers._unmasked_rows(cu_k, cu_q, keys, left)
        assert torch.equal(valid_q, shown.any(1)) and torch.equal(valid_k, shown.any(0)), (trial, lengths, causal, window)
        assert sum(attention_peers._kept(*lengths, right)) == int(valid_q.sum())
        assert sum(attention_peers._kept(*lengths[::-1], left)) == int(valid_k.sum())


@pytest.mark.parametrize("name, function", [("flash_attn", "flash_attn.flash_attn_interface"),
                                            ("flash_attn_3", "flash_attn_interface"),
                                            ("flash_attn_4", "flash_attn.cute.interface")])
def test_deterministic_is_passed_on(gpu, monkeypatch, name, function):
    asked, inputs = [], pack(*RAGGED)
    inputs["q"].requires_grad_()
    right = sys.modules[function].flash_attn_varlen_func
    monkeypatch.setattr(sys.modules[function], "flash_attn_varlen_func",
                        lambda *a, deterministic=False, **k: asked.append(deterministic) or right(*a, **k))
    peer(name)(**inputs)
    peer(name)(**inputs, deterministic=True)
    assert asked == [False, True]


def test_xformers_gets_only_rows_that_see_something(gpu, monkeypatch):
    given = []
    right = planted_peers.xformers_attention
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention",
                        lambda q, k, v, attn_bias, scale: given.append((attn_bias.queries, attn_bias.keys, q, k))
                        or right(q, k, v, attn_bias, scale=scale))
    inputs = pack(*CROSS, tail=3)
    peer("xformers")(**inputs)
    peer("xformers")(**inputs, causal=True)
    peer("xformers")(**inputs, window=(2, 0))
    assert [found[:2] for found in given] == [([20, 5, 1], [9, 30, 3]), ([9, 5, 1], [9, 30, 3]), ([9, 5, 1], [9, 7, 3])]
    whole = pack((4, 6), (5, 6))
    peer("xformers")(**whole)
    assert given[-1][2].data_ptr() == whole["q"].data_ptr()  # nothing left out, nothing copied


# ------------------------------------------------------------------------------------------------------- wrong adapters
def test_wrong_adapters_fail(gpu, monkeypatch):
    inputs = pack((20, 7, 5), (9, 3, 30))
    right = planted_peers.flash_attn_2

    def swapped(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        return right(q, k, v, cu_k.clamp(max=q.shape[0]), cu_q.clamp(max=k.shape[0]), max_k, max_q, **options)

    def unscaled(*arguments, softmax_scale=None, **options):
        return right(*arguments, **options)

    assert_matches("varlen_attention", peer("flash_attn"), inputs | dict(softmax_scale=0.5))
    for wrong in (swapped, unscaled):
        monkeypatch.setattr(sys.modules["flash_attn.flash_attn_interface"], "flash_attn_varlen_func", wrong)
        with pytest.raises(AssertionError, match="varlen_attention departs"):
            assert_matches("varlen_attention", peer("flash_attn"), inputs | dict(softmax_scale=0.5), grads=False)


@pytest.mark.parametrize("call", [attention_peers.flash_attn, attention_peers.flash_attn_3, attention_peers.flash_attn_4])
def test_their_own_calls_alone_break_the_contract(gpu, call):
    """What the guards are for: a library's own call is right on a plain pack, and not on one with a tail."""
    def bare(q, k, v, cu_seqlens_q, cu_seqlens_k):
        return call(q, k, v, cu_seqlens_q, cu_seqlens_k, 64, 64, causal=False, window=(-1, -1), return_lse=False)[0]

    assert_matches("varlen_attention", bare, pack(*RAGGED))
    with pytest.raises(AssertionError, match="non-finite"):
        assert_matches("varlen_attention", bare, pack(*RAGGED, tail=2))


# ------------------------------------------------------------------------------------------------------------- refusals
H200 = AttentionProblem("cuda:sm90", torch.bfloat16, True, heads=4, key_heads=4, head_dim=128, causal=False, window=(-1, -1),
                        return_lse=False, deterministic=False)
CAUSAL, BEHIND, AHEAD = dict(causal=True), dict(causal=True, window=(5, -1)), dict(window=(5, 2))
GRADLESS = dict(grad=False)
REFUSALS = [  # change of the problem, sentence by backend
    (dict(device="cpu"), {name: "needs a CUDA device." for name in NAMES}),
    (dict(device="cuda:sm75"), {name: "is built for sm_" for name in NAMES}),
    (dict(device="cuda:sm80"), {"flash_attn_3": "this device is sm_80.", "flash_attn_4": "built for sm_90 to sm_129"}),
    (dict(device="cuda:sm100"), {"flash_attn_3": "is built for sm_90 to sm_90; this device is sm_100."}),
    (dict(device="cuda"), {}),  # a traced tensor does not tell
    (dict(dtype=torch.float32), {name: "takes float16 and bfloat16 only." for name in NAMES}),
    (dict(return_lse=True), {"flash_attn": "does not differentiate its log-sum-exp.",
                             "flash_attn_3": "does not differentiate its log-sum-exp.",
                             "cudnn": "does not differentiate its log-sum-exp.",
                             "xformers": "does not return the log-sum-exp."}),
    (dict(return_lse=True) | GRADLESS, {"xformers": "does not return the log-sum-exp."}),
    (CAUSAL, {"cudnn": "takes no causal mask and no window here."}),
    (dict(window=(-1, 0)), {"cudnn": "takes no causal mask and no window here."}),
    (BEHIND, {"cudnn": "no window"}),
    (AHEAD, {"cudnn": "no window", "xformers": "takes no window that is not causal here."}),
    (dict(window=(5, -1)), {"cudnn": "no window", "xformers": "takes no window that is not causal here."}),
    (dict(key_heads=2), {"xformers": "no backward for grouped key heads"}),
    (dict(deterministic=True), {"cudnn": "cannot be asked for a deterministic backward.",
                                "xformers": "cannot be asked for a deterministic backward."}),
    (dict(deterministic=True) | GRADLESS, {}),
    (dict(deterministic=True, head_dim=256), {
        "flash_attn_3": "no deterministic backward for head dims above 192.", "cudnn": "deterministic",
        "xformers": "deterministic"}),
    (dict(device="cuda:sm120", deterministic=True), {
        "flash_attn_3": "sm_120", "flash_attn_4": "no deterministic backward on sm_120 and later.",
        "cudnn": "deterministic", "xformers": "deterministic"}),
    (dict(device="cuda:sm100", head_dim=192), {"flash_attn_3": "sm_100", "flash_attn_4": "no head dim of 192 on sm_100."}),
    (dict(device="cuda:sm100", head_dim=256), {"flash_attn_3": "sm_100"}),
    (dict(device="cuda:sm86", head_dim=160), {"flash_attn_3": "sm_86", "flash_attn_4": "sm_86",
                                              "cudnn": "head dims above 128 from sm_90 on."}),
]


@pytest.mark.parametrize("change, refusing", REFUSALS, ids=[str(change) for change, _ in REFUSALS])
def test_unsupported(gpu, change, refusing):
    problem = replace(H200, **change)
    for backend in attention_peers.ATTENTION:
        reasons = backend.unsupported(problem)
        assert len(reasons) == (backend.name in refusing), (backend.name, reasons)
        for reason in reasons:
            assert refusing[backend.name] in reason
            assert reason.endswith(".") and "\n" not in reason and reason[0] != " ", reason


def test_every_reason_is_given(gpu):
    problem = replace(H200, device="cuda:sm75", dtype=torch.float32, window=(1, 1), key_heads=2, return_lse=True,
                      deterministic=True)
    by_name = {backend.name: backend.unsupported(problem) for backend in attention_peers.ATTENTION}
    assert {name: len(reasons) for name, reasons in by_name.items()} == dict(
        flash_attn=3, flash_attn_3=3, flash_attn_4=2, cudnn=5, xformers=6)


def test_what_a_cudnn_before_its_repair_says(gpu, monkeypatch):
    cudnn = VARLEN_ATTENTION.backends["cudnn"]
    assert cudnn.unsupported(H200) == []
    monkeypatch.setattr(sys.modules["cudnn"], "backend_version", lambda: 91900)
    assert cudnn.unsupported(H200) == ["cuDNN before 9.25 is wrong on samples without queries or keys, which any pack may "
                                       "hold, and this one is 9.19."]


def test_the_forward_of_flash_attention_3_alone(monkeypatch):
    planted_peers.plant(monkeypatch, "fa3_fwd_interface", flash_attn_varlen_func=planted_peers.flash_attn_3)
    monkeypatch.setattr(attention, "device_name", lambda tensor: "cuda:sm90")
    backend, forward = VARLEN_ATTENTION.backends["flash_attn_3"], replace(H200, grad=False)
    assert backend.unsupported(forward) == []
    assert backend.unsupported(H200) == ["fa3_fwd, the forward of FlashAttention-3, has no backward."]
    for change, words in ((dict(dtype=torch.float16), "takes bfloat16 only"), (BEHIND, "no window"), (AHEAD, "no window")):
        [reason] = backend.unsupported(replace(forward, **change))
        assert words in reason
    assert backend.unsupported(replace(forward, causal=True)) == []
    assert_matches("varlen_attention", peer("flash_attn_3"), pack(*CROSS, tail=2, causal=True), grads=False)


def test_a_library_that_cannot_be_imported_says_why(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so.12: cannot open")

    monkeypatch.setattr(attention_peers.importlib, "import_module", broken)
    assert VARLEN_ATTENTION.backends["xformers"].unsupported(H200) == [
        "The package xformers is installed and cannot be imported: OSError: libcudart.so.12: cannot open."]


# ---------------------------------------------------------------------------------------------------------- by name only
def explained():
    """The lines of varlen_attention on an H200, by backend."""
    lines = sora_fast.explain("varlen_attention", every=True, device="cuda:sm90").splitlines()
    return {line.split()[1]: line for line in lines if line.startswith("varlen_attention")}


def test_explain_shows_an_absent_peer(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface", "fa3_fwd_interface", "cudnn", "xformers"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = explained()
    for name, module in zip(NAMES, ("flash_attn", "flash_attn_interface", "flash_attn", "cudnn", "xformers"), strict=True):
        assert lines[name].split()[2] == "-" and f"The package {module} is not installed." in lines[name]
    with pytest.raises(NotImplementedError, match="The package cudnn is not installed"):
        VARLEN_ATTENTION.choose(H200, "cudnn")


def test_auto_takes_none_of_them(gpu):
    shown = explained()
    for name in NAMES:
        assert shown[name].split()[2] == "ok" and "It is not among those that auto tries" in shown[name]
    assert VARLEN_ATTENTION.choose(H200).name not in NAMES
    with pytest.raises(ValueError, match="expected one of 'auto'"), sora_fast.use_backend("flash_attn"):
        pass


def test_a_library_on_another_device_is_refused(monkeypatch):
    planted_peers.plant_all(monkeypatch)
    for name in NAMES:
        with pytest.raises(NotImplementedError, match="needs a CUDA device"):
            peer(name)(**pack(*RAGGED))


def test_packed_libraries_are_traced_whole(gpu, monkeypatch):
    """No length is read: xformers alone needs them on the host, and says so."""
    @torch.library.custom_op("planted::attend", mutates_args=())
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
        return planted_peers.attend(q, k, v, cu_q, cu_k, 64, 64)[0]

    attend.register_fake(lambda q, *others: torch.empty_like(q))
    monkeypatch.setattr(sys.modules["flash_attn.flash_attn_interface"], "flash_attn_varlen_func",
                        lambda q, k, v, cu_q, cu_k, max_q, max_k, **options: attend(q, k, v, cu_q, cu_k))
    torch._dynamo.reset()
    compiled = torch.compile(peer("flash_attn"), fullgraph=True, backend="eager")
    for queries, keys in (CROSS, RAGGED):
        inputs = pack(queries, keys, tail=3)
        assert_matches("varlen_attention", compiled(**inputs), inputs)
