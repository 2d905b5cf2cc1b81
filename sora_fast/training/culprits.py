"""Which samples made a loss or gradient nan or inf: each of the step's runs alone, as it was drawn."""

import math
from collections.abc import Sequence

from torch import nn

from . import checkpoint, distributed


def sentence(trainer, loss: float, norm: float, plans: Sequence) -> str:
    """What happened in the step made of ``plans``, which samples it comes from, and what is left."""
    found = checkpoint.everything(trainer.run_folder)
    where = f"the last checkpoint, {found[-1]}, is whole" if found else "nothing was saved yet"
    return (f"training stopped: expected a finite loss and gradient at step {trainer.step + 1}, got a loss of {loss} and a "
            f"gradient norm of {norm}; {_culprits(trainer, plans)}; {where}: look at that data, or lower --lr")


def _culprits(trainer, plans: Sequence) -> str:
    alone, together, names = [], [], []
    for plan in plans:  # every rank runs all of them: sharded weights need everybody
        batch = trainer.drawn(plan)
        names += batch.names
        if _is_finite(trainer, batch):
            continue
        broken = [name for i, name in enumerate(batch.names) if not _is_finite(trainer, batch.only(i))]
        alone += broken
        together += [] if broken else batch.names
    if len(alone) == len(names) > 1:
        return f"every sample of the step gives that, as {_listed(alone)}: the weights are at fault and not the data"
    if alone:
        return f"it comes from {_listed(alone)}"
    if together:
        return f"it comes from these samples together and from none alone: {_listed(together)}"
    return f"it did not come again when the samples of the step were run once more: {_listed(names)}"


def _is_finite(trainer, batch) -> bool:
    """Whether ``batch`` alone has a finite loss and gradient, with the weights as they are."""
    trainer.optimizer.zero_grad(set_to_none=True)
    with trainer.autocast():
        loss, _ = trainer.plain(batch)
    loss.backward()
    gradients = [p.grad for p in trainer.parameters.values() if p.grad is not None]
    norm = float(distributed.whole(nn.utils.get_total_norm(gradients)))
    trainer.optimizer.zero_grad(set_to_none=True)
    return distributed.sum_of(not (math.isfinite(float(loss.detach())) and math.isfinite(norm)))[0] == 0


def _listed(names: Sequence[str], most: int = 3) -> str:
    return "; ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
