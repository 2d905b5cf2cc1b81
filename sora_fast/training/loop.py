"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, EMA, held-out loss, checkpoints, resume, Ctrl-C.

A step is made of a number of packs (batches), numbered through the run. Each has random numbers of its own, from the seed
and its number, and every rank plans all packs and computes its share: so a step is the same step after a resume, and on any
number of ranks up to the order of a sum. Its loss and gradient are means over what is learned in it: a pack weighs as much
as it holds, whichever packs and ranks the samples are in.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..files import check_folder
from ..precision import emulated_on_cpu
from ..progress import Progress
from . import checkpoint, culprits, distributed, heldout, throughput
from .config import LoopConfig
from .interrupt import finish_on_interrupt
from .logs import Events, Table

# Numbers of a run that state.json holds beside what batches know.
COUNTERS = ("step", "packs_per_step", "samples", "tokens", "pad", "seconds", "warm_seconds", "losses", "window",
            "flops_per_token")


class Plan(Protocol):
    """What a batch will hold: ``number`` in the run, from 0 on, and a key of each sample."""

    number: int
    keys: Sequence[str]


class Batch(Protocol):
    """A batch with all that was drawn for it: loss(batch) is a function of it and of the weights."""

    names: Sequence[str]  # of each sample, for people
    learned: int  # elements that its loss is a mean over: its weight in a step

    def only(self, index: int) -> "Batch": ...


