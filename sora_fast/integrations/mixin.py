"""The base of all families: mixins, the children that a mixin may absorb, and the change of an object's class.

A swap changes nothing but an object's ``__class__``: the new class derives from a mixin, whose forward runs on this
library's ops, and from the original class.

A mixin may absorb a child: it uses the child's weights and does not call its forward. That is correct only if the child is
of exactly the class that was verified, has no hook and no replaced method, and every setting of its forward is either read
at each call or has the one value that the mixin implements. A Kind holds these conditions; a mixin's ``absorbs`` names one
per child. They are checked when the model is swapped and again at each call, so later changes are respected.
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
    """The base of all mixins: a forward for a third-party class.

    ``report``: the ops it runs on, for the Report. ``absorbs``: children whose parameters it uses without calling them, each
    with a check, such as a Kind, that their forward is the known one. ``why_not(module)``: why this object cannot be
    swapped, or None.
    """

    report = ""
    absorbs: Mapping[str, Callable[[nn.Module | None], bool]] = {}

    @classmethod
    def report_of(cls, module: nn.Module) -> str:
        """``report`` of one object, for a mixin where it depends on the object."""
        return cls.report

    @classmethod
    def absorbed(cls, module: nn.Module) -> list[str]:
        """The names in ``absorbs`` of one object, for a mixin where they depend on the object."""
        return list(cls.absorbs)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Checked when a model is swapped and in each call, since a child may change later."""
        for name, may_absorb in cls.absorbs.items():
            if not may_absorb(get_member(module, name)):
                return f"its {name} was replaced, has a hook, or has settings that are not supported"
        return None


# ------------------------------------------------------------------------------------------------ asking a module
def is_fast(module: nn.Module) -> bool:
    """Whether ``module`` has been swapped."""
    return isinstance(module, Fast)


def accepts_our_arguments(module: nn.Module) -> bool:
    """Whether ``module`` accepts arguments that only mixins know: it is swapped, and its class was not subclassed since."""
    return is_fast(module) and not issubclass(original_of(type(module)), Fast)


def get_member(module: nn.Module, name: str):
    """The parameter, child or attribute of that name, or None. getattr alone would cost 2 us per call."""
    found = module._parameters.get(name)
    if found is None:
        found = module._modules.get(name)
    return getattr(module, name, None) if found is None else found


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards ``module`` itself."""
    return _is_fsdp(type(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks besides its forward, its own or global ones."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
                or _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks
                or _global_backward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether forward was replaced on the object itself, as accelerate's offloading hooks do.

    A removed hook leaves the class's own bound forward there, which replaces nothing.
    """
    if "forward" not in module.__dict__:
        return False
    forward = module.__dict__["forward"]
    bound_to = getattr(forward, "__self__", None)
    return bound_to is not module or forward.__func__ is not type(module).forward


def runs_only_forward(module: nn.Module) -> bool:
    """Whether a call runs the class's forward and nothing else: no replaced forward, no hook of its own or global."""
    return not (has_own_forward(module) or has_hooks(module))


