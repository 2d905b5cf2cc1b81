"""sora-fast train-vae and sora-fast train."""

from pathlib import Path

from ..training.config import DiTTraining, VAETraining
from .options import read_options


def _library(command: str, folder: str):
    from ..data import scan

    if not folder:
        raise ValueError(f"{command}: expected --data FOLDER with mp4, webm, gif, png or jpg files, got none; pass it")
    library = scan(folder)
    print(library.summary(), flush=True)
    return library


def train_vae(arguments) -> int:
    from ..training import memory
    from ..training import vae as task

    config = read_options(arguments, VAETraining)
    trainer = task.make_trainer(config, _library("train-vae", config.data).items)
    print(memory.estimate(trainer), flush=True)
    trainer.run()
    task.finish(trainer)
    print(f"wrote {trainer.run_folder / 'vae.safetensors'}; next: sora-fast train --vae {config.out} --data {config.data}")
    return 0


def train(arguments) -> int:
    from ..training import dit as task
    from ..training import memory
    from ..training.latents import load_library
    from ..training.vae import load_vae

    config = read_options(arguments, DiTTraining)
    library = _library("train", config.data)
    vae = load_vae(config.vae, task.pick_device(config.device))
    latents = Path(config.out) / "latents"
    if config.resume and latents.with_suffix(".json").is_file():
        clips = load_library(latents)
    else:
        clips = task.encode_media(config, vae, library.items)
    trainer = task.make_trainer(config, vae, clips)
    print(f"{len(clips)} latent clips in packs of {config.budget:,} tokens", flush=True)
    print(memory.estimate(trainer), flush=True)
    trainer.run()
    print(f"trained {trainer.samples:,} samples; next: sora-fast generate {config.out} --prompt '...' --size 9x128x128")
    return 0
