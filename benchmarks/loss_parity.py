"""Loss parity: a training whose ops run on what ``auto`` chooses loses nothing against the same training on the reference.

A DiT is trained three times on the same packs, noise and timesteps: on the reference from weights of seed 0, on the
reference from weights of seed 1, and with ``auto`` from weights of seed 0. Losses are averaged over windows of 20 steps.
The run has PASSED when, in every window, auto differs from the reference of its own seed by no more than the largest
difference, over all windows, between the two seeds of the reference: what changes by luck is the measure of what may
change. It has FAILED, too, when a loss is not finite, or the reference's own did not fall: then nothing was compared.

The gates of the ops are the finer sieve: a network learns around some errors (its weights can take up a factor).

python -m sora_fast.benchmarks.loss_parity --device cuda --out DIR
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sora_fast.diffusion import FlowMatching
from sora_fast.dispatch import device_name, use_backend
from sora_fast.environment import environment
from sora_fast.explanation import all_ops
from sora_fast.files import check_folder
from sora_fast.models import DiT, DiTConfig
from sora_fast.models.dit import PRESETS
from sora_fast.named import pick_device
from sora_fast.pack import Pack
from sora_fast.progress import Progress

from . import rows

WINDOW = 20
STEPS = 300
DATA_SEED = 20
RUNS = {"reference, seed 0": ("reference", 0), "reference, seed 1": ("reference", 1), "auto, seed 0": ("auto", 0)}
FALL = 0.9  # of the first window's loss: the reference must end below it


@dataclass(frozen=True)
class Recipe:
    """What is trained: sizes (T, H, W) of the latents take turns; the learning rate rises over the first window."""

    model: DiTConfig
    sizes: tuple[tuple[int, int, int], ...]
    samples: int
    lr: float
    precision: str  # "bf16": weights in float32 under torch.autocast; "fp32"


# QK-norm and 3-D RoPE, which the paper's DiT lacks, so that every op of a DiT takes part.
FULL = Recipe(replace(PRESETS["S/2"], learn_sigma=False, classes=16, qk_norm=True, rope_axes=(16, 24, 24)),
              ((1, 32, 32), (1, 24, 40), (3, 16, 24), (1, 40, 24)), samples=32, lr=5e-4, precision="bf16")
QUICK = Recipe(replace(FULL.model, width=64, depth=2, heads=2, classes=8, rope_axes=(8, 12, 12)),
               ((1, 8, 8), (1, 8, 12), (3, 4, 8), (1, 12, 8)), samples=8, lr=2e-3, precision="fp32")


# ------------------------------------------------------------------------------------------------ training
def batch(recipe: Recipe, step: int) -> dict[str, object]:
    """The clips of a step (waves whose direction and length are their class's, plus noise), and all that is drawn."""
    generator = torch.Generator().manual_seed(DATA_SEED * 1_000_003 + step)
    labels = torch.randint(recipe.model.classes, (recipe.samples,), generator=generator)
    clips = []
    for place, label in enumerate(labels.tolist()):
        sizes = recipe.sizes[(step + place) % len(recipe.sizes)]
        t, h, w = torch.meshgrid(*(torch.arange(n) / 8 for n in sizes), indexing="ij")
        phase = torch.arange(recipe.model.in_channels)[:, None, None, None] / 4 + t
        wave = torch.sin(2 * math.pi * ((1 + label % 3) * h + label // 3 * w + phase))
        clips.append(1.2 * wave + 0.2 * torch.randn(wave.shape, generator=generator))
    x0 = torch.cat([clip.flatten() for clip in clips])
    counts = torch.tensor([clip.numel() for clip in clips])
    return dict(grids=[tuple(n // p for n, p in zip(clip.shape[1:], recipe.model.patch, strict=True)) for clip in clips],
                labels=labels, x0=x0, counts=counts, noise=torch.randn(x0.shape, generator=generator),
                timesteps=_OBJECTIVE.draw_timesteps(counts, generator))


_OBJECTIVE = FlowMatching("velocity", timesteps="uniform", shift=1.0)


def train(recipe: Recipe, backend: str, seed: int, steps: int, device: torch.device, progress: Progress) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(seed)
    model = DiT(recipe.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    autocast = torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()
    losses = []
    with use_backend(backend):
        for step in range(steps):
            data = batch(recipe, step)
            pack = Pack(data.pop("grids"), device=device)
            labels, x0, counts, noise, timesteps = (t.to(device) for t in data.values())
            with autocast:
                predicted = model(_OBJECTIVE.add_noise(x0, noise, timesteps, counts), timesteps, pack, labels=labels)
                loss = _OBJECTIVE.loss(predicted, x0, noise, timesteps, counts)
            loss.backward()
            optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / WINDOW)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            progress.update(step + 1, f"loss {losses[-1]:.4f}", last=step + 1 == steps)
    return losses


# ------------------------------------------------------------------------------------------------ verdict
def smooth(losses: list[float]) -> list[float]:
    """Means of whole windows."""
    return [sum(losses[start : start + WINDOW]) / WINDOW for start in range(0, len(losses) - WINDOW + 1, WINDOW)]


def judge(curves: dict[str, list[float]]) -> dict[str, object]:
    """status, reason, error (auto against the reference, worst window), allowed (the two seeds, worst window), windows."""
    windows = {name: smooth(losses) for name, losses in curves.items()}
    reference, other, auto = (windows[name] for name in RUNS)
    apart = lambda a, b: [abs(x - y) for x, y in zip(a, b, strict=True)]
    errors, allowed = apart(auto, reference), max(apart(other, reference))
    worst = max(range(len(errors)), key=errors.__getitem__)
    broken = [name for name, losses in curves.items() if not all(map(math.isfinite, losses))]
    reason = ""
    if broken:
        reason = f"A loss is not finite: {' and '.join(broken)}."
    elif reference[-1] > FALL * reference[0]:
        reason = f"The reference's loss did not fall ({reference[0]:.4f} to {reference[-1]:.4f}): nothing was learnt."
    elif errors[worst] > allowed:
        reason = (f"From step {worst * WINDOW + 1} to {(worst + 1) * WINDOW} auto's loss is {auto[worst]:.5f} and the "
                  f"reference's {reference[worst]:.5f}; two seeds of the reference are at most {allowed:.5f} apart.")
    numbers = dict(error=None, allowed=None) if broken else dict(error=errors[worst], allowed=allowed)
    return dict(status="FAILED" if reason else "PASSED", reason=reason, **numbers, window=WINDOW,
                windows={name: _rounded(values) for name, values in windows.items()},
                final={name: _rounded(values)[-1] for name, values in windows.items()})


def _rounded(values: list[float]) -> list[float | None]:
    """Six decimals; null, as JSON has it, for what is no number."""
    return [round(value, 6) if math.isfinite(value) else None for value in values]


def run(device: torch.device | str, steps: int = STEPS, out: Path | str = ".", *, quick: bool = False) -> dict:
    """Train three times, judge, and append the row to ``out / "parity.jsonl"``.

    Args:
        steps: of each training, a multiple of 20, at least 40. quick: a tiny model in float32, for a CPU.

    Returns:
        The row: ``"row": "parity"``, judge()'s entries, ``curves`` (the loss of every step, by run), the recipe, which
        backend ``auto`` takes for a typical call of each op, seconds, and the environment.
    """
    if steps < 2 * WINDOW or steps % WINDOW:
        raise ValueError(f"loss_parity: expected steps as a multiple of {WINDOW}, at least {2 * WINDOW}, got {steps}; pass "
                         f"{max(2, steps // WINDOW) * WINDOW}")
    check_folder("--out", Path(out))
    device, recipe, curves, start = torch.device(device), QUICK if quick else FULL, {}, time.monotonic()
    for name, (backend, seed) in RUNS.items():
        progress = Progress(name, steps, 0)
        try:
            curves[name] = train(recipe, backend, seed, steps, device, progress)
        finally:
            progress.close()
    row = dict(row="parity", schema=rows.SCHEMA, suite="quick" if quick else "full", **judge(curves), steps=steps,
               curves={name: _rounded(losses) for name, losses in curves.items()}, recipe=asdict(recipe),
               backends=_chosen(device, torch.float32 if quick else torch.bfloat16), seconds=time.monotonic() - start,
               command=f"python -m sora_fast.benchmarks.loss_parity --device {device.type} --steps {steps}"
                       f"{' --quick' if quick else ''}",
               environment=environment(device))
    rows.append(Path(out) / "parity.jsonl", [row])
    return row


def _chosen(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    where = device_name(torch.empty(0, device=device))
    return {name: op.choose(op.example(where, dtype, True)).name for name, op in all_ops().items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sora_fast.benchmarks.loss_parity", allow_abbrev=False,
                                     description="Train on the reference and on auto; the loss curves must agree.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help=f"of each training (default: {STEPS}; with --quick 80)")
    parser.add_argument("--quick", action="store_true", help="a tiny model in float32: seconds on a CPU")
    parser.add_argument("--out", default="out/parity", help="folder for parity.jsonl (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        row = run(pick_device(arguments.device), arguments.steps or (80 if arguments.quick else STEPS), arguments.out,
                  quick=arguments.quick)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{row['status']}: final losses " + ", ".join(f"{name}: {value}" for name, value in row["final"].items()))
    print(row["reason"] or f"auto is at most {row['error']:.2e} from the reference, two seeds {row['allowed']:.2e}; "
                           f"{row['seconds']:.0f} s; wrote {Path(arguments.out) / 'parity.jsonl'}")
    return 0 if row["status"] == "PASSED" else 1


if __name__ == "__main__":
    sys.exit(main())
