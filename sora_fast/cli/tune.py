"""sora-fast tune."""

import importlib.util
from collections import Counter
from functools import partial
from pathlib import Path

from .. import env
from ..files import check_file
from ..progress import Progress

DESCRIPTION = """\
Goes through the benchmark's cases on a GPU. What a kernel may be launched with passes the benchmark's
gate or is out; the rest is timed beside the heuristic, on the same inputs, in turns. What is faster by
more than the noise is kept with its figures in SORA_FAST_CACHE (default ~/.cache/sora_fast): launches
on this GPU find it, for exactly this problem, kernel source and Triton. What the cycle model likes best
is tried first, which decides nothing else. The same command goes on where a run was stopped. Exits with
1 if a case could not be tuned, with 3 if --minutes left cases for the next call. With TRITON_INTERPRET=1
and --device cpu the tuner itself can be tried without a GPU.

  sora-fast tune --minutes 20
  sora-fast tune modulation --case 'Wan 14B'
  sora-fast tune --from benchmarks/results/nvidia-h200/tune.jsonl --ship"""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help="families to tune (default: all)")
    add("--suite", choices=("quick", "full"), default="full",
        help="whose cases: full has real models' sizes, quick small ones")
    add("--quick", action="store_true", help="the same as --suite quick (default: as --suite says)")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT (default: all)")
    add("--candidates", type=int, default=0, metavar="N", help="try no more than the first N of a kernel's; 0: all")
    add("--minutes", type=float, default=0.0, help="begin nothing after so long; 0: never stop")
    add("--fresh", action="store_true", help="measure again what is in --out (default: go on)")
    add("--out", default="out/tune.jsonl", metavar="FILE", help="a row for each lookup")
    add("--ship", action="store_true",
        help="keep winners in this checkout's sora_fast/tuning/configs (default: in your cache)")
    add("--from", dest="source", metavar="FILE",
        help="measure nothing: keep the winners in FILE, the --out of another run (default: measure)")


def run(arguments) -> int:
    """Tune, print what came of every lookup, and keep the winners.

    Returns 1 if a case could not be tuned, 3 if --minutes left cases for the next call, else 0.
    """
    root = _shipped() if arguments.ship else None
    if arguments.source:
        return _keep(arguments.source, root)
    check_file("--out", Path(arguments.out))
    from ..benchmarks import timing
    from ..environment import device_label
    from ..named import pick_device
    from ..tuning.tuner import Settings, Tuner

    device = pick_device(arguments.device)
    _check_kernels_run(device, arguments.ship)
    suite = "quick" if arguments.quick else arguments.suite
    work = _work(arguments.families, suite, arguments.case)
    out = Path(arguments.out)
    if arguments.fresh:
        out.unlink(missing_ok=True)
    settings = Settings(device, suite, out, root, arguments.minutes, arguments.candidates,
                        timing.GPU if device.type == "cuda" else timing.CPU)
    print(f"{device_label(device)}, suite {suite}, {len(work)} cases", flush=True)
    bar = Progress("tune", len(work), 0)
    tell = bar.bar.write if bar.bar is not None else lambda text: print(text, flush=True)
    of_gpu = {}
    if device.type == "cuda":
        from .tune_predicted import likeliest

        of_gpu = dict(likeliest=partial(likeliest, tell=tell))
    tuner = Tuner(settings, tell, bar.update, **of_gpu)
    try:
        tuner.run(work)
    finally:
        bar.close()
    _report(tuner, len(work))
    return 1 if tuner.failures else 3 if tuner.left else 0


def _check_kernels_run(device, ship: bool) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("tune: expected Triton, whose kernels are tuned, got none; run pip install triton")
    if device.type == "cuda" and env.interpreted():
        raise ValueError("tune: expected kernels that run on the GPU, got TRITON_INTERPRET=1 that interprets them; unset it")
    if device.type not in ("cpu", "cuda") or device.type == "cpu" and not env.interpreted():
        raise ValueError(f"tune: expected a CUDA GPU, got {device}; run it where there is one, or set TRITON_INTERPRET=1 to "
                         f"try the tuner itself on a CPU, with kernels interpreted")
    if device.type == "cpu" and ship:
        raise ValueError("tune: expected a GPU's times for --ship, got the interpreter's; leave --ship out")


