"""The attention peers of the benchmark: who refuses what, and the adapters on planted modules with the real signatures."""

from dataclasses import replace

import planted_peers
import pytest
import torch
from planted_peers import plant
from test_bench_attention import BANDED, CPU, CROSS, EQUAL, GROUPED, RAGGED, VARLEN, cases, failures, provider
from torch.nn.attention import varlen

from sora_fast import ops
from sora_fast.benchmarks import peers_attention
from sora_fast.benchmarks.peers_attention import libraries, peers
from sora_fast.benchmarks.specs.attention import providers

forget = pytest.fixture(autouse=True)(planted_peers.forget)


# -------------------------------------------------------------------------------------------------------- refusals
def on_gpu(monkeypatch, sm=(9, 0), missing=""):
    """A device that peers take for a GPU with all of them installed, or all but those whose reason is ``missing``."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    monkeypatch.setattr(libraries, "installed", lambda module: missing)
    return torch.device("cuda")


def refusals(case, device, direction="forward"):
    return {p.name: p.unavailable(case, direction, device) for p in peers()}


def test_a_library_is_one_provider():
    """Libraries that are backends too are timed by their own calls alone."""
    names = [one.name for one in providers("varlen_attention")]
    assert len(names) == len(set(names)) and ALL < set(names)


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
    monkeypatch.setattr(libraries, "installed", lambda module: "The package cudnn.sdpa is not installed."
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
    monkeypatch.setattr(libraries, "installed", lambda module: "The package flash_attn_interface is not installed."
                        if module == "flash_attn_interface" else "")
    fa3 = provider("flash_attn_3")
    assert fa3.unavailable(BF16, "forward", device) == ""
    assert fa3.unavailable(BF16, "backward", device).endswith("has no backward.")
    assert "window" in fa3.unavailable(replace(BF16, window=(3, 3)), "forward", device)
    assert "bfloat16 only" in fa3.unavailable(replace(BF16, dtype=torch.float16), "forward", device)
    assert fa3.details(BF16, device) == dict(module="fa3_fwd_interface")


# -------------------------------------------------------------------------------------------------- planted peers
def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    """torch 2.13's; causal is the tuple (-1, 0) and nothing else."""
    assert query.shape[1] == key.shape[1] or enable_gqa
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, window_size)


def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                     window_size=(-1, -1)):
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, window_size)


def _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, window_size):
    out, lse = ops.varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window=window_size, return_lse=True,
                                    backend="reference")
    return (out, lse) if return_aux is not None and return_aux.lse else out


def planted(monkeypatch):
    planted_peers.plant_all(monkeypatch)
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
    deaf = lambda *args, causal, window_size, **more: planted_peers.flash_attn_2(*args, **more)
    plant(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func=deaf)
    assert failures(EQUAL, provider("flash_attn")) == []
    assert failures(BANDED, provider("flash_attn"), "forward")


def test_varlen_attn_before_it_had_a_flag_for_grouped_heads(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_2_11)
    assert failures(GROUPED, provider("varlen_attn")) == []


def test_the_forward_wheel_is_called_where_flash_attention_3_is_not_whole(monkeypatch):
    called = []
    forward = lambda *args, **options: called.append(1) or planted_peers.flash_attn_3(*args, **options)
    plant(monkeypatch, "fa3_fwd_interface", flash_attn_varlen_func=forward)
    assert failures(GROUPED, provider("flash_attn_3"), "forward") == [] and called


def test_an_older_flash_attention_3_returns_the_log_sum_exp_unasked(monkeypatch):
    def older(*args, causal=False, window_size=(-1, -1)):
        return planted_peers.flash_attn_3(*args, causal=causal, window_size=window_size, return_attn_probs=True)

    plant(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=older)
    assert failures(BANDED, provider("flash_attn_3")) == []


def test_cudnn_says_how_it_was_called(monkeypatch):
    planted(monkeypatch)
    assert provider("cudnn_frontend").details(EQUAL, CPU) == dict(backend_version=92500, batch="a view")
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
