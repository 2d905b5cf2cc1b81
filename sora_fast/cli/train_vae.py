"""sora-fast train-vae."""

from shlex import quote

from ..training.config import VAETraining
from .options import add_options, read_options

DESCRIPTION = """\
train a VideoVAE on a folder of clips and images

  sora-fast train-vae --data clips/ --out runs/vae
  sora-fast train-vae --data clips/ --out runs/vae --resume
  sora-fast train-vae --print-config > run.yaml && sora-fast train-vae --config run.yaml"""


def add_arguments(parser) -> None:
    add_options(parser, VAETraining)


def run(arguments) -> int:
    from ..training import distributed

    with distributed.together():
        config = read_options(arguments, VAETraining)
        with distributed.claimed(config.out):
            return _train(config)


def _train(config: VAETraining) -> int:
    from ..training import vae as task
    from ..training.loop import check_start
    from .before_training import announce, library

    check_start(config)
    task.check_sizes(config)
    trainer = task.make_trainer(config, library("train-vae", config.data).items)
    print(trainer.batches.summary(), flush=True)
    announce(trainer)
    trainer.run()
    task.finish(trainer)
    print(f"wrote {trainer.run_folder / 'vae.safetensors'}; next: sora-fast train --vae {quote(config.out)} "
          f"--data {quote(config.data)}")
    return 0
