"""Swapping layers of a model in place: ``accelerate``, ``restore``, and the report of what happened.

A swap changes an object's class and nothing else: to one made of a mixin, whose forward runs on this library's ops, and of
the class it had. Parameters, buffers, hooks and attributes stay the same objects, so optimisers, averages, wrappers and
checkpoints made before go on working, state_dict keys do not change, and restoring is giving the old class back.

Which class takes which mixin is in the families beside this file. Classes are known by the name of their module and their
own, so nothing is imported that the model has not imported already; a subclass is another class, and is left alone. Those
that people copy from file to file are in structures.py.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .. import env
from .attention_backend import register_attention_backend
from .step_caches import register_block

# Each may hold SWAPS, {"module.Class": mixin}, KNOWN, {"module.Class": why it is left}, and PREPARES, {"module.Class": what
# is noted on the children of such a module before they are looked at, in attributes that begin with _sora_fast_}.
FAMILIES = ("wan_vae", "hunyuan_vae", "cogvideox_vae", "wan_transformer", "joint_transformers", "adaptive_norms",
            "sequences", "uncovered")
# Whose classes have been compared with ours, version by version: another version may compute something else.
PROVEN = {"diffusers": ("0.42.",)}


class Fast:
    """What every mixin is: a forward for a class of somebody else's.

    ``runs``: what it runs on, for the report. ``reads``: children whose parameters it reads itself instead of calling
    them, each with a check that all it computes with is read (see known.py); ``unsuited(module)``: why this very object
    cannot be swapped, or None.
    """

    runs = ""
    reads: Mapping[str, Callable[[nn.Module | None], bool]] = {}

    @classmethod
    def runs_of(cls, module: nn.Module) -> str:
        """``runs`` of one object, where it depends on what is in it."""
        return cls.runs

    @classmethod
    def reads_of(cls, module: nn.Module) -> list[str]:
        """The names in ``reads`` of one object, where they depend on what is in it."""
        return list(cls.reads)

    @classmethod
    def unsuited(cls, module: nn.Module) -> str | None:
        """Asked when a model is swapped, and by each call, since a child may change after."""
        for name, may_be_read in cls.reads.items():
            if not may_be_read(held(module, name)):
                return f"its {name} was replaced, has a hook, or is set to what is not read past it"
        return None


class Progress:
    """What a caller wants to be told: one object for all copies of a model, and not for its pickles."""

    def __init__(self, tell: Callable[[int, int], None] | None = None):
        self.tell = tell

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Progress, ()


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, what happened to it ("swapped", "inside" or "left"), and why."""

    name: str
    kind: str
    state: str
    note: str


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did, module by module; print it for a table, with equal lines told once."""

    rows: tuple[Row, ...]

    @property
    def swapped(self) -> tuple[Row, ...]:
        """Modules that run on this library now."""
        return tuple(row for row in self.rows if row.state == "swapped")

    @property
    def left(self) -> tuple[Row, ...]:
        """Modules that were left as they are, each with the reason."""
        return tuple(row for row in self.rows if row.state == "left")

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.state, row.kind, row.note), []).append(row.name or "(the model)")
        inside = sum(row.state == "inside" for row in self.rows)
        lines = [f"{len(self.swapped)} modules swapped, {inside} inside of these, {len(self.left)} left as they are"]
        for state in ("swapped", "inside", "left"):
            for (of, kind, note), names in groups.items():
                if of == state:
                    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
                    lines.append(f"{state:8} {len(names):4} x {kind}: {note} [{shown}]")
        return "\n".join(lines)


def accelerate(model: nn.Module, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """Swap the layers of ``model`` that this library knows for its own, in place; the same numbers to rounding.

    Parameters stay the same objects and state_dict keeps its keys. Call it before or after an optimiser, LoRA, FSDP2 or
    torch.compile have got hold of the model; ``restore(model)`` undoes it exactly. ``SORA_FAST_ACCELERATE=0`` makes it do
    nothing. Attention stays on the backend that diffusers is set to; "sora_fast" is registered as one of them.

    Args:
        model: an nn.Module, whole or a part.
        progress: called with (frames done, frames in all) while a video autoencoder encodes or decodes without gradients.

    Returns:
        Report: every module, swapped or left, with the reason.

    Raises:
        TypeError: not an nn.Module.

    >>> vae = AutoencoderKLWan.from_pretrained(...)
    >>> print(sora_fast.accelerate(vae))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected an nn.Module, got {type(model).__name__}; pass one part of a pipeline after "
                        f"the other, such as pipeline.vae")
    on, rows, readers = env.accelerate(), [], {}
    _known().resolve()
    if on and "diffusers.models.attention_dispatch" in sys.modules:
        register_attention_backend()
    for name, module in model.named_modules():
        kind = original_of(type(module)).__name__
        if on:
            _table("PREPARES").get(_path(original_of(type(module))), lambda module: None)(module)
        if not on:
            row = Row(name, kind, "left", "SORA_FAST_ACCELERATE=0 switches everything off")
        elif module in readers:
            row = Row(name, kind, "inside", f"read by a {readers[module]}")
        else:
            mixin, reason = _decide(module)
            row = Row(name, kind, "left" if mixin is None else "swapped", reason if mixin is None else mixin.runs_of(module))
        rows.append(row)
        if row.state == "swapped":
            _change_class(module, lambda original, mixin=mixin: fast_class(original, mixin))
            if progress is not None and hasattr(mixin, "streams"):
                module._sora_fast_progress = Progress(progress)
            readers |= {inner: kind for child in mixin.reads_of(module) for inner in _modules(module, child)}
    return Report(tuple(rows))


