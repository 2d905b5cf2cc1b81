"""Swapping layers of a model in place: ``accelerate``, ``restore`` and their Report.

A swap changes nothing but an object's ``__class__``: the new class derives from a mixin, whose forward runs on this
library's ops, and from the original class. Parameters, buffers, hooks and attributes stay the same objects, so existing
optimisers, averages, wrappers and checkpoints go on working, state_dict keys do not change, and ``restore`` sets the old
class again.

The families beside this file map classes to mixins. Classes are identified by module path and name, so nothing is imported
that the model has not imported already. A subclass is another class and is left alone. Classes that projects copy from file
to file are in copied_blocks.py.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from .. import env, measured, records
from ..dispatch import device_name
from ..explanation import all_ops
from . import (
    adaptive_norms,
    cogvideox_vae,
    copied_blocks,
    hunyuan_vae,
    joint_transformers,
    sequential_pairs,
    uncovered,
    wan_transformer,
    wan_vae,
)
from .attention_backend import register_attention_backend
from .mixin import (
    Fast,
    _new,  # noqa: F401 - pickles of swapped modules may look for it here, where it once was
    change_class,
    fast_class,
    has_own_forward,
    is_fast,
    is_unmodified,
    original_of,
    resolve,
)

# Each may define SWAPS, {"module.Class": mixin}; KNOWN, {"module.Class": why it stays unchanged}; and PREPARES,
# {"module.Class": a function that sets _sora_fast_ attributes on the children of such a module before they are swapped}.
FAMILIES = (wan_vae, hunyuan_vae, cogvideox_vae, wan_transformer, joint_transformers, adaptive_norms, sequential_pairs,
            uncovered)
SWAPS, KNOWN, PREPARES = ({path: found for family in FAMILIES for path, found in getattr(family, table, {}).items()}
                          for table in ("SWAPS", "KNOWN", "PREPARES"))
# Package versions whose classes have been verified: another version may compute something else.
PROVEN = {"diffusers": ("0.42.",)}


class Progress:
    """The caller's progress callback: shared by all copies of a model, and not pickled."""

    def __init__(self, tell: Callable[[int, int], None] | None = None):
        self.tell = tell

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Progress, ()


