"""A trial of one third-party block: does its forward equal ours, for this object, in evaluation and in training?

The trial runs on a twin in float64: norms, layer scales and modules without weights are copied with random weights, and each
large part that both forwards only call (attention, MLP) is replaced by the same cheap function. So its cost is a few rows of
the width whatever the block's size; it reads no weight and runs no hook. Every attribute that the twin's forward reads is
recorded. Later calls check that these are unchanged, else the block is tried again.

B batch, N tokens, D width.
"""

import enum
import functools
import inspect
import pickle
import random
import sys
import types
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..dispatch import use_backend
from .mixin import original_of, runs_only_forward

_MISSING = object()
_INTERNAL = frozenset(vars(nn.Module())) | {"forward"}
# Immutable values: they change only if the attribute is set.
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, type,
          types.FunctionType, types.BuiltinFunctionType)
_MAX_ELEMENTS = 2**20  # copied per block: 8 MB
_MAX_TRIALS = 8  # per object: if its attributes change at every step, it keeps its own forward


# ------------------------------------------------------------------------------------------------ what was found
@dataclass(frozen=True)
class Proof:
    """The result of one trial and what it depends on, in flat tuples since every call checks them.

    ``reason``: why the forward is not ours, or None. ``own_attributes``, ``class_attributes``: those of the object and its
    class that were read. ``child_classes``: children and their classes; ``uncalled``: those that ours does not call;
    ``settings``: theirs, as (child, attribute, value).
    """

    reason: str | None
    original: type
    forward: object
    names: tuple[str, ...]  # of the forward's first arguments
    own_attributes: tuple[tuple[str, object], ...]
    class_attributes: tuple[tuple[str, object], ...]
    child_classes: tuple[tuple[str, type], ...]
    uncalled: tuple[str, ...]
    settings: tuple[tuple[str, str, object], ...]

    def is_current(self, module: nn.Module) -> bool:
        """Whether everything that the trial depends on is unchanged."""
        own, inner = module.__dict__, module._modules
        if self.original.forward is not self.forward:
            return False
        for name, value in self.own_attributes:
            now = own.get(name, _MISSING)
            changed = now is not value and not _same_value(now, value)
            if changed or value is _MISSING and self._has_outside_dict(module, name):
                return False
        for name, value in self.class_attributes:
            if name in own or not _same_value(getattr(self.original, name, _MISSING), value):
                return False
        for name, kind in self.child_classes:
            if type(inner.get(name)) is not kind:
                return False
        for name, attribute, value in self.settings:
            now = inner[name].__dict__.get(attribute, _MISSING)
            if now is not value and not _same_value(now, value):
                return False
        return True

    def _has_outside_dict(self, module: nn.Module, name: str) -> bool:
        """Whether a module has an attribute that is not in its __dict__."""
        return (name in module._modules or name in module._parameters or name in module._buffers
                or hasattr(self.original, name))

    def calls_plain_children(self, module: nn.Module) -> bool:
        """Whether no child that ours does not call has hooks or a replaced forward, which would be skipped."""
        inner = module._modules
        for name in self.uncalled:
            if not runs_only_forward(inner[name]):
                return False
        return True


class Proofs:
    """The proofs of one object. They are not pickled: the class may be another version when it is loaded."""

    def __init__(self, form: type, found: tuple[Proof, ...] = ()):
        self.form, self.found = form, found

    def current(self, module: nn.Module) -> Proof | None:
        """The proof for ``module`` as it is now, after a trial if there is none; None after too many trials.

        Tracing a graph runs no trial.
        """
        for proof in self.found:
            if proof.is_current(module):
                return proof
        if torch.compiler.is_compiling() or len(self.found) >= _MAX_TRIALS:
            return None
        proof = attempt(module, self.form)
        # A failed trial may have recorded only some of the attributes read, and must not shadow a proof that holds.
        self.found = (proof, *self.found) if proof.reason is None else (*self.found, proof)
        return proof

    def __deepcopy__(self, memo):
        return Proofs(self.form, self.found)

    def __reduce__(self):
        return Proofs, (self.form,)


def _same_value(a, b) -> bool:
    """Equality of immutable values."""
    return a is b or type(a) is type(b) and a == b


def _is_immutable(value) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(_is_immutable(each) for each in value)
    return isinstance(value, _IMMUTABLE)


# ------------------------------------------------------------------------------------------------ the twin
class _Refused(Exception):
    pass


