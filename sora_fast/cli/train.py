"""sora-fast train."""

from pathlib import Path
from shlex import quote

from ..training.config import DiTTraining
from .options import add_options, read_options

DESCRIPTION = """\
train a text-conditioned DiT on packs of clips and images of any size

  sora-fast train --data clips/ --vae runs/vae --out runs/dit
  sora-fast train --data clips/ --vae runs/vae --out runs/dit --resume
  sora-fast train --print-config > run.yaml && sora-fast train --config run.yaml
  torchrun --nproc-per-node 8 -m sora_fast.cli train --config run.yaml --parallel fsdp"""


def add_arguments(parser) -> None:
    add_options(parser, DiTTraining)


def run(arguments) -> int:
    from ..training import distributed

    with distributed.together():
        config = read_options(arguments, DiTTraining)
        with distributed.claimed(config.out):
            return _train(config)


def _train(config: DiTTraining) -> int:
    from ..training import dit as task
    from ..training.distributed import own_device
    from ..training.latents import load_library
    from ..training.loop import check_start
    from ..training.vae import load_vae
    from .before_training import announce, library

    check_start(config)
    task.preset_config(config.preset)  # wrong settings are told before the media are read and encoded
    task.objective_of(config)
    latents, own_vae = Path(config.out) / "latents", Path(config.out) / "vae"
    vae = load_vae(str(own_vae) if config.resume and own_vae.is_dir() else config.vae, own_device(config.device))
    step = vae.config.time_factor
    if (config.frames - 1) % step:
        low = (config.frames - 1) // step * step + 1
        raise ValueError(f"train: expected --frames of 1 + {step} k, which is what the VAE takes, got {config.frames}; the "
                         f"nearest are {low} or {low + step}")
    if config.resume and latents.with_suffix(".json").is_file():
        clips = load_library(latents)
        print(f"latents and VAE are those of {config.out}; --data and --vae are not read again", flush=True)
    else:
        clips = task.encode_media(config, vae, library("train", config.data).items)
    vae.cpu()
    trainer = task.make_trainer(config, vae, clips)
    held = len(clips) - len(trainer.batches.clips)
    print(f"{len(trainer.batches.clips)} latent clips in packs of {trainer.config.budget:,} tokens, {held} held out",
          flush=True)
    announce(trainer)
    trainer.run()
    print(f"trained {trainer.samples:,} samples; next: sora-fast generate {quote(config.out)} --prompt '...' --size "
          f"9x128x128")
    return 0
