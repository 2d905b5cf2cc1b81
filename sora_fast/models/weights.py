"""Weights in files of other projects, and by other names than ours.

A table of ``Keys`` says for each of our tensors which of theirs it holds; ``convert`` reads by it and ``export`` writes.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..files import replace, save_text

Tensors = Mapping[str, torch.Tensor]
# Our name -> their names and shapes; several stand one after the other in ours (q, k and v of one layer).
Keys = dict[str, list[tuple[str, tuple[int, ...]]]]

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)


# ------------------------------------------------------------------------------------------------ names
def convert(op: str, keys: Keys, state: Tensors, dtype: torch.dtype | None, kept: str = "$^") -> dict[str, torch.Tensor]:
    """Their tensors by our names, in our element order; one error message for everything that does not fit.

    ``kept``: pattern of our names that are cast to no 16 bits.
    """
    wanted = dict(pair for parts in keys.values() for pair in parts)
    wrong = [f"{name} of {tuple(state[name].shape)} for {shape}" for name, shape in wanted.items()
             if name in state and tuple(state[name].shape) != shape]
    faults = [f"{words} {_few(found)}" for words, found in (
        ("without", [name for name in wanted if name not in state]),
        ("with unknown", [name for name in state if name not in wanted]), ("with", wrong)) if found]
    if faults:
        raise ValueError(f"{op}: expected the {len(wanted)} tensors of this model, got a checkpoint {', '.join(faults)}; "
                         f"pass the weights of one whole model and its own config.json")
    values = {}
    for ours, parts in keys.items():
        given = [state[name] for name, _ in parts]
        if dtype is not None and (dtype.itemsize > 2 or not re.search(kept, ours)):
            given = [t.to(dtype) for t in given]
        values[ours] = given[0] if len(given) == 1 else torch.cat(given)
    return values


def fill(model: nn.Module, values: Tensors) -> None:
    """Make ``values`` the weights of a model from ``build``, in its shapes and in their own dtypes."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    model.load_state_dict({name: t.reshape(shapes[name]) for name, t in values.items()}, assign=True)


def export(keys: Keys, state: Tensors) -> dict[str, torch.Tensor]:
    """Our tensors by their names and in their shapes, as views."""
    return {name: part.reshape(shape) for ours, parts in keys.items()
            for (name, shape), part in zip(parts, state[ours].chunk(len(parts)), strict=True)}


def shape_of(op: str, state: Tensors, name: str, dims: int | None = None) -> tuple[int, ...]:
    """The shape of one of their tensors, from which a size is read."""
    if name not in state or dims is not None and state[name].dim() != dims:
        got = f"{name} of {tuple(state[name].shape)}" if name in state else f"{_few(list(state)) or 'no tensors'}"
        raise ValueError(f"{op}: expected a tensor {name}{f' of {dims} dimensions' if dims else ''}, got {got}; pass a "
                         f"checkpoint of this kind of model")
    return tuple(state[name].shape)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with uninitialised weights, for ``fill``: initialising them would be wasted."""
    with torch.device("meta"):
        return make()


def check_layout(layout: str) -> None:
    if layout not in ("diffusers", "wan"):
        raise ValueError(f"checkpoints: expected layout to be 'diffusers' or 'wan', got {layout!r}; choose one of them")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ------------------------------------------------------------------------------------------------ files
def read(op: str, path: str | Path, classes: Sequence[str], part: str) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Tensors of a file or folder, and its config.json where that is of one of ``classes``, else None.

    ``part``: the folder to take of a whole pipeline's.
    """
    path = Path(path)
    if (path / part / "config.json").is_file() and not (path / "config.json").is_file():
        path = path / part
    folder = path if path.is_dir() else path.parent
    config, described = None, folder / "config.json"
    if described.is_file():
        config = _json(op, described)
        name = config.get("_class_name")
        if name not in classes:
            if path.is_dir() and name:
                raise ValueError(f"{op}: expected a folder of {' or '.join(classes)}, got one of {name} in {path}; pass the "
                                 f"folder of the model itself")
            config = None
    return _tensors(op, path), config