class Recorder:
    """A twin of ``module``, of the same class, that records attribute reads and refuses those it cannot track."""

    def __init__(self, module: nn.Module, form: type, training: bool):
        self.module, self.form, self.training = module, form, training
        self.original = original_of(type(module))
        self.own_attributes, self.class_attributes, self.child_classes, self.settings, self.twins = {}, {}, {}, {}, {}
        self.calls, self.weights, self.elements, self.refused = [], {}, 0, None
        self.twin = _bare_module(_recording_class(self.original), _sora_fast_recorder=self)

    def refuse(self, reason: str) -> _Refused:
        self.refused = self.refused or reason
        return _Refused(reason)

    def read(self, name: str):
        """The value of ``twin.name``; _MISSING: look it up on the class."""
        module, own = self.module, self.module.__dict__
        if name == "training":
            return self.training
        if name in module._parameters or name in module._buffers:
            raise self.refuse(f"its forward reads its own {name}")
        if name in own:
            if not _is_immutable(own[name]):
                raise self.refuse(f"its forward reads {name}, a {type(own[name]).__name__}, which may change unseen")
            self.own_attributes[name] = own[name]
            return own[name]
        found = inspect.getattr_static(self.original, name, _MISSING)
        if found is _MISSING and name in module._modules:
            return self.child(name)
        if found is _MISSING:
            self.own_attributes[name] = _MISSING
        elif not (_is_immutable(found) or hasattr(type(found), "__get__")):
            raise self.refuse(f"its forward reads {name}, a {type(found).__name__}, which may change unseen")
        elif not hasattr(nn.Module, name):
            self.class_attributes[name] = getattr(self.original, name)
        return _MISSING

    def child(self, name: str):
        if name not in self.twins:
            child = self.module._modules[name]
            called = name in self.form.calls
            self.twins[name] = child if child is None else (self._stub if called else self._copy)(name, child)
            self.child_classes[name] = type(child)
            if not (called or child is None):
                self.settings[name] = _settings(child)
        return self.twins[name]

    def _stub(self, name: str, child):
        """A cheap function of the first argument. Others must have their defaults, since ours passes none."""
        layers = [layer for layer in child.modules() if hasattr(layer, "out_features")] if self.form.calls[name] else []
        signature = inspect.signature(child.forward)

        def call(*args, **kwargs):
            x, *more = signature.bind(*args, **kwargs).arguments.items()
            for argument, value in more:
                kind, default = signature.parameters[argument].kind, signature.parameters[argument].default
                several = kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
                given = value if kind is inspect.Parameter.VAR_POSITIONAL else value.values() if several else ()
                if not (all(each is None for each in given) if several else _same_value(value, default)):
                    raise self.refuse(f"its forward gives {argument} to its {name}")
            self.calls.append(name)
            x, draw = x[1], _seeded_randn(name)
            width = layers[-1].out_features if layers else x.shape[-1]
            spread = x[..., torch.arange(width, device=x.device) % x.shape[-1]] + x.mean(-1, keepdim=True)
            return torch.sin(draw(width) * spread + draw(width))

        return _bare_module(original_of(type(child)), _compiled_call_impl=call)

    def _copy(self, name: str, child):
        """The child with random weights in float64, without hooks."""
        for attribute, value in _settings(child).items():
            if not _is_immutable(value):
                raise self.refuse(f"its {name} has {attribute}, a {type(value).__name__}, which may change unseen")
        self.elements += sum(p.numel() for p in child.parameters())
        if self.elements > _MAX_ELEMENTS:
            raise self.refuse(f"its {name} is too large to be tried")
        if child._modules or child._buffers:
            raise self.refuse(f"its forward calls {name}, which has {'children' if child._modules else 'buffers'}")
        kind, draw = original_of(type(child)), _seeded_randn(name)
        twin = _bare_module(kind, **_settings(child))
        twin.__dict__.update(training=self.training, _compiled_call_impl=functools.partial(kind.forward, twin))
        for key, p in child._parameters.items():
            twin._parameters[key] = None if p is None else nn.Parameter(draw(*p.shape))
            if p is not None:
                self.weights[name, key] = twin._parameters[key]
        return twin


def _settings(child: nn.Module) -> dict:
    """A child's attributes besides nn.Module's own."""
    return {name: value for name, value in vars(child).items() if name not in _INTERNAL}


def _bare_module(kind: type, **attributes) -> nn.Module:
    """A bare instance of ``kind``. With a _compiled_call_impl its calls bypass global hooks."""
    twin = object.__new__(kind)
    twin.__dict__.update(vars(nn.Module()), **attributes)
    return twin


