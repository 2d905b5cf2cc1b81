"""``validate``: a function, ours or somebody's, against the reference in float64 over all cases of an op."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .. import ops
from .cases import cases
from .rule import Comparison, compare_with_reference


@dataclass(frozen=True)
class Row:
    """One tensor of one case. ``direction`` is forward or backward."""

    op: str
    implementation: str
    case: str
    direction: str
    comparison: Comparison

    def as_dict(self) -> dict:
        c = self.comparison
        return dict(op=self.op, implementation=self.implementation, case=self.case, direction=self.direction,
                    tensor=c.name, dtype=str(c.dtype).removeprefix("torch."), shape=list(c.shape),
                    error_max=c.error_max, allowed_max=c.allowed_max, error_rms=c.error_rms,
                    allowed_rms=c.allowed_rms, passed=c.passed, problem=c.problem)


@dataclass(frozen=True)
class Report:
    """Rows of a validation; ``print(report)`` shows the worst tensor of every case."""

    rows: tuple[Row, ...]
    unsupported: tuple[str, ...] = ()  # cases that the named backend refuses, with its reasons

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.comparison.passed for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'op':28s} {'implementation':16s} {'dtype':9s} {'direction':9s} {'error':>10s} {'allowed':>10s}"
                 f"  verdict"]
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            key = (row.op, row.implementation, str(row.comparison.dtype).removeprefix("torch."), row.direction)
            groups.setdefault(key, []).append(row)
        for (op, implementation, dtype, direction), rows in groups.items():
            worst = max(rows, key=lambda r: (not r.comparison.passed, _ratio(r.comparison)))
            c = worst.comparison
            verdict = "ok" if c.passed else f"FAILED: case {worst.case!r}, {c.name}, at {list(c.worst)} {c.problem}"
            lines.append(f"{op:28s} {implementation:16s} {dtype:9s} {direction:9s} {c.error_max:10.2e} "
                         f"{c.allowed_max:10.2e}  {verdict}")
        lines.extend(f"not run: {reason}" for reason in self.unsupported)
        failed = sum(not row.comparison.passed for row in self.rows)
        lines.append(f"{len(self.rows) - failed} of {len(self.rows)} comparisons passed")
        return "\n".join(lines)

    def to_jsonl(self) -> str:
        return "".join(json.dumps(row.as_dict()) + "\n" for row in self.rows)


def _ratio(c: Comparison) -> float:
    return c.error_max / c.allowed_max if c.allowed_max else 0.0


def validate(op: str, fn: Callable | None = None, *, backend: str = "auto", device: str = "cpu",
             dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)) -> Report:
    """Run ``fn`` over the cases of ``op``, forward and backward, and compare with the reference in float64.

    Args:
        op: name of an op, as in ``sora_fast.ops``.
        fn: takes the op's keyword arguments and returns what it returns; None: our own op on ``backend``.
        device: where it runs. The truth is computed there too.

    Returns:
        A Report: ``report.passed``, ``print(report)``, ``report.to_jsonl()``.

    Raises:
        ValueError: an op without cases. Whatever ``fn`` raises.
    """
    if fn is None:
        name = backend
        public = getattr(ops, op, None)
        if public is None:
            raise ValueError(f"validate: expected the name of an op of sora_fast.ops, got {op!r}; see sora_fast.info()")
        fn = lambda **arguments: public(**arguments, backend=backend)
    else:
        name = getattr(fn, "__name__", type(fn).__name__)
    rows, unsupported = [], []
    for dtype in dtypes:
        for label, inputs in cases(op, dtype, device):
            raw = op.startswith("varlen_attention_")
            try:
                rows.extend(_rows(op, name, fn, label, inputs, raw))
            except NotImplementedError as refusal:
                unsupported.append(f"{label}, {str(dtype).removeprefix('torch.')}: {refusal}")
    return Report(tuple(rows), tuple(unsupported))


def _rows(op: str, name: str, fn: Callable, label: str, inputs: dict, raw: bool) -> list[Row]:
    rows = []
    for flat in (False, True) if not raw else (False,):
        for c in compare_with_reference(op, fn, inputs, grads=not raw, flat_cotangent=flat):
            direction = "backward" if c.name.startswith("d ") else "forward"
            if not flat or direction == "backward":
                rows.append(Row(op, name, label + (", stride-0 gradient" if flat else ""), direction, c))
    return rows
