"""Peers that torch.compile makes pass the benchmark's gate, and a compiled step is traced whole."""

from dataclasses import replace
from functools import partial

import pytest
import test_bench
import test_bench_attention as of_attention
import test_bench_convolution as of_convolution
import test_bench_dit_layers as of_dit_layers
import test_bench_models as of_models
import torch

from sora_fast import ops

pytestmark = pytest.mark.full

CPU = torch.device("cpu")


def test_the_compiled_definition_passes_the_gate():
    found = test_bench.verdicts(torch.compile(partial(ops.gate_residual, backend="reference"), dynamic=False), compiled=True)
    assert {v.status for v in found.values()} == {"PASSED"}, found


def test_compiled_attention_passes():
    case = replace(of_attention.CROSS, queries=(10, 6), keys=(4, 6), head_dim=16)
    torch._dynamo.reset()
    assert of_attention.failures(case, of_attention.provider("compile")) == []


def test_the_compiled_composition_passes_the_gate():
    case = next(replace(case, return_cache=True) for case in of_convolution.QUICK
                if case.norm == "group" and case.op == "norm_act_conv3d")
    peer = of_convolution.provider("compile", case.op)
    assert not peer.unavailable(case, "forward", CPU)
    results = case.truth(case.inputs(CPU, 0), 0).compare(peer.run)
    assert {"output 0", "output 1", "d x", "d weight", "d norm_bias"} < {r.name for r in results}
    assert all(r.passed for r in results), results


def test_the_compiled_batch_obeys_the_error_rule():
    case = next(case for case in of_dit_layers.QUICK if case.op == "norm_modulate" and case.batch)
    provider = of_dit_layers.providers(case.op)["compile_eager"]
    reason = provider.unavailable(case, "forward", CPU)
    if reason:
        pytest.skip(reason)
    assert not of_dit_layers.failures(case, provider)


def test_a_compiled_step_is_traced_whole_and_once(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: real(function, backend=counting, fullgraph=True))
    shallow = replace(of_models.QUICK["wan_vae_decode"].config, multipliers=(1, 1), encoder_blocks=1, decoder_blocks=1,
                      space_factor=2, time_factor=2, attention=False)
    decode = replace(of_models.QUICK["wan_vae_decode"], config=shallow, frames=9)
    for case, expected in ((of_models.QUICK["dit_block_training_step"], 1), (decode, 4)):
        torch._dynamo.reset()
        graphs.clear()
        step = of_models.provider(case, "compile").build(case, CPU)
        out = step()
        step()
        assert len(graphs) == expected  # in a stream the first three chunks differ, and then no more
        wanted = of_models.provider(case, "torch").build(case, CPU)()
        assert all((out[name] - wanted[name]).abs().max() <= 0.05 * wanted[name].abs().max() for name in wanted)
