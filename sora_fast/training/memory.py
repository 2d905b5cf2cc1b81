"""A memory estimate before the first step: measured on a part of a batch, scaled to a full one."""

import os
from pathlib import Path

import torch

from .loop import Trainer


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
    weights = list(trainer.modules.parameters())

    def measure(copies: int) -> tuple[int, float]:
        batch, parts = trainer.batches.probe(copies)
        generator = torch.Generator().manual_seed(0)
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16"):
            return saved_bytes(lambda: trainer.loss(batch, generator), weights), parts

    one, parts = measure(1)
    if parts < 2:
        return one * parts, 1 / parts
    growth = measure(2)[0] - one
    return one + growth * (parts - 1), 2 / parts


def estimate(trainer: Trainer) -> str:
    """One line: what a step will need, and what is free."""
    activations, share = activation_bytes(trainer)
    weights = sum(p.numel() * p.element_size() for p in trainer.modules.parameters())
    trained = sum(p.numel() * p.element_size() for p in trainer.parameters.values())
    states = weights + 4 * trained  # gradient, two moments, average
    line = (f"memory: about {_size(states + activations)} a step: {_size(states)} for weights, gradients, AdamW and "
            f"average, {_size(activations)} for activations (measured on {share:.0%} of a batch)")
    free = _free_bytes(trainer.device)
    if free is None:
        return line
    more = activations + 3 * trained  # weights and average are there already
    warning = "" if more < free else "; this will probably not fit: lower --budget, --clips or --crop"
    return f"{line}; {_size(free)} free{warning}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:  # what Linux could free counts as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # Windows and macOS do not tell
        return None
