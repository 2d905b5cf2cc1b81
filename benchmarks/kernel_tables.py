"""The tables on a kernel family's page in docs/kernels: what is predicted, what its machine code says, what has passed.

Read from kernels/predicted.json (``evidence.keep``), tests/structure.json (tests/structure.py) and kernels/proof.jsonl
(tests/proof.py).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from sora_fast import files, records
from sora_fast.explanation import all_ops

from .evidence import KERNELS
from .tables import Table


def block(family: str, kernels: Path = KERNELS) -> str:
    """The three tables of ``family``, from the files in ``kernels`` and the structure.json beside."""
    guessed = [row for row in json.loads(files.read_text(kernels / "predicted.json") or "[]") if row["family"] == family]
    structure = json.loads(files.read_text(kernels.parent / "tests" / "structure.json"))["kernels"]
    found = {gpu: of_family[family] for gpu, of_family in structure.items() if family in of_family}
    proven = list(files.json_lines(files.read_text(kernels / "proof.jsonl")))
    parts = ((_prediction_title(guessed), _predicted(guessed)), (_structure_title(found), _structure(found)),
             ("**In the emulator**: calls that pass under three schedules, and their largest error as a share of what the "
              "error rule allows.", _emulated(family, proven)))
    return "\n\n".join(text for title, table in parts if table.rows for text in (title, table.markdown()))


def _prediction_title(rows: Sequence[dict]) -> str:
    if any(row["kernel_hash"] != records.kernel_hash(row["family"]) for row in rows):
        return "**Predicted** for other kernels than these: run `sora-fast predict`."
    errors = "; ".join(dict.fromkeys(row["error"] for row in rows))
    unit = "TFLOP/s of the main loop" if any(row["tflops"] for row in rows) else "percent of the copy rate"
    return f"**Predicted on an {rows[0]['gpu']}**, {unit}. The model's error: {errors}." if rows else ""


def _predicted(rows: Sequence[dict]) -> Table:
    """A line for each case, a column for each kernel; launches of one kernel in one case stand together."""
    names = list(dict.fromkeys(_plain(row["kernel"]) for row in rows))
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        rate = row["tflops"] or (row["copy_share"] and 100 * row["copy_share"])
        case = row["case"].replace(", sm90", "").replace(", padding 0%", "")
        if rate:
            cells.setdefault(case, {}).setdefault(_plain(row["kernel"]), []).append(f"{rate:.0f}")
    lines = [(case, *(" and ".join(dict.fromkeys(of.get(name, ()))) for name in names)) for case, of in cells.items()]
    return Table(("case", *names), lines, frozenset(range(1, len(names) + 1)))


def _structure_title(found: dict[str, dict]) -> str:
    issued = any("issue" in entry for kernels in found.values() for entry in kernels.values())
    return ("**In the machine code**: CTAs per SM and what limits them" + (
        "; the time to issue all instructions as a share of the time that DRAM needs." if issued else "."))


def _structure(found: dict[str, dict]) -> Table:
    """A line for each kernel, a column for each architecture; ``found``: its entries of structure.json by architecture."""
    names = sorted({name for kernels in found.values() for name in kernels})
    lines = [(_plain(name), *(_occupancy(kernels.get(name)) for kernels in found.values()),
              "; ".join(dict.fromkeys(_faults(kernels.get(name) for kernels in found.values())))) for name in names]
    return Table(("kernel", *found, "known faults"), lines)


def _occupancy(entry: dict | None) -> str:
    if not entry:
        return ""
    return f"{entry['blocks']} ({entry['limit']})" + (f"; {entry['issue']}%" if "issue" in entry else "")


def _faults(entries: Iterable[dict | None]) -> Iterable[str]:
    for entry in entries:
        yield from (f"{fault}: {why}" for fault, why in (entry or {"faults": {}})["faults"].items())


def _emulated(family: str, rows: Sequence[dict]) -> Table:
    """A line for each op and backend, a column for each architecture."""
    backends = [(name, backend.name) for name, op in all_ops().items() for backend in op.backends.values()
                if backend.kernel and any(other.kernel == family for other in op.backends.values())]
    gpus = sorted({row["emulated"] for row in rows})
    lines = []
    for name, backend in backends:
        mine = [row for row in rows if (row["op"], row["backend"]) == (name, backend) and not row["refused"]]
        passed = [row for row in mine if row["passed"]]
        counts = [str(sum(row["emulated"] == gpu for row in passed)) for gpu in gpus]
        worst = max((row["error"] / row["allowed"] for row in passed if row.get("allowed")), default=None)
        lines.append((name, backend, *counts, "" if worst is None else f"{worst:.0%}", str(len(mine) - len(passed))))
    places = frozenset(range(2, len(gpus) + 4))
    heads = ("op", "backend", *(gpu.replace("sm", "sm_") for gpu in gpus), "largest error", "calls that fail")
    return Table(heads, lines, places)


def _plain(kernel: str) -> str:
    """norm_act of norm_act_kernel<float, float, 4, 6>: instances of a template share a column."""
    return kernel.partition("<")[0].removesuffix("_kernel")