def restore(model: nn.Module) -> int:
    """Give every swapped module of ``model`` its own class back; the model computes what it did before, bit for bit.

    A module of a subclass that somebody has made of a swapped class since stays as it is, and is not counted.

    Returns:
        How many modules were restored; 0 where nothing had been swapped.
    """
    count = 0
    for module in model.modules():
        if is_fast(module):
            _change_class(module, original_of)
            count += not is_fast(module)
        for name in [name for name in vars(module) if name.startswith("_sora_fast_")]:
            delattr(module, name)
    return count


def is_fast(module: nn.Module) -> bool:
    """Whether ``module`` has been swapped."""
    return isinstance(module, Fast)


def takes_what_is_ours(module: nn.Module) -> bool:
    """Whether ``module`` may be called with arguments that mixins alone know: its class has no subclass made since."""
    return is_fast(module) and not issubclass(original_of(type(module)), Fast)


def held(module: nn.Module, name: str):
    """The child or parameter of that name, else the attribute, or None; by getattr it would take 2 us of each call."""
    found = module._parameters.get(name)
    if found is None:
        found = module._modules.get(name)
    return getattr(module, name, None) if found is None else found


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds ``module`` as such."""
    return _is_fsdp(type(module))


def as_built(module: nn.Module | None, classes: tuple[type, ...]) -> bool:
    """Whether a child is still of one of these very classes, called as they are: no adapter, subclass or hook."""
    if not isinstance(module, nn.Module):
        return False
    cls = type(module)
    # the plain class first: torch.compile cannot look into the one of diffusers' attention
    return (cls in classes or original_of(cls) in classes) and runs_alone(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` is more than its forward, by hooks of its own or of all modules."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
                or _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks
                or _global_backward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether forward was replaced on the object itself, as by hooks that bring its weights only while it runs.

    Hooks that go leave the class's own forward there, bound, which replaces nothing.
    """
    if "forward" not in module.__dict__:
        return False
    forward = module.__dict__["forward"]
    bound_to = getattr(forward, "__self__", None)
    return bound_to is not module or forward.__func__ is not type(module).forward


def runs_alone(module: nn.Module) -> bool:
    """Whether a call is the class's forward and nothing else: no forward of its own, no hook on it or on all modules."""
    return not (has_own_forward(module) or has_hooks(module))


# ------------------------------------------------------------------------------------------------ deciding
@functools.cache
def _table(what: str) -> dict:
    found: dict = {}
    for family in FAMILIES:
        found |= getattr(importlib.import_module(f"sora_fast.integrations.{family}"), what, {})
    return found


def _known():
    return importlib.import_module("sora_fast.integrations.known")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _decide(module: nn.Module) -> tuple[type[Fast] | None, str]:
    """The mixin for ``module``, or None and why it is left."""
    original = original_of(type(module))
    if issubclass(original, Fast):
        return None, "a subclass of a swapped class, as parametrizations make one; it stays as it is"
    mixin = _table("SWAPS").get(_path(original))
    if mixin is not None and not genuine(original, tuple(vars(mixin))):
        return None, f"not the {original.__name__} that its names lead to, or one whose methods were replaced"
    if mixin is None:
        mixin, reason = importlib.import_module("sora_fast.integrations.structures").mixin_of(module)
        return (None, reason or _why_left(original)) if mixin is None else (mixin, "")
    if has_own_forward(module) and not is_fast(module) and "forward" in vars(mixin):
        return None, "its forward was replaced, as hooks that offload or cast do; accelerate before they come"
    package, version = _version(original)
    if package in PROVEN and not version.startswith(PROVEN[package]):
        return None, (f"{package} {version} has not been compared with, only {', '.join(PROVEN[package])}x; its "
                      f"{original.__name__} may compute something else")
    reason = mixin.unsuited(module)
    return (None, reason) if reason else (mixin, "")