WORDS = {"swapped": "replaced", "inside": "absorbed", "left": "unchanged"}  # of a Row's states, as they are printed


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, what happened to it (a state of WORDS), and why."""

    name: str
    kind: str
    state: str
    note: str


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did, module by module; print it for a table that groups equal lines.

    ``missing``: a sentence on what of this GPU auto does not know yet, and the command that changes it, or "";
    ``measured``: with ``setup=True`` what sora_fast.setup found.
    """

    rows: tuple[Row, ...]
    missing: str = ""
    measured: object | None = None

    @property
    def swapped(self) -> tuple[Row, ...]:
        """Modules that run on this library's ops now."""
        return tuple(row for row in self.rows if row.state == "swapped")

    @property
    def left(self) -> tuple[Row, ...]:
        """Modules that are unchanged, each with the reason."""
        return tuple(row for row in self.rows if row.state == "left")

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.state, row.kind, row.note), []).append(row.name or "(the model)")
        inside = sum(row.state == "inside" for row in self.rows)
        lines = [f"{len(self.swapped)} modules replaced, {inside} absorbed by these, {len(self.left)} unchanged"]
        for state, word in WORDS.items():
            for (of, kind, note), names in groups.items():
                if of == state:
                    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
                    lines.append(f"{word:9} {len(names):4} x {kind}: {note} [{shown}]")
        lines += [self.missing] * bool(self.missing)
        lines += [] if self.measured is None else [str(self.measured)]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, progress: Callable[[int, int], None] | None = None, setup: bool = False,
               call: Callable[[nn.Module], object] | None = None) -> Report:
    """Replace the layers of ``model`` that this library knows by its own, in place; results are equal up to rounding.

    Parameters stay the same objects and state_dict keeps its keys. Call it before or after an optimiser, LoRA, FSDP2 or
    torch.compile is applied to the model; ``restore(model)`` undoes it exactly. ``SORA_FAST_ACCELERATE=0`` disables it.
    Attention stays on the backend that diffusers is set to; "sora_fast" is registered as one of them.

    Args:
        model: an nn.Module, whole or a part.
        progress: called with (frames done, frames in all) while a video autoencoder encodes or decodes without gradients.
        setup: of a model on a GPU, ``sora_fast.setup(model)`` now, which takes seconds to two minutes and says so before:
            kernels are judged and backends timed for what this model calls, unless they have been here. Never later.
        call: for that, a function that runs the model once, where the inputs of its class are not known.

    Returns:
        A Report: every module, replaced, absorbed or unchanged, with the reason; of a model on a GPU what is not known of
        that, or with ``setup`` what was measured.

    Raises:
        TypeError: not an nn.Module. With ``setup``, what sora_fast.setup raises; layers are replaced by then.

    >>> # needs: diffusers and the published weights
    >>> vae = AutoencoderKLWan.from_pretrained(...)
    >>> print(sora_fast.accelerate(vae))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected an nn.Module, got {type(model).__name__}; pass one part of a pipeline after "
                        f"the other, such as pipeline.vae")
    on, rows, readers = env.accelerate(), [], {}
    resolve()
    if on and "diffusers.models.attention_dispatch" in sys.modules:
        register_attention_backend()
    for name, module in model.named_modules():
        kind = original_of(type(module)).__name__
        if on:
            PREPARES.get(_path(original_of(type(module))), lambda module: None)(module)
        if not on:
            row = Row(name, kind, "left", "disabled by SORA_FAST_ACCELERATE=0")
        elif module in readers:
            row = Row(name, kind, "inside", f"by a {readers[module]}")
        else:
            mixin, reason = _decide(module)
            row = Row(name, kind, "left", reason) if mixin is None else Row(name, kind, "swapped", mixin.report_of(module))
        rows.append(row)
        if row.state == "swapped":
            change_class(module, lambda original, mixin=mixin: fast_class(original, mixin))
            if progress is not None and hasattr(mixin, "streams"):
                module._sora_fast_progress = Progress(progress)
            readers |= {inner: kind for child in mixin.absorbed(module) for inner in _descendants(module, child)}
    found = Report(tuple(rows))
    first = next(model.parameters(), None)
    if not found.swapped or first is None or not first.is_cuda:
        return found
    if setup:
        from .. import setup as set_up

        found = replace(found, measured=set_up(model, call=call, device=str(first.device)))
    return replace(found, missing=_missing(found, first))


def _missing(report: Report, parameter: nn.Parameter) -> str:
    """A sentence on the kernels and times that auto lacks for what was swapped, or ""."""
    words = {word for row in report.swapped for word in re.findall(r"\w+", row.note)}
    device, without, untimed = device_name(parameter), [], []
    for name, op in all_ops().items():
        if name not in words:
            continue
        problem = op.example(device, parameter.dtype, False)
        kernels = [each for each in op.backends.values() if each.kernel and not each.unsupported(problem)]
        if kernels and all(records.why_not(name, each, problem) for each in kernels):
            without.append(name)
        elif kernels and not measured.every(op, device):
            untimed.append(name)
    told = [f"no kernel has a validation record for {', '.join(without)}, which run on PyTorch"] * bool(without)
    told += [f"nothing was timed of {', '.join(untimed)}"] * bool(untimed)
    once = "run sora-fast setup, or sora_fast.accelerate(model, setup=True), once"
    return f"on this GPU {' and '.join(told)}: {once}" if told else ""


def restore(model: nn.Module) -> int:
    """Give every replaced module of ``model`` its original class back; the model's results are bitwise those of before.

    A module whose replaced class was subclassed since stays as it is and is not counted.

    Returns:
        How many modules were restored; 0 if nothing had been replaced.

    Raises:
        AttributeError: not an nn.Module.
    """
    count = 0
    for module in model.modules():
        if is_fast(module):
            change_class(module, original_of)
            count += not is_fast(module)
        for name in [name for name in vars(module) if name.startswith("_sora_fast_")]:
            delattr(module, name)
    return count


# ------------------------------------------------------------------------------------------------ deciding
def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _decide(module: nn.Module) -> tuple[type[Fast] | None, str]:
    """The mixin for ``module``, or None and why it is left."""
    original = original_of(type(module))
    if issubclass(original, Fast):
        return None, "a subclass of a replaced class, as parametrizations make one; it stays as it is"
    mixin = SWAPS.get(_path(original))
    if mixin is not None and not is_unmodified(original, tuple(vars(mixin))):
        return None, f"not the {original.__name__} that its name refers to, or its methods were replaced"
    if mixin is None:
        mixin, reason = copied_blocks.mixin_of(module)
        return (None, reason or _why_left(original)) if mixin is None else (mixin, "")
    if has_own_forward(module) and not is_fast(module) and "forward" in vars(mixin):
        return None, "its forward was replaced, as hooks that offload or cast do; accelerate before they are added"
    package, version = _version(original)
    if package in PROVEN and not version.startswith(PROVEN[package]):
        return None, (f"{package} {version} has not been compared, only {', '.join(PROVEN[package])}x; its "
                      f"{original.__name__} may compute something else")
    reason = mixin.why_not(module)
    return (None, reason) if reason else (mixin, "")


def _why_left(original: type) -> str:
    known = KNOWN.get(_path(original))
    if known:
        return known
    for base in original.__mro__[1:]:
        if _path(base) in SWAPS and base.__module__.partition(".")[0] != "torch":
            return f"an altered {base.__name__}: its own forward may do something else"
    if original.__module__.startswith("torch."):
        return "a container" if original in (nn.Sequential, nn.ModuleList, nn.ModuleDict) else "PyTorch's own"
    return "not known; its children are replaced one by one"


@functools.cache
def _version(original: type) -> tuple[str, str]:
    package = original.__module__.partition(".")[0]
    return package, str(getattr(importlib.import_module(package), "__version__", "")) if package in PROVEN else ""


def _descendants(module: nn.Module, name: str) -> list[nn.Module]:
    """The child of that name and its descendants; empty if there is none."""
    child = getattr(module, name, None)
    return list(child.modules()) if isinstance(child, nn.Module) else []
