"""sora-fast validate."""

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ..files import check_file, save_text
from .parsing import DTYPES

DESCRIPTION = """\
Ours:  sora-fast validate --op norm_modulate --backend torch
Yours: sora-fast validate --op norm_modulate --impl my_package.kernels:norm_modulate
Your function takes the op's keyword arguments and returns what it returns.
Without a GPU: --device emulated:sm90 executes the PTX of Triton kernels, yours too, for that GPU.
A whole model of diffusers beside its accelerated self, layer by layer:
       sora-fast validate --model AutoencoderKLWan      (tiny and random)
       sora-fast validate --model path/to/vae           (a folder of save_pretrained)"""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--op", action="append", help="op to check; repeat for several (default: all)")
    add("--impl", metavar="PKG.MOD:FN", help="your function, for one --op")
    add("--model", metavar="CLASS|FOLDER",
        help="a model of diffusers, plain and accelerated, in place of ops (default: ops)")
    add("--backend", action="append", help="backend of ours; repeat for several (default: all there are)")
    add("--dtype", action="append", choices=DTYPES, help="repeat for several (default: the last three)")
    add("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT, those at models' sizes among them; "
                                                   "no records come of a part (default: all)")
    add("--small", action="store_true", help="without the cases at models' sizes, which a GPU has; no records come of it "
                                               "(default: with them)")
    add("--device", default="auto",
        help="auto (a GPU where there is one), cpu, cuda, or a GPU that is emulated, as in emulated:sm90")
    add("--schedules", type=int, metavar="N", help="emulated: each launch under N schedules: asynchronous copies late, "
                                                   "early, at random times (default: late alone)")
    add("--race", action="store_true", help="emulated: look for races and missing fences too (default: not)")
    add("--counters", action="store_true", help="emulated: what each kernel executed and moved (default: not)")
    add("--jobs", type=int, default=1, metavar="N", help="emulated: N processes")
    add("--jsonl", metavar="FILE", help="also write a line of JSON per op, backend, dtype and direction")


def run(arguments) -> int:
    """Print one report per op and backend; 0 only if every comparison passed, 1 if not, ValueError for wrong flags.

    What was named has not passed where it refused everything: a function a dtype and direction, a backend an op or a dtype
    that was named too. That it lacks a direction, as a kernel without a backward does, is no failure.
    """
    if arguments.model is not None:
        return _model(arguments)
    import torch

    from ..explanation import all_ops
    from ..named import load_function

    table = all_ops()
    unknown = [name for name in arguments.op or () if name not in table]
    if unknown:
        raise ValueError(f"--op: expected ops among {', '.join(table)}, got {', '.join(unknown)}; check the name")
    if arguments.impl and len(arguments.op or ()) != 1:
        raise ValueError(f"--impl: expected exactly one --op to compare it with, got {len(arguments.op or [])}; name the "
                         f"op that your function computes")
    if arguments.impl and arguments.backend:
        raise ValueError("--impl: expected no --backend beside it, got one; a function of yours has no backend of ours")
    known = ["auto", *dict.fromkeys(name for op in table.values() for name in op.backends)]
    for backend in arguments.backend or ():
        if backend not in known:
            raise ValueError(f"--backend: expected one of {', '.join(known)}, got {backend!r}; choose one of them")
    if arguments.jsonl:
        check_file("--jsonl", Path(arguments.jsonl))
    device = _device(arguments)
    dtypes = [getattr(torch, name) for name in arguments.dtype or ("float32", "bfloat16", "float16")]
    if arguments.impl:
        load_function(arguments.impl, "--impl")  # or its sentence, before any work
    work = _work(table, arguments, device, dtypes)
    reports = []
    for report, counted in _reports(work, device, dtypes, arguments):
        reports.append(report)
        for each in report.tracebacks[:1]:  # a bug of the user's keeps its traceback; the report counts the others
            print(each, file=sys.stderr, end="")
        print("\n".join([str(report), *counted]), flush=True)
        _keep(report)
        if arguments.jsonl:  # after each report: a run that is killed keeps what it has found
            path = Path(arguments.jsonl)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_text(path, "".join(each.to_jsonl() for each in reports))
        if report.stopped:
            break
    if arguments.jsonl:
        print(f"wrote {arguments.jsonl}")
    if arguments.case and not any(row.ran or row.raised or row.refused for report in reports for row in report.rows):
        raise ValueError(f"--case: expected a part of the name of a case of these ops, got {arguments.case!r}; "
                         f"sora_fast.testing.cases yields their names")
    rows = [row for report in reports for row in report.rows if not _excused(row, report, arguments)]
    passed = bool(rows) and all(row.passed for row in rows) and not any(report.stopped for report in reports)
    print("validate: every comparison passed" if passed else "validate: FAILED")
    return 0 if passed else 1


