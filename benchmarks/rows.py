"""Rows: one line of JSON per measurement, each with everything it takes to read it alone.

A row with ``"row": "time"`` is one op (or model step) at one shape in one direction by one provider:

    schema 1; suite, family, op, case, direction, provider, dtype, shape: what was measured
    status: PASSED, FAILED (the gate), UNSUPPORTED, ERROR; reason: a sentence for the last three
    error, allowed, gate: the worst compared tensor's largest error, what the rule allowed, what was compared, in words
    min_ms, p20_ms, median_ms, q3_ms, p80_ms, n: of one call; only a PASSED row has them
    timer: graph, events or wall; l2: cold or hot; clock_mhz: SM clock, mean of before and after, or null
    flops, bytes: of the case in this direction; roof: matrix or copy, whichever takes longer; floor_ms: what it takes at
        the measured roof; share: floor_ms / median_ms, or null where the roof says nothing about such a working set
    peak_bytes: most memory beyond the inputs that one call held; saved_bytes: what a forward keeps for its backward
    mfu: FLOPs over the chip's published peak (model rows), or null
    details: what the provider says of itself (which kernel ran); command: what makes this row again
    environment: see sora_fast.environment.environment()

A row with ``"row": "host"`` is what Python costs before a launch (host_time.COLUMNS), in microseconds and in calls.

A row with ``"row": "roof"`` is a limit of the machine: kind ("matrix" in FLOP/s, "copy" in bytes/s), dtype, bytes (the
working set), rate, published (null where the chip is not in the table), source, l2, timer, n, environment.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from sora_fast import files

SCHEMA = 1
# Rows that differ in one of these were not measured under the same conditions.
CONDITIONS = ("device", "driver", "torch", "triton", "cuda", "cudnn", "threads", "tf32", "commit", "changed")


def key(row: Mapping) -> tuple:
    """What a time row measures; two rows with one key are two measurements of the same thing."""
    return (row["suite"], row["op"], row["case"], row["direction"], row["provider"], row["dtype"])


def read(path: str | Path) -> list[dict]:
    """The rows of a file. A last line cut short by a killed process is left out; any other bad line is an error."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or row.get("schema") != SCHEMA:
                raise ValueError("bad row")
        except ValueError:
            if number == len(lines):  # no newline after it: it was never finished
                continue
            raise ValueError(f"bench: expected a row of schema {SCHEMA} in line {number} of {path}, got {line[:60]!r}; "
                             f"pass a file that sora-fast bench wrote") from None
        rows.append(row)
    return rows


def read_run(path: str | Path) -> list[dict]:
    """The rows of a file, or of a folder's bench*.jsonl."""
    path = Path(path)
    if not path.is_dir():
        return read(path)
    files = sorted(path.glob("bench*.jsonl"))
    if not files:
        raise ValueError(f"bench: expected bench.jsonl in the folder {path}, got no such file; pass what sora-fast "
                         f"bench was told as --out")
    return [row for file in files for row in read(file)]


def append(path: Path, rows: Iterable[Mapping]) -> None:
    """Add whole rows to a file and wait until they are on the disk; a torn last line of an earlier run is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with open(path, "ab+") as file:
        file.seek(0)
        kept = file.read()
        if kept and not kept.endswith(b"\n"):
            file.truncate(kept.rfind(b"\n") + 1)
    files.append(path, text, flush=True)


def arguments_of(program: str, text: str, gpu: str, jsonl: str, arguments: list[str] | None) -> argparse.Namespace:
    """--device and --jsonl of a program that writes rows of its own; a file it cannot write is told before any work."""
    parser = argparse.ArgumentParser(prog=f"python -m sora_fast.benchmarks.{program}", description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help=f"{gpu}; on any other the reason is printed (default cuda)")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help=jsonl)
    asked = parser.parse_args(arguments)
    try:
        if asked.jsonl:
            files.check_file("--jsonl", asked.jsonl)
    except OSError as error:
        parser.error(str(error))
    return asked
