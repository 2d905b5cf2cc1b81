"""What a call costs Python, counted; and that nothing which is remembered of earlier calls outlives what it depends on."""

from dataclasses import replace
from types import SimpleNamespace

import op_checks
import pytest
import torch

from sora_fast import Pack, configs, dispatch, ops, use_backend
from sora_fast.benchmarks import host_time
from sora_fast.ops import triton_backend

# Python functions that one call runs, PyTorch's own among them: (without, with gradients), forward. As counted with the
# versions of constraints.txt and rounded up to a multiple of 5; a change that needs more says why here.
MOST = {
    # patches are split into runs of one size: a slice has a gradient as large as the pack; 16 bits are asked about, as some
    # CPUs have no products in them
    "patch_embed": (20, 25),
    "unpatchify": (15, 15),
    "norm_modulate": (15, 20),
    "gate_residual": (15, 20),
    "gate_residual_norm_modulate": (15, 25),
    "qk_norm_rope": (30, 35),  # two outputs have a hook each
    "varlen_attention": (25, 25),
    "causal_conv3d": (35, 45),
    "norm_act": (15, 15),
    "norm_act_conv3d": (40, 50),
    "kl_sample": (15, 20),
}
# The same of Triton's backend up to the launch, without gradients; here the launchers of kernels/ count too.
MOST_OF_TRITON = {
    "patch_embed": 55, "unpatchify": 40, "norm_modulate": 45, "gate_residual": 45, "gate_residual_norm_modulate": 50,
    "qk_norm_rope": 55, "varlen_attention": 75, "causal_conv3d": 65, "norm_act": 45, "norm_act_conv3d": 90,
}


@pytest.mark.parametrize("grad", (False, True), ids=("forward", "with gradients"))
def test_python_calls(grad):
    found = {op: host_time.python_calls(ours) for op, (ours, _) in host_time.calls(grad).items()}
    assert found.keys() == MOST.keys()
    assert {op: count for op, count in found.items() if count > MOST[op][grad]} == {}


def test_python_calls_before_a_launch():
    pytest.importorskip("triton")
    with host_time.launches_left_out(), use_backend("triton"):
        calls = host_time.calls(False)
        found = {op: host_time.python_calls(calls[op][0]) for op in MOST_OF_TRITON}
    assert {op: count for op, count in found.items() if count > MOST_OF_TRITON[op]} == {}


def test_a_block_is_plain_pytorchs():
    """What the benchmark compares is one function."""
    ours, plain = host_time.block_calls()
    torch.testing.assert_close(ours(), plain()[0])


# ------------------------------------------------------------------------------------------------ nothing outlives its cause
def test_what_differs_from_a_right_call_is_checked():
    x, table = torch.randn(6, 8), torch.randn(1, 8)
    q, cu = torch.randn(6, 2, 16), torch.tensor([0, 6], dtype=torch.int32)
    pack = Pack([(1, 2, 3)])
    right = dict(eps=1, norm="layer")
    for _ in range(2):
        ops.norm_modulate(x, table, table, pack, **right)
        ops.varlen_attention(q, q, q, cu, cu, window=(1, 1))
        for wrong in (dict(eps=True), dict(norm="batch"), dict(scale=table[:, :7]), dict(rows=Pack([(1, 2, 2)])),
                      dict(rows=Pack([(1, 1, 3), (1, 1, 3)])), dict(shift=table.int()), dict(x=x.to("meta")),
                      dict(dtype=torch.int32), dict(rows=torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int32))):
            arguments = dict(x=x, shift=table, scale=table, rows=pack, **right) | wrong
            op_checks.assert_refused(lambda arguments=arguments: ops.norm_modulate(**arguments), "norm_modulate")
        for wrong in (dict(window=(1.0, 1)), dict(window=[1]), dict(softmax_scale="1"), dict(max_seqlen_q=2.5)):
            arguments = dict(window=(1, 1)) | wrong
            op_checks.assert_refused(lambda arguments=arguments: ops.varlen_attention(q, q, q, cu, cu, **arguments),
                                     "varlen_attention")
        cu[1] = 7  # bare index tensors are looked at every time
        op_checks.assert_refused(lambda: ops.varlen_attention(q, q, q, cu, cu, window=(1, 1)), "varlen_attention", "got 7")
        cu[1] = 6


