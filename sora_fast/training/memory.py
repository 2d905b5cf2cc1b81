"""A memory estimate before the first step: measured on a small batch, scaled to a full one."""

import os

import torch

from .loop import Trainer


def saved_bytes(compute) -> int:
    """Bytes that autograd keeps for the backward of ``compute()``, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(storages.values())


def estimate(trainer: Trainer) -> str:
    """One line: what a step will need, and what is free."""
    batch, scale = trainer.batches.probe()
    generator = torch.Generator().manual_seed(0)
    weights = sum(p.numel() * p.element_size() for p in trainer.modules.parameters())
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16"):
        kept = saved_bytes(lambda: trainer.loss(batch, generator))
    # Weights themselves are among what the graph keeps; they do not grow with the batch.
    activations = max(kept - weights, 0) * scale
    states = sum(p.numel() for p in trainer.parameters.values()) * 4 * 4 + (weights - 4 * sum(
        p.numel() for p in trainer.parameters.values()))
    free = _free_bytes(trainer.device)
    line = (f"memory: about {(states + activations) / 2**30:.2f} GiB a step: {states / 2**30:.2f} for weights, gradients, "
            f"AdamW and average, {activations / 2**30:.2f} for activations (measured on a {scale:.0f}th of a batch)")
    if free is None:
        return line
    warning = "" if states + activations < free else "; this will probably not fit: lower --budget, --clips or --crop"
    return f"{line}; {free / 2**30:.1f} GiB free{warning}"


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # Windows and macOS do not tell
        return None
