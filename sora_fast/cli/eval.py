"""sora-fast eval: figures of a trained VAE or DiT on given media."""

import platform
import shlex
import sys
from pathlib import Path

from ..files import check_folder
from .parsing import typed

DESCRIPTION = """\
A VAE:  sora-fast eval runs/vae --data clips/
A DiT:  sora-fast eval runs/dit --data clips/ --prompt 'a rabbit' --size 9x96x160 --size 1x128x128
With a distance of features of your own:
        sora-fast eval runs/vae --data clips/ --features my_package.features:clip_features

A VAE: PSNR, SSIM, PSNR of the differences of neighbouring frames and of the worst frame, for each file
and in all, in memory that does not grow with the clips' length. A DiT, with its averaged weights: the
loss over timesteps with fixed noise, and a sheet of samples, prompts by sizes. Writes OUT/eval.json,
eval.png and report.html. The function of --features takes a clip, uint8 (T, H, W, 3), and gives D
numbers; the Frechet distance is between their Gaussians, real against reconstructed or generated."""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("model", help="run folder of sora-fast train-vae or train, or weights of Wan 2.1's VAE")
    add("--data", metavar="FOLDER",
        help="clips and images to judge it on (default: the files that the run held out from its training)")
    add("--out", default="out/eval", help="folder for figures, report and samples")
    add("--files", type=int, default=64, metavar="N", help="no more than N files, evenly spread; 0: all")
    add("--short-side", type=int, default=0, metavar="PIXELS",
        help="VAE: clips and images are made this small, never larger; 0: as in training, else 256")
    add("--frames", type=int, default=0, metavar="N", help="VAE: the first N frames of each clip; 0: all")
    add("--fps", type=float, default=0.0,
        help="VAE: frames per second read from clips; 0: as in training, else the clips' own")
    add("--strata", type=int, default=10, metavar="N",
        help="DiT: equal parts of the timesteps, each met once by every window")
    add("--prompt", type=typed, action="append",
        help="DiT: a caption of the sheet; repeat for more rows (default: the first three of the data)")
    add("--size", action="append", metavar="TxHxW",
        help="DiT: a size of the sheet; repeat for more columns (default: that of a window, and an image)")
    add("--steps", type=int, default=25, help="DiT: sampling steps")
    add("--guidance", type=float, default=1.0, help="DiT: classifier-free guidance, 1: none")
    add("--gif", action="store_true", help="DiT: a gif of the sheet in place of mp4 (default: mp4)")
    add("--features", metavar="PKG.MOD:FN", help="your function of features, for a Frechet distance (default: none)")
    add("--feature-frames", type=int, default=16, metavar="N",
        help="VAE: features are those of windows of N frames, shorter clips as they are")
    add("--feature-batch", type=int, default=0, metavar="B",
        help="your function takes up to B clips of one size, (B, T, H, W, 3), and gives (B, D); 0: one clip")
    add("--seed", type=int, default=0, help="seed of noise, timesteps and samples")
    add("--device", default="auto", help="auto, cpu, cuda")


def run(arguments) -> int:
    import torch

    from ..data.media import shown
    from ..named import load_function, pick_device
    from . import eval_dit, eval_vae
    from .eval_report import Findings

    a, out, device = arguments, Path(arguments.out), pick_device(arguments.device)
    for name, least in dict(files=0, frames=0, short_side=0, fps=0, strata=1, steps=1, feature_frames=1,
                            feature_batch=0).items():
        if getattr(a, name) < least:
            raise ValueError(f"eval: expected --{name.replace('_', '-')} of {least} or more, got {getattr(a, name):g}; see "
                             f"sora-fast eval --help")
    check_folder("--out", out)  # before any work, as a wrong name
    function = load_function(a.features, "--features") if a.features else None
    kind, described = _description(a.model)
    training = described.get("training", {})
    library = _library(a, training)
    facts = dict(command=_command(a), model=f"{a.model} ({kind})",
                 media=f"{a.data or training.get('data')}, {len(library.items)} files",
                 machine=f"{platform.machine()}, device {device}, Python {platform.python_version()}, torch "
                         f"{torch.__version__}")
    found = Findings(kind, facts, skipped=[(shown(path), shown(why)) for path, why in library.skipped])
    out.mkdir(parents=True, exist_ok=True)
    evaluate = dict(vae=eval_vae.evaluate, dit=eval_dit.evaluate)[kind]
    evaluate(a, training, list(library.items), device, function, found, out)
    found.tell()
    found.save(out)
    plot = f"{out / 'eval.png'}" if found.plot else "no plot, since matplotlib is not installed,"
    print(f"wrote {out / 'eval.json'}, {plot} and {out / 'report.html'}")
    return 0


def _command(a) -> str:
    """What makes these figures again, defaults included."""
    given = {name: value for name, value in vars(a).items() if name not in ("run", "model") and value not in (None, "")}
    words = [a.model]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            words += ([flag] if each else []) if isinstance(each, bool) else [flag, str(each)]
    return f"sora-fast eval {shlex.join(words)}"


def _description(model: str) -> tuple[str, dict]:
    """("vae" or "dit", config.json of the run); a published VAE has no description. Else one sentence, before any work."""
    from ..models.weights import is_published
    from ..training import checkpoint

    folder = Path(model)
    if folder.is_file() or is_published(folder):
        return "vae", {}
    file = folder / "config.json"
    described = checkpoint.load_json(file) if file.is_file() else {}
    if described.get("kind") not in ("vae", "dit"):
        came = f"one of kind {described.get('kind')!r}" if described else (
            "no config.json there" if folder.is_dir() else "nothing there")
        raise FileNotFoundError(f"{model}: expected a run folder of sora-fast train-vae or train, or weights of Wan 2.1's "
                                f"VAE, got {came}; pass the folder given as --out")
    if not (folder / "vae.safetensors").is_file():
        checkpoint.newest(folder)  # or its sentence
    return described["kind"], described


def _library(a, training: dict):
    """The media of --data; without it those that the run kept from its training."""
    from ..data import Library, scan
    from ..training import checkpoint
    from ..training.latents import held_out

    folder = a.data or training.get("data")
    if not folder:
        raise ValueError("eval: expected --data FOLDER with clips or images, got none, and the model names none that it was "
                         "trained on; pass it")
    library = scan(folder, progress=sys.stderr.isatty())
    print(library.summary(), flush=True)
    items = library.items
    if not a.data:
        share, latents = training.get("heldout", 0.0), Path(a.model) / "latents.json"
        # A DiT's run chose among the files that it could encode.
        among = ([clip["source"] for clip in checkpoint.load_json(latents)] if latents.is_file()
                 else [str(item.path) for item in items])
        names = held_out(among, share)
        items = tuple(item for item in items if str(item.path) in names)
        if not items:
            raise ValueError(f"eval: expected files in {folder} that the run held out, got none ({share:.0%} of "
                             f"{len(library.items)}); pass --data FOLDER with what to judge it on")
        print(f"{len(items)} files that the run held out from training", flush=True)
    if a.files and len(items) > a.files:
        print(f"{a.files} of {len(items)} files, evenly spread; --files 0 takes all", flush=True)
        items = tuple(items[i * len(items) // a.files] for i in range(a.files))
    return Library(items, library.skipped, library.others)
