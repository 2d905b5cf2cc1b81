"""Settings of a training run; every field is a command-line flag and a YAML key of the same name."""

import math
from dataclasses import dataclass, field, fields

# How --help and --print-config order the settings; what is in none of these is about the run itself.
GROUPS = {
    "media and model": "data vae preset text_encoder frames crop short_side fps windows clips images image_share "
                       "latent_cache budget look_ahead memory_gb checkpointing",
    "objective": "objective prediction learn_sigma timesteps shift condition_dropout clean_frames reconstruction "
                 "regularisation kl codes perceptual perceptual_weight adversarial adversarial_start",
    "optimisation": "steps minutes lr warmup final_lr weight_decay clip accumulate ema precision parallel",
}


def option(default, help: str, choices: tuple = (), *, least: float = -math.inf, most: float = math.inf,
           fixed: bool = False, words: tuple = (), own: bool = False):
    """A dataclass field with its help text, its legal values or range, and whether a resumed run must keep it.

    ``words``: what a bool may be on the command line and in YAML besides; it is a bool by the time of the dataclass.
    ``own``: besides ``choices`` it may be the user's own, package.module:name.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most, "fixed": fixed,
                                            "words": words, "own": own})


@dataclass(frozen=True)
class LoopConfig:
    out: str = option("runs/run", "folder for checkpoints, losses.csv and TensorBoard events")
    steps: int = option(1000, "optimiser steps", least=1)
    minutes: float = option(0.0, "stop (schedule included) after this long even if steps are left; 0: no limit", least=0)
    lr: float = option(1e-3, "peak learning rate of AdamW", least=0)
    warmup: int = option(40, "steps of linear warm-up", least=0)
    final_lr: float = option(0.02, "learning rate at the end of the cosine, as a share of lr", least=0, most=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "gradient norm is clipped to this; 0: not clipped", least=0)
    accumulate: int = option(0, "packs (batches) of an optimiser step, over all processes together, each weighing "
                             "what it holds; 0: one for each process",
                             least=0)
    parallel: str = option("ddp", "with torchrun: ddp keeps everything in each process, fsdp (FSDP2) shards weights, "
                           "gradients, optimiser and average", ("ddp", "fsdp"))
    ema: float = option(0.999, "decay of the averaged weights", least=0, most=1)
    precision: str = option("auto", "autocast dtype; weights, optimiser and average stay float32; auto: bf16 where the "
                            "device is fast with it", ("auto", "bf16", "fp32"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int = option(0, "CPU threads; 0: PyTorch's choice", least=0)
    seed: int = option(0, "seed of weights, data order and noise", fixed=True)
    save_every: int = option(500, "steps between checkpoints; the last one is always saved", least=1)
    keep: int = option(2, "checkpoints kept", least=1)
    log_every: int = option(10, "steps between rows of losses.csv, whose loss is the mean of those steps", least=1)
    log_samples: bool = option(False, "write samples.csv too: which samples each step was made of, by pack and process")
    heldout: float = option(0.05, "share of the files (rounded down) that is never trained on, for heldout.csv", least=0,
                            most=0.9, fixed=True)
    heldout_every: int = option(500, "steps between rows of heldout.csv; the last step has one too", least=1)
    peak_tflops: float = option(0.0, "TFLOP/s of one device that MFU is a share of; 0: measured with a matrix product",
                                least=0)
    resume: bool = option(False, "go on from the newest checkpoint in out, with that run's settings where none are given; "
                          "auto: begin anew where there is no checkpoint", words=("auto",))
    tensorboard: bool = option(True, "write TensorBoard events too")

    def __post_init__(self):
        for each in fields(self):
            value, limits = getattr(self, each.name), each.metadata
            own = limits["own"] and ":" in str(value)
            if limits["choices"] and value not in limits["choices"] and not own:
                raise ValueError(f"{each.name}: expected one of {', '.join(c for c in limits['choices'] if c)}, got "
                                 f"{value!r}; choose one of them")
            if limits["words"] and not isinstance(value, bool):
                raise ValueError(f"{each.name}: expected True or False, got {value!r}; pass one of them, since only the "
                                 f"command line takes words")
            # Negated, so that nan is refused too.
            if not isinstance(value, (str, bool)) and not limits["least"] <= value <= limits["most"]:
                most = f" to {limits['most']:g}" if limits["most"] < math.inf else " or more"
                raise ValueError(f"{each.name}: expected {limits['least']:g}{most}, got {value:g}; change that setting")


@dataclass(frozen=True)
class VAETraining(LoopConfig):
    out: str = option("runs/vae", "folder for checkpoints, losses.csv and TensorBoard events")
    data: str = option("", "folder of clips and images (mp4, mov, webm, mkv, avi, gif, png, jpg, webp); needed")
    preset: str = option("tiny", "VideoVAE preset", ("tiny", "wan2.1"), fixed=True)
    steps: int = option(2000, "optimiser steps", least=1)
    lr: float = option(7e-4, "peak learning rate of AdamW", least=0)
    warmup: int = option(100, "steps of linear warm-up", least=0)
    ema: float = option(0.99, "decay of the averaged weights", least=0, most=1)
    frames: int = option(9, "frames of a training crop, 1 + time_factor * k", least=1)
    crop: int = option(64, "lines and columns of a training crop", least=1)
    clips: int = option(2, "clip crops in a batch of clips", least=1)
    images: int = option(6, "image crops in a batch of images", least=1)
    image_share: float = option(0.3, "share of batches that hold images", least=0, most=1)
    short_side: int = option(180, "clips and images are made this small before they are cropped, never larger", least=1)
    fps: float = option(0.0, "frames per second read from clips; 0: their own", least=0)
    reconstruction: str = option("l1", "error of the pixels", ("l1", "l2"), fixed=True)
    regularisation: str = option("kl", "of the latents: kl (a posterior near the unit normal) or vq (a codebook)",
                                 ("kl", "vq"), fixed=True)
    kl: float = option(1e-6, "weight of the posterior's KL, per number of the clip as the pixels' error is", least=0)
    codes: int = option(1024, "codes of the codebook, with vq", least=1, fixed=True)
    perceptual: str = option("", "package.module:function, called as f(reconstruction, video) -> (B,); default: none",
                             fixed=True)
    perceptual_weight: float = option(1.0, "weight of the perceptual function", least=0)
    adversarial: float = option(0.0, "weight of a patch discriminator, on top of its adaptive one; 0: none", least=0,
                                fixed=True)
    adversarial_start: int = option(1000, "step from which the discriminator takes part", least=0)
    memory_gb: float = option(4.0, "decoded frames kept in memory", least=0)


@dataclass(frozen=True)
class DiTTraining(LoopConfig):
    out: str = option("runs/dit", "folder for checkpoints, losses.csv and TensorBoard events")
    data: str = option("", "folder of clips and images (mp4, mov, webm, mkv, avi, gif, png, jpg, webp) with captions in "
                       ".txt or metadata.jsonl; needed")
    vae: str = option("runs/vae", "run folder of the trained VideoVAE")
    preset: str = option("tiny", "DiT preset; the paper's presets are built with text in place of classes", fixed=True)
    steps: int = option(2000, "optimiser steps", least=1)
    lr: float = option(1e-3, "peak learning rate of AdamW", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    budget: int = option(1024, "tokens of a pack; every pack is padded to it; 0: as many as the free memory holds", least=0)
    look_ahead: int = option(1000, "items the packer may choose among", least=1)
    frames: int = option(9, "most frames of a clip, 1 + time_factor * k", least=1, fixed=True)
    short_side: int = option(160, "short side of clips and images, never enlarged", least=1, fixed=True)
    fps: float = option(0.0, "frames per second read from clips; 0: their own", least=0, fixed=True)
    windows: int = option(4, "windows of each clip that are encoded, evenly spread", least=1, fixed=True)
    latent_cache: str = option("", "folder that keeps latents by file content for later runs, or none; default: latents in "
                               "the user's cache, ~/.cache/sora_fast")
    objective: str = option("flow", "flow matching, DDPM, or package.module:Class, an Objective of your own made without "
                            "arguments", ("flow", "ddpm"), fixed=True, own=True)
    prediction: str = option("", "x0 (clean patches), velocity or noise; default velocity for flow, noise for ddpm",
                             ("", "x0", "velocity", "noise"), fixed=True)
    learn_sigma: bool = option(False, "with ddpm: learn the variance of its steps too, as DiT does", fixed=True)
    timesteps: str = option("logit_normal", "distribution of flow matching's timesteps", ("logit_normal", "uniform"))
    shift: str = option("tokens", "shift of flow matching's timesteps: a number, or tokens (by token count)")
    condition_dropout: float = option(0.1, "share of samples trained without their caption, for guidance", least=0, most=1)
    clean_frames: float = option(0.25, "share of clips trained with some frames given clean (first, start, end or both "
                                 "ends, drawn), so that images and clips can be prompts", least=0, most=1)
    text_encoder: str = option("", "folder of a Hugging Face T5, mT5 or UMT5 encoder; default: bytes, trained along",
                               fixed=True)
    checkpointing: bool = option(False, "recompute blocks in the backward to save memory")
