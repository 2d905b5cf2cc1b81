"""README's table of evidence: what of each family of kernels compiles, passes in the emulator, is predicted and validated.

Read from files that commands write: kernels/proof.jsonl (tests/proof.py), kernels/predicted.json (``keep``) and the
validation records in benchmarks/results/.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from sora_fast import files, records
from sora_fast.explanation import all_ops
from sora_fast.kernels.arch import SHARED

from .tables import Table

KERNELS = Path(records.__file__).parents[1] / "kernels"  # in a checkout; an installed package has no table to write
FAMILIES = {"attention": "variable-length attention", "convolution": "causal 3-D convolution",
            "normalization": "norm + SiLU", "modulation": "adaLN, gated residual", "rotary": "QK norm + 3-D RoPE",
            "patches": "patch embedding"}


def keep(predictions: Iterable[dict], path: Path = KERNELS / "predicted.json") -> int:
    """Write what the table needs of ``predictions``, the predictions.json of ``sora-fast predict``; how many it keeps."""
    rows = []
    for each in predictions:
        family, _, case = each["case"].partition(" ")
        direction = each["direction"].partition(" ")[0]  # of TMA's convolution: "forward or dgrad"
        if direction in ("forward", "backward") and family in FAMILIES:
            rows.append(dict(family=family, kernel=each["kernel"], case=case, direction=direction, gpu=each["gpu"],
                             kernel_hash=records.kernel_hash(family), tflops=each["loop_tflops"] or each["tflops"],
                             copy_share=each["copy_share"], error=each["error"]))
    order = list(FAMILIES)
    rows.sort(key=lambda row: (order.index(row["family"]), row["direction"] != "forward", row["kernel"], row["case"]))
    files.save_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return len(rows)


def block(results: Path, kernels: Path = KERNELS) -> str:
    """The table, from the files in ``kernels`` and the validation records in ``results``."""
    proven = list(files.json_lines(files.read_text(kernels / "proof.jsonl")))
    guessed = json.loads(files.read_text(kernels / "predicted.json") or "[]")
    judged = [record for path in sorted(results.glob("*/validate.jsonl"))
              for record in files.json_lines(files.read_text(path))]
    names = {name: {backend.kernel for backend in op.backends.values() if backend.kernel} for name, op in all_ops().items()}
    lines = []
    for family, title in FAMILIES.items():
        ops = [name for name, kernels_of in names.items() if family in kernels_of]
        passed = [row for row in proven if row["passed"] and row["op"] in ops]
        failed = sum(not row["passed"] and not row["refused"] for row in proven if row["op"] in ops)
        gpus = sorted({record["gpu"] for record in judged if record["op"] in ops and record.get("passed")})
        lines.append((f"[{title}](docs/kernels/{family}.md)",
                      f"{len(passed):,}" + (f", {failed} fail" if failed else ""),
                      _spread([row for row in guessed if row["family"] == family]), ", ".join(gpus) or "none yet"))
    gpu = guessed[0]["gpu"] if guessed else "H200"
    heads = ("kernels", "[pass in the emulator](kernels/PROOF.md)", f"predicted on an {gpu}, 16 bits", "validated on")
    compiled = f"All compile for sm_{', '.join(str(capability) for capability in SHARED)}."
    return "\n\n".join(filter(None, (Table(heads, lines).markdown(), " ".join(filter(None, (compiled, _errors(guessed)))))))


def _errors(rows: Sequence[dict]) -> str:
    """How far the model was off, for each kind of kernel: no predicted figure stands without it."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        directions = kinds.setdefault(row["error"], {}).setdefault(row["family"], [])
        directions += [] if row["direction"] in directions else [row["direction"]]
    told = "; ".join(", ".join(family if len(directions) > 1 else f"{family} {directions[0]}"
                               for family, directions in families.items()) + f": {error}"
                     for error, families in kinds.items())
    return f"Predicted: the median of the cases (least to most). The model's error: {told}." if told else ""


def _spread(rows: Sequence[dict]) -> str:
    """Median of the cases of each direction in 16 bits, and least to most: TFLOP/s, or the share of the copy rate."""
    if any(row["kernel_hash"] != records.kernel_hash(row["family"]) for row in rows):
        return "of other kernels: run sora-fast predict"
    told = []
    for direction in ("forward", "backward"):
        mine = [row for row in rows if row["direction"] == direction and "float32" not in row["case"]]
        rates = [row["tflops"] for row in mine if row["tflops"]]
        shares = [row["copy_share"] for row in mine if row["copy_share"]]
        if rates:
            told.append(f"{direction} {_range(rates, '{:.0f}')} TFLOP/s")
        elif shares:
            told.append(f"{direction} {_range([100 * share for share in shares], '{:.0f}')}% of copying")
    return "; ".join(told) or "not yet"


def _range(values: Sequence[float], form: str) -> str:
    low, middle, high = (form.format(of(values)) for of in (min, statistics.median, max))
    return low if low == high else f"{middle} ({low} to {high})"
