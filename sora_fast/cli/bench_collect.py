"""sora-fast bench collect."""

import json
import os
import re
from pathlib import Path

from ..files import save_text


def add_arguments(parser) -> None:
    parser.add_argument("folder", help="the output folder of benchmarks/gpu_run.sh")


def run(arguments) -> int:
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