class Batches(Protocol):
    """An endless source of batches whose place can be saved."""

    def next(self) -> Plan: ...
    def load(self, plan: Plan) -> object: ...
    def probe(self, copies: int) -> tuple[object, float]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Trainer:
    """One run, of one process or of several.

    Args:
        config: a LoopConfig.
        modules: what is trained; parameters without requires_grad stay as they are.
        batches: where batches come from.
        draw: ``draw(loaded, generator) -> Batch``: adds the random numbers, from a CPU generator of this batch's own.
        loss: ``loss(batch) -> (loss, counts)``; counts has ``samples``, ``tokens`` and ``pad`` (tokens of tail).
        description: what rebuilds the model; saved beside the weights, with the settings, as config.json.
        units: submodules that FSDP2 gathers one at a time; see ``distributed.Step``.
        held_out: gives (name, batch) of what is kept from training, the same at every call; heldout.csv has a column for
            each name.
    """

    def __init__(self, config: LoopConfig, modules: nn.ModuleDict, batches: Batches, draw: Callable, loss: Callable,
                 description: dict, *, units: Sequence[nn.Module] = (),
                 held_out: Callable[[], Iterable[tuple[str, Batch]]] | None = None):
        self.device = distributed.own_device(config.device)
        config = replace(config, precision=throughput.pick_precision(config.precision, self.device))
        self.config, self.modules, self.batches, self.draw, self.loss = config, modules, batches, draw, loss
        self.held_out = held_out
        self.run_folder = Path(config.out)
        self.step, self.samples, self.tokens, self.pad, self.seconds = 0, 0, 0, 0, 0.0
        self.packs_per_step = config.accumulate or distributed.size()
        self.flops_per_token, self.since = 0.0, time.perf_counter()
        self.warm_seconds = 0.0  # of training, when the warm-up ended
        self.losses: list[float] = []  # since the last row
        self.window = dict(tokens=0, seconds=0.0)  # since the last row
        check_start(config)
        if config.resume:
            check_same_model(self.run_folder, description)
            saved = checkpoint.newest(self.run_folder)
            modules.load_state_dict(checkpoint.load_tensors(saved / "model.safetensors"))
        self.plain = distributed.Step(modules, lambda batch: self.loss(batch), units)
        self.wrapped = distributed.wrap(self.plain, config.parallel, self.device)
        self.parameters = {n: p for n, p in modules.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        if config.resume:
            self._load(saved)
        if self.packs_per_step % distributed.size():
            ranks = distributed.size()
            raise ValueError(f"--accumulate: expected a multiple of the {ranks} processes, since it counts the packs of a "
                             f"step over all of them, got {self.packs_per_step}; pass {ranks}, or 0 for one each")
        quiet = not distributed.first()
        self.events = Events(self.run_folder, 0, wanted=False)  # until run()
        self.tables = {name: Table(self.run_folder / f"{name}.csv", quiet) for name in ("losses", "heldout", "samples")}
        with distributed.claimed(self.run_folder):
            if not quiet:
                checkpoint.save_json(self.run_folder / "config.json", description | {"training": asdict(config)})
            rows = {name: table.begin(self.step) for name, table in self.tables.items()}
        self.rows = [{k: int(v) if k in ("step", "samples", "tokens") else float(v) for k, v in row.items()}
                     for row in rows["losses"]]
        self.held_out_rows = [{k: int(v) if k == "step" else float(v) for k, v in row.items()} for row in rows["heldout"]]

    # ------------------------------------------------------------------------------------------------ the loop
    def progress_share(self, since_step: int = 0, since_seconds: float = 0.0) -> float:
        """How much of the run is done (after ``since_...``), by steps or by minutes, whichever is further."""
        share = (self.step - since_step) / max(self.config.steps - since_step, 1)
        if self.config.minutes:
            limit = 60 * self.config.minutes - since_seconds
            share = max(share, (self.seconds - since_seconds) / limit if limit > 0 else 1.0)
        return min(share, 1.0)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine over what the run has left."""
        c = self.config
        if self.step < c.warmup:
            return c.lr * (self.step + 1) / c.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress_share(c.warmup, self.warm_seconds)))
        return c.lr * (c.final_lr + (1 - c.final_lr) * cosine)

    def run(self, on_log: Callable[[dict], None] | None = None) -> None:
        """Train to the end and save; Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.

        ``on_log`` gets every row of losses.csv. The run folder is claimed: a second run in it is refused.
        """
        with distributed.claimed(self.run_folder):
            self._run(on_log)

    def _run(self, on_log: Callable[[dict], None] | None) -> None:
        if self.progress_share() >= 1.0:
            print(f"{self.run_folder}: already trained to step {self.step:,}; raise --steps or --minutes to go on",
                  flush=True)
        writes = distributed.first()
        if writes and self.device.type == "cpu" and self.config.precision == "bf16" and emulated_on_cpu(torch.bfloat16):
            print("this CPU has no bfloat16: --precision fp32 is several times faster", flush=True)
        self.events = Events(self.run_folder / "tensorboard", self.step, self.config.tensorboard and writes)
        progress, text = Progress(self.run_folder.name, self.config.steps, self.step, quiet=not writes), ""
        self.since, stop = time.perf_counter(), False
        try:
            with finish_on_interrupt() as interrupted:
                while self.progress_share() < 1.0 and not stop:
                    value, stop = self._one_step(interrupted)
                    if self.step == self.config.warmup:
                        self.warm_seconds = self.seconds
                    self.losses.append(value)
                    done = self.progress_share() >= 1.0
                    if self.step % self.config.log_every == 0 or done:
                        row = self._log()
                        text = self._describe(row)
                        if on_log:
                            on_log(row)
                    progress.update(self.step, text, last=done)
                    if self.held_out and (self.step % self.config.heldout_every == 0 or done):
                        self.evaluate()
                    if self.step % self.config.save_every == 0 and not done:
                        self.save()
                saved = self.save()
        finally:
            progress.close()
            self.events.close()
        if stop:
            print(f"interrupted: saved {saved}; go on with the same command and --resume", flush=True)
            raise KeyboardInterrupt

    def autocast(self):
        """The context that losses are computed in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def drawn(self, plan: Plan) -> Batch:
        """The batch of a plan with its random numbers; PyTorch's own generators are set too, for what layers draw."""
        return self.draw(self.batches.load(plan), self._seeded(plan))

    def _seeded(self, plan: Plan) -> torch.Generator:
        """A batch's own generator; PyTorch's begin anew with its seed."""
        generator = checkpoint.generator(self.config.seed, "batch", plan.number)
        torch.manual_seed(generator.initial_seed())
        return generator

    def _one_step(self, interrupted: threading.Event | None = None) -> tuple[float, bool]:
        """The step's loss, and whether a rank was asked to stop."""
        began = time.perf_counter()
        plans = [self.batches.next() for _ in range(self.packs_per_step)]
        own = distributed.share(plans)
        batches = [self.drawn(plan) for plan in own]  # all of them first: a pack's weight is its share of the whole step
        learned = max(distributed.sum_of(sum(batch.learned for batch in batches))[0], 1)
        totals, mean = dict(samples=0, tokens=0, pad=0), 0.0
        for place, (plan, batch) in enumerate(zip(own, batches, strict=True)):
            self._seeded(plan)  # what layers draw is the batch's own too
            with distributed.no_exchange(self.wrapped, last=place == len(own) - 1):
                # times the ranks, since DDP and FSDP2 average gradients over them
                loss, counts = self._backward(batch, batch.learned * distributed.size() / learned)
            mean = mean + loss.detach() * (batch.learned / learned)
            totals = {name: totals[name] + counts[name] for name in totals}
        for parameter in self.parameters.values():
            if parameter.grad is None:  # unused in this step: 0, as on several ranks, where one may have used it
                parameter.grad = torch.zeros_like(parameter.detach())
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        norm = float(distributed.whole(nn.utils.get_total_norm(gradients.values())))
        # Rank 0's clock is everybody's: schedules by minutes must agree.
        now, clock = time.perf_counter(), float(distributed.first())
        asked = interrupted is not None and interrupted.is_set()
        mean, asked, alone, took, worked, *totals = distributed.sum_of(
            float(mean), asked, distributed.orphaned(), clock * (now - self.since),
            clock * (now - began), *totals.values())
        if alone:
            sys.exit("sora-fast: torchrun was killed: training stops here, without saving")
        self.since = now
        samples, tokens, pad = map(int, totals)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise FloatingPointError(culprits.sentence(self, mean, norm, plans))
        if 0 < self.config.clip < norm:
            torch._foreach_mul_(distributed.locals_of(gradients), self.config.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # The average follows closely at first, so that short runs do not average in their start.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(distributed.locals_of(self.ema), distributed.locals_of(self.parameters), 1 - decay)
        if self.config.log_samples:
            self.tables["samples"].append([dict(step=self.step, pack=plan.number, rank=place % distributed.size(),
                                                samples=" ".join(plan.keys)) for place, plan in enumerate(plans)])
        self.samples, self.tokens, self.pad = self.samples + samples, self.tokens + tokens, self.pad + pad
        self.seconds += took
        self.window = dict(tokens=self.window["tokens"] + tokens, seconds=self.window["seconds"] + worked)
        return mean, bool(asked)

    def _backward(self, batch: Batch, share: float) -> tuple[torch.Tensor, dict]:
        """Loss and counts of a batch; ``share`` of its gradient is added. The run's first also counts its FLOPs."""
        found = []

        def compute():
            with self.autocast():
                found[:] = self.wrapped(batch)
            return found[0] * share

        if self.flops_per_token or not distributed.first():
            compute().backward()
        else:
            _, flops = throughput.count(compute, self.plain.units if getattr(self.config, "checkpointing", False) else ())
            self.flops_per_token = flops / max(found[1]["tokens"] + found[1]["pad"], 1)
        return found[0], found[1]

    # ------------------------------------------------------------------------------------------------ telling
    def _log(self) -> dict:
        rate = self.window["tokens"] / max(self.window["seconds"], 1e-9)
        row = dict(step=self.step, samples=self.samples, tokens=self.tokens, loss=sum(self.losses) / len(self.losses),
                   lr=self.optimizer.param_groups[0]["lr"], tokens_per_s=rate,
                   mfu=self.flops_per_token * rate / self._peak(),
                   pad_share=self.pad / max(self.tokens + self.pad, 1), seconds=self.seconds)
        self.losses, self.window = [], dict(tokens=0, seconds=0.0)
        self.rows.append(row)
        self.tables["losses"].append([row])
        self.events.add(self.step, {name: row[name] for name in ("loss", "lr", "tokens_per_s", "mfu", "pad_share")})
        return row

    def _peak(self) -> float:
        """FLOPs a second that all devices of the run could do."""
        if not distributed.first():
            return math.inf
        one = self.config.peak_tflops * 1e12 or throughput.peak(self.device, self.config.precision,
                                                                torch.get_num_threads())
        return one * distributed.size()

    def _describe(self, row: dict) -> str:
        left = self.seconds * (1 - self.progress_share()) / max(self.progress_share(), 1e-9)
        return (f"loss {row['loss']:.4f}, {self.samples:,} samples, {self.tokens:,} tokens, "
                f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}, pad {row['pad_share']:.1%}, "
                f"{left / 60:.1f} min left")

    def evaluate(self) -> dict:
        """The row of heldout.csv for this step, written and told; all ranks must call it."""
        row = heldout.evaluate(self)
        self.held_out_rows.append(row)
        self.tables["heldout"].append([row])
        self.events.add(self.step, {f"heldout/{name}": value for name, value in row.items() if name != "step"})
        print(f"{self.run_folder.name} {self.step:,}/{self.config.steps:,}: {heldout.sentence(row)}", flush=True)
        if distributed.first():
            heldout.plot(self.run_folder / "heldout.png", self.held_out_rows)
        return row

    # ------------------------------------------------------------------------------------------------ saving
    def save(self) -> Path:
        """Write a checkpoint of this step; nothing to do where it was loaded from that very step.

        All ranks must call it. It holds whole tensors: any number of ranks, of either kind, goes on from it.
        """
        folder = checkpoint.folder_of(self.run_folder, self.step)
        there = distributed.sum_of(distributed.first() and folder in checkpoint.everything(self.run_folder))[0]
        if there:
            return folder
        tensor = lambda value: value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
        moments = {f"{name}/{key}": tensor(value) for name, parameter in self.parameters.items()
                   for key, value in self.optimizer.state.get(parameter, {}).items()}
        gathered = distributed.gathered
        model = self.modules.state_dict()
        tensors = dict(model=gathered(model), ema=gathered(model | self.ema), optimizer=gathered(moments))
        if distributed.first():
            state = {name: getattr(self, name) for name in COUNTERS}
            checkpoint.write(self.run_folder, self.step, tensors, state | {"batches": self.batches.state_dict()},
                             self.config.keep)
        return folder

    def _load(self, folder: Path) -> None:
        """Everything of a checkpoint but the weights."""
        ema = checkpoint.load_tensors(folder / "ema.safetensors")
        for name, value in self.ema.items():
            value.copy_(distributed.like(ema[name], value))
        places = {name: place for place, name in enumerate(self.parameters)}
        state: dict[int, dict] = {}
        for key, value in checkpoint.load_tensors(folder / "optimizer.safetensors").items():
            name, _, moment = key.rpartition("/")
            value = value if moment == "step" else distributed.like(value, self.parameters[name])
            state.setdefault(places[name], {})[moment] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        numbers = checkpoint.load_json(folder / "state.json")
        missing = [name for name in (*COUNTERS, "batches") if name not in numbers]
        if missing:
            raise ValueError(f"--resume: expected {folder} to hold {', '.join(missing)}, got a checkpoint of an older "
                             f"version; begin another run with another --out")
        self.batches.load_state_dict(numbers["batches"])
        for name in COUNTERS:
            setattr(self, name, numbers[name])
        if self.config.accumulate:
            self.packs_per_step = self.config.accumulate
        elif self.packs_per_step % distributed.size():
            before, ranks = self.packs_per_step, distributed.size()
            self.packs_per_step = -(-before // ranks) * ranks
            print(f"a step is now of {self.packs_per_step} packs, and was of {before} before: {ranks} processes share it",
                  flush=True)


def check_start(config: LoopConfig) -> None:
    """One sentence where a run may not begin in config.out, or not go on with these settings; before any work."""
    run = Path(config.out)
    check_folder("--out", run)
    found = checkpoint.everything(run)
    if not config.resume:
        if found:
            raise FileExistsError(f"{run}: expected an empty run folder, got one with checkpoints; pass --resume to go on, "
                                  f"or another --out")
        return
    if not found:
        raise FileNotFoundError(f"--resume: expected a run folder with a checkpoint in checkpoints/, got none in {run}; "
                                f"train first, or pass --resume auto, which begins anew where there is none")
    before = checkpoint.load_json(run / "config.json").get("training", {})
    for each in fields(config):
        value = getattr(config, each.name)
        if each.metadata["fixed"] and each.name in before and before[each.name] != value:
            raise ValueError(f"--resume: expected {each.name} {before[each.name]!r}, as {run} began with, got {value!r}; "
                             f"leave it out, or begin another run with another --out")


def check_same_model(run: Path, description: dict) -> None:
    """One sentence where the weights in ``run`` are those of another model."""
    saved = checkpoint.load_json(run / "config.json")
    if saved.get("kind") != description.get("kind"):
        raise ValueError(f"--resume: expected {run} to hold a run of kind {description.get('kind')!r}, got "
                         f"{saved.get('kind')!r}; pass that run's own folder as --out")
    for part, value in checkpoint.plain(description).items():
        if saved.get(part) != value:
            raise ValueError(f"--resume: expected the model that {run} began with ({part}: {saved.get(part)}), got {value}; "
                             f"begin another run with another --out")
