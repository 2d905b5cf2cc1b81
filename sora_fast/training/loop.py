"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, EMA, logs, checkpoints, resume, Ctrl-C."""

import csv
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from . import checkpoint
from .config import LoopConfig


class Batches(Protocol):
    """An endless source of batches whose place can be saved."""

    def next(self) -> object: ...
    def probe(self) -> tuple[object, float]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Trainer:
    """One run.

    Args:
        config: a LoopConfig.
        modules: what is trained; parameters without requires_grad stay as they are.
        batches: where batches come from.
        loss: ``loss(batch, generator) -> (loss, counts)``; counts has ``samples``, ``tokens`` and ``pad`` (tokens of
            tail) of the batch. ``generator`` is a CPU generator whose state is in the checkpoint.
        description: saved beside the weights as config.json: what rebuilds the model.
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
        self.rows: list[dict] = []
        self.run_folder.mkdir(parents=True, exist_ok=True)
        if config.resume:
            self._load(checkpoint.newest(self.run_folder))
        elif checkpoint.everything(self.run_folder):
            raise FileExistsError(f"{self.run_folder}: expected an empty run folder, got one with checkpoints; pass "
                                  f"--resume to go on, or another --out")
        checkpoint.save_json(self.run_folder / "config.json", description)

    # ------------------------------------------------------------------------------------------------ the loop
    def progress_share(self) -> float:
        """How much of the run is done, by steps or by minutes, whichever is further."""
        share = self.step / self.config.steps
        if self.config.minutes:
            share = max(share, self.seconds / (60 * self.config.minutes))
        return min(share, 1.0)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine over what the run has left."""
        c = self.config
        if self.step < c.warmup:
            return c.lr * (self.step + 1) / c.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress_share()))
        return c.lr * (c.final_lr + (1 - c.final_lr) * cosine)

    def run(self, on_log: Callable[[dict], None] | None = None) -> None:
        """Train to the end; Ctrl-C saves a checkpoint and raises KeyboardInterrupt again."""
        bar, writer = self._bar(), self._writer()
        losses: list[float] = []
        since, window = time.perf_counter(), dict(tokens=0, seconds=0.0)
        try:
            while self.progress_share() < 1.0:
                value, counts = self._one_step()
                now = time.perf_counter()
                took, since = now - since, now
                self.seconds += took
                losses.append(value)
                window = dict(tokens=window["tokens"] + counts["tokens"], seconds=window["seconds"] + took)
                done = self.progress_share() >= 1.0
                if self.step % self.config.log_every == 0 or done:
                    row = self._log(losses, window, writer)
                    losses, window = [], dict(tokens=0, seconds=0.0)
                    if on_log:
                        on_log(row)
                    bar.set_postfix_str(self._postfix(row), refresh=False)
                bar.update(1)
                if self.step % self.config.save_every == 0 and not done:
                    self.save()
        except KeyboardInterrupt:
            bar.close()
            print(f"interrupted: saved {self.save()}; go on with --resume", flush=True)
            raise
        finally:
            bar.close()
            if writer:
                writer.close()
        self.save()

    def _one_step(self) -> tuple[float, dict]:
        autocast = (torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16"
                    else nullcontext())
        totals, value = dict(samples=0, tokens=0, pad=0), 0.0
        for _ in range(self.config.accumulate):
            batch = self.batches.next()
            with autocast:
                loss, counts = self.loss(batch, self.generator)
            (loss / self.config.accumulate).backward()
            value += float(loss.detach()) / self.config.accumulate
            totals = {name: totals[name] + counts[name] for name in totals}
        if not math.isfinite(value):
            raise FloatingPointError(f"training stopped: expected a finite loss at step {self.step + 1}, got {value}; the "
                                     f"last checkpoint is whole: lower --lr, or look at the data of this step")
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
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
    def _log(self, losses, window, writer) -> dict:
        row = dict(step=self.step, samples=self.samples, tokens=self.tokens, loss=sum(losses) / len(losses),
                   lr=self.optimizer.param_groups[0]["lr"], tokens_per_s=window["tokens"] / max(window["seconds"], 1e-9),
                   pad_share=self.pad / max(self.tokens + self.pad, 1), seconds=self.seconds)
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

    def _postfix(self, row: dict) -> str:
        left = self.seconds * (1 - self.progress_share()) / max(self.progress_share(), 1e-9)
        return (f"loss {row['loss']:.4f}, {self.samples:,} samples, {self.tokens:,} tokens, "
                f"{row['tokens_per_s']:,.0f} tokens/s, pad {row['pad_share']:.1%}, {left / 60:.1f} min left")

    def _bar(self):
        from tqdm.auto import tqdm

        return tqdm(total=self.config.steps, initial=self.step, desc=self.run_folder.name, unit="step", mininterval=1.0,
                    bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}] {postfix}")

    def _writer(self):
        if not self.config.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: losses go to losses.csv only", flush=True)
            return None
        return SummaryWriter(self.run_folder / "tensorboard")

    # ------------------------------------------------------------------------------------------------ saving
    def save(self) -> Path:
        moments = {}
        for (name, _), state in zip(self.parameters.items(), self.optimizer.state_dict()["state"].values(), strict=False):
            moments |= {f"{name}/{key}": torch.as_tensor(value) for key, value in state.items()}
        batches = self.batches.state_dict()
        tensors = {k: v for k, v in batches.items() if isinstance(v, torch.Tensor)}
        state = dict(step=self.step, samples=self.samples, tokens=self.tokens, pad=self.pad, seconds=self.seconds,
                     batches={k: v for k, v in batches.items() if k not in tensors})
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
        saved = checkpoint.load_tensors(folder / "optimizer.safetensors")
        state: dict[int, dict] = {}
        for place, name in enumerate(self.parameters):
            own = {key.rpartition("/")[2]: value for key, value in saved.items() if key.rpartition("/")[0] == name}
            if own:
                state[place] = own
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        numbers = json.loads((folder / "state.json").read_text())
        tensors = checkpoint.load_tensors(folder / "state.safetensors")
        self.generator.set_state(tensors.pop("generator"))
        self.batches.load_state_dict(numbers.pop("batches") | {k.removeprefix("batches/"): v for k, v in tensors.items()})
        for name, value in numbers.items():
            setattr(self, name, value)
        self._drop_later_rows()

    def _drop_later_rows(self) -> None:
        """Rows of steps after the checkpoint will be written again."""
        path = self.run_folder / "losses.csv"
        if not path.exists():
            return
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.step]
        self.rows = [{k: int(v) if k in ("step", "samples", "tokens") else float(v) for k, v in row.items()} for row in rows]
        path.unlink()
        if rows:
            with open(path, "w", newline="") as file:
                table = csv.DictWriter(file, fieldnames=list(rows[0]))
                table.writeheader()
                table.writerows(rows)
