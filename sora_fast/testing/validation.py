"""``validate``: a function, ours or somebody's, against the reference in float64 over all cases of an op.

``Report.to_jsonl()`` writes a line of JSON per op, implementation, dtype and direction:

    schema 1; row "validate"; op; implementation; backend (null for a function of the user's); dtype (of the case, not of
        the tensor); direction: forward or backward
    passed: whether something was compared, all of it obeyed the error rule, and nothing in ``raised``
    cases, comparisons: how many ran, and how many tensors were compared
    error, allowed, tensor, case: of the tensor closest to its limit, or furthest past it; null where nothing was compared
    failed: every failed comparison in full; raised: {case, reason} where the call raised or wrote into its arguments;
        refused: {case, reason} where the backend says that it cannot
    kernel, kernel_hash: module of sora_fast.kernels, or family of csrc, and its hash, or null
    arch: "sm90", or null off NVIDIA GPUs and where not all cases were run
    emulated: "sm90" where that GPU was emulated, or null
    environment: as sora_fast.environment gives it

A number that is not finite is null. Those of a kernel on a CUDA GPU are the records of sora_fast.records.
"""

import json
import math
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from .. import dispatch, ops, records
from ..environment import environment
from ..explanation import all_ops
from ..named import pick_device
from ..precision import float32_kept
from .cases import cases
from .emulated import emulated_gpu
from .rule import Comparison, Truth, run, same_bits, tensors, truth


@dataclass
class Row:
    """One implementation of one op in one dtype and direction.

    ``compared`` pairs a case's label with a Comparison, ``raised`` and ``refused`` with a sentence; ``ran`` holds the labels
    of the cases that gave something to compare.
    """

    op: str
    implementation: str
    dtype: str
    direction: str
    backend: str | None
    kernel: str | None
    kernel_hash: str | None
    arch: str | None
    environment: dict
    emulated: str | None = None
    compared: list[tuple[str, Comparison]] = field(default_factory=list)
    raised: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)

    def add(self, case: str, label: str, comparisons: Iterable[Comparison], wrote: str) -> None:
        """Take the comparisons of one call, and a sentence if it ``wrote`` where it must not."""
        self.ran.add(case)
        self.compared += [(label, c) for c in comparisons]
        if wrote:
            self.raised.append((label, wrote))

    @property
    def passed(self) -> bool:
        return bool(self.compared) and not self.raised and all(c.passed for _, c in self.compared)

    @property
    def refused_whole(self) -> bool:
        """Whether there is nothing to judge: no pass, and no failure either."""
        return not self.compared and not self.raised

    @property
    def worst(self) -> tuple[str, Comparison] | None:
        return max(self.compared, key=lambda pair: pair[1].severity, default=None)

    def as_dict(self) -> dict:
        case, worst = self.worst or (None, None)
        facts = {name: getattr(self, name) for name in ("op", "implementation", "backend", "dtype", "direction", "passed")}
        pairs = lambda found: [dict(case=label, reason=reason) for label, reason in found]
        return dict(
            schema=records.SCHEMA, row="validate", **facts, cases=len(self.ran), comparisons=len(self.compared),
            error=worst and _finite(worst.error_max), allowed=worst and _finite(worst.allowed_max),
            tensor=worst and worst.name, case=case, failed=[_full(label, c) for label, c in self.compared if not c.passed],
            raised=pairs(self.raised), refused=pairs(self.refused), kernel=self.kernel, kernel_hash=self.kernel_hash,
            arch=self.arch, emulated=self.emulated, environment=self.environment)

    def __str__(self) -> str:
        head = f"{self.op:28s} {self.implementation:16s} {self.dtype:9s} {self.direction:9s}"
        below = "".join(f"\n  FAILED: {each}" for each in _gathered(self.raised))
        if self.worst is None:
            reason = "FAILED" if self.raised else "no pass: every case was refused" if self.refused else "no pass: not run"
            return f"{head} {'-':>10s} {'-':>10s}  {reason}{below}"
        case, c = self.worst
        verdict = "ok" if self.passed else "FAILED"
        if not c.passed:
            verdict += f": case {case!r}, {c.name}, at {list(c.worst)}, rms {c.error_rms:.2e} (allowed {c.allowed_rms:.2e})"
            verdict += f", {c.problem}" if c.problem else ""
        if self.refused:
            verdict += f" (cases refused: {len(self.refused)})"
        return f"{head} {c.error_max:10.2e} {c.allowed_max:10.2e}  {verdict}{below}"


