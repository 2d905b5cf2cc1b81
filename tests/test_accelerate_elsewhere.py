"""Blocks known by their form, and pairs in an nn.Sequential, whose weights are offloaded or sharded, before or after."""

import accelerate_checks as checks
import pytest
import test_accelerate_structures as forms
import torch
import torch.distributed as dist
from test_accelerate_sequences import causal, clip, norm_act
from test_accelerate_trials import close, given, note
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

import sora_fast
from sora_fast.integrations.mixin import is_fast

pytestmark = [pytest.mark.full, pytest.mark.ci]
offload = pytest.importorskip("accelerate").cpu_offload


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_blocks(when):
    """Weights that are on the meta device outside of their own child's call."""
    for make, inputs in ((forms.DiTBlock, given()), (forms.FinalLayer, given()), (forms.Block, given()[:1])):
        module = checks.randomise(make()).eval()
        wanted = module(*inputs)
        steps = [lambda m: offload(m, torch.device("cpu")), sora_fast.accelerate]
        for step in steps if when == "before" else reversed(steps):
            report = step(module)
        if when == "before":
            assert not report.swapped and "offload" in report.rows[0].note
        with torch.no_grad():
            close(module(*inputs), wanted)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
def test_sharded_blocks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        assert "sharded" in note(distribute_module(forms.DiTBlock(), mesh))
        for part in ("attn", ""):
            module = checks.randomise(forms.DiTBlock())
            wanted = module(*given())
            fully_shard(module.get_submodule(part), mesh=mesh)
            assert "sharded" in note(module)
            close(module(*given()), wanted)
        module = checks.randomise(forms.DiTBlock())
        wanted = module(*given())
        sora_fast.accelerate(module)
        fully_shard(module, mesh=mesh)
        close(module(*given()), wanted)
        assert is_fast(module) and module._sora_fast_proofs.current(module).reason is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("make", [norm_act, causal])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_pairs(make, when):
    """In a model and by themselves."""
    for model in (make(), nn.Sequential(make(), nn.Tanh())):
        checks.randomise(model).eval()
        wanted = model(clip())
        steps = [lambda m: offload(m, torch.device("cpu")), sora_fast.accelerate]
        for step in steps if when == "before" else reversed(steps):
            step(model)
        assert any(p.is_meta for p in model.parameters())
        with torch.no_grad():
            close(model(clip()), wanted)