def _device(arguments) -> str:
    """The device's name, and one sentence for a flag that goes with another."""
    if arguments.device.startswith("emulated:"):
        return arguments.device
    given = [flag for flag, value in (("--schedules", arguments.schedules is not None), ("--race", arguments.race),
                                      ("--counters", arguments.counters), ("--jobs", arguments.jobs != 1)) if value]
    if given:
        raise ValueError(f"{given[0]}: expected --device emulated:sm90 or another beside it, got --device "
                         f"{arguments.device}; add it, or leave {given[0]} out")
    from ..named import pick_device

    return str(pick_device(arguments.device))


def _reports(work, device: str, dtypes, arguments) -> Iterator[tuple]:
    """A report for each op and backend, in order, and lines on what its kernels did."""
    import torch

    total = len(work)
    if arguments.jobs == 1:
        for place, (name, backend) in enumerate(work, start=1):
            progress = lambda text, place=place: _progress(f"{place} of {total}: {text}")
            found = _one(name, backend, device, dtypes, arguments, progress)
            _progress("")
            yield found
        return
    if arguments.jobs < 1:
        raise ValueError(f"--jobs: expected 1 or more processes, got {arguments.jobs}; pass how many there are cores")
    pieces = [(name, backend, dtype) for name, backend in work for dtype in dtypes]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = [pool.submit(_one, name, backend, device, (dtype,), arguments) for name, backend, dtype in pieces]
        for place, each in enumerate(running, start=1):
            _progress(f"{place} of {len(pieces)}: {' '.join(map(str, pieces[place - 1]))}")
            found = each.result()
            _progress("")
            yield found


def _one(name, backend, device, dtypes, arguments, progress=lambda text: None) -> tuple:
    """The report, and lines on what its kernels did."""
    from ..named import load_function
    from ..testing import emulated_gpu, validate

    function = load_function(arguments.impl, "--impl") if arguments.impl else None
    run = lambda: validate(name, function, backend=backend, device=device, dtypes=dtypes, progress=progress,
                           case=arguments.case, models=False if arguments.small else None)
    if not device.startswith("emulated:"):
        return run(), []
    schedules = "late" if arguments.schedules is None else arguments.schedules
    scope = emulated_gpu(device.partition(":")[2], schedules=schedules, race=arguments.race, counters=arguments.counters)
    with scope as emulator:
        report = run()
    if not arguments.counters:
        return report, []
    from ..emulator.counters import table

    return report, table(emulator.records)


def _excused(row, report, arguments) -> bool:
    """Whether nobody asked for just what ``row`` refused whole: a device, an op, a dtype, or a direction of a backend."""
    if arguments.impl or not row.refused_whole:
        return False
    if not arguments.backend or not arguments.op:
        return True
    return any(not other.refused_whole for other in report.rows if other.dtype == row.dtype or not arguments.dtype)


def _model(arguments) -> int:
    """A model beside its accelerated self; 0 only if every output and gradient is as right as the original's."""
    import torch

    from ..integrations.comparison import compare, open_model
    from ..named import pick_device

    other = [name for name in ("op", "impl", "backend", "jsonl", "case", "small") if getattr(arguments, name)]
    if other:
        raise ValueError(f"--model: expected no --{other[0]} beside it, got one; --dtype and --device are for models too")
    model, passed = open_model(arguments.model), True
    for name in arguments.dtype or ("float32",):
        found = compare(model, dtype=getattr(torch, name), device=pick_device(arguments.device), progress=_progress)
        _progress("")
        print(f"{name}\n{found}", flush=True)
        passed = passed and found.passed
    print("validate: as right as the original" if passed else "validate: FAILED")
    return 0 if passed else 1


def _work(table, arguments, device: str, dtypes) -> list[tuple[str, str]]:
    """The pairs of op and backend that are to be checked; a sentence for each that does not exist."""
    work = []
    for name in arguments.op or table:
        for backend in arguments.backend or ([*table[name].backends] if not arguments.impl else ["auto"]):
            if backend in ("auto", *table[name].backends):
                work.append((name, backend))
            elif arguments.op:  # says what the op has
                table[name].choose(table[name].example(device, dtypes[0], True), backend)
            else:
                print(f"not run: {name} has no {backend} backend", flush=True)
    return work


def _keep(report) -> None:
    """Merge the rows of kernels on a CUDA GPU into the user's records, and say so."""
    from .. import records

    try:
        path = records.save(report.to_dicts())
    except OSError as error:
        print(f"validate: expected to write records to {records.user_file()}, got: {error}; set SORA_FAST_CACHE to a folder "
              f"that can be written", file=sys.stderr)
        return
    if path is not None:
        print(f"records of these kernels are in {path}; auto takes those that passed", flush=True)


def _progress(text: str) -> None:
    """One line on a terminal's stderr that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:120]}", file=sys.stderr, end="", flush=True)
