"""Graphs of torch.compile through the Triton backend: a whole DiT, one tensor given twice, batches of any size.

A graph cannot be traced inside emulated_gpu: test_interpreted_registered.py runs this file in Triton's interpreter.
"""

import op_checks
import pytest
import torch
from test_emulated_dit import CONFIGS, model_and_inputs, step

from sora_fast import ops, use_backend


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compiled_dit_is_one_graph(name):
    """Nothing breaks the graph (fullgraph), and what a compiled step computes is what an eager one does."""
    model, *inputs = model_and_inputs(name, modulation="sample")
    eager = step(model, *inputs, "triton")
    forward = model.forward
    model.forward = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = step(model, *inputs, "triton")
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_one_tensor_given_twice_is_no_break():
    x, table, cu = torch.randn(6, 16, requires_grad=True), torch.randn(1, 16), torch.tensor([0, 4, 6], dtype=torch.int32)
    heads = lambda x: x.view(6, 1, 16)

    def calls(x, table):
        yield ops.gate_residual(x, x, table)
        yield ops.norm_modulate(x, table, table)
        yield ops.qk_norm_rope(heads(x), heads(x), None, norm="rms_head")[1]
        yield ops.varlen_attention(heads(x), heads(x), heads(x), cu, cu, 4, 4)

    step = lambda: torch.autograd.grad(sum(out.square().sum() for out in fn(x, table)), x)[0]
    with use_backend("triton"):
        fn = lambda x, table: tuple(calls(x, table))
        eager = step()
        fn = torch.compile(fn, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(), eager)


def test_compiled_batches():
    """Sizes of a batch are symbols: they reach the device when the graph runs."""
    weight = torch.randn(5, 3, 1, 2, 2)
    fn = lambda x: ops.patch_embed(x, weight, backend="triton")
    counts = op_checks.graphs(fn, lambda n: dict(x=torch.randn(2, 3, n, 2 * n, 4)), (5, 4, 3, 6), None)
    assert counts[1] == counts[-1] <= 2, counts
