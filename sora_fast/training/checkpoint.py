"""Checkpoints: folders of safetensors and JSON that are either whole or not there.

A run folder holds ``checkpoints/step-00000500/`` with model.safetensors, ema.safetensors, optimizer.safetensors,
state.safetensors (random generators) and state.json. Each is written under another name, flushed, and renamed.
"""

import json
import os
import shutil
from pathlib import Path

import torch


def _safetensors():
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ImportError("checkpoints: expected the safetensors package, got none; run "
                          "pip install 'sora_fast[train]'") from error
    return safetensors


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    _safetensors().save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary)
    _flush(temporary)
    os.replace(temporary, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return _safetensors().load_file(path)


def save_json(path: Path, value) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write(run: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int) -> Path:
    """Save ``tensors`` (file name -> tensors) and ``state`` as checkpoint ``step`` and drop all but the last ``keep``."""
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    building = folder / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name, values in tensors.items():
        save_tensors(building / f"{name}.safetensors", values)
    save_json(building / "state.json", state)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(building, final)
    for old in everything(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def everything(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def newest(run: Path) -> Path:
    """The newest checkpoint of a run; FileNotFoundError, in one sentence, where there is none."""
    found = everything(run)
    if not found:
        raise FileNotFoundError(f"{run}: expected a run folder with a checkpoint in checkpoints/, got none; train first, "
                                f"or pass the folder that was given as --out")
    return found[-1]
