"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, EMA, logs, checkpoints, resume, Ctrl-C."""

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from . import checkpoint
from .config import LoopConfig
from .progress import Progress

# Numbers of a run that state.json holds beside what batches know.
COUNTERS = ("step", "samples", "tokens", "pad", "seconds", "warm_seconds", "losses", "window")


class Batches(Protocol):
    """An endless source of batches whose place can be saved."""

    def next(self) -> object: ...
    def probe(self, copies: int) -> tuple[object, float]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


def pick_device(name: str) -> torch.device:
    """The device of that name, "auto" for a GPU where there is one; one sentence where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, no such GPU, a build without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device: expected auto, cpu, cuda or another device of this machine, got {name!r} ({reason}); "
                         f"sora-fast info shows what there is") from error
    return device


@contextmanager
def finish_on_interrupt():
    """Ctrl-C inside sets the yielded event, so that the step at hand is finished; a second Ctrl-C stops at once.

    Only the main thread may set handlers, and whoever has set another one (or ignores Ctrl-C) keeps it.
    """
    asked = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return

    def once(signum, frame):
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """One run.

    Args:
        config: a LoopConfig.
        modules: what is trained; parameters without requires_grad stay as they are.
        batches: where batches come from.
        loss: ``loss(batch, generator) -> (loss, counts)``; counts has ``samples``, ``tokens`` and ``pad`` (tokens of
            tail) of the batch. ``generator`` is a CPU generator whose state is in the checkpoint.
        description: what rebuilds the model; saved beside the weights, with the settings, as config.json.
    """

    def __init__(self, config: LoopConfig, modules: nn.ModuleDict, batches: Batches, loss: Callable, description: dict):
        self.config, self.modules, self.batches, self.loss = config, modules, batches, loss
        self.run_folder = Path(config.out)
        self.device = pick_device(config.device)
        self.parameters = {n: p for n, p in modules.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.step, self.samples, self.tokens, self.pad, self.seconds = 0, 0, 0, 0, 0.0
        self.warm_seconds = 0.0  # of training, when the warm-up ended
        self.losses: list[float] = []  # since the last row
        self.window = dict(tokens=0, seconds=0.0)  # since the last row
        self.rows: list[dict] = []
        check_start(config)
        self.run_folder.mkdir(parents=True, exist_ok=True)
        if config.resume:
            check_same_model(self.run_folder, description)
            self._load(checkpoint.newest(self.run_folder))
        else:
            # Left by a run that ended before its first checkpoint: this run begins its table anew.
            (self.run_folder / "losses.csv").unlink(missing_ok=True)
        checkpoint.save_json(self.run_folder / "config.json", description | {"training": asdict(config)})

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

        ``on_log`` gets every row of losses.csv.
        """
        if self.progress_share() >= 1.0:
            print(f"{self.run_folder}: already trained to step {self.step:,}; raise --steps or --minutes to go on",
                  flush=True)
        writer = self._writer()
        progress, text = Progress(self.run_folder.name, self.config.steps, self.step), ""
        since = time.perf_counter()
        try:
            with finish_on_interrupt() as interrupted:
                while self.progress_share() < 1.0 and not interrupted.is_set():
                    value, counts = self._one_step()
                    now = time.perf_counter()
                    took, since = now - since, now
                    self.seconds += took
                    if self.step == self.config.warmup:
                        self.warm_seconds = self.seconds
                    self.losses.append(value)
                    self.window = dict(tokens=self.window["tokens"] + counts["tokens"],
                                       seconds=self.window["seconds"] + took)
                    done = self.progress_share() >= 1.0
                    if self.step % self.config.log_every == 0 or done:
                        row = self._log(writer)
                        text = self._describe(row)
                        if on_log:
                            on_log(row)
                    progress.update(self.step, text, last=done)
                    if self.step % self.config.save_every == 0 and not done:
                        self.save()
                saved = self.save()
        finally:
            progress.close()
            if writer:
                writer.close()
        if interrupted.is_set():
            print(f"interrupted: saved {saved}; go on with the same command and --resume", flush=True)
            raise KeyboardInterrupt

    def _one_step(self) -> tuple[float, dict]:
        autocast = (torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16"
                    else nullcontext())
        totals, mean = dict(samples=0, tokens=0, pad=0), 0.0
        for _ in range(self.config.accumulate):
            batch = self.batches.next()
            with autocast:
                loss, counts = self.loss(batch, self.generator)
            (loss / self.config.accumulate).backward()
            mean = mean + loss.detach() / self.config.accumulate
            totals = {name: totals[name] + counts[name] for name in totals}
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip or math.inf)
        value, norm = float(mean), float(norm)
        if not (math.isfinite(value) and math.isfinite(norm)):
            found = checkpoint.everything(self.run_folder)
            where = f"the last checkpoint, {found[-1]}, is whole" if found else "nothing was saved yet"
            raise FloatingPointError(
                f"training stopped: expected a finite loss and gradient at step {self.step + 1}, got a loss of {value} and "
                f"a gradient norm of {norm}; {where}: lower --lr, or look at the data of this step")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # The average follows closely at first, so that short runs do not average in their start.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        self.samples, self.tokens, self.pad = (
            self.samples + totals["samples"], self.tokens + totals["tokens"], self.pad + totals["pad"])
        return value, totals

    # ------------------------------------------------------------------------------------------------ telling
    def _log(self, writer) -> dict:
        row = dict(step=self.step, samples=self.samples, tokens=self.tokens, loss=sum(self.losses) / len(self.losses),
                   lr=self.optimizer.param_groups[0]["lr"],
                   tokens_per_s=self.window["tokens"] / max(self.window["seconds"], 1e-9),
                   pad_share=self.pad / max(self.tokens + self.pad, 1), seconds=self.seconds)
        self.losses, self.window = [], dict(tokens=0, seconds=0.0)
        self.rows.append(row)
        path = self.run_folder / "losses.csv"
        fresh = not path.exists()
        with open(path, "a", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(row))
            if fresh:
                table.writeheader()
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        if writer:
            for name in ("loss", "lr", "tokens_per_s", "pad_share"):
                writer.add_scalar(name, row[name], self.step)
        return row

    def _describe(self, row: dict) -> str:
        left = self.seconds * (1 - self.progress_share()) / max(self.progress_share(), 1e-9)
        return (f"loss {row['loss']:.4f}, {self.samples:,} samples, {self.tokens:,} tokens, "
                f"{row['tokens_per_s']:,.0f} tokens/s, pad {row['pad_share']:.1%}, {left / 60:.1f} min left")

    def _writer(self):
        if not self.config.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: losses go to losses.csv only", flush=True)
            return None
        # Events after the checkpoint that a resumed run begins from will be written again.
        return SummaryWriter(self.run_folder / "tensorboard", purge_step=self.step + 1)

    # ------------------------------------------------------------------------------------------------ saving
    def save(self) -> Path:
        """Write a checkpoint of this step; nothing to do where it was loaded from that very step."""
        folder = self.run_folder / "checkpoints" / f"step-{self.step:08d}"
        if folder in checkpoint.everything(self.run_folder):
            return folder
        moments = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = torch.as_tensor(value)
        batches = self.batches.state_dict()
        tensors = {k: v for k, v in batches.items() if isinstance(v, torch.Tensor)}
        state = {name: getattr(self, name) for name in COUNTERS}
        state["batches"] = {k: v for k, v in batches.items() if k not in tensors}
        return checkpoint.write(
            self.run_folder, self.step,
            dict(model=self.modules.state_dict(), ema=self.modules.state_dict() | self.ema, optimizer=moments,
                 state={"generator": self.generator.get_state()} | {f"batches/{k}": v for k, v in tensors.items()}),
            state, self.config.keep)

    def _load(self, folder: Path) -> None:
        self.modules.load_state_dict(checkpoint.load_tensors(folder / "model.safetensors"))
        ema = checkpoint.load_tensors(folder / "ema.safetensors")
        for name, value in self.ema.items():
            value.copy_(ema[name])
        places = {name: place for place, name in enumerate(self.parameters)}
        state: dict[int, dict] = {}
        for key, value in checkpoint.load_tensors(folder / "optimizer.safetensors").items():
            name, _, moment = key.rpartition("/")
            state.setdefault(places[name], {})[moment] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        numbers = checkpoint.load_json(folder / "state.json")
        tensors = checkpoint.load_tensors(folder / "state.safetensors")
        self.generator.set_state(tensors.pop("generator"))
        self.batches.load_state_dict(numbers["batches"] | {k.removeprefix("batches/"): v for k, v in tensors.items()})
        for name in COUNTERS:
            setattr(self, name, numbers[name])
        self._drop_later_rows()

    def _drop_later_rows(self) -> None:
        """Rows of steps after the checkpoint will be written again."""
        path = self.run_folder / "losses.csv"
        if not path.exists():
            return
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if all(row.values()) and int(row["step"]) <= self.step]
        self.rows = [{k: int(v) if k in ("step", "samples", "tokens") else float(v) for k, v in row.items()} for row in rows]
        if not rows:
            path.unlink()
            return
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        checkpoint.save_text(path, text.getvalue())


def check_start(config: LoopConfig) -> None:
    """One sentence where a run may not begin in config.out, or not go on with these settings; before any work."""
    run = Path(config.out)
    found = checkpoint.everything(run)
    if not config.resume:
        if found:
            raise FileExistsError(f"{run}: expected an empty run folder, got one with checkpoints; pass --resume to go on, "
                                  f"or another --out")
        return
    checkpoint.newest(run)  # or its sentence
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
