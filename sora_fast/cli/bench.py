"""sora-fast bench, bench compare, bench report, bench collect, bench readme."""

import json
import os
import re
from pathlib import Path

import torch

from ..dispatch import ORDER
from ..environment import device_label
from ..files import check_folder, claimed, save_text
from ..training.loop import pick_device
from .validate import load_function


def run(arguments) -> int:
    """Measure, print every row as it comes, and write OUT/bench.jsonl and the report.

    Returns 1 if one of our backends or the user's function failed, 3 if --minutes left cases for the next call, else 0.
    """
    from ..benchmarks import report, suites, timing
    from ..benchmarks.runner import Runner, Settings

    device = pick_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: expected a CPU or a CUDA device to time, got {device}; pass --device cpu or cuda")
    suite = "quick" if arguments.quick else arguments.suite
    l2 = arguments.l2 or ("cold" if device.type == "cuda" else "hot")
    if device.type == "cpu" and l2 == "cold":
        raise ValueError("bench: expected --l2 hot on a CPU, whose caches are not emptied between calls, got cold; leave "
                         "--l2 out")
    named = arguments.providers or ()
    every = suites.work(arguments.families, suite, spare_compiling=device.type == "cpu" and not named)
    if arguments.op:
        every = [(family, case, providers) for family, case, providers in every if case.op == arguments.op]
    if arguments.impl:
        every, mine = _with_function(every, arguments.op, arguments.impl)
        named = [*named, mine] if named else named
    work = suites.select(every, arguments.case, named)
    if not work:
        raise ValueError(f"bench: expected --op, --case and --providers to leave something of suite {suite}, got "
                         f"{arguments.op or 'all'}, {arguments.case!r} and {arguments.providers or 'all'}; see sora-fast "
                         f"bench --list")
    if arguments.list:
        for _, case, providers in work:
            print(f"{case.id}: {', '.join(provider.name for provider in providers)}")
        return 0
    out = Path(arguments.out)
    with claimed(out):
        if arguments.fresh:
            (out / "bench.jsonl").unlink(missing_ok=True)
        settings = Settings(device, suite, l2, out, arguments.minutes, timing.GPU if device.type == "cuda" else timing.CPU)
        _say_conditions(settings)
        runner = Runner(settings, tell=lambda text: print(text, flush=True), show=lambda row: print(line(row), flush=True))
        done = runner.run(work)
        report.write([(out.name, done)], out)
    print(f"wrote {out / 'bench.jsonl'} ({len(done)} rows) and {out / 'report.html'}")
    answerable = (*ORDER, "auto", *([mine] if arguments.impl else ()))
    ours = [row for row in done if row["row"] == "time" and row["provider"] in answerable
            and row["status"] in ("FAILED", "ERROR")]
    for row in ours:
        what = " / ".join(row[name] for name in ("op", "case", "direction", "provider"))
        print(f"bench: {what} {row['status']}: {row['reason']}")
    return 1 if ours else 3 if runner.left else 0


def _with_function(work: list[tuple], op: str | None, path: str) -> tuple[list[tuple], str]:
    """The cases of ``op`` with the function ``path`` as one more provider, and that provider's name."""
    from ..benchmarks.case import Provider

    if not op:
        raise ValueError("bench: expected --op beside --impl, got none; name the op that your function computes")
    function = load_function(path)
    name = getattr(function, "__name__", path.rpartition(":")[2])
    taken = {provider.name for _, _, providers in work for provider in providers}
    if name in taken:
        raise ValueError(f"bench: expected --impl to have a name of its own among {', '.join(sorted(taken))}, got {name!r}; "
                         f"rename the function")
    mine = Provider(name, function)
    return [(family, case, [*providers, mine]) for family, case, providers in work], name


def _say_conditions(settings) -> None:
    where = device_label(settings.device)
    threads = f", {torch.get_num_threads()} threads" if settings.device.type == "cpu" else f", L2 {settings.l2}"
    print(f"{where}{threads}, torch {torch.__version__}, suite {settings.suite}")


def line(row: dict) -> str:
    """One row for a terminal."""
    name = f"    {row['direction']:9s} {row['provider']:24s}"
    if row["status"] != "PASSED":
        return f"{name} {row['status']:11s} {row['reason']}"
    share = f"{row['share']:6.1%} of the floor" if row["share"] is not None else ""
    return f"{name} {row['median_ms']:11.4f} ms  {share}"


def compare(arguments) -> int:
    """Print a verdict for every row that two runs share; 1 if one is slower by more than --fail-slower."""
    from ..benchmarks import compare as comparing
    from ..benchmarks import rows

    result = comparing.compare(rows.read(arguments.base), rows.read(arguments.new), fraction(arguments.fail_slower))
    print(result)
    return result.exit_code


def fraction(text: str) -> float:
    """0.05 of "5%" or "0.05"."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ValueError(f"--fail-slower: expected a share such as 5% or 0.05, got {text!r}; write it so")
    return value


def report(arguments) -> int:
    """Write report.html, report.md and report.csv of one or more runs; the files of one folder are one run."""
    from ..benchmarks import report as reporting
    from ..benchmarks import rows

    check_folder("--out", Path(arguments.out))
    runs: dict[str, list] = {}
    for path in arguments.files:
        found = rows.read(path)
        if not found:
            raise ValueError(f"bench report: expected rows in {path}, got none; pass the bench.jsonl of a finished run")
        runs.setdefault(Path(path).resolve().parent.name, []).extend(found)
    reporting.write(list(runs.items()), Path(arguments.out))
    print(f"wrote {Path(arguments.out) / 'report.html'}, report.md and report.csv")
    return 0


def collect(arguments) -> int:
    """Copy the result files of a GPU run into benchmarks/results/<gpu>/ of this checkout."""
    from .. import benchmarks
    from ..benchmarks import rows

    folder = Path(arguments.folder)
    files = {path.name: rows.read(path) for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise ValueError(f"bench collect: expected *.jsonl files in {folder}, got none; pass the folder that gpu_run.sh "
                         f"wrote")
    measured_on = {(row["environment"]["kind"], row["environment"]["device"]) for found in files.values() for row in found}
    if len(measured_on) != 1 or "cpu" in next(iter(measured_on)):
        names = ", ".join(sorted(device for _, device in measured_on)) or "no rows"
        raise ValueError(f"bench collect: expected the rows of one GPU, got {names}; results of CPUs are not kept")
    ((_, device),) = measured_on
    target = Path(benchmarks.__path__[0]) / "results" / slug(device)
    target.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        save_text(target / name, "".join(json.dumps(row) + "\n" for row in found))
    print(f"wrote {len(files)} files to {os.path.relpath(target)}; sora-fast bench readme brings README.md up to date")
    return 0


def slug(device: str) -> str:
    """"nvidia-h200" of "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def readme(arguments) -> int:
    """Write README.md's measured tables from the committed results, or say that they differ."""
    from ..benchmarks import tables

    tables.update_readme(Path(arguments.file), check=arguments.check)
    print(f"{arguments.file} {'matches' if arguments.check else 'holds'} the committed results")
    return 0
