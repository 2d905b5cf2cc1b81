"""Train a Wan-type transformer sharded by FSDP2 on two processes, plain and with sora_fast's layers: equal losses.

    python examples/train_wan_with_fsdp2.py

A tiny random model on random latents; two gloo processes on the CPU, started from here.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import WanTransformer3DModel
from torch.distributed.fsdp import fully_shard

import sora_fast

TINY = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64, ffn_dim=128, num_layers=2)


def train(rank: int, steps: int, fast: bool) -> list[float]:
    """Losses, averaged over the processes; each has one clip of its own."""
    torch.manual_seed(0)  # the same weights everywhere
    model = WanTransformer3DModel(**TINY)
    if fast:
        sora_fast.accelerate(model)  # before or after fully_shard
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(1 + rank), []
    draw = lambda *shape: torch.randn(shape, generator=generator)
    clean, text = draw(1, 16, 5, 8, 12), draw(1, 32, 64)
    for _ in range(steps):
        share, noise = torch.rand(1, generator=generator), draw(*clean.shape)
        velocity = model(torch.lerp(clean, noise, share), 1000 * share, text, return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def run(rank: int, world: int, steps: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    plain, fast = (train(rank, steps, fast) for fast in (False, True))
    dist.barrier()  # neither leaves while the other still talks
    dist.destroy_process_group()
    if rank == 0:
        for step, (a, b) in enumerate(zip(plain, fast, strict=True), 1):
            print(f"step {step:2}: loss {a:.6f} plain, {b:.6f} with sora_fast")
            if abs(a - b) > 1e-4 * a:
                raise SystemExit(f"step {step}: the losses differ by {abs(a - b) / a:.1e}")
        print("equal losses")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (2, parser.parse_args().steps, folder), nprocs=2)