@dataclass(frozen=True)
class Report:
    """Rows of a validation; ``print(report)`` shows the worst tensor of each, ``report.passed`` says whether all passed.

    ``tracebacks``: of what the function raised. ``stopped``: why the cases after the last one here were not run, or "".
    """

    rows: tuple[Row, ...]
    tracebacks: tuple[str, ...] = ()
    stopped: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.stopped and all(row.passed for row in self.rows)

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Cases that were refused, with the reasons."""
        return tuple(f"{label}: {reason}" for label, reason in self._refused())

    def _refused(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((f"{label}, {row.dtype}", reason) for row in self.rows for label, reason in row.refused))

    def __str__(self) -> str:
        lines = [f"{'op':28s} {'implementation':16s} {'dtype':9s} {'direction':9s} {'error':>10s} {'allowed':>10s}"
                 f"  verdict"]
        lines += [str(row) for row in self.rows]
        lines += [f"not run: {each}" for each in _gathered(self._refused())]
        lines += [f"stopped: {self.stopped}"] * bool(self.stopped)
        compared = [c for row in self.rows for _, c in row.compared]
        lines.append(f"{sum(c.passed for c in compared)} of {len(compared)} comparisons passed")
        return "\n".join(lines)

    def to_dicts(self) -> list[dict]:
        """A dictionary for each row, of plain Python values."""
        return [row.as_dict() for row in self.rows]

    def to_jsonl(self) -> str:
        """One line per row, as this module's docstring says."""
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.to_dicts())


def validate(op: str, fn: Callable | None = None, *, backend: str = "auto", device: str = "auto",
             dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
             progress: Callable[[str], object] = lambda text: None, case: str = "", models: bool | None = None) -> Report:
    """Run ``fn`` over the cases of ``op``, forward and backward, and compare with the reference in float64.

    A case in which ``fn`` raises or writes into its arguments has failed, one that it refuses (NotImplementedError) is
    listed; the others run all the same. PyTorch's products and convolutions of float32 are made without TF32.

    Args:
        op: name of an op, as in ``sora_fast.ops``.
        fn: takes the op's keyword arguments and returns what it returns; None: our own op on ``backend``.
        backend: of our own op. dtypes: of the cases.
        device: where it runs; "auto": a GPU where there is one. The truth is computed there too. "emulated:sm90": CPU
            tensors inside ``emulated_gpu``, in the scope that is open or, where none is, one with its defaults.
        progress: called before each case with what it is.
        case: only cases whose label contains this text. models: as in ``cases``, which a ``case`` chooses from in all. A
            part of the cases makes no records.

    Returns:
        A Report: ``report.passed``, ``print(report)``, ``report.to_jsonl()``.

    Raises:
        ValueError: an op without cases.
    """
    if op not in ops.__all__:
        raise ValueError(f"validate: expected the name of an op of sora_fast.ops, got {op!r}; see sora_fast.info()")
    facts = dict(op=op, backend=None, kernel=None, kernel_hash=None)
    if fn is None:
        public, name = getattr(ops, op), backend
        fn = lambda **arguments: public(**arguments, backend=backend)
        chosen = all_ops()[op].backends.get(backend)
        kernel = chosen.kernel if chosen else ""
        facts |= dict(backend=backend, kernel=kernel or None,
                      kernel_hash=records.kernel_hash(kernel, backend) if kernel else None)
    else:
        name = getattr(fn, "__name__", type(fn).__name__)
    if device == "auto":
        device = "cpu" if dispatch.emulated_gpu() else str(pick_device("auto"))
    emulated = device.partition(":")[2] if device.startswith("emulated:") else None
    scope = nullcontext() if emulated is None or dispatch.emulated_gpu() else emulated_gpu(emulated)
    with scope, float32_kept():
        return _validate(op, fn, name, facts | dict(emulated=emulated), device, dtypes, progress, case, models)


def _validate(op: str, fn: Callable, name: str, facts: dict, place: str, dtypes, progress, case, models) -> Report:
    device = torch.device("cpu" if facts["emulated"] else place)
    whole = not case and models is None
    facts |= dict(implementation=name, arch=_arch(device) if whole else None, environment=environment(device))
    # the raw attention ops are forward and backward themselves, and have no gradients of their own
    directions = ("forward",) if op.startswith("varlen_attention_") else records.DIRECTIONS
    rows: list[Row] = []
    tracebacks: list[str] = []
    for dtype in dtypes:
        of_dtype = {way: Row(dtype=str(dtype).removeprefix("torch."), direction=way, **facts) for way in directions}
        rows += of_dtype.values()
        for label, inputs in cases(op, dtype, place, 0, True if case and models is None else models):
            if case not in label:
                continue
            progress(f"{op}, {name}, {str(dtype).removeprefix('torch.')}: {label}")
            error = _case(op, name, fn, label, inputs, of_dtype)
            if error is None:
                continue
            tracebacks.append("".join(traceback.format_exception(error)))
            if not _answers(device):
                stopped = f"{device} answers no more after case {label!r}; fix that first, the rest was not run"
                return Report(tuple(rows), tuple(tracebacks), stopped)
    return Report(tuple(rows), tuple(tracebacks))