def may_need_grad(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call of ``module`` on x may need gradients."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


# ------------------------------------------------------------------------------------------------ classes by name
KINDS: list["Kind"] = []


class Kind:
    """A class, by its module and name, and the settings that an instance must have to be absorbed.

    Call it with a child. ``reads``: the attributes that the mixin reads, None if it calls the child and only checks its
    class; ``methods``: the methods that the class's forward calls; ``kernel``: the kernel size of its weight;
    ``rule(child)``: conditions beyond the ``required`` values of attributes.
    """

    def __init__(self, *paths: str, reads: str | None = None, methods: tuple[str, ...] = ("forward",), kernel=None,
                 rule: Callable[[nn.Module], bool] | None = None, **required):
        self.paths, self.reads, self.methods = paths, reads, methods
        self.kernel, self.rule, self.required = kernel, rule, required
        self.classes: tuple[type, ...] = ()
        KINDS.append(self)

    def with_settings(self, **settings) -> "Kind":
        """The same class with stricter settings."""
        own = dict(reads=self.reads, methods=self.methods, kernel=self.kernel, rule=self.rule)
        return Kind(*self.paths, **(own | self.required | settings))

    def __call__(self, child) -> bool:
        return is_exactly(child, self.classes) and self.matches_settings(child)

    def is_exact_type(self, value) -> bool:
        """Whether ``value``, not a module, is exactly of this class."""
        return type(value) in self.classes

    def is_exact_instance(self, module: nn.Module) -> bool:
        """Whether ``module`` was built as exactly this class, whatever was set or hooked later."""
        return original_of(type(module)) in self.classes

    def matches_settings(self, module: nn.Module) -> bool:
        """Whether the settings match, regardless of class and hooks; a swapped module checks itself with it."""
        own = module.__dict__
        for name in self.methods:
            if name != "forward" and name in own:
                return False
        for name, value in self.required.items():  # no attrgetter: torch.compile does not trace one
            if getattr(module, name) != value:
                return False
        if self.kernel is not None and get_member(module, "weight").shape[2:] != self.kernel:
            return False
        return self.rule is None or self.rule(module)


def resolve() -> None:
    """Look the classes up among the modules imported so far, without importing any."""
    for kind in KINDS:
        kind.classes = tuple(cls for cls in map(_find, kind.paths) if cls is not None)


def _find(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) and is_unmodified(cls, ("forward",)) else None


def is_unmodified(cls: type, methods: tuple[str, ...]) -> bool:
    """Whether ``cls`` is what its qualified name refers to, with ``methods`` defined in that module: neither a subclass that
    took its base's name nor a monkeypatched class."""
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return False
    for method in methods:
        owner = next((base for base in cls.__mro__ if method in vars(base)), object)
        written = getattr(vars(owner).get(method), "__globals__", None)
        if written is not None and written.get("__name__") != owner.__module__:
            return False
    return True


def is_exactly(module: nn.Module | None, classes: tuple[type, ...]) -> bool:
    """Whether a child is exactly of one of these classes and runs their forward: no adapter, subclass or hook."""
    if not isinstance(module, nn.Module):
        return False
    cls = type(module)
    # the plain class first: torch.compile cannot trace original_of for diffusers' attention
    return (cls in classes or original_of(cls) in classes) and runs_only_forward(module)


# ------------------------------------------------------------------------------------------------ changing classes
def original_of(cls: type) -> type:
    """The original of a swapped class, else ``cls`` itself; FSDP2's wrapper class is unwrapped.

    A subclass of a swapped class, such as a parametrization's, is its own original: it computes something else.
    """
    inner = cls.__bases__[1] if _is_fsdp(cls) else cls
    return inner.__dict__.get("_sora_fast_original", inner)


@functools.cache
def fast_class(original: type, mixin: type[Fast]) -> type:
    """A class of ``mixin`` and ``original`` under the original's names, which checkpoints and pipelines save."""
    resolve()  # unpickling does not go through ``accelerate``
    namespace = dict(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__,
                     _sora_fast_original=original, __reduce_ex__=_reduce)
    swapped = type(original)(original.__name__, (mixin, original), namespace)
    register_block(original, swapped)
    return swapped


def change_class(module: nn.Module, change: Callable[[type], type]) -> None:
    """``change`` the class that ``module`` was built with, below classes that wrappers have derived since."""
    if not has_own_forward(module):
        module.__dict__.pop("forward", None)  # the old class's, left by a removed hook: it would shadow the new one
    module.__class__ = _changed(type(module), change)


def _changed(cls: type, change: Callable[[type], type]) -> type:
    """FSDP2's and parametrizations' classes are rebuilt on the changed class. Other subclasses stay: their methods may refer
    to them."""
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
    """FSDP2 derives a class from FSDPModule and the module's own."""
    return len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule"


def _reduce(self, protocol):
    """Copies and pickles stay swapped. They refer to the original class, since a class made here has no importable name."""
    original = original_of(type(self))
    if issubclass(original, Fast):  # a user's subclass of a class made here
        return object.__reduce_ex__(self, protocol)
    mixin = next(base for base in type(self).__mro__ if issubclass(base, Fast) and not issubclass(base, nn.Module))
    return _new, (original, mixin), vars(self)


def _new(original: type, mixin: type[Fast]) -> nn.Module:
    cls = fast_class(original, mixin)
    return cls.__new__(cls)
