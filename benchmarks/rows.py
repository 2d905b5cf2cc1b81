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
    environment: see environment()

A row with ``"row": "roof"`` is a limit of the machine: kind ("matrix" in FLOP/s, "copy" in bytes/s), dtype, bytes (the
working set), rate, published (null where the chip is not in the table), source, l2, timer, n, environment.
"""

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

import sora_fast
from sora_fast import env

from .providers import version

SCHEMA = 1
PACKAGES = ("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4", "nvidia-cudnn-frontend", "xformers",
            "liger-kernel", "diffusers")
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


def append(path: Path, rows: Iterable[Mapping]) -> None:
    """Add whole rows to a file and wait until they are on the disk; a torn last line of an earlier run is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with open(path, "ab+") as file:
        file.seek(0)
        kept = file.read()
        if kept and not kept.endswith(b"\n"):
            file.truncate(kept.rfind(b"\n") + 1)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def device_label(device: torch.device) -> str:
    """The name that rows and result folders go by: the GPU's, or the CPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()


def environment(device: torch.device) -> dict:
    """Everything about the machine and the software that a figure depends on."""
    found = dict(
        device=device_label(device), kind=device.type, sm=None, sms=None, memory_bytes=None, l2_bytes=None,
        **_nvidia_smi(device), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
        torch=torch.__version__, triton=version("triton"), python=platform.python_version(),
        os=f"{platform.system()} {platform.release()}", cpu=_cpu(), cores=os.cpu_count(),
        threads=torch.get_num_threads(), tf32=_tf32(),
        **_commit(), version=sora_fast.__version__, variables=env.settings(),
        packages={name: version(name) for name in PACKAGES if version(name) != "unknown"},
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        found |= dict(sm=chip.major * 10 + chip.minor, sms=chip.multi_processor_count, memory_bytes=chip.total_memory,
                      l2_bytes=getattr(chip, "L2_cache_size", None))
    return found


def _tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


@functools.cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _commit() -> dict:
    """The commit of the checkout this package was imported from, and a hash of what differs from it; nulls elsewhere."""
    root = Path(sora_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return dict(commit=env.commit(), changed=None)
    try:
        git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout
        # results are what a run writes: they change no figure
        changes = git("diff", "HEAD", "--", ".", ":!benchmarks/results")
        return dict(commit=git("rev-parse", "HEAD").decode().strip(),
                    changed=hashlib.sha256(changes).hexdigest()[:12] if changes else None)
    except (OSError, subprocess.CalledProcessError):
        return dict(commit=None, changed=None)


def _query(device: torch.device, fields: str) -> list[str]:
    """Values that nvidia-smi gives for ``device``, [] where it is not there."""
    if device.type != "cuda":
        return []
    try:
        identity = str(torch.cuda.get_device_properties(device).uuid)
        out = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits",
                              f"--id=GPU-{identity}"], capture_output=True, check=True, text=True, timeout=20).stdout
    except (OSError, AttributeError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in out.strip().split(",")]


def _number(values: list[str], place: int) -> float | None:
    try:
        return float(values[place])
    except (IndexError, ValueError):  # "[N/A]" where the driver does not tell
        return None


def _nvidia_smi(device: torch.device) -> dict:
    values = _query(device, "driver_version,clocks.max.sm,power.limit")
    return dict(driver=values[0] if values else None, clock_max_mhz=_number(values, 1), power_limit_w=_number(values, 2))


def clock_mhz(device: torch.device) -> float | None:
    """The SM clock now, or None where it cannot be read."""
    return _number(_query(device, "clocks.sm"), 0)
