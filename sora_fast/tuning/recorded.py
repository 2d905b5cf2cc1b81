"""Calls of ops as a model makes them, without their memory: made again with random numbers, to be judged and timed.

A call is held as its backend is given it: checked and cast, so that each backend's own time is measured and nothing else.
B batch, C channels, T H W frames and pixels; N tokens, R modulation rows, S samples, D width.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn

from .. import dispatch
from ..benchmarks.case import FORWARD, FULL, Case, Provider
from ..dispatch import Backend, Op, Problem
from ..explanation import all_ops
from ..integrations.mixin import original_of
from ..pack import Pack
from ..testing import Truth, truth
from ..testing.rule import tensors

# Their inputs are each other's outputs, which random numbers are not.
LEFT_OUT = ("varlen_attention_forward", "varlen_attention_backward")
# Of the small twin that is judged in float64: tokens of a modulation row, of a sample of attention, frames and pixels.
TOKENS, SAMPLES, FRAMES, SIDE = 512, 3, 5, 24


@dataclass(frozen=True)
class Hollow:
    """A tensor without its memory; ``values``: of an index tensor, on the CPU, None where it had none."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool
    values: torch.Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, t: torch.Tensor) -> "Hollow":
        index = not t.is_floating_point() and t.device.type != "meta"
        return cls(tuple(t.shape), t.stride(), t.dtype, t.requires_grad, t.detach().cpu() if index else None)

    def cut(self, *shape: int) -> "Hollow":
        """One of another shape, dense, its dimensions in memory in the order they were; an index without values."""
        found, step = [0] * len(shape), 1
        for place in sorted(range(len(shape)), key=lambda place: (self.stride[place], -place)):
            found[place], step = step, step * shape[place]
        return Hollow(shape, tuple(found), self.dtype, self.grad)

    def filled(self, generator: torch.Generator | None, device) -> torch.Tensor:
        """Normal numbers in its layout; none on the device meta."""
        if generator is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        held = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if prod(self.shape) else 0
        numbers = torch.randn(held, generator=generator, device=device, dtype=torch.float32).to(self.dtype)
        return numbers.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Recorded(Case):
    """One call; ``arguments`` by keyword, tensors as Hollow, a Pack as its grids; ``callers``: classes of modules."""

    problem: Problem
    arguments: dict = field(compare=False, hash=False)
    callers: set[str] = field(compare=False, hash=False, default_factory=set)

    def inputs(self, device, seed):
        generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
        return {name: self._made(name, value, generator, device) for name, value in self.arguments.items()}

    def _made(self, name: str, value, generator, device):
        if isinstance(value, Hollow):
            return value.filled(generator, device) if value.dtype.is_floating_point else self._index(name, value).to(device)
        return Pack(value.grids, device=device) if isinstance(value, _Grids) else value

    def _index(self, name: str, given: Hollow) -> torch.Tensor:
        """Of an index without values: tokens in equal shares over rows and samples, coords counted in a square."""
        if given.values is not None:
            return given.values
        count, arguments = given.shape[0], self.arguments
        if name.startswith("cu_seqlens"):
            total = arguments[name[-1]].shape[0]
            return torch.linspace(0, total, count, dtype=torch.float64, device="cpu").to(given.dtype)
        if name == "rows":
            table = next(arguments[n] for n in ("gate", "scale", "shift", "q") if arguments.get(n) is not None)
            rows = table.shape[0] if "q" not in arguments else 1
            return (torch.arange(count, device="cpu") * rows // max(count, 1)).to(given.dtype)
        if name == "coords":
            side = max(1, round(count**0.5))
            place = torch.arange(count, device="cpu")
            return torch.stack([torch.zeros_like(place), place // side, place % side], 1).to(given.dtype)
        return torch.zeros(given.shape, dtype=given.dtype, device="cpu")

    def directions(self):
        if not self.problem.grad:
            return {FORWARD: ()}
        return {"backward": tuple(name for name, value in self._tensors().items() if value.grad)}

    def least_bytes(self, direction):
        return sum(prod(value.shape) * value.dtype.itemsize for value in self._tensors().values())

    def shape(self):
        return {name: list(value.shape) for name, value in self._tensors().items()}

    def _tensors(self) -> dict[str, Hollow]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Hollow)}

    def truth(self, inputs, seed) -> Truth:
        names = next(iter(self.directions().values()))
        return truth(self.op, inputs, grads=bool(names), names=names, seed=seed,
                     definition=all_ops()[self.op].backends["reference"].run)

    def providers(self) -> list[Provider]:
        """The backends that can run it here: ours, PyTorch's, and the peers that are installed."""
        return [Provider(name, backend.run) for name, backend in all_ops()[self.op].backends.items()
                if name != "reference" and not backend.unsupported(self.problem)]

    def small(self) -> "Recorded":
        """Its twin with the same widths, heads, channels and settings, and as little of the rest as shows what is wrong."""
        return replace(self, arguments=_small(self.op, dict(self.arguments)))


@dataclass(frozen=True)
class _Grids:
    """What is held of a Pack."""

    grids: tuple


# ------------------------------------------------------------------------------------------------------ the small twin
def _small(op: str, a: dict) -> dict:
    tensor = {name: value for name, value in a.items() if isinstance(value, Hollow)}
    if op == "varlen_attention":
        samples = min(SAMPLES, max(1, a["cu_seqlens_q"].shape[0] - 1))
        for side, others in (("q", ""), ("k", "v")):
            ends = a[f"cu_seqlens_{side}"]
            length = min(TOKENS, tensor[side].shape[0] // max(1, ends.shape[0] - 1))
            for name in side + others:
                a[name] = tensor[name].cut(samples * length, *tensor[name].shape[1:])
            a[f"cu_seqlens_{side}"] = ends.cut(samples + 1)
        return a
    if op in ("patch_embed", "unpatchify"):
        if isinstance(a["grids"], tuple | list):
            tokens = sum(map(prod, a["grids"]))
            grids = tuple((min(t, 2), min(h, SIDE), min(w, SIDE)) for t, h, w in list(a["grids"])[:SAMPLES])
            name = "latents" if op == "patch_embed" else "tokens"
            first = tensor[name].shape[0] // max(tokens, 1) * sum(map(prod, grids))
            a |= {"grids": grids, name: tensor[name].cut(first, *tensor[name].shape[1:])}
            a["pack"] = None if a["pack"] is None else _Grids(grids)
        return a
    if op in ("causal_conv3d", "norm_act_conv3d", "norm_act"):
        whole = tensor["x"].shape
        for name in ("x", "cache"):
            if name in tensor:
                b, c, t, h, w = tensor[name].shape
                a[name] = tensor[name].cut(b, c, min(t, FRAMES), min(h, SIDE), min(w, SIDE))
        if "residual" in tensor:  # of the output's shape
            with torch.no_grad():
                given = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Hollow)
                         else value for name, value in (a | dict(residual=None)).items()}
                made = tensors(all_ops()[op].backends["torch"].run(**given))[0]
            a["residual"] = tensor["residual"].cut(*made.shape)
        return a if prod(whole) else dict(a)
    return _few_tokens(a, tensor)


