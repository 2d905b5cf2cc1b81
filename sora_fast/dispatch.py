"""Which backend runs an op, and why.

An op has a few backends. Each answers ``unsupported(problem)`` with full sentences; an empty list means it can run.
``auto`` takes the fastest where ``sora-fast setup`` has measured the problem here (measured.py), else the first of
``ORDER`` that can; a kernel only if a validation record speaks for it (records.py).
A backend asked for by name needs no record; it runs or raises: nothing falls back.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import configs, env, measured, records
from .first_order import PLAIN, first_order, run_once, tied
from .pack import Pack
from .precision import autocast_dtype, no_autocast, transformed

# The one visible order of "auto" where nothing was measured: kernels, PyTorch's own best composition, then the definition.
# An op has some of them.
ORDER = ("cuda", "triton", "torch", "reference")

_forced: str | None = None
_watcher: Callable | None = None  # see watched()


class EmulatedGPU(Protocol):
    """A GPU that runs kernels on CPU tensors: what sora_fast.testing.emulated_gpu puts here for the calling context."""

    arch: str  # "sm90"

    def launch(self, extension, op: str, fields: dict) -> None:
        """Run the launcher ``extension.<op>``; tensors among ``fields`` become addresses."""


_emulated: ContextVar[EmulatedGPU | None] = ContextVar("emulated_gpu", default=None)


def emulated_gpu() -> EmulatedGPU | None:
    """The GPU that is emulated in this context, or None."""
    return _emulated.get()


@contextmanager
def use_emulated_gpu(gpu: EmulatedGPU):
    """Inside, in this context, CPU tensors are on ``gpu`` for the backends "triton" and "cuda"."""
    token = _emulated.set(gpu)
    try:
        yield
    finally:
        _emulated.reset(token)


@env.constant_in_graphs
def _refuse_graphs() -> None:
    """A graph would keep what is true inside emulated_gpu alone."""
    if _emulated.get() is not None:
        raise NotImplementedError("emulated_gpu: expected calls of ops outside torch.compile, got a graph that is traced; "
                                  "call the function itself, or compile it outside")


@dataclass(frozen=True)
class Problem:
    """What a backend is told about a call: enough to refuse it, nothing that changes from step to step.

    ``device`` is ``"cpu"`` or, with its architecture, ``"cuda:sm90"``, or ``"emulated:sm90"`` of a CPU tensor inside
    sora_fast.testing.emulated_gpu; ``grad`` says whether any input needs one.
    Families add their own facts in a subclass. ``size``, where it is one of them, is for what was measured alone: the
    buckets (``measured.sizes``) of a call's lengths, () where they are not known.
    """

    device: str
    dtype: torch.dtype
    grad: bool


@dataclass(frozen=True)
class Backend:
    """One way to run an op: ``run`` takes, by keyword, what the op hands to all of its backends.

    ``kernel``: the module of sora_fast.kernels with its kernel, such as "modulation"; "" is plain PyTorch, which needs no
    record. For ``explain``: ``config``, the configs.Found of a typical call (None: none to choose), and ``note``.
    ``foreign``: its backward is others' kernels, whose gradients autograd may take for constants or cannot derive again.
    ``hooked``: the same of some nodes; ``run`` takes ``hook`` (or None), a hook to register on each of them.
    """

    name: str
    run: Callable
    unsupported: Callable[[Problem], list[str]] = lambda problem: []
    kernel: str = ""
    config: Callable[[Problem], configs.Found] | None = None
    note: Callable[[Problem], str] = lambda problem: ""
    foreign: bool = False
    hooked: bool = False


def _cannot(backend: Backend, problem: Problem) -> list[str]:
    """Sentences: why ``backend`` cannot run ``problem`` here."""
    reasons = backend.unsupported(problem)
    if transformed() and backend.name not in ("torch", "reference"):
        return [*reasons, "Transforms of torch.func go through plain PyTorch and not through its kernels; "
                          "torch.autograd.grad does."]
    return reasons


class Plan(NamedTuple):
    """How a call runs: ``kind`` is PyTorch's type of its device; ``grad``: a second derivative is to be refused."""

    backend: Backend
    kind: str
    grad: bool