def _seeded_randn(name: str):
    """Random numbers in float64, seeded by name, that leave PyTorch's default generator alone."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


@functools.cache
def _recording_class(original: type) -> type:
    def get(self, name):
        if name.startswith("__") or name == "_sora_fast_recorder":
            return object.__getattribute__(self, name)
        value = self._sora_fast_recorder.read(name)
        return object.__getattribute__(self, name) if value is _MISSING else value

    def change(self, name, *value):
        raise self._sora_fast_recorder.refuse(f"its forward changes its {name}")

    return type(original)(original.__name__, (original,), dict(
        __module__=original.__module__, __qualname__=original.__qualname__, __getattribute__=get, __setattr__=change,
        __delattr__=change))


# ------------------------------------------------------------------------------------------------ the trial
def attempt(module: nn.Module, form: type) -> Proof:
    """Try ``module`` against ``form``, one of copied_blocks.py."""
    original, reason = original_of(type(module)), None
    own, shared, settings, kinds = {}, {}, {}, {name: type(module._modules.get(name)) for name in form.parts}
    with _isolated():
        for training in (False, True):
            theirs = ours = None
            try:
                theirs, ours = Recorder(module, form, training), Recorder(module, form, training)
                reason = _compare(theirs, ours)
            except Exception as error:  # a third-party forward may raise anything
                said = " ".join(str(error).split())[:120] or type(error).__name__
                reason = theirs and theirs.refused or f"its forward could not be tried: {said}"
            if theirs is not None:
                own, shared = own | theirs.own_attributes, shared | theirs.class_attributes
                kinds, settings = kinds | theirs.child_classes, settings | theirs.settings
            if reason is not None:
                break
    names = tuple(inspect.signature(original.forward).parameters)[1 : len(inspect.signature(form.compute).parameters)]
    flat = tuple((name, attribute, value) for name, of in settings.items() for attribute, value in of.items())
    return Proof(reason, original, original.forward, names, tuple(own.items()), tuple(shared.items()),
                 tuple(kinds.items()), tuple(settings), flat)


def _compare(theirs: Recorder, ours: Recorder) -> str | None:
    """Why the forward of ``theirs`` differs from the form's; None if outputs and gradients agree to 1e-10."""
    mode = "in training" if theirs.training else "in evaluation"
    (wanted, used_rng), (got, _) = _run(theirs, theirs.original.forward), _run(ours, ours.form.compute)
    if theirs.refused:
        return theirs.refused
    if used_rng:
        return f"its forward draws random numbers {mode}"
    if not _agree(wanted, got):
        return f"its forward is not that of the {theirs.original.__name__} known here ({mode})"
    return None if theirs.calls == ours.calls else "its forward calls its parts in another order, or several times"


def _run(recorder: Recorder, forward):
    """The output and, by name, the gradients of a weighted sum of it; and whether random numbers were drawn."""
    draw, before = _seeded_randn("inputs"), _rng_states()
    given = [draw(*shape).requires_grad_() for shape in recorder.form.shapes(recorder.module)]
    out = forward(recorder.twin, *(x.clone() for x in given))  # copies: it may write to them
    used_rng = _rng_states() != before
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"it returns a {type(out).__name__}")
    leaves = recorder.weights | dict(enumerate(given))
    gradients = torch.autograd.grad((out * draw(*out.shape)).sum(), list(leaves.values()), allow_unused=True)
    return (out.detach(), dict(zip(leaves, gradients, strict=True))), used_rng


def _agree(wanted, got) -> bool:
    """Whether two outputs and their gradients agree; a gradient of None, or of an unread weight, counts as zero."""
    (out, theirs), (other, ours) = wanted, got
    if out.shape != other.shape or out.dtype != other.dtype:
        return False
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    pairs = [(theirs.get(name), ours.get(name)) for name in theirs | ours]
    pairs = [(out, other), *((zero if a is None else a, zero if b is None else b) for a, b in pairs)]
    return all((a - b).abs().max() <= 1e-10 * a.abs().max() for a, b in pairs)


# ------------------------------------------------------------------------------------------------ isolation
def _rng_states() -> tuple:
    numpy = sys.modules.get("numpy")
    return (torch.default_generator.get_state().numpy().tobytes(), random.getstate(),
            pickle.dumps(numpy.random.get_state()) if numpy else None)


@contextmanager
def _isolated():
    """Run on the CPU with gradients and without autocast, and restore the random generators."""
    numpy = sys.modules.get("numpy")
    kept = torch.default_generator.get_state(), random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False),
                        use_backend("torch")):
            stack.enter_context(context)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            torch.default_generator.set_state(kept[0])
            random.setstate(kept[1])
            if numpy:
                numpy.random.set_state(kept[2])
