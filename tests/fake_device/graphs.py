"""A stream capture: operators are recorded and leave memory as it was; a replay runs them again into the same memory."""

import contextlib
import threading

import torch
from torch.utils import _pytree as pytree

from . import waits


def _memory(x: torch.Tensor) -> torch.Tensor:
    return getattr(x, "held", x)


def _results(out) -> list[torch.Tensor]:
    return [_memory(x) for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


class Tape:
    """What one capture recorded. Memory that only a replay fills is NaN until then."""

    def __init__(self):
        self.steps, self.before, self.fresh, self.paused = [], [], [], False

    def run(self, func, run, inputs, written):
        """What ``run()`` gives, recorded; ``written``: of ``inputs``, those it writes into."""
        if self.paused:
            return run()
        self.before += [(_memory(x), _memory(x).clone()) for x in written]
        out = run()
        if not func.is_view:
            made = _results(out)
            known = {_memory(x).untyped_storage().data_ptr() for x in inputs}
            self.fresh += [x for x in made if x.untyped_storage().data_ptr() not in known]
            self.steps.append((run, made))
        return out

    @contextlib.contextmanager
    def one_step(self):
        """Inside, operators are parts of the one that called them and not recorded; waits are refused all the same."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def finish(self) -> None:
        """A capture runs nothing: put back what was written, and take away what was computed."""
        for x in self.fresh:
            if x.is_floating_point():
                x.fill_(torch.nan)
        for x, held in reversed(self.before):
            x.copy_(held)

    def replay(self) -> None:
        for run, made in self.steps:
            for old, new in zip(made, _results(run()), strict=True):
                if old is not new:
                    old.copy_(new)


class Pool:
    """Memory of a CUDA graph of torch.compile's, in which one thread allocates while it is ``open``."""

    def __init__(self):
        self.thread, self.held = None, []

    @contextlib.contextmanager
    def open(self):
        self.thread, waits.state.pool = threading.get_ident(), self
        try:
            yield
        finally:
            self.thread = waits.state.pool = None

    def add(self, made, inputs) -> None:
        """Of what an operator ``made``, the memory that is none of its ``inputs``."""
        if self.thread == threading.get_ident():
            known = {_memory(x).untyped_storage().data_ptr() for x in inputs}
            self.held += [x for x in _results(made) if x.untyped_storage().data_ptr() not in known]

    def use_again(self) -> None:
        for x in self.held:
            x.fill_(torch.nan if x.is_floating_point() else -1)


class CUDAGraph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self, *_, **__):
        self.tape = None

    def replay(self) -> None:
        if self.tape is None:
            raise RuntimeError("CUDAGraph: expected a capture before a replay, got none")
        with torch.no_grad():
            self.tape.replay()

    def pool(self):
        return (0, 0)

    def reset(self) -> None:
        self.tape = None


class graph:
    """In the place of torch.cuda.graph."""

    def __init__(self, cuda_graph: CUDAGraph, pool=None, stream=None, capture_error_mode="global"):
        self.graph = cuda_graph

    def __enter__(self):
        waits.note("the begin of a capture")
        waits.state.capture = self.tape = Tape()

    def __exit__(self, kind, *_):
        waits.state.capture = None
        with torch.no_grad():
            self.tape.finish()
        if kind is None:
            self.graph.tape = self.tape
