"""Several processes as one: who speaks and writes, how gradients meet, whole tensors from shards and back.

``torchrun`` starts the processes; without it there is one, and everything here is what one process does alone. Every rank
walks the same list of packs and takes its share, and gradients are averaged, so that a step is the same step however many
ranks make it. DDP keeps everything on every rank (PyTorch Distributed, arXiv 2006.15704); FSDP2 keeps a shard of weights,
gradients and optimiser (``fully_shard``; FSDP: arXiv 2304.11277).
"""

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .. import files
from ..named import pick_device

# A rank may wait for another that encodes latents for hours. One that dies is torchrun's to notice, within a second.
PATIENCE = timedelta(hours=12)


def rank() -> int:
    return dist.get_rank() if _started() else 0


def size() -> int:
    return dist.get_world_size() if _started() else 1


def first() -> bool:
    """Whether this is the rank that prints and writes."""
    return rank() == 0


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs what is inside as one of torchrun's processes: rank 0 alone prints, and the first to fail alone says why.

    Ctrl-C reaches every rank through torchrun. A rank that fails leaves with its exit code, and torchrun ends the others.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or _started():
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    store, own, count = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=own, world_size=count,
                            timeout=PATIENCE)
    _parent()
    try:
        with contextlib.ExitStack() as stack:
            if not first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except KeyboardInterrupt:
        if not first():
            sys.exit(130)
        raise
    except Exception:
        # Where one rank fails the others fail too, of the same reason or because it has gone: once is enough.
        if store.add("sora_fast/failed", 1) > 1:
            sys.exit(2)
        raise
    barrier()  # nobody leaves while rank 0 still writes
    dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of that name for this rank: each process on a machine has a GPU of its own."""
    device = pick_device(name)
    if size() == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(f"--device: expected cuda, auto or cpu with {size()} processes, got {device}; leave the number "
                         f"out, so that each takes its own")
    index, count = dist.get_node_local_rank(0), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"torchrun: expected at most one process per GPU, {count} here, got process {index + 1}; lower "
                         f"--nproc-per-node")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@lru_cache(1)
def _parent() -> int:
    return os.getppid()


def orphaned() -> bool:
    """Whether torchrun has gone, killed: its processes would go on, and write into a run that somebody resumes."""
    return size() > 1 and os.getppid() != _parent()


def share(values: Sequence) -> Sequence:
    """This rank's part of ``values``: every size()-th, beginning at rank()."""
    return values[rank() :: size()]


def sum_of(*numbers: float) -> list[float]:
    """Each number summed over the ranks, in float64, the same on all of them."""
    return _reduced(numbers, "SUM")


def least(number: float) -> float:
    """The smallest of the ranks' numbers."""
    return _reduced((number,), "MIN")[0]


def _reduced(numbers, operation: str) -> list[float]:
    if size() == 1:
        return [float(number) for number in numbers]
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    dist.all_reduce(values, getattr(dist.ReduceOp, operation))
    return values.tolist()


def gather(value) -> list | None:
    """Every rank's ``value`` (picklable), by rank, on rank 0; None on the others."""
    if size() == 1:
        return [value]
    found = [None] * size() if first() else None
    dist.gather_object(value, found)
    return found


def claimed(run) -> contextlib.AbstractContextManager:
    """``files.claimed`` of a run folder, which rank 0, who writes, has for all."""
    return files.claimed(Path(run)) if first() else contextlib.nullcontext()


def barrier() -> None:
    """Wait until every rank is here; over the CPU, whatever they compute on."""
    sum_of(0)


# ---------------------------------------------------------------------------------------------------- models
class Step(nn.Module):
    """``loss(batch) -> (loss, counts)`` as a module's forward, which is what DDP and FSDP2 wrap.

    Args:
        modules: what ``loss`` uses.
        units: submodules of it that FSDP2 gathers one at a time; everything else is one unit more. Each forward of a unit
            must use all its parameters, for ranks whose gradients differ in number wait for each other for ever; the rest
            may leave parameters unused.
    """

    def __init__(self, modules: nn.ModuleDict, loss: Callable, units: Sequence[nn.Module] = ()):
        super().__init__()
        self.modules_of_loss, self.loss, self.units, self.sharded = modules, loss, tuple(units), False

    def forward(self, batch):
        loss, counts = self.loss(batch)
        if size() > 1 and torch.is_grad_enabled():
            inside = {id(module) for unit in (self.units if self.sharded else ()) for module in unit.modules()}
            outside = {id(p): p for module in self.modules() if id(module) not in inside
                       for p in module.parameters(recurse=False) if p.requires_grad}
            loss = _Used.apply(loss, self.sharded, *outside.values())
        return loss, counts


class _Used(torch.autograd.Function):
    """The loss, in a graph that all parameters are part of: each rank reports a gradient for each, if only 0."""

    @staticmethod
    def forward(ctx, loss, zeros: bool, *parameters):
        # DDP takes "none" for 0; FSDP2 sends what there is, which must then be there.
        ctx.like = [(p.shape, p.dtype, p.device) if zeros else None for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss):
        return d_loss, None, *(None if like is None else torch.zeros(like[0], dtype=like[1], device=like[2])
                               for like in ctx.like)


def wrap(step: Step, kind: str, device: torch.device) -> nn.Module:
    """``step`` for this many ranks: itself alone, DDP around it, or itself with its parameters sharded in place."""
    if size() == 1:
        return step
    with torch.no_grad():
        for tensor in (*step.parameters(), *step.buffers()):
            dist.broadcast(tensor, 0)
    if kind == "ddp":
        ddp = nn.parallel.DistributedDataParallel
        old = "forward_sync_buffers" not in inspect.signature(ddp).parameters  # torch 2.13 has a new name for it
        return ddp(step, gradient_as_bucket_view=True, **{"broadcast_buffers" if old else "forward_sync_buffers": False})
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A block's gate is a view of its modulation, into which nobody writes.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (size(),))
    for module in (*step.units, step):
        # The outermost too, which by default stays gathered: evaluation changes the weights between two forwards.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    step.sharded = True
    return step


def no_exchange(module: nn.Module, last: bool):
    """A context for one of several backwards of a step: DDP exchanges gradients in the last. FSDP2 does in each, which
    keeps them sharded."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) and not last else \
        contextlib.nullcontext()


def _is_sharded(tensor: torch.Tensor) -> bool:
    if size() == 1:  # then nothing is, and the import, half a second, is not needed
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def locals_of(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The part of each of ``tensors`` that is here, sharing its memory, without autograd."""
    return [t.detach().to_local() if _is_sharded(t) else t.detach() for t in tensors.values()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of ``tensor``; every rank must ask."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on rank 0's CPU, one at a time; nothing on the others, and every rank must ask."""
    found = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if first():
            found[name] = tensor.cpu()
    return found


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``value``, whole on every rank, on the parameter's device and sharded as it is where their shapes agree."""
    value = value.to(parameter.device)
    if not _is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