class Op:
    """A public op: its name, its backends, and the choice between them."""

    def __init__(self, name: str, family: str, example: Callable[[str, torch.dtype, bool], Problem],
                 backends: Iterable[Backend], problem: type[Problem] = Problem):
        self.name = name
        self.family = family
        self.example = example  # (device, dtype, grad) -> a typical problem, for explain()
        self.problem = problem
        self.backends = {backend.name: backend for backend in backends}
        self.told = False  # that auto landed on a slow path

    def choose(self, problem: Problem, requested: str = "auto", *, assume_validated: bool = False) -> Backend:
        """The backend that will run ``problem``; raises with every backend's reasons where none can.

        ``assume_validated``: as if every kernel had its record, to see what ``auto`` would take then.
        """
        wanted = requested
        if isinstance(requested, str) and requested == "auto":
            wanted = _forced or env.backend() or "auto"
            if wanted == "auto":
                return self._first(problem, assume_validated)
        if not isinstance(wanted, str) or wanted not in (*ORDER, *self.backends):
            names = ", ".join(repr(name) for name in ("auto", *self.backends))
            raise ValueError(f"{self.name}: expected backend to be one of {names}, got {wanted!r}; "
                             f"sora_fast.info() lists what this installation has")
        if wanted not in self.backends:
            names = ", ".join(repr(name) for name in self.backends)
            raise NotImplementedError(f"{self.name}: backend {wanted!r} was asked for by name and does not implement "
                                      f"this op, expected one of {names}; pass backend='auto'")
        reasons = _cannot(self.backends[wanted], problem)
        if reasons:
            raise NotImplementedError(
                f"{self.name}: backend {wanted!r} was asked for by name and cannot run this call: "
                f"{' '.join(reasons)} Pass backend='auto', or change the call."
            )
        return self.backends[wanted]

    def why_not(self, name: str, problem: Problem, *, assume_validated: bool = False) -> list[str]:
        """Why ``auto`` passes over backend ``name``: what it cannot do, or the record that it lacks."""
        backend = self.backends[name]
        reasons = _cannot(backend, problem)
        return reasons if reasons or assume_validated else records.why_not(self.name, backend, problem)

    def order(self, problem: Problem) -> list[str]:
        """The backends that ``auto`` tries for ``problem``: as measured here, the fastest first, then as ``ORDER`` has them.

        One that was wrong, or could not run, where it was measured is not among them.
        """
        timed, refused = measured.order(self, problem) if problem.device.startswith("cuda") else ((), ())
        usual = [name for name in ORDER if name not in timed and name not in refused]
        return [name for name in (*timed, *usual) if name in self.backends]

    def _first(self, problem: Problem, assume_validated: bool) -> Backend:
        """The first of ``order`` that ``auto`` may take for ``problem``."""
        reasons = {}
        for name in self.order(problem):
            reasons[name] = self.why_not(name, problem, assume_validated=assume_validated)
            if not reasons[name]:
                return self.backends[name]
        for name in self.backends:
            if name not in reasons:
                reasons[name] = ["It was wrong, or could not run, when it was measured here." if name in ORDER else
                                 "It is not among those that 'auto' tries; ask for it by name."]
        listed = " ".join(f"[{name}] {' '.join(why)}" for name, why in reasons.items())
        raise NotImplementedError(f"{self.name}: no backend can run this call: {listed}")

    def _tell_if_slow(self, backend: Backend, problem: Problem, requested: str) -> None:
        """One log line the first time auto, on a CUDA tensor, lands on the definition or passes over a kernel that can run.

        The slow path is never silent.
        """
        if self.told or backend.kernel or not problem.device.startswith("cuda"):
            return
        if requested != "auto" or (_forced or env.backend() or "auto") != "auto":
            return
        tried = self.order(problem)
        if measured.find(self, problem) is not None:  # it was seen here what is slow
            return
        passed_over = [self.backends[name] for name in tried[:tried.index(backend.name)]]
        idle = [other for other in passed_over if other.kernel and not _cannot(other, problem)]
        if not idle and backend.name != "reference":
            return
        self.told = True
        reasons = " ".join(why for other in passed_over for why in self.why_not(other.name, problem))
        what = (f"its reference on {problem.device}, which is slow" if backend.name == "reference"
                else f"its {backend.name} backend on {problem.device}, not on its kernel")
        logging.getLogger("sora_fast").warning("%s runs on %s. %s sora_fast.explain(%r) shows the choices.",
                                               self.name, what, reasons or "It has no other backend.", self.name)

    def plan(self, facts: tuple, requested: str) -> Plan:
        """How to run a call: for ``run``, and for ``remember`` with the call's key.

        Args:
            facts: the fields of its Problem, in order, which is made of them where the choice is not remembered.
        """
        kind = "cpu" if facts[0] == "cpu" else _device_type(facts[0])
        if torch.compiler.is_compiling():
            _refuse_graphs()
            return Plan(self.choose(self.problem(*facts), requested), kind, False)
        # unsupported() of a backend sees its problem and the environment; what else there is (the build of our extension,
        # installed packages) is fixed for the process
        now = (self, requested, *_choices(), transformed(), facts)
        found = remembered(now)
        if found is None:
            problem = self.problem(*facts)
            backend = self.choose(problem, requested)
            if _watcher is not None:
                backend = _watcher(self, problem, backend)
            else:
                self._tell_if_slow(backend, problem, requested)
            found = remember(now, Plan(backend, kind, problem.grad))
        return found

    def run(self, plan: Plan, key: tuple | None, /, **arguments):
        """Run the op as planned; the result can be differentiated once.

        Ops have cast their tensors by now: autocast is off inside, or it would round the products that a backend
        makes in float32 (the reference's, and the angles of learned frequencies).

        Args:
            key: the call's ``call_key``; where it has one, neither a graph nor a transform of torch.func is at work.
        """
        backend, kind, grad = plan
        if (key is None or forward_ad._current_level >= 0) and not torch.compiler.is_compiling():
            refuse_transforms(self.name, arguments.values())
        run = backend.run
        if grad:
            if key is None or backend.foreign:
                arguments = first_order(arguments, self.name)
            elif backend.hooked:
                arguments["hook"], _ = tied(self.name, arguments)
            else:
                arguments = dict(op=self.name, run=run, arguments=arguments)
                run = run_once
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with no_autocast(kind):
                return run(**arguments)
        return run(**arguments)


