"""What train-vae and train share: the media that are trained on, and what is said before it begins."""

import sys

from ..training import distributed, memory
from ..training.loop import Trainer


def library(command: str, folder: str):
    from ..data import scan

    if not folder:
        raise ValueError(f"{command}: expected --data FOLDER of clips and images, got none; pass it")
    found = scan(folder, progress=sys.stderr.isatty() and distributed.first())
    print(found.summary(), flush=True)
    return found


def announce(trainer: Trainer) -> None:
    """What is about to run."""
    config, ranks = trainer.config, distributed.size()
    kinds = dict(ddp="with DDP", fsdp="sharded by FSDP2")
    if ranks > 1:
        print(f"{ranks} processes {kinds[config.parallel]} on {trainer.device.type}, {trainer.packs_per_step} packs a step",
              flush=True)
    if trainer.held_out is None and config.heldout:
        print(f"no file is held out, since {config.heldout:.0%} of them is less than one: raise --heldout for heldout.csv",
              flush=True)
    print(f"{memory.estimate(trainer)}; precision {config.precision}", flush=True)
