"""The loss on data that is kept from training, with the averaged weights: the same batches every time."""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..evaluation.plots import png
from ..files import replace
from . import distributed


@contextmanager
def averaged(trainer):
    """Inside, the trainer's modules compute with the averaged weights, in evaluation mode."""
    weights, average = distributed.locals_of(trainer.parameters), distributed.locals_of(trainer.ema)
    held, training = [weight.clone() for weight in weights], trainer.modules.training
    trainer.modules.eval()
    torch._foreach_copy_(weights, average)
    try:
        yield
    finally:
        torch._foreach_copy_(weights, held)
        trainer.modules.train(training)


@torch.no_grad()
def evaluate(trainer) -> dict:
    """A row of heldout.csv: step, the loss of each name that ``trainer.held_out`` has batches of (its mean over what
    is learned in them, as a step's is), and the mean of several.

    Every rank computes all of it, so that the figure is the same figure on any number of them.
    """
    sums: dict[str, tuple[float, int]] = {}
    with averaged(trainer), trainer.autocast():
        for name, batch in trainer.held_out():
            loss, _ = trainer.plain(batch)
            total, learned = sums.get(name, (0.0, 0))
            sums[name] = total + float(loss) * batch.learned, learned + batch.learned
    means = {name: total / learned for name, (total, learned) in sums.items()}
    return dict(step=trainer.step) | means | (dict(mean=sum(means.values()) / len(means)) if len(means) > 1 else {})


def sentence(row: dict) -> str:
    """A row for people."""
    return "held out: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")


def plot(path: Path, rows: Sequence[dict]) -> None:
    """A PNG of held-out losses over steps, a line for each name; nothing where matplotlib is not installed."""
    def draw(axes):
        for name in [name for name in rows[-1] if name != "step"]:
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, marker=".", linewidth=1.2,
                      **dict(color="black", linestyle="--") if name == "mean" else {})
        axes.set(title="held-out loss, averaged weights", xlabel="step", ylabel="loss", yscale="log")
        axes.legend(fontsize="small")

    plotted = png(draw, size=(6.4, 4.0), dpi=100)
    if plotted:
        replace(path, lambda temporary: temporary.write_bytes(plotted))