# ------------------------------------------------------------------------------------------- what need not be done twice
_answers: dict[tuple, object] = {}
_SINGLE = frozenset((type(None), bool, int, float, str, type, torch.dtype))


def _choices() -> tuple:
    """What a choice of backend depends on beside the call."""
    return (_forced, *env.choices(), records.generation)


def call_key(op: Op, requested: str, tensors: tuple, *settings, casts: bool = False) -> tuple | None:
    """All that a call's checks and its plan depend on, but values: two calls with one key are right or wrong together.

    None where nothing is to be remembered: in graphs and transforms, and of subclasses of tensors, fake ones among them.

    Args:
        tensors: each a tensor, a Pack or None. settings: the other arguments that are checked, and whatever else the problem
            is made of. casts: the op casts its tensors as torch.autocast asks.
    """
    if is_dynamo_compiling() or _are_functorch_transforms_active():  # whatever else traces has fake tensors
        return None
    gpu = _emulated.get()
    key = [op, requested, _forced, env.choices(), records.generation, gpu and gpu.arch, torch.is_grad_enabled()]
    for tensor in tensors:
        if type(tensor) in PLAIN:
            key.append((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad))
        elif tensor is None:
            key.append(None)
        elif isinstance(tensor, Pack):
            key.append(tensor._facts or tensor.facts)
        else:
            return None
    if casts and type(tensors[0]) in PLAIN:
        key.append(autocast_dtype(tensors[0]))
    kinds = tuple(map(type, settings))  # 1, 1.0 and True are one key of a dict
    key.append(kinds)
    if _SINGLE.issuperset(kinds):
        key.append(settings)
        return tuple(key)
    for kind, value in zip(kinds, settings):  # noqa: B905 (of one length)
        if kind is tuple or kind is list:
            key += (tuple(map(type, value)), tuple(value))
        elif isinstance(value, torch.Tensor):
            return None
        else:
            key.append(value)
    return tuple(key)


