"""Settings of a training run; every field is a command-line flag and a YAML key of the same name."""

from dataclasses import dataclass, field


def option(default, help: str, choices: tuple = ()):
    """A dataclass field with its help text and, where given, its legal values."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class LoopConfig:
    out: str = option("runs/run", "folder for checkpoints, losses.csv and TensorBoard events")
    steps: int = option(1000, "optimiser steps")
    minutes: float = option(0.0, "stop (schedule included) after this long even if steps are left; 0: no limit")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    warmup: int = option(40, "steps of linear warm-up")
    final_lr: float = option(0.02, "learning rate at the end of the cosine, as a share of lr")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    clip: float = option(1.0, "gradient norm is clipped to this; 0: not clipped")
    accumulate: int = option(1, "batches whose gradients are summed before each step")
    ema: float = option(0.999, "decay of the averaged weights")
    precision: str = option("bf16", "autocast dtype; weights, optimiser and average stay float32", ("bf16", "fp32"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int = option(0, "CPU threads; 0: PyTorch's choice")
    seed: int = option(0, "seed of weights, data order and noise")
    save_every: int = option(500, "steps between checkpoints; the last one is always saved")
    keep: int = option(2, "checkpoints kept")
    log_every: int = option(10, "steps between rows of losses.csv")
    resume: bool = option(False, "go on from the newest checkpoint in out")
    tensorboard: bool = option(True, "write TensorBoard events too")

    def __post_init__(self):
        for name in ("steps", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}; pass a larger number")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision: expected bf16 or fp32, got {self.precision}; choose one of them")


@dataclass(frozen=True)
class VAETraining(LoopConfig):
    out: str = option("runs/vae", "folder for checkpoints, losses.csv and TensorBoard events")
    data: str = option("", "folder of mp4, webm, gif, png and jpg files")
    preset: str = option("tiny", "VideoVAE preset", ("tiny", "wan2.1"))
    steps: int = option(2000, "optimiser steps")
    lr: float = option(1.5e-3, "peak learning rate of AdamW")
    ema: float = option(0.99, "decay of the averaged weights")
    frames: int = option(9, "frames of a training crop, 1 + time_factor * k")
    crop: int = option(64, "lines and columns of a training crop")
    clips: int = option(2, "clip crops in a batch of clips")
    images: int = option(6, "image crops in a batch of images")
    image_share: float = option(0.3, "share of batches that hold images")
    short_side: int = option(180, "clips and images are made this small before they are cropped, never larger")
    fps: float = option(0.0, "frames per second read from clips; 0: their own")
    kl: float = option(1e-6, "weight of the KL term (per element of the clip)")
    memory_gb: float = option(4.0, "decoded frames kept in memory")


@dataclass(frozen=True)
class DiTTraining(LoopConfig):
    out: str = option("runs/dit", "folder for checkpoints, losses.csv and TensorBoard events")
    data: str = option("", "folder of mp4, webm, gif, png and jpg files with captions in .txt or metadata.jsonl")
    vae: str = option("runs/vae", "run folder of the trained VideoVAE")
    preset: str = option("tiny", "DiT preset; the paper's presets are built with text in place of classes")
    steps: int = option(2000, "optimiser steps")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    budget: int = option(1024, "tokens of a pack (of one optimiser step, times accumulate)")
    look_ahead: int = option(1000, "items the packer may choose among")
    frames: int = option(9, "most frames of a clip, 1 + time_factor * k")
    short_side: int = option(160, "short side of clips and images, never enlarged")
    fps: float = option(0.0, "frames per second read from clips; 0: their own")
    windows: int = option(4, "windows of each clip that are encoded, evenly spread")
    objective: str = option("flow", "flow matching or DDPM", ("flow", "ddpm"))
    prediction: str = option("", "x0 (clean patches), velocity or noise; default velocity for flow, noise for ddpm",
                             ("", "x0", "velocity", "noise"))
    timesteps: str = option("logit_normal", "distribution of flow matching's timesteps", ("logit_normal", "uniform"))
    shift: str = option("tokens", "shift of flow matching's timesteps: a number, or tokens (by token count)")
    condition_dropout: float = option(0.1, "share of samples trained without their caption, for guidance")
    text_encoder: str = option("", "folder of a Hugging Face T5, mT5 or UMT5 encoder; default: bytes, trained along")
    checkpointing: bool = option(False, "recompute blocks in the backward to save memory")
