"""What every family stands on: mixins, what a swapped module may read past, and how an object's class is changed.

A swap changes an object's class and nothing else: to one made of a mixin, whose forward runs on this library's ops, and of
the class it had.

A mixin reads the weights of some children and leaves their forward out. That is right only while such a child is of the
very class that was proven, has no hook and nothing replaced on it, and every setting that its forward computes with is
either read at each call too or has the one value that the mixin computes with. Those values are in a Kind; a mixin's
``reads`` names one for each child. It is asked when the model is swapped and again at each call, so the order of changes
does not matter.
"""

import functools
import sys
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .step_caches import register_block


class Fast:
    """What every mixin is: a forward for a class of somebody else's.

    ``runs``: what it runs on, for the report. ``reads``: children whose parameters it reads itself instead of calling
    them, each with a check that all it computes with is read, such as a Kind; ``unsuited(module)``: why this very object
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


# ------------------------------------------------------------------------------------------------ asking a module
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


def grad_wanted(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call of ``module`` on x may be asked for gradients."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


# ------------------------------------------------------------------------------------------------ classes by name
KINDS: list["Kind"] = []


class Kind:
    """A class, by the names of its module and its own, and the settings that its objects must have to be read past.

    Call it with a child. ``read``: what the reader reads itself, None where it calls the child and only asks for its class;
    ``methods``: what the class's forward calls on itself; ``kernel``: the sizes of its weight behind the channels;
    ``rule(child)``: what no table of values can say.
    """

    def __init__(self, *paths: str, read: str | None = None, methods: tuple[str, ...] = ("forward",), kernel=None,
                 rule: Callable[[nn.Module], bool] | None = None, **fixed):
        self.paths, self.read, self.methods, self.kernel, self.rule, self.fixed = paths, read, methods, kernel, rule, fixed
        self.classes: tuple[type, ...] = ()
        KINDS.append(self)

    def but(self, **more) -> "Kind":
        """The same class in one place, where fewer settings are right."""
        own = dict(read=self.read, methods=self.methods, kernel=self.kernel, rule=self.rule)
        return Kind(*self.paths, **(own | self.fixed | more))

    def __call__(self, child) -> bool:
        return as_built(child, self.classes) and self.settled(child)

    def is_of(self, value) -> bool:
        """Whether ``value``, not a module, is of the very class."""
        return type(value) in self.classes

    def built(self, module: nn.Module) -> bool:
        """Whether ``module`` was built of the very class, whatever has been set and hooked since."""
        return original_of(type(module)) in self.classes

    def settled(self, module: nn.Module) -> bool:
        """Whether its settings are those; its class and hooks aside, as a swapped module asks of itself."""
        own = module.__dict__
        for name in self.methods:
            if name != "forward" and name in own:
                return False
        for name, value in self.fixed.items():  # no attrgetter: torch.compile does not trace one
            if getattr(module, name) != value:
                return False
        if self.kernel is not None and held(module, "weight").shape[2:] != self.kernel:
            return False
        return self.rule is None or self.rule(module)


def resolve() -> None:
    """Look the classes up among the modules that are imported by now; nothing is imported for it."""
    for kind in KINDS:
        kind.classes = tuple(cls for cls in map(_find, kind.paths) if cls is not None)


def _find(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) and genuine(cls, ("forward",)) else None


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


def as_built(module: nn.Module | None, classes: tuple[type, ...]) -> bool:
    """Whether a child is still of one of these very classes, called as they are: no adapter, subclass or hook."""
    if not isinstance(module, nn.Module):
        return False
    cls = type(module)
    # the plain class first: torch.compile cannot look into the one of diffusers' attention
    return (cls in classes or original_of(cls) in classes) and runs_alone(module)


# ------------------------------------------------------------------------------------------------ changing classes
def original_of(cls: type) -> type:
    """The class that a swapped one was made of, else ``cls`` itself; FSDP2's wrapper is looked through.

    A subclass of a swapped class, as parametrizations make one, is itself: it computes something else.
    """
    inner = cls.__bases__[1] if _is_fsdp(cls) else cls
    return inner.__dict__.get("_sora_fast_original", inner)


@functools.cache
def fast_class(original: type, mixin: type[Fast]) -> type:
    """``original`` with ``mixin`` in front, under the original's own names, which checkpoints and pipelines write down."""
    resolve()  # a pickle is read without ``accelerate``
    namespace = dict(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__,
                     _sora_fast_original=original, __reduce_ex__=_reduce)
    made = type(original)(original.__name__, (mixin, original), namespace)
    register_block(original, made)
    return made


def change_class(module: nn.Module, change: Callable[[type], type]) -> None:
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
