"""A memory estimate before the first step: measured on a part of a batch, scaled to a full one."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, distributed
from .loop import Trainer

SHARE = 0.7  # of the free memory, for what is measured: gradients of activations and the allocator's gaps take the rest
ROUND = 256  # tokens that a budget is a multiple of


def saved_bytes(compute, known=()) -> int:
    """Bytes that autograd keeps for the backward of ``compute()``, each storage once, without those of ``known``."""
    storages: dict[int, int] = {}
    old = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in old:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(storages.values())


def activation_bytes(trainer: Trainer) -> tuple[float, float]:
    """Bytes that a full batch keeps for its backward, and the share of a batch they were measured on.

    Measured on one and on two parts of a batch: what both keep (weights in the autocast dtype) does not grow.
    """
    weights = distributed.locals_of(dict(trainer.modules.named_parameters()))
    buffers = [(buffer, buffer.clone()) for buffer in trainer.modules.buffers()]  # which a forward may change

    def measure(copies: int) -> tuple[int, float]:
        loaded, parts = trainer.batches.probe(copies)
        batch = trainer.draw(loaded, checkpoint.generator(0))
        with trainer.autocast():
            return saved_bytes(lambda: trainer.plain(batch), weights), parts

    try:
        one, parts = measure(1)
        if parts < 2:
            return one * parts, 1 / parts
        return one + (measure(2)[0] - one) * (parts - 1), 2 / parts
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def find_budget(config, modules: nn.ModuleDict, drawn: Callable, loss: Callable, sizes: Sequence[int], largest: int,
                device: torch.device) -> int:
    """Tokens of a pack that the free memory holds, printed; the same on all ranks, and on resume that of the run.

    Args:
        config: a DiTTraining whose budget is 0. modules: what is trained, not sharded yet.
        drawn: ``drawn(copies)`` is a batch of as many samples of one size. loss: as the Trainer's.
        sizes: tokens of every clip that is trained on: a pack holds no more than all of them, or than look_ahead of them,
            together. largest: tokens of the largest clip, which must fit.
    """
    if config.resume:
        return int(checkpoint.load_json(Path(config.out) / "config.json")["training"]["budget"])
    kept, tokens, weights = [], [], list(modules.parameters())
    for copies in (1, 2):
        batch = drawn(copies)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            kept.append(saved_bytes(lambda batch=batch: loss(batch), weights))
        tokens.append(batch.batch.length)
    each = (kept[1] - kept[0]) / (tokens[1] - tokens[0])
    once = kept[0] - each * tokens[0]
    free = _free_bytes(device)
    if free is None:
        raise ValueError(f"--budget: expected a device that tells its free memory, got {device} and 0; pass a number of "
                         f"tokens")
    # Ranks on a CPU share its memory. Gradients, two moments and the average come beside the weights.
    free = free / (distributed.size() if device.type == "cpu" else 1)
    states = 4 * _bytes({name: p for name, p in modules.named_parameters() if p.requires_grad})
    room = distributed.least((SHARE * free - states - once) / each)
    if room < largest:
        raise ValueError(f"--budget: expected free memory for the largest clip, {largest:,} tokens, got {_size(free)}, "
                         f"enough for {max(int(room), 0):,}; lower --short-side or --frames, or pass --checkpointing")
    useful = sum(sizes) * min(1, config.look_ahead / len(sizes))
    budget = int(min(room, useful))
    budget = max(budget // ROUND * ROUND if budget > ROUND else budget, largest)
    print(f"budget: {budget:,} tokens a pack, from {_size(free)} free and {_size(each * 1024)} per 1,024 tokens"
          + ("" if room < useful else "; the packer has no more to fill one with"), flush=True)
    return budget


def estimate(trainer: Trainer) -> str:
    """One line: what a step will need, and what is free."""
    activations, share = activation_bytes(trainer)
    weights = _bytes(dict(trainer.modules.named_parameters()))
    trained = _bytes(trainer.parameters)
    states = weights + 4 * trained  # gradient, two moments, average
    line = (f"memory: about {_size(states + activations)} a step: {_size(states)} for weights, gradients, AdamW and "
            f"average, {_size(activations)} for activations (measured on {share:.0%} of a batch)")
    free = _free_bytes(trainer.device)
    if free is None:
        return line
    more = activations + 3 * trained  # weights and average are there already
    warning = "" if more < free else "; this will probably not fit: lower --budget, --clips or --crop"
    return f"{line}; {_size(free)} free{warning}"


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Of the shards that are here."""
    return sum(t.numel() * t.element_size() for t in distributed.locals_of(tensors))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:  # what Linux could free counts as free
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # Windows and macOS do not tell
        return None
