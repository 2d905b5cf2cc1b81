"""What tests/test_distributed.py runs under torchrun, in each process: distributed_runs.py FOLDER, or a command of ours."""

import json
import math
import sys
from pathlib import Path

import pytest
from training_checks import Numbers, Stop, latent_clips, little, stop_at, tiny_dit, tiny_vae

from sora_fast.cli.__main__ import main as command_line
from sora_fast.training import distributed
from sora_fast.training import vae as vae_task

STEPS = dict(steps=4, save_every=2, accumulate=2, warmup=2, log_samples=True)


def uneven(trainer):
    """Packs of 1 to 4 rows, and only every second uses the layer z: in one step one rank does and the other does not."""
    a, z = trainer.modules["a"], trainer.modules["z"]

    def loss(batch):
        odd = int(batch.names[0].partition(".")[0]) % 2
        made = a(batch.values) if odd else z(a(batch.values))
        error = made - batch.values.sum(1, keepdim=True) + 0.1 * batch.noise
        return error.square().mean(), dict(samples=len(batch.names), tokens=3 * len(batch.names), pad=1)

    trainer.loss = loss
    return trainer


def runs(root: Path):
    """name -> (out, **settings) -> Trainer, of each task."""
    of_vae = dict(image_share=0.5, heldout=0.2)
    return {
        "little": lambda out, **more: uneven(little(out, batches=Numbers(uneven=True),
                                                        **STEPS | dict(accumulate=4, weight_decay=0.1) | more)),
        "dit": lambda out, **more: tiny_dit(out, latent_clips(), **STEPS | dict(heldout=0.25, heldout_every=2) | more),
        "vae": lambda out, **more: tiny_vae(out, root / "media", **STEPS | of_vae | more),
        "adversary": lambda out, **more: tiny_vae(out, root / "media", adversarial=0.5, adversarial_start=1,
                                                  **STEPS | of_vae | more),
    }


def nan_at(trainer, name: str):
    """From the batch on that holds the sample ``name``, its loss is nan."""
    loss = trainer.loss
    trainer.loss = lambda batch: (loss(batch)[0] * (math.nan if name in batch.names else 1), loss(batch)[1])
    return trainer


@distributed.together()
def main(root: Path):
    rank, said = distributed.rank(), {}
    for kind in ("ddp", "fsdp"):
        for name, make in runs(root).items():
            make(root / f"{name}-{kind}", parallel=kind).run()
        # Half of a run here and half alone, and the other way round.
        with pytest.raises(Stop):
            runs(root)["dit"](root / f"dit-{kind}-alone", parallel=kind).run(stop_at(3))
        runs(root)["dit"](root / f"dit-alone-{kind}", parallel=kind, resume=True).run()
        with pytest.raises(FloatingPointError) as stopped:
            nan_at(little(root / f"nan-{kind}", parallel=kind, **STEPS), "5.2").run()
        said[f"nan-{kind}"] = str(stopped.value)
    with pytest.raises(ValueError) as stopped:
        little(root / "odd", accumulate=3)
    said["odd"] = str(stopped.value)
    raised = little(root / "raised", resume=True, steps=2)  # of one process and one pack a step
    raised.run()
    said["raised"] = raised.packs_per_step
    (root / f"said-{rank}.json").write_text(json.dumps(said))
    print("rank 0 alone says this")


def fail(arguments):
    """The command line, where rank 1 cannot read its third batch."""
    load = vae_task.CropBatches.load

    def reads(self, plan):
        if plan.number == 5 and distributed.rank() == 1:
            raise OSError("the disk of rank 1 is gone")
        return load(self, plan)

    vae_task.CropBatches.load = reads
    command_line(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else fail(sys.argv[1:])