def genuine(cls: type, methods: tuple[str, ...]) -> bool:
    """Whether the names ``cls`` bears lead to it and its ``methods`` were written there: neither a subclass that took its
    base's names over, nor a class into which others were put."""
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return False
    for method in methods:
        owner = next((base for base in cls.__mro__ if method in vars(base)), object)
        written = getattr(vars(owner).get(method), "__globals__", None)
        if written is not None and written.get("__name__") != owner.__module__:
            return False
    return True


def _why_left(original: type) -> str:
    known = _table("KNOWN").get(_path(original))
    if known:
        return known
    for base in original.__mro__[1:]:
        if _path(base) in _table("SWAPS") and base.__module__.partition(".")[0] != "torch":
            return f"an altered {base.__name__}: its own forward may do something else"
    if original.__module__.startswith("torch."):
        return "a container" if original in (nn.Sequential, nn.ModuleList, nn.ModuleDict) else "PyTorch's own"
    return "not known; its children are looked at one by one"


@functools.cache
def _version(original: type) -> tuple[str, str]:
    package = original.__module__.partition(".")[0]
    return package, str(getattr(importlib.import_module(package), "__version__", "")) if package in PROVEN else ""


def _modules(module: nn.Module, name: str) -> list[nn.Module]:
    """The child of that name and all below it; nothing where this module has none."""
    child = getattr(module, name, None)
    return list(child.modules()) if isinstance(child, nn.Module) else []


# ------------------------------------------------------------------------------------------------ classes
def original_of(cls: type) -> type:
    """The class that a swapped one was made of, else ``cls`` itself; FSDP2's wrapper is looked through.

    A subclass of a swapped class, as parametrizations make one, is itself: it computes something else.
    """
    inner = cls.__bases__[1] if _is_fsdp(cls) else cls
    return inner.__dict__.get("_sora_fast_original", inner)


@functools.cache
def fast_class(original: type, mixin: type[Fast]) -> type:
    """``original`` with ``mixin`` in front, under the original's own names, which checkpoints and pipelines write down."""
    _known().resolve()  # a pickle is read without ``accelerate``
    namespace = dict(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__,
                     _sora_fast_original=original, __reduce_ex__=_reduce)
    made = type(original)(original.__name__, (mixin, original), namespace)
    register_block(original, made)
    return made


def _change_class(module: nn.Module, change: Callable[[type], type]) -> None:
    """``change`` the class that ``module`` was built with, under what others have made of it since."""
    if not has_own_forward(module):
        module.__dict__.pop("forward", None)  # the old class's, left by a hook that went: it would hide the new one's
    module.__class__ = _changed(type(module), change)


def _changed(cls: type, change: Callable[[type], type]) -> type:
    """FSDP2's wrapper and a parametrization's are made anew on the changed class; a subclass made by hand stays, since its
    methods may hold it."""
    if _is_fsdp(cls):
        bases = (cls.__bases__[0], _changed(cls.__bases__[1], change))
    elif cls.__module__ == "torch.nn.utils.parametrize":
        bases = (_changed(cls.__bases__[0], change),)
    else:
        return cls if _is_subclass_of_swapped(cls) else change(original_of(cls))
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def _is_subclass_of_swapped(cls: type) -> bool:
    return issubclass(original_of(cls), Fast)


def _is_fsdp(cls: type) -> bool:
    """FSDP2 makes a class of FSDPModule and the module's own."""
    return len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule"


def _reduce(self, protocol):
    """Copies and pickles are swapped too: by the original class, since a class made here can be found under no name."""
    original = original_of(type(self))
    if issubclass(original, Fast):  # somebody's subclass of a class made here
        return object.__reduce_ex__(self, protocol)
    mixin = next(base for base in type(self).__mro__ if issubclass(base, Fast) and not issubclass(base, nn.Module))
    return _new, (original, mixin), vars(self)


def _new(original: type, mixin: type[Fast]) -> nn.Module:
    cls = fast_class(original, mixin)
    return cls.__new__(cls)


def grad_wanted(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call of ``module`` on x may be asked for gradients."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
