"""FSDP2 around an accelerated model, on two processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_accelerate_training import batch, loss_of, wan
from torch.distributed.fsdp import fully_shard

import sora_fast
from sora_fast.integrations.mixin import is_fast

pytestmark = [pytest.mark.full, pytest.mark.ci]


def _rank(rank, where, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{where}", rank=rank, world_size=2)
    try:
        model = wan()
        if where == "before":
            sora_fast.accelerate(model)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        if where == "after":
            sora_fast.accelerate(model)
        assert is_fast(model.blocks[0]) and type(model.blocks[0]).__name__ == "FSDPWanTransformerBlock"
        optimizer, losses = torch.optim.SGD(model.parameters(), 1e-2), []
        for step in range(3):
            given = {name: value[rank : rank + 1] for name, value in batch(seed=step).items()}
            optimizer.zero_grad()
            loss = loss_of(model, given)
            loss.backward()
            optimizer.step()
            loss = loss.detach()
            dist.all_reduce(loss)
            losses.append(float(loss) / 2)
        if where == "after":
            assert sora_fast.restore(model) and not is_fast(model.blocks[0])
            assert type(model.blocks[0]).__name__ == "FSDPWanTransformerBlock"
        if rank == 0:
            torch.save(losses, f"{folder}/losses-{where}.pt")
        dist.barrier()  # neither leaves while the other still talks
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("where", ["after"])
def test_fsdp2_on_two_processes_gives_the_single_process_s_loss(where, tmp_path):
    mp.spawn(_rank, (where, str(tmp_path)), nprocs=2)
    model, wanted = wan(), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch(seed=step))
        loss.backward()
        optimizer.step()
        wanted.append(float(loss.detach()))
    assert torch.load(f"{tmp_path}/losses-{where}.pt") == pytest.approx(wanted, rel=1e-5)