def _shipped() -> Path:
    from .. import configs

    if not (configs.SHIPPED.parents[2] / "pyproject.toml").is_file():
        raise ValueError(f"tune: expected --ship in a checkout of the sources, got the installed package in "
                         f"{configs.SHIPPED.parents[1]}; leave --ship out to write to your cache")
    return configs.SHIPPED


def _work(families: list[str], suite: str, text: str) -> list[tuple]:
    """(family, case, its Triton provider) of every case to go through."""
    from ..benchmarks import suites
    from ..ops import FAMILIES

    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise ValueError(f"tune: expected families among {', '.join(FAMILIES)}, got {', '.join(unknown)}; check the name")
    every = suites.select(suites.work(families or FAMILIES, suite), text, ())
    if not every:
        raise ValueError(f"tune: expected --case to leave something of suite {suite}, got {text!r}; sora-fast bench --suite "
                         f"{suite} --list shows the cases")
    work = [(family, case, providers[0]) for family, case, providers in suites.select(every, text, ("triton",))]
    without = dict.fromkeys(family for family, _, _ in every if family not in {family for family, _, _ in work})
    if without:
        print(f"nothing to tune in {', '.join(without)}: no Triton kernels yet", flush=True)
    return work


def _keep(path: str, root: Path | None) -> int:
    """Keep the winners of rows that another run, perhaps on another machine, has written."""
    from ..benchmarks import rows
    from ..tuning.tuner import keep

    found = [row for row in rows.read(path) if row["row"] == "tune"]
    if not found:
        raise ValueError(f"tune: expected rows of sora-fast tune in {path}, got none; pass the --out of a run")
    if root is not None and any(row["gpu"] == "cpu" for row in found):
        raise ValueError(f"tune: expected a GPU's times for --ship, got the interpreter's in {path}; leave --ship out")
    written = Counter(keep(row, root) for row in found)
    kept = sum(count for file, count in written.items() if file)
    print(f"{kept} of {len(found)} lookups beat their heuristic" + "".join(
        f"; wrote {file}" for file in sorted(filter(None, written))))
    return 0


def _report(tuner, cases: int) -> None:
    from ..tuning import tuner as tuning

    lines = [("kernel", "problem", "heuristic us", "best us", "config", "verdict")]
    for row in tuner.rows:
        kernel, _, problem = row["key"].partition(": ")
        micro = lambda value: "-" if value is None else f"{value:,.1f}"
        verdict = row["verdict"] + (f" ({row['why']})" if row["why"] else "") or "no candidate passed"
        verdict += ", kept" if row["entry"] else ", the heuristic stays"
        lines.append((f"{row['family']} {kernel}", problem.replace("torch.", ""), micro(row["heuristic_us"]),
                      micro(row["us"]), tuning.config_of(row), verdict))
    widths = [max(len(line[place]) for line in lines) for place in range(5)]
    align = lambda line: "  ".join(text.rjust(width) if place in (2, 3) else text.ljust(width)
                                   for place, (text, width) in enumerate(zip(line, widths, strict=False)))
    if tuner.rows:
        print("\n" + "\n".join(f"{align(line)}  {line[5]}" for line in lines) + "\n")
    for sentence in dict.fromkeys(sentence for row in tuner.rows for sentence in tuning.reasons(row)):
        print(f"skipped: {sentence}")
    for sentence in tuner.failures:
        print(f"tune: {sentence}")
    kept = [row for row in tuner.rows if row["entry"]]
    folders = sorted({str((tuner.settings.root or env.cache() / 'configs') / row["gpu"]) for row in kept})
    print(f"{len(kept)} of {len(tuner.rows)} lookups beat their heuristic by more than the noise"
          + (f" and are kept in {', '.join(folders)}" if kept else ": nothing is saved") + f"; rows in {tuner.settings.out}")
    if tuner.left:
        print(f"{tuner.left} of {cases} cases are left after {tuner.settings.minutes:g} minutes; the same command goes on "
              f"with them")