def remembered(key: tuple | None) -> object | None:
    """What was remembered under ``key``, or None."""
    try:
        return None if key is None else _answers.get(key)
    except TypeError:  # an argument without a hash: it is to be refused, or is not worth remembering
        return None


def remember(key: tuple | None, answer):
    """Keep and return ``answer``; not while somebody watches, who would miss the next call."""
    if key is not None and _watcher is None:
        if len(_answers) >= 10_000:  # packs of all lengths come by, and nothing grows for ever
            _answers.clear()
        try:
            _answers[key] = answer
        except TypeError:
            pass
    return answer


def forget() -> None:
    """Check and choose again; needed only where a test has changed backends or the machine."""
    _answers.clear()
    _capability_of.cache_clear()


@contextmanager
def watched(watcher: Callable[["Op", Problem, Backend], Backend]):
    """Inside, ``watcher`` sees every call's op, problem and backend, and answers with the Backend that runs it.

    Not in a graph that is traced.
    """
    global _watcher
    before, _watcher = _watcher, watcher
    forget()
    try:
        yield
    finally:
        _watcher = before


@contextmanager
def use_backend(name: str):
    """Every op called inside uses backend ``name``, in all threads; ``"auto"`` lifts an outer choice.

    It goes before SORA_FAST_BACKEND, and an op's own ``backend=`` before both.

    A graph made by torch.compile keeps the backends it was traced with.

    Raises:
        ValueError: an unknown name.

    >>> with use_backend("reference"):
    ...     out = ops.norm_act(torch.randn(1, 4, 1, 2, 2))
    """
    global _forced
    if not isinstance(name, str) or name not in ("auto", *ORDER):
        names = ", ".join(repr(known) for known in ("auto", *ORDER))
        raise ValueError(f"use_backend: expected one of {names}, got {name!r}; choose one of them")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@env.constant_in_graphs
def _capability(index: int) -> str:
    return _capability_of(index)


@functools.cache
def _capability_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:sm{major}{minor}"


def _device_type(device: str) -> str:
    """PyTorch's type for a Problem's ``device``: what an emulated GPU works on are CPU tensors."""
    kind = device.partition(":")[0]
    return "cpu" if kind == "emulated" else kind


@env.constant_in_graphs
def _emulated_name() -> str:
    gpu = _emulated.get()
    return "cpu" if gpu is None else f"emulated:{gpu.arch}"


def device_name(tensor: torch.Tensor) -> str:
    """``"cpu"``, ``"cuda:sm90"``, ``"emulated:sm90"``, or the bare device type of others."""
    if tensor.is_cpu:
        return _emulated_name()
    if tensor.is_cuda and not isinstance(tensor, torch._subclasses.FakeTensor):
        return _capability(tensor.device.index)
    return tensor.device.type


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_transforms(op: str, values: Iterable) -> None:
    """Raise one sentence if a tensor among ``values`` is a batch of torch.func.vmap or has a forward-mode tangent."""
    if not transformed() and forward_ad._current_level < 0:
        return
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if is_batched(tensor):
                raise NotImplementedError(f"{op}: expected tensors without a dimension of torch.func.vmap, for which it has "
                                          f"no rule, got one with it; loop over that dimension, or use "
                                          f"sora_fast.reference.{op}, which is plain PyTorch")
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(f"{op}: expected tensors without a tangent, because it has no forward-mode "
                                          f"derivative, got one with it; use torch.func.vjp, or sora_fast.reference.{op}, "
                                          f"which is plain PyTorch")


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether torch.func.vmap has added a dimension to ``tensor`` that its shape does not show."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