def is_published(folder: Path) -> bool:
    """Whether a folder is one of diffusers', for one model or a pipeline; run folders of ours say no ``_class_name``."""
    try:
        return any("_class_name" in _json("", folder / name) for name in ("model_index.json", "config.json")
                   if (folder / name).is_file())
    except ValueError:  # the reader of the folder says what is wrong with its file
        return False


def write(op: str, path: str | Path, tensors: Tensors, config: dict | None) -> None:
    """A file of ``tensors``, or, with ``config``, a folder as diffusers reads it; each file is whole or not there."""
    path = Path(path)
    if path.suffix in SUFFIXES:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif config is None:
        raise ValueError(f"{op}: expected a file of {', '.join(SUFFIXES[:3])} for this layout, got {path}; add the suffix")
    else:
        if (path / f"{WEIGHTS}.index.json").exists():
            raise ValueError(f"{op}: expected a folder without weights in several files, got {path}; choose another folder, "
                             f"because readers would take the old ones")
        path.mkdir(parents=True, exist_ok=True)
        save_text(path / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        path = path / WEIGHTS
    values = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    if path.suffix in PICKLED:
        return replace(path, lambda temporary: _pickle(values, temporary))
    safetensors = _safetensors(op)
    return replace(path, lambda temporary: safetensors.save_file(values, temporary, metadata={"format": "pt"}))


def _pickle(values: Tensors, path: Path) -> None:
    """``torch.save`` through a file of Python's, which says why it cannot be written."""
    with open(path, "wb") as file:
        torch.save(values, file)


def _tensors(op: str, path: Path) -> dict[str, torch.Tensor]:
    if path.is_file():
        return _pickled(op, path) if path.suffix in PICKLED else _load_file(op, path)
    if not path.is_dir():
        raise FileNotFoundError(f"{op}: expected a file or folder of weights, got nothing at {path}; check the path")
    index = path / f"{WEIGHTS}.index.json"
    if index.is_file():
        files = sorted(set(_json(op, index).get("weight_map", {}).values()))
        lost = [name for name in files if not (path / name).is_file()]
        if lost:
            raise FileNotFoundError(f"{op}: expected the {len(files)} files that {index} names, got none of {_few(lost)}; "
                                    f"fetch them again")
        return {name: t for file in files for name, t in _load_file(op, path / file).items()}
    found = [path / WEIGHTS] if (path / WEIGHTS).is_file() else next(
        (files for suffix in SUFFIXES if (files := sorted(path.glob(f"*{suffix}")))), [])
    if len(found) != 1:
        raise FileNotFoundError(f"{op}: expected one file of weights ({', '.join(SUFFIXES)}) in {path}, got "
                                f"{_few([file.name for file in found]) or 'none'}; pass the file itself")
    return _tensors(op, found[0])


def _load_file(op: str, path: Path) -> dict[str, torch.Tensor]:
    try:
        return _safetensors(op).load_file(path)
    except ImportError:
        raise
    except Exception as error:  # SafetensorError has no public name
        raise ValueError(f"{op}: expected a whole safetensors file at {path}, got {error}; fetch it again") from error


def _pickled(op: str, path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a pickle, which may be of nothing else; of a training checkpoint the average, where it has one."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training keeps its command line beside them
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, from zip files to pickles
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{op}: expected a file of tensors at {path}, got {type(error).__name__} ({first}); fetch it "
                         f"again, or save its state_dict() alone") from error
    for name in ("ema", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise ValueError(f"{op}: expected a state dict of tensors in {path}, got "
                         f"{_few([str(key) for key in found]) if isinstance(found, dict) else type(found).__name__}; save "
                         f"the model's state_dict() alone")
    return dict(found)


def _json(op: str, path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{op}: expected JSON in {path}, got {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{op}: expected a JSON object in {path}, got a {type(found).__name__}; fetch it again")
    return found


def _safetensors(op: str):
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ImportError(f"{op}: expected the safetensors package, got none; run pip install 'sora_fast[train]'") from error
    return safetensors
