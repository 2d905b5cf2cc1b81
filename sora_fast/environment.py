"""The machine and the software that a figure or a verdict depends on, for whoever reads it later."""

import functools
import hashlib
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, env
from .precision import tf32_convolutions, tf32_products

# What adds a backend or is measured beside ours, none of it required: what to import, and the package to install.
PEERS = {"triton": "triton", "flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3",
         "fa3_fwd_interface": "fa3-fwd", "flash_attn.cute": "flash-attn-4", "cudnn": "nvidia-cudnn-frontend",
         "xformers": "xformers", "liger_kernel": "liger-kernel", "diffusers": "diffusers"}


def device_label(device: torch.device) -> str:
    """The name that rows and result folders go by: the GPU's, or the CPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()


def environment(device: torch.device) -> dict:
    """Everything about the machine and the software that a figure depends on."""
    found = dict(
        device=device_label(device), kind=device.type, sm=None, sms=None, memory_bytes=None, l2_bytes=None,
        **_nvidia_smi(device), cuda=torch.version.cuda, cudnn=cudnn_version(),
        torch=torch.__version__, triton=version("triton"), nvcc=build_info().get("nvcc"), python=platform.python_version(),
        os=f"{platform.system()} {platform.release()}", cpu=_cpu(), cores=os.cpu_count(),
        threads=torch.get_num_threads(), tf32=tf32_products() or tf32_convolutions(),
        **_commit(), version=__version__, variables=env.settings(),
        packages={name: version(name) for name in PEERS.values() if version(name)},
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        found |= dict(sm=chip.major * 10 + chip.minor, sms=chip.multi_processor_count, memory_bytes=chip.total_memory,
                      l2_bytes=getattr(chip, "L2_cache_size", None))
    return found


def version(package: str) -> str | None:
    """The installed version of a package, read without importing it, or None."""
    # Triton goes by other names in builds for other systems
    for name in (package, "pytorch-triton", "triton-windows") if package == "triton" else (package,):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def cudnn_version() -> int | None:
    """91900 of the cuDNN 9.19.0 that PyTorch calls; None where there is none, or one that PyTorch refuses."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:  # older than the one it was built with
        return None


@functools.cache
def build_info() -> dict:
    """What setup.py wrote beside the CUDA extension: its nvcc, architectures, hashes of kernels; or why not: "skipped"."""
    try:
        return json.loads(Path(__file__).with_name("_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"skipped": "this copy was installed without a build"}


@functools.cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _commit() -> dict:
    """The commit of the checkout this package was imported from, and a hash of what differs from it; nulls elsewhere."""
    root = Path(__file__).resolve().parents[1]
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
                              f"--id=GPU-{identity}"], capture_output=True, check=True, encoding="utf-8", errors="replace",
                             timeout=20).stdout
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