def test_a_choice_lasts_as_long_as_what_it_was_made_of(monkeypatch):
    """One and the same call, while flags, contexts and the environment change around it."""
    x = torch.randn(6, 8)
    ran = []
    for name in ("triton", "torch", "reference"):
        run = ops.modulation.GATE_RESIDUAL.backends[name].run
        spy = lambda name=name, run=run, **arguments: ran.append(name) or (
            arguments["x"] if name == "triton" else run(**arguments))
        monkeypatch.setitem(ops.modulation.GATE_RESIDUAL.backends, name,
                            replace(ops.modulation.GATE_RESIDUAL.backends[name], run=spy))

    def taken(**options):
        try:
            ops.gate_residual(x, x, x[:1], **options)
        except NotImplementedError:
            return None
        return ran.pop()

    for _ in range(2):
        assert taken() == "torch" and taken(backend="reference") == "reference" and taken(backend="triton") is None
        with use_backend("reference"):
            assert taken() == "reference" and taken(backend="torch") == "torch"
        with dispatch.use_emulated_gpu(SimpleNamespace(arch="sm90")):
            assert taken() == "torch" and taken(backend="triton") == "triton"
        with dispatch.use_emulated_gpu(SimpleNamespace(arch="sm75")):
            assert taken(backend="triton") is None
        with monkeypatch.context() as patch:
            patch.setenv("SORA_FAST_BACKEND", "reference")
            assert taken() == "reference"
            patch.setenv("SORA_FAST_BACKEND", "auto")
            patch.setenv("TRITON_INTERPRET", "1")
            assert taken() == "torch" and taken(backend="triton") == "triton"
        x = torch.randn(6, 8, dtype=torch.float64)
        with dispatch.use_emulated_gpu(SimpleNamespace(arch="sm90")):
            assert taken(backend="triton") is None
        x = x.float()


def test_autocast_gradients_and_determinism_are_seen_anew():
    q, cu = torch.randn(6, 2, 16, requires_grad=True), torch.tensor([0, 6], dtype=torch.int32)
    run = lambda: ops.varlen_attention(q, q, q, cu, cu)
    for _ in range(2):
        assert run().dtype == torch.float32 and run().requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run().dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.float16):
            assert run().dtype == torch.float16
        with torch.no_grad():
            assert not run().requires_grad
        q.requires_grad_(False)
        assert not run().requires_grad
        q.requires_grad_()


def test_a_config_lasts_as_long_as_what_it_was_looked_up_in():
    pytest.importorskip("triton")
    facts = dict(channels=64, norm="rms", act="silu", x_dtype=torch.float32, y_dtype=torch.float32, pixels=64)
    found = lambda: triton_backend.config("normalization", "forward", torch.device("cpu"), **facts).config
    usual, other = found(), object()
    for _ in range(2):
        with configs.override("normalization", "forward", other):
            assert found() is other
            with configs.recording() as asked:
                found()
            assert len(asked) == 1
        assert found() == usual
        with configs.recording() as asked:
            assert found() == usual
        assert len(asked) == 1


def test_a_pack_knows_its_tail_and_what_is_even():
    """Rows of a Pack are what bare rows are, whether masked, picked or viewed; and what is changed in it counts."""
    even, ragged, frames = Pack([(2, 1, 3)] * 2), Pack([(1, 1, 3), (2, 1, 3)]), Pack([(1, 2, 2), (2, 1, 4)],
                                                                                     modulation="frame")
    kept = even.keep(torch.tensor([0, 1, 2, 6, 7, 8]))
    expected = [(even, False, 6), (ragged, False, 0), (frames, False, 4), (even.pad_to(14), True, 0), (kept, False, 0),
                (even.pad_to(12), False, 6), (Pack([]), True, 0), (Pack([(0, 1, 1)]), True, 0)]
    for pack, tail, length in expected:
        assert (pack.tail, pack.even) == (tail, length), pack
        x = torch.randn(pack.num_tokens, 8, requires_grad=True)
        tables = [torch.randn(pack.num_rows, 8, requires_grad=True) for _ in range(3)]
        runs = [ops.gate_residual_norm_modulate(x, x * 2, *tables, rows) for rows in (pack, pack.rows)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        grads = [torch.autograd.grad([out.square().sum() for out in run], [x, *tables]) for run in runs]
        torch.testing.assert_close(*grads)
    changed = Pack([(2, 1, 3)] * 2)
    changed.rows = torch.tensor([0] * 6 + [1] * 5 + [-1], dtype=torch.int32)
    assert changed.tail and not changed.even
    x, gate = torch.ones(12, 8), torch.ones(2, 8)
    assert not ops.gate_residual(x, x, gate, changed)[-1].any() and ops.gate_residual(x, x, gate, even)[-1].all()


def test_angles_are_those_of_the_coordinates_as_they_are():
    q, pack = torch.randn(6, 2, 16), Pack([(1, 2, 3)])
    run = lambda pack, **options: ops.qk_norm_rope(q, None, pack, axes=(4, 6, 6), **options)[0]
    right = lambda pack, **options: run(pack, backend="reference", **options)
    for _ in range(2):
        torch.testing.assert_close(run(pack), right(pack))
        torch.testing.assert_close(run(pack, theta=10.0), right(pack, theta=10.0))
        pack.coords.add_(1)
        torch.testing.assert_close(run(pack), right(pack))
        pack.coords = pack.coords * 2
        torch.testing.assert_close(run(pack), right(pack))
    other = pack.coords
    del pack
    assert ops.rotary._cached is not None
    del other
    assert ops.rotary._cached is None  # nothing outlives the coordinates