def _few_tokens(a: dict, tensor: dict) -> dict:
    """Of modulation and rotary: equal shares of tokens for each modulation row."""
    first = next(tensor[name] for name in ("x", "q") if name in tensor)
    tokens = first.shape[0]
    tables = [name for name in ("gate", "shift", "scale") if name in tensor]
    rows = tensor[tables[0]].shape[0] if tables else 1
    share = min(-(-tokens // max(rows, 1)), max(1, TOKENS // max(rows, 1)))
    kept = min(tokens, rows * share)
    for name, value in tensor.items():
        if value.shape and value.shape[0] == tokens and not name.endswith(("weight", "bias")):
            a[name] = value.cut(kept, *value.shape[1:])
    if a.get("even"):
        a["even"] = kept // rows
    return a


# ---------------------------------------------------------------------------------------------------------- recording
class Seen(Exception):
    """Ends a call whose result nobody wants."""


@contextmanager
def recording(device: str, *, run: bool = True) -> Iterator[list[Recorded]]:
    """Collects the distinct calls inside, each with its Problem as it is on ``device``, "cuda:sm90".

    ``run``: False ends each call with Seen once it is noted.
    """
    found: dict[tuple, Recorded] = {}

    def watcher(op: Op, problem: Problem, backend: Backend) -> Backend:
        def watched(**arguments):
            note(op, problem, arguments)
            if not run:
                raise Seen
            return backend.run(**arguments)

        return replace(backend, run=watched, hooked=False)

    def note(op: Op, problem: Problem, arguments: dict) -> None:
        if op.name in LEFT_OUT or all(name == "reference" or not backend.kernel and name == "torch"
                                      for name, backend in op.backends.items()):
            return  # nothing to choose between
        problem = replace(problem, device=device)
        if hasattr(problem, "cudnn"):
            problem = replace(problem, cudnn=op.example(device, problem.dtype, problem.grad).cudnn)
        key = op.name, problem
        if key not in found:
            found[key] = Recorded(op.name, f"{problem}", problem.dtype, FULL, problem, {
                name: _held(value) for name, value in arguments.items()})
        found[key].callers.update(_callers())

    calls: list[Recorded] = []
    with dispatch.watched(watcher):
        yield calls
    calls += found.values()


def _held(value):
    if isinstance(value, torch.Tensor):
        return Hollow.of(value)
    return _Grids(value.grids) if isinstance(value, Pack) else value


def _callers() -> Iterator[str]:
    """The class of the innermost module whose forward runs."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield original_of(type(module)).__name__
            return
        frame = frame.f_back


