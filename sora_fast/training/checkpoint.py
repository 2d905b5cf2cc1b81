"""Checkpoints: folders of safetensors and JSON that are either whole or not there.

A run folder holds ``checkpoints/step-00000500/`` with model.safetensors, ema.safetensors, optimizer.safetensors and
state.json. Each is written under another name, flushed, and renamed; so is the folder. Folders that begin with a dot are
unfinished or on their way out, and are never read. Random numbers need no file: each batch has its own generator, seeded
by the run's seed and the batch's running number, and that is in state.json.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch

from ..files import replace, save_text, writing


def _safetensors():
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ImportError("checkpoints: expected the safetensors package, got none; run "
                          "pip install 'sora_fast[train]'") from error
    return safetensors


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with ``metadata`` in its header."""
    found, values = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        place = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory (tied weights): each gets a copy of its own.
        values[name] = tensor.clone() if place in found else tensor
        found.add(place)
    safetensors = _safetensors()
    replace(path, lambda temporary: safetensors.save_file(values, temporary, metadata))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What ``save_tensors`` wrote; one sentence for a file that is missing or damaged."""
    safetensors = _safetensors()
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError has no public name
        raise ValueError(f"{path}: expected a safetensors file, got {error}; use an older checkpoint, or write it "
                         f"again") from error


def load_with_metadata(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """``load_tensors`` and the header's metadata."""
    tensors = load_tensors(path)
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return tensors, file.metadata() or {}


def save_json(path: Path, value) -> None:
    """Write JSON atomically."""
    save_text(path, json.dumps(value, indent=1))


def load_json(path: Path):
    """What ``save_json`` wrote; one sentence for a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}; use an older checkpoint, or write it again") from error


def description(run: str | Path, kind: str, command: str) -> dict:
    """config.json of a run folder that ``command`` made and that holds a model of ``kind``; else one sentence."""
    file = Path(run) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run}: expected a run folder of {command}, got no config.json there; pass the folder "
                                f"given as its --out")
    found = load_json(file)
    if found.get("kind") != kind:
        raise ValueError(f"{run}: expected a run of {command}, got one of kind {found.get('kind')!r}; pass the run folder "
                         f"of a {kind}")
    return found


def plain(value):
    """``value`` as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``names`` alone: not on what was drawn before, nor on who draws."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def folder_of(run: Path, step: int) -> Path:
    """Where checkpoint ``step`` of a run is, or will be."""
    return run / "checkpoints" / f"step-{step:08d}"


def write(run: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int) -> Path:
    """Save ``tensors`` (file name -> tensors) and ``state`` as checkpoint ``step`` and drop all but the last ``keep``."""
    final = folder_of(run, step)
    folder = final.parent
    building = folder / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    with writing(final):
        try:
            building.mkdir(parents=True)
            for name, values in tensors.items():
                save_tensors(building / f"{name}.safetensors", values)
            save_json(building / "state.json", state)
            if final.exists():
                _set_aside(final)
            os.replace(building, final)
        except BaseException:  # a full disk, a second Ctrl-C: what is half written would only fill the disk
            shutil.rmtree(building, ignore_errors=True)
            raise
    _sync_folder(folder)  # the new one is on the disk before an old one goes
    for old in everything(run)[:-keep]:
        _set_aside(old)
    for left in [*folder.glob(".old-*"), *folder.glob(".building-*")]:
        shutil.rmtree(left, ignore_errors=True)
    return final


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint that goes, so that one half deleted has no checkpoint's name."""
    aside = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def everything(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    # state.json is written last.
    found = [folder for folder in folders if re.fullmatch(r"step-\d+", folder.name) and (folder / "state.json").is_file()]
    return sorted(found, key=lambda folder: int(folder.name.partition("-")[2]))


def newest(run: Path) -> Path:
    """The newest checkpoint of a run; FileNotFoundError, in one sentence, where there is none."""
    found = everything(run)
    if not found:
        raise FileNotFoundError(f"{run}: expected a run folder with a checkpoint in checkpoints/, got none; train first, "
                                f"or pass the folder that was given as --out")
    return found[-1]
