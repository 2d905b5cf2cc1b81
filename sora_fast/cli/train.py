"""sora-fast train-vae and sora-fast train."""

import sys
from pathlib import Path
from shlex import quote

from ..training import distributed
from ..training.config import DiTTraining, VAETraining
from ..training.loop import Trainer, check_start
from .options import read_options


def _library(command: str, folder: str):
    from ..data import scan

    if not folder:
        raise ValueError(f"{command}: expected --data FOLDER of clips and images, got none; pass it")
    library = scan(folder, progress=sys.stderr.isatty() and distributed.first())
    print(library.summary(), flush=True)
    return library


def _announce(trainer: Trainer) -> None:
    """What is about to run."""
    from ..training import memory

    config, ranks = trainer.config, distributed.size()
    kinds = dict(ddp="with DDP", fsdp="sharded by FSDP2")
    if ranks > 1:
        print(f"{ranks} processes {kinds[config.parallel]} on {trainer.device.type}, {trainer.packs_per_step} packs a step",
              flush=True)
    if trainer.held_out is None and config.heldout:
        print(f"no file is held out, since {config.heldout:.0%} of them is less than one: raise --heldout for heldout.csv",
              flush=True)
    print(f"{memory.estimate(trainer)}; precision {config.precision}", flush=True)


@distributed.together()
def train_vae(arguments) -> int:
    config = read_options(arguments, VAETraining)
    with distributed.claimed(config.out):
        return _train_vae(config)


def _train_vae(config: VAETraining) -> int:
    from ..training import vae as task

    check_start(config)
    task.check_sizes(config)
    trainer = task.make_trainer(config, _library("train-vae", config.data).items)
    print(trainer.batches.summary(), flush=True)
    _announce(trainer)
    trainer.run()
    task.finish(trainer)
    print(f"wrote {trainer.run_folder / 'vae.safetensors'}; next: sora-fast train --vae {quote(config.out)} "
          f"--data {quote(config.data)}")
    return 0


@distributed.together()
def train(arguments) -> int:
    config = read_options(arguments, DiTTraining)
    with distributed.claimed(config.out):
        return _train(config)


def _train(config: DiTTraining) -> int:
    from ..training import dit as task
    from ..training.latents import load_library
    from ..training.vae import load_vae

    check_start(config)
    task.preset_config(config.preset)  # wrong settings are told before the media are read and encoded
    task.objective_of(config)
    latents, own_vae = Path(config.out) / "latents", Path(config.out) / "vae"
    vae = load_vae(str(own_vae) if config.resume and own_vae.is_dir() else config.vae, task.pick_device(config.device))
    step = vae.config.time_factor
    if (config.frames - 1) % step:
        low = (config.frames - 1) // step * step + 1
        raise ValueError(f"train: expected --frames of 1 + {step} k, which is what the VAE takes, got {config.frames}; the "
                         f"nearest are {low} or {low + step}")
    if config.resume and latents.with_suffix(".json").is_file():
        clips = load_library(latents)
        print(f"latents and VAE are those of {config.out}; --data and --vae are not read again", flush=True)
    else:
        clips = task.encode_media(config, vae, _library("train", config.data).items)
    vae.cpu()
    trainer = task.make_trainer(config, vae, clips)
    held = len(clips) - len(trainer.batches.clips)
    print(f"{len(trainer.batches.clips)} latent clips in packs of {trainer.config.budget:,} tokens, {held} held out",
          flush=True)
    _announce(trainer)
    trainer.run()
    print(f"trained {trainer.samples:,} samples; next: sora-fast generate {quote(config.out)} --prompt '...' --size "
          f"9x128x128")
    return 0
