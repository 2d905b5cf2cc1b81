"""What the tests of training share: a run of a linear layer, and the comparison of two runs bit for bit."""

import csv
import json
from pathlib import Path

import torch
from torch import nn

from sora_fast.training import checkpoint
from sora_fast.training.config import LoopConfig
from sora_fast.training.loop import Trainer

QUIET = dict(tensorboard=False, device="cpu", precision="fp32")


class Numbers:
    """Batches of one feature, whose place can be saved."""

    def __init__(self, size=4, seed=0):
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def next(self):
        return torch.randn(self.size, 3, generator=self.generator)

    def probe(self, copies):
        return torch.zeros(copies, 3), self.size

    def state_dict(self):
        return dict(generator=self.generator.get_state())

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def little(out, *, batches=None, loss=None, **settings):
    """A Trainer of a linear layer, with a frozen and an unused parameter beside it."""
    torch.manual_seed(0)
    frozen = nn.Linear(3, 1).requires_grad_(False)
    modules = nn.ModuleDict({"unused": nn.Linear(2, 2), "a": nn.Linear(3, 1), "frozen": frozen, "z": nn.Linear(1, 1)})

    def squared(batch, generator):
        noise = torch.randn(batch.shape[0], 1, generator=generator)
        error = modules["z"](modules["a"](batch)) + modules["frozen"](batch) - batch.sum(1, keepdim=True) + 0.1 * noise
        return error.square().mean(), dict(samples=batch.shape[0], tokens=3 * batch.shape[0], pad=1)

    config = LoopConfig(**dict(out=str(out), steps=10, warmup=0, log_every=1, **QUIET) | settings)
    return Trainer(config, modules, batches or Numbers(), loss or squared, dict(kind="little", model=dict(sizes=(3, 1))))


def rows_of(run):
    with open(Path(run) / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}


class Stop(Exception):
    pass


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
    timeless = lambda rows: [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]
    assert timeless(rows_of(one)) == timeless(rows_of(two))
