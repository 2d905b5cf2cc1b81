"""sora-fast bench."""

from pathlib import Path

from ..files import claimed

DESCRIPTION = """\
Measures ops (families patches, modulation, rotary, attention, convolution, normalization, latents)
and whole models (model). Only what agrees with the reference in float64 gets a time. Writes
OUT/bench.jsonl and OUT/report.html; the same command goes on where a run was stopped. Exits with 1 if
one of our backends failed, with 3 if --minutes left cases for the next call.

  sora-fast bench attention --suite full --device cuda
  sora-fast bench --op norm_modulate --impl my_package.kernels:norm_modulate_fast
  sora-fast bench compare old new --fail-slower 5%
  sora-fast bench report h100 h200 --out both"""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help="families to measure (default: all, and model)")
    add("--suite", choices=("quick", "full", "model"), default="quick",
        help="quick: small sizes, minutes on a CPU; full: real models' sizes, for a GPU; model: whole steps of real models")
    add("--quick", action="store_true", help="the same as --suite quick (default: as --suite says)")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--l2", choices=("cold", "hot"),
        help="whether inputs have left the GPU's L2 when they are read (default: cold on a GPU, hot on a CPU)")
    add("--providers", nargs="+", metavar="NAME", help="only these (default: all)")
    add("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT (default: all)")
    add("--op", metavar="OP", help="only cases of this op (default: all)")
    add("--impl", metavar="PKG.MOD:FN",
        help="your function for --op, measured beside all others: it takes the op's keyword arguments (default: none)")
    add("--list", action="store_true", help="print the cases and their providers (default: measure)")
    add("--minutes", type=float, default=0.0, help="begin no case after so long; 0: never stop")
    add("--fresh", action="store_true", help="begin again (default: go on with OUT/bench.jsonl)")
    add("--out", default="out/bench", help="folder for rows and report")


def run(arguments) -> int:
    """Measure, print every row as it comes, and write OUT/bench.jsonl and the report.

    Returns 1 if one of our backends or the user's function failed, 3 if --minutes left cases for the next call, else 0.
    """
    from ..benchmarks import figures, host_time, report, suites, timing
    from ..benchmarks.runner import Runner, Settings
    from ..named import pick_device
    from ..ops import FAMILIES

    device = pick_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: expected a CPU or a CUDA device to time, got {device}; pass --device cpu or cuda")
    suite = "quick" if arguments.quick else arguments.suite
    l2 = arguments.l2 or ("cold" if device.type == "cuda" else "hot")
    if device.type == "cpu" and l2 == "cold":
        raise ValueError("bench: expected --l2 hot on a CPU, whose caches are not emptied between calls, got cold; leave "
                         "--l2 out")
    named = arguments.providers or ()
    every = suites.work(arguments.families, suite, device.type, spare_compiling=device.type == "cpu" and not named)
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
        runner = Runner(settings, tell=lambda text: print(text, flush=True), show=_show)
        done = runner.run(work)
        whole = not (arguments.op or arguments.case or named) and set(FAMILIES) <= {family for family, _, _ in work}
        if device.type == "cuda" and whole and not runner.left and all(row["row"] != "host" for row in done):
            print("host time of each op", flush=True)
            runner.write(host_time.complete(host_time.measure(device, lambda row: None), device, l2))
        report.write([(out.name, done)], out)
    measured = figures.measurements(done)
    print(_ending(measured))
    print(f"wrote {out / 'bench.jsonl'} ({len(done)} rows) and {out / 'report.html'}")
    answerable = lambda name: figures.is_own(name) or arguments.impl and name == mine
    ours = [row for row in measured if answerable(row["provider"]) and row["status"] in ("FAILED", "ERROR")]
    for row in ours:
        what = " / ".join(row[name] for name in ("op", "case", "direction", "provider"))
        print(f"bench: {what} {row['status']}: {row['reason']}")
    return 1 if ours else 3 if runner.left else 0


def _with_function(work: list[tuple], op: str | None, path: str) -> tuple[list[tuple], str]:
    """The cases of ``op`` with the function ``path`` as one more provider, and that provider's name."""
    from ..benchmarks.case import Provider
    from ..named import load_function

    if not op:
        raise ValueError("bench: expected --op beside --impl, got none; name the op that your function computes")
    function = load_function(path, "--impl")
    name = getattr(function, "__name__", path.rpartition(":")[2])
    taken = {provider.name for _, _, providers in work for provider in providers}
    if name in taken:
        raise ValueError(f"bench: expected --impl to have a name of its own among {', '.join(sorted(taken))}, got {name!r}; "
                         f"rename the function")
    mine = Provider(name, function)
    return [(family, case, [*providers, mine]) for family, case, providers in work], name


def _say_conditions(settings) -> None:
    import torch

    from ..environment import device_label

    where = device_label(settings.device)
    threads = f", {torch.get_num_threads()} threads" if settings.device.type == "cpu" else f", L2 {settings.l2}"
    print(f"{where}{threads}, torch {torch.__version__}, suite {settings.suite}")


def _show(rows: list[dict]) -> None:
    """A case's rows for a terminal; why a provider could not run is said once, at the end."""
    from ..benchmarks import figures

    for cell in figures.group(rows, *figures.CELL).values():
        mark = f"  {figures.TOO_SMALL}" if figures.too_small(cell) else ""
        for row in cell:
            name = f"    {row['direction']:9s} {row['provider']:24s}"
            if row["status"] == "PASSED":
                share = f"{row['share']:6.1%} of the limit" if row["share"] is not None else ""
                print(f"{name} {row['median_ms']:11.4f} ms  {share}{mark}", flush=True)
            elif row["status"] != "UNSUPPORTED":
                print(f"{name} {row['status']:11s} {row['reason']}", flush=True)


def _ending(rows: list[dict]) -> str:
    """How many rows of ours and of peers ended how; then each reason not to run once, with those that gave it."""
    from collections import Counter

    from ..benchmarks.figures import STATUSES, group, is_own

    lines = []
    for who, own in (("ours", True), ("peers", False)):
        counts = Counter(row["status"] for row in rows if is_own(row["provider"]) == own)
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        lines.append(f"{who}: {told or 'no rows'}")
    for (reason,), theirs in group((row for row in rows if row["status"] == "UNSUPPORTED"), "reason").items():
        names = ", ".join(dict.fromkeys(row["provider"] for row in theirs))
        lines.append(f"not run, {len(theirs)} {'row' if len(theirs) == 1 else 'rows'} of {names}: {reason}")
    return "\n".join(lines)
