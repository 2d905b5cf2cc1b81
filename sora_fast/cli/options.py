"""Dataclass fields as command-line flags and YAML keys of the same names.

Flags win over the file, and both over the settings of the run that --resume goes on with.
"""

import argparse
import dataclasses
import json
import textwrap
from pathlib import Path

from ..training.config import GROUPS
from .parsing import meant


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag per field of the dataclass ``config``, in groups, and --config for a YAML file of them."""
    parser.usage = f"{parser.prog} [--config FILE] [--SETTING VALUE ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings by name, or the config.json "
                                                         "of another run")
    parser.add_argument("--print-config", action="store_true", default=False,
                        help="print all settings as YAML, with comments, and stop (default: train)")
    for title, members in grouped(config):
        _add_flags(parser.add_argument_group(title), members)


def grouped(config: type) -> list[tuple[str, list[dataclasses.Field]]]:
    """(title, fields) of each group."""
    names = {title: words.split() for title, words in GROUPS.items()}
    rest = [name for words in names.values() for name in words]
    fields = dataclasses.fields(config)
    groups = [(title, [field for name in words for field in fields if field.name == name]) for title, words in names.items()]
    return [*groups, ("run", [field for field in fields if field.name not in rest])]


def _add_flags(parser, fields: list[dataclasses.Field]) -> None:
    for field in fields:
        flag = "--" + field.name.replace("_", "-")
        # Defaults stay out of argparse, so that a flag can be told from a default when it meets the file.
        default = "none" if field.default == "" else field.default
        said = "" if field.default == "" and "default" in field.metadata["help"] else f" (default: {default})"
        settings: dict = dict(dest=field.name, default=argparse.SUPPRESS,
                              help=f"{field.metadata['help']}{said}".replace("%", "%%"))
        words = field.metadata.get("words")
        if words:
            parser.add_argument(flag, nargs="?", const=True, choices=words, metavar="|".join(words), **settings)
            settings["help"] = f"not --{field.name} (default: {field.default})"
            parser.add_argument(f"--no-{flag[2:]}", action="store_false", **settings)
        elif field.type in (bool, "bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            choices, own = field.metadata["choices"], field.metadata["own"]
            names = [*filter(None, choices), *["PKG.MOD:CLASS"] * own]
            parser.add_argument(flag, type=type(field.default), choices=None if own else choices or None,
                                metavar="{" + ",".join(names) + "}" if names else field.name.upper(), **settings)


def read_options(arguments: argparse.Namespace, config: type):
    """The dataclass from --config and flags; one sentence for a key or a type that is wrong."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    values = {}
    if arguments.config:
        for name, value in _read_yaml(arguments.config).items():
            name = str(name).replace("-", "_")
            if name not in fields:
                guess = meant(name, fields)
                raise ValueError(f"{arguments.config}: expected settings among {', '.join(fields)}, got {name!r}; "
                                 f"{guess}remove it or fix its name")
            kind = type(fields[name].default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if kind is float and isinstance(value, str):  # YAML 1.1 takes 1e-3 for text: it wants 1.0e-3
                try:
                    value = float(value)
                except ValueError:
                    pass
            if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
                value = str(value)
            right = isinstance(value, kind) or value in fields[name].metadata["words"]
            if not right or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{arguments.config}: expected {name} as {kind.__name__}, got {value!r}; fix the file")
            values[name] = value
    values |= {name: value for name, value in vars(arguments).items() if name in fields}
    if values.get("resume") == "auto":
        from ..training.checkpoint import everything

        values["resume"] = bool(everything(values.get("out", fields["out"].default)))
    if values.get("resume"):
        values = _settings_of(values.get("out", fields["out"].default), fields) | values
    made = config(**values)
    if arguments.print_config:
        print(commented(made), end="")
        raise SystemExit(0)
    return made


def commented(config) -> str:
    """``config`` as YAML that --config reads, each setting below a comment that says what it is."""
    lines = []
    for title, fields in grouped(type(config)):
        lines += [f"# ---- {title}"]
        for field in fields:
            names = [*filter(None, field.metadata["choices"])]
            comment = field.metadata["help"] + (f" ({', '.join(names)})" if names else "")
            lines += [*(f"# {line}" for line in textwrap.wrap(comment, 100)),
                      f"{field.name}: {json.dumps(getattr(config, field.name))}"]
        lines.append("")
    return "\n".join(lines)


def _settings_of(run: str, fields) -> dict:
    """The settings that the run in folder ``run`` was begun with; none where it has no readable config.json."""
    try:
        saved = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))["training"]
        return {name: value for name, value in saved.items() if name in fields}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # the trainer says what is missing


def _read_yaml(path: str) -> dict:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--config: expected the pyyaml package, got none; run pip install 'sora_fast[train]'") from error
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config: expected a YAML file, got no file at {path}; check the path")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}; fix the file") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path}: expected settings as 'name: value' lines, got a {type(content).__name__}; fix the file")
    content = content or {}
    if isinstance(content.get("training"), dict):  # a run's config.json; the new run has a folder of its own
        content = {name: value for name, value in content["training"].items() if name not in ("out", "resume")}
    return content
