"""What the tests of training share: a run of a linear layer, and the comparison of two runs bit for bit."""

import csv
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sora_fast.data import scan, write_image, write_video
from sora_fast.models import VideoVAE
from sora_fast.models.vae import PRESETS as VAE_PRESETS
from sora_fast.training import checkpoint
from sora_fast.training import dit as dit_task
from sora_fast.training import vae as vae_task
from sora_fast.training.config import DiTTraining, LoopConfig, VAETraining
from sora_fast.training.latents import LatentClip
from sora_fast.training.loop import Trainer

TIMES = ("seconds", "tokens_per_s", "mfu")
QUIET = dict(tensorboard=False, device="cpu", precision="fp32")
TINY = dict(**QUIET, warmup=2, log_every=1, peak_tflops=1.0)


@dataclass(frozen=True)
class Rows:
    """A batch of rows of three features, with noise once it is drawn."""

    values: torch.Tensor
    names: tuple[str, ...]
    noise: torch.Tensor | None = None

    @property
    def learned(self):
        return len(self.names)

    def only(self, index):
        part = slice(index, index + 1)
        return Rows(self.values[part], self.names[part], self.noise[part])


@dataclass(frozen=True)
class Count:
    number: int
    keys: tuple[str, ...]


class Numbers:
    """Batches of one feature, whose place can be saved; ``uneven``: of 1 to ``size`` rows in turn."""

    def __init__(self, size=4, seed=0, uneven=False):
        self.size, self.seed, self.number, self.uneven = size, seed, 0, uneven

    def next(self):
        size = 1 + self.number % self.size if self.uneven else self.size
        plan = Count(self.number, tuple(f"{self.number}.{i}" for i in range(size)))
        self.number += 1
        return plan

    def load(self, plan):
        values = torch.randn(len(plan.keys), 3, generator=checkpoint.generator(self.seed, "numbers", plan.number))
        return Rows(values, plan.keys)

    def probe(self, copies):
        return Rows(torch.zeros(copies, 3), ("",) * copies), self.size

    def state_dict(self):
        return dict(number=self.number)

    def load_state_dict(self, state):
        self.number = state["number"]


def with_noise(batch, generator):
    return replace(batch, noise=torch.randn(len(batch.names), 1, generator=generator))


def little(out, *, batches=None, loss=None, **settings):
    """A Trainer of a linear layer, with a frozen and an unused parameter beside it."""
    torch.manual_seed(0)
    frozen = nn.Linear(3, 1).requires_grad_(False)
    modules = nn.ModuleDict({"unused": nn.Linear(2, 2), "a": nn.Linear(3, 1), "frozen": frozen, "z": nn.Linear(1, 1)})

    def squared(batch):
        sums = batch.values.sum(1, keepdim=True)
        error = modules["z"](modules["a"](batch.values)) + modules["frozen"](batch.values) - sums + 0.1 * batch.noise
        return error.square().mean(), dict(samples=len(batch.names), tokens=3 * len(batch.names), pad=1)

    config = LoopConfig(**dict(out=str(out), steps=10, warmup=0, log_every=1, peak_tflops=1.0, **QUIET) | settings)
    return Trainer(config, modules, batches or Numbers(), with_noise, loss or squared,
                   dict(kind="little", model=dict(sizes=(3, 1))))


@contextmanager
def smaller(presets, **changes):
    """The preset "tiny" of a model made smaller."""
    before, presets["tiny"] = presets["tiny"], replace(presets["tiny"], **changes)
    try:
        yield
    finally:
        presets["tiny"] = before


def tiny_dit(out, clips, **settings):
    """A Trainer of a DiT of two blocks on latent ``clips``."""
    config = DiTTraining(**dict(out=str(out), budget=40, look_ahead=6, **TINY) | settings)
    with smaller(dit_task.PRESETS, width=48, depth=2, heads=2, rope_axes=(8, 8, 8)):
        return dit_task.make_trainer(config, VideoVAE.preset("tiny", width=4), clips)


def latent_clips():
    """Latents of three sizes with captions."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4, 6), (1, 6, 6), (2, 4, 4), (1, 4, 8)]
    return [LatentClip(torch.randn(16, *size, generator=generator), f"caption {i}", f"{i}.mp4", 0, 4 * size[0] - 3, 8.0)
            for i, size in enumerate(sizes)]


def tiny_vae(out, media, **settings):
    """A Trainer of the tiny VAE on crops of a folder."""
    config = VAETraining(**dict(out=str(out), crop=32, frames=5, clips=2, images=2, short_side=48, **TINY) | settings)
    with smaller(VAE_PRESETS, width=8):
        return vae_task.make_trainer(config, scan(media, progress=False).items)


def write_media(folder):
    """Three clips and two images of different sizes, with captions."""
    ramp = torch.linspace(0, 255, 64)
    for index, (frames, height, width) in enumerate([(9, 48, 64), (13, 64, 48), (5, 48, 48)]):
        moving = torch.stack([(ramp[None, :width] + 8 * t + 40 * index).remainder(256).expand(height, width)
                              for t in range(frames)])
        write_video(folder / f"clip{index}.mp4", moving.to(torch.uint8)[..., None].repeat(1, 1, 1, 3), 8)
        (folder / f"clip{index}.txt").write_text(f"stripes {index}")
    for index, (height, width) in enumerate([(48, 80), (64, 64)]):
        picture = (ramp[:height, None].expand(height, width)).to(torch.uint8)[..., None].repeat(1, 1, 3)
        write_image(folder / f"image{index}.png", picture)
    return folder


def rows_of(run):
    with open(Path(run) / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}


class Stop(Exception):
    pass


def step_of(trainer):
    """(loss, gradients) of one step, before the optimiser takes them."""
    found, step = {}, trainer.optimizer.step

    def spy():
        found.update({name: p.grad.detach().clone() for name, p in trainer.parameters.items()})
        step()

    trainer.optimizer.step = spy
    loss, _ = trainer._one_step()
    trainer.optimizer.step = step
    return loss, found


def stop_at(step):
    def on_log(row):
        if row["step"] == step:
            raise Stop
    return on_log


def same_files(one: Path, two: Path):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            a, b = checkpoint.load_tensors(one / name), checkpoint.load_tensors(two / name)
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]), (name, key)
        else:
            a, b = json.loads((one / name).read_text()), json.loads((two / name).read_text())
            for timing in ("seconds", "warm_seconds"):
                a.pop(timing), b.pop(timing)
            a["window"].pop("seconds"), b["window"].pop("seconds")
            assert a == b


def same_rows(one, two):
    timeless = lambda rows: [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    assert timeless(rows_of(one)) == timeless(rows_of(two))