def _case(op: str, name: str, fn: Callable, label: str, inputs: dict, rows: dict[str, Row]) -> Exception | None:
    """Run one case, write what came of it into ``rows``, and return what the call raised."""
    forward, backward = rows["forward"], rows.get("backward")
    try:
        wanted = truth(op, inputs, grads=backward is not None)
        # A kernel that reads its gradient's memory as if it were dense errs where .sum() made one of stride 0.
        flat = truth(op, inputs, flat_cotangent=True) if backward else None
    except Exception as error:  # such as memory that it does not fit, or a cuDNN that is not to be trusted
        for row in rows.values():
            row.raised.append((label, f"the reference of {op} raised {type(error).__name__}: {error}"))
        return error
    held = _Held(wanted)
    fails = lambda error: f"{name} raised {type(error).__name__} where {op} does not: {error}"
    try:
        with torch.no_grad():
            outputs, _ = run(fn, inputs, None)
        _wait(outputs)
    except NotImplementedError as refusal:  # what has no forward has no backward
        held.put_right()
        for row in rows.values():
            row.refused.append((label, str(refusal)))
        return None
    except Exception as error:
        for row in rows.values():
            row.raised.append((label, fails(error)))
        held.put_right()
        return error
    forward.add(label, label, wanted.compare(outputs), held.put_right())
    for case, truth_of_case in ((label, wanted), (f"{label}, stride-0 gradient", flat)) if backward else ():
        try:
            comparisons = truth_of_case.compare(fn)
            _wait(inputs)
        except NotImplementedError as refusal:
            held.put_right()
            backward.refused.append((label, str(refusal)))
            return None
        except Exception as error:
            backward.raised.append((case, fails(error)))
            held.put_right()
            return error
        backward.add(label, case, [c for c in comparisons if c.name.startswith("d ")], held.put_right())
        if truth_of_case is wanted:  # kernels that save for a backward may be others
            forward.add(label, f"{label}, to be differentiated", [c for c in comparisons if not c.name.startswith("d ")], "")
    return None


def _gathered(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence per distinct reason, with its cases counted."""
    cases_of: dict[str, list[str]] = {}
    for label, reason in pairs:
        cases_of.setdefault(reason, []).append(label)
    return [f"case {labels[0]!r}{f' and {len(labels) - 1} more' if labels[1:] else ''}: {reason}"
            for reason, labels in cases_of.items()]


class _Held:
    """What a call is given and must leave alone: its arguments, and the gradients of its outputs."""

    def __init__(self, wanted: Truth):
        self.tensors = [(f"argument {name}", t) for name, value in wanted.inputs.items() for t in tensors(value)]
        self.tensors += [("the gradient it is given", t) for t in wanted.cotangents or ()]
        self.copies = [t.clone() for _, t in self.tensors]

    def put_right(self) -> str:
        """Write back what was changed; a sentence that names it, or "". The device must still answer, or nothing is done."""
        if not all(_answers(t.device) for t in self.copies[:1]):
            return ""
        changed = {}
        for (name, t), copy in zip(self.tensors, self.copies, strict=True):
            if not same_bits(t, copy):
                changed[name] = None
                t.copy_(copy)
        return f"It writes into what it is given: {', '.join(changed)}." if changed else ""


def _wait(values) -> None:
    """Wait for the GPU: an error of a kernel belongs to its own call, not to the next."""
    first = next(iter(tensors(values)), None)
    if first is not None and first.is_cuda:
        torch.cuda.synchronize(first.device)


def _answers(device: torch.device) -> bool:
    """Whether the device can still be used: after an illegal access a CUDA device cannot, in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _full(case: str, c: Comparison) -> dict:
    sizes = {name: _finite(getattr(c, name)) for name in ("error_max", "allowed_max", "error_rms", "allowed_rms")}
    return dict(case=case, tensor=c.name, dtype=str(c.dtype).removeprefix("torch."), shape=list(c.shape),
                worst=list(c.worst), problem=c.problem, **sizes)


def _arch(device: torch.device) -> str | None:
    """"sm90" of an NVIDIA GPU; None of anything else, whose rows are no records."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
