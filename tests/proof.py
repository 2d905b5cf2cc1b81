"""Every kernel in the emulator, case by case: ``python tests/proof.py`` runs what is missing in kernels/proof.jsonl, and
writes kernels/PROOF.md from it.

A row is one call, forward and backward, of one op in one dtype, compiled for one architecture and executed under three
schedules: asynchronous copies and MMAs as late as the PTX ISA allows, at once, and at random times with warps in random
order. The results of each must obey the error rule. The first case of each op in
bfloat16 on sm80 and sm90 runs with the race detector. Rows belong to a kernel's hash and a Triton minor version. After a
change of a kernel its calls are compiled anew: where launches, instructions and arguments are what they were (a name or
another GPU's heuristics have changed), the row holds on; where not, it is dropped, and missing again. The command can be
stopped at any time and goes on where it was. Rows are no validation records.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import proof_cases
import torch

from sora_fast import files, ops, records
from sora_fast.explanation import all_ops
from sora_fast.ops import cuda_backend
from sora_fast.testing import Truth, cases, emulated_gpu, truth
from sora_fast.testing.rule import random_cotangents, run

ROOT = Path(__file__).resolve().parents[1]
ROWS, TABLE = ROOT / "kernels" / "proof.jsonl", ROOT / "kernels" / "PROOF.md"
DTYPES = ("bfloat16", "float16", "float32")
ARCHS = ("sm90", "sm80")
FORWARD_ONLY = ("varlen_attention_forward", "varlen_attention_backward")  # without a backward of their own
SCHEDULES = ("late", "early", "random")
KEY = ("op", "backend", "emulated", "dtype", "kind", "case", "kernel_hash", "triton")  # of a row


@dataclass(frozen=True)
class Call:
    """One row to make: ``place`` of the case among those of ``kind``, "testing" or "wide"."""

    op: str
    backend: str
    arch: str
    dtype: str
    kind: str
    place: int
    label: str

    @property
    def kernel(self) -> str:
        return all_ops()[self.op].backends[self.backend].kernel

    @property
    def race(self) -> bool:
        return self.kind == "testing" and self.place == 0 and self.dtype == "bfloat16"

    def key(self) -> tuple:
        return (self.op, self.backend, self.arch, self.dtype, self.kind, self.label,
                records.kernel_hash(self.kernel, self.backend), records.triton_minor() if self.backend == "triton" else None)


def inputs_of(op: str, dtype: str, kind: str):
    made = proof_cases.wide_cases(op, getattr(torch, dtype)) if kind == "wide" else cases(op, getattr(torch, dtype),
                                                                                          "emulated:sm90")
    return list(made)


@functools.cache
def labels(op: str, kind: str) -> tuple[str, ...]:
    """Of the cases, the same in every dtype (float16's may be fewer)."""
    return tuple(label for label, _ in inputs_of(op, "float16", kind))


def calls() -> list[Call]:
    """Everything that is to be proven: a case of each first, what takes longest last."""
    found = []
    for name, op in all_ops().items():
        for backend in ("triton", "cuda"):
            if backend not in op.backends or backend == "cuda" and cuda_backend.extension()[1]:
                continue
            for kind in ("testing", "wide"):
                for dtype in DTYPES:
                    found += [Call(name, backend, arch, dtype, kind, place, label)
                              for place, label in enumerate(labels(name, kind)) for arch in ARCHS]
    large = lambda call: call.op.endswith("conv3d") and (call.place > 10 or call.dtype == "float32")
    return sorted(found, key=lambda call: (large(call), call.place > 0, DTYPES.index(call.dtype), call.kind == "wide",
                                           ARCHS.index(call.arch)))


def prove(call: Call) -> dict:
    """The row of one call."""
    label, inputs = inputs_of(call.op, call.dtype, call.kind)[call.place]
    public = getattr(ops, call.op)
    row = dict(zip(KEY, call.key(), strict=True))
    row |= dict(row="proof", kernel=call.kernel, race=call.race, schedules=len(SCHEDULES), passed=False, refused=None,
                failure=None)
    start = time.perf_counter()
    wanted = truth(call.op, inputs, grads=has_gradients(call))
    launched = []
    for schedule in SCHEDULES:
        with emulated_gpu(call.arch, schedules=schedule, race=call.race) as emulator:
            launched = emulator.records
            if not _judge(row, wanted, lambda **given: public(**given, backend=call.backend)):
                break
    row |= dict(launches=len(launched), instructions=sum(each.instructions for each in launched),
                digest=digest(launched), seconds=round(time.perf_counter() - start, 1))
    return row


def digest(launched) -> str:
    """Of the launches of one call."""
    return hashlib.sha256(" ".join(each.digest for each in launched).encode()).hexdigest()[:16]


def launches_alike(row: dict, call: Call) -> bool:
    """Whether ``call`` still launches what it did when ``row`` was made; nothing is executed."""
    _, inputs = inputs_of(call.op, call.dtype, call.kind)[call.place]
    op, cotangents = getattr(ops, call.op), None
    if has_gradients(call):
        cotangents = random_cotangents(run(functools.partial(op, backend="reference"), inputs, None)[0], seed=0)
    with emulated_gpu(call.arch) as emulator:
        emulator.dry = True
        try:
            run(functools.partial(op, backend=call.backend), inputs, cotangents)
        except NotImplementedError as refusal:
            return row["refused"] == str(refusal)
    return row["passed"] and row.get("digest") == digest(emulator.records)


def has_gradients(call: Call) -> bool:
    return call.backend == "triton" and call.op not in FORWARD_ONLY


def _judge(row: dict, wanted: Truth, fn) -> bool:
    """Write into ``row`` what came of ``fn`` under one schedule; whether the next one is to be tried."""
    try:
        found = wanted.compare(fn)
        worst = max(found, key=lambda each: each.severity)
        row |= dict(passed=all(each.passed for each in found), error=worst.error_max, allowed=worst.allowed_max,
                    tensor=worst.name)
    except NotImplementedError as refusal:
        row |= dict(passed=False, refused=str(refusal))
    except Exception as error:  # a finding, or a fault of the emulator's: either way it is not proven
        row |= dict(passed=False, failure=f"{type(error).__name__}: {error}")
    return row["passed"]


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def rows() -> list[dict]:
    return list(files.json_lines(files.read_text(ROWS)))


def is_current(row: dict) -> bool:
    """Of the kernel as it stands. Of CUDA's kernels nothing is known where they are not built."""
    now = records.kernel_hash(row["kernel"], row["backend"])
    return row["kernel_hash"] == now or row["backend"] == "cuda" and now is None


def renew(wanted: Callable[[str], bool], late: Callable[[], bool]) -> bool:
    """Drop rows of kernels that launch something else now; of others the hash becomes the present one.

    True if it became ``late``: rows may be left.
    """
    without_hash = lambda key: tuple(part for name, part in zip(KEY, key, strict=True) if name != "kernel_hash")
    known = {without_hash(call.key()): call for call in calls()}
    stale = [row for row in rows() if not is_current(row) and wanted(row["op"])]
    if stale:
        print(f"{len(stale)} rows of changed kernels: each call is compiled, to see whether it launches what it did",
              flush=True)
    for place, row in enumerate(stale, start=1):
        call = known.get(without_hash(key_of(row)))
        alike = call is not None and launches_alike(row, call)
        now = [row | dict(zip(KEY, call.key(), strict=True))] if alike else []

        def replace(text, row=row, now=now):
            kept = [now if key_of(each) == key_of(row) else [each] for each in files.json_lines(text)]
            return "".join(json.dumps(each) + "\n" for each in sum(kept, []))

        files.edit(ROWS, replace)
        print(f"{place} of {len(stale)}: {', '.join(row[name] for name in KEY[:6])}: {'holds on' if alike else 'dropped'}",
              flush=True)
        if late():
            return True
    return False


def table(found: list[dict]) -> str:
    """PROOF.md: for each op, backend and architecture, how much of what is to be proven has been."""
    proven, cells = {key_of(row): row for row in found}, {}
    for call in calls():
        cell = cells.setdefault((call.op, call.backend, call.arch), {dtype: Counter() for dtype in DTYPES} | {"race": "-"})
        row = proven.get(call.key())
        verdict = "missing" if row is None else "refused" if row["refused"] else "passed" if row["passed"] else "failed"
        cell[call.dtype][verdict] += 1
        if call.race and verdict == "passed":
            cell["race"] = "yes"
    failed = [row for row in found if not row["passed"] and not row["refused"]]
    done = sum(row["passed"] for row in found)
    lines = ["# What passes in the emulator", "",
             "Made by `python tests/proof.py` from `kernels/proof.jsonl`: calls of every op, forward and backward, compiled",
             "for an architecture and executed on a CPU under three schedules (asynchronous copies and MMAs late, early, at",
             "random times). The results of each obey the error rule, and nothing was found. This is no validation:",
             "what ptxas makes of the PTX, and the GPU of that, is seen on hardware alone.", "",
             f"{done:,} calls pass, of kernels as they stand now, in {sum(row['instructions'] for row in found):,} warp "
             f"instructions; {len(failed)} fail.", "",
             "| op | backend | emulated | " + " | ".join(DTYPES) + " | races looked for |",
             "| --- | --- | --- |" + " --- |" * 4]
    for (op, backend, arch), cell in cells.items():
        words = []
        for dtype in DTYPES:
            count = cell[dtype]
            asked = sum(count.values()) - count["refused"]
            words.append(f"{count['passed']} of {asked}" + (f", **{count['failed']} fail**" if count["failed"] else "")
                         if asked else "not taken")
        lines.append(f"| {op} | {backend} | {arch} | {' | '.join(words)} | {cell['race']} |")
    if failed:
        lines += ["", "## Failures", ""]
        rule = "the error rule: {tensor}, error {error:.2e}, allowed {allowed:.2e}"
        lines += [f"- {row['op']}, {row['backend']}, {row['emulated']}, {row['dtype']}, {row['case']!r}: "
                  f"{row['failure'] or rule.format(**row)}" for row in failed]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the row that ends later than this")
    parser.add_argument("--op", action="append", help="only these ops; repeat for several")
    arguments = parser.parse_args()
    start = time.monotonic()
    late = lambda: time.monotonic() - start > 60 * arguments.minutes
    wanted = lambda op: not arguments.op or op in arguments.op
    stopped = renew(wanted, late)
    done = {key_of(row) for row in rows()}
    missing = [] if stopped else [call for call in calls() if call.key() not in done and wanted(call.op)]
    for place, call in enumerate(missing, start=1):
        row = prove(call)
        files.edit(ROWS, lambda text, row=row: text + json.dumps(row) + "\n")
        verdict = "passed" if row["passed"] else "refused" if row["refused"] else "FAILED"
        print(f"{place} of {len(missing)}: {call.op}, {call.backend}, {call.arch}, {call.dtype}, {call.label!r}: {verdict} "
              f"({row['seconds']} s)", flush=True)
        if late():
            break
    found = rows()
    files.save_text(TABLE, table(found))
    return 0 if all(row["passed"] or row["refused"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
