"""The error rule: one function, used by every test.

The reference in float64 is the truth (``ref64``). ``low`` is the same reference on inputs of the tested dtype: the
error that dtype cannot avoid. A result k passes if, for every output and every gradient,

    max|k - ref64| <= 2 max|low - ref64| + 2 eps max|ref64|
    rms(k - ref64) <= 2 rms(low - ref64) + eps/2 rms(ref64)

with eps of the tensor's own dtype. 16-bit attention may add one eps to the first and eps/2 to the second, because P is
rounded before the second product. Anything non-finite fails, but where the truth itself is -inf (the log-sum-exp of a
row without keys), which must be met exactly. In float64 the reference is the truth itself and would allow no other
order of a sum: there ``low`` errs as it does in float32, scaled by the ratio of the eps, and the truth's own rounding
grants one eps to the first and eps/2 to the second.

causal_conv3d's outputs have a bound of their own besides, ``_CONVOLUTION``: the rule would let a kernel pass that sums
in 16 bits, as a convolution's own rounding is a fraction of what the rule allows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from .. import ops
from ..precision import float32_kept

ROUNDS_P = ("varlen_attention", "varlen_attention_forward", "varlen_attention_backward")


@dataclass(frozen=True)
class Comparison:
    """One tensor against the truth. Errors are absolute; ``worst`` is the index of the largest."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    error_max: float
    allowed_max: float
    error_rms: float
    allowed_rms: float
    worst: tuple[int, ...]
    problem: str  # "" or why the comparison fails regardless of size

    @property
    def passed(self) -> bool:
        return not self.problem and self.error_max <= self.allowed_max and self.error_rms <= self.allowed_rms

    @property
    def severity(self) -> tuple[bool, float]:
        """Orders comparisons: failures last, and among equals the one that used most of what it is allowed."""
        used = lambda error, allowed: 0.0 if error == 0 else error / allowed if allowed else math.inf
        return not self.passed, max(used(self.error_max, self.allowed_max), used(self.error_rms, self.allowed_rms))

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        text = (f"{self.name} {str(self.dtype).removeprefix('torch.')} {list(self.shape)}: "
                f"max error {self.error_max:.3e} (allowed {self.allowed_max:.3e}) at {list(self.worst)}, "
                f"rms {self.error_rms:.3e} (allowed {self.allowed_rms:.3e}): {verdict}")
        return f"{text}; {self.problem}" if self.problem else text


def compare(name: str, got: torch.Tensor, low: torch.Tensor, ref64: torch.Tensor, *,
            rounds_p: bool = False) -> Comparison:
    """Apply the rule to one tensor.

    Args:
        name: of the tensor, for the report.
        got: what is judged, of any shape.
        low: the reference in got's dtype, of any shape.
        ref64: the reference in float64, of any shape.
        rounds_p: grants 16-bit attention its extra rounding.

    Raises nothing: a tensor of another shape or dtype is a failed comparison.
    """
    blank = dict(error_max=float("inf"), allowed_max=0.0, error_rms=float("inf"), allowed_rms=0.0, worst=())
    if got is None or ref64 is None:
        if got is None and ref64 is None:
            zero = dict(error_max=0.0, allowed_max=0.0, error_rms=0.0, allowed_rms=0.0, worst=())
            return Comparison(name, torch.float32, (), problem="", **zero)
        return Comparison(name, torch.float32, (), problem=f"one of them is missing: got {got is not None}", **blank)
    if got.shape != ref64.shape:
        return Comparison(name, got.dtype, tuple(got.shape), **blank,
                          problem=f"shape {tuple(got.shape)} instead of {tuple(ref64.shape)}")
    if got.dtype != low.dtype:
        return Comparison(name, got.dtype, tuple(got.shape), **blank,
                          problem=f"dtype {got.dtype} instead of {low.dtype}")
    wide, low, ref64 = (t.detach().to(ref64.device, torch.float64) for t in (got, low, ref64))
    absent = torch.isneginf(ref64)
    problem = ""
    if not torch.equal(torch.isneginf(wide), absent):
        problem = "-inf in other places than the truth"
    wide, low, ref64 = (torch.where(absent, 0.0, t) for t in (wide, low, ref64))
    if not bool(torch.isfinite(wide).all()):
        problem = f"{int((~torch.isfinite(wide)).sum())} non-finite numbers"
    if wide.numel() == 0:
        return Comparison(name, got.dtype, tuple(got.shape), 0.0, 0.0, 0.0, 0.0, (), problem)
    eps = torch.finfo(got.dtype).eps
    rounded = rounds_p and got.dtype in (torch.float16, torch.bfloat16) or got.dtype == torch.float64
    extra = 1.0 if rounded else 0.0
    error, unavoidable = (wide - ref64).abs(), (low - ref64).abs()
    worst = torch.unravel_index(error.nan_to_num(nan=float("inf")).argmax(), error.shape)
    rms = lambda t: float(t.square().mean().sqrt())
    return Comparison(
        name, got.dtype, tuple(got.shape),
        error_max=float(error.max()),
        allowed_max=2 * float(unavoidable.max()) + (2 + extra) * eps * float(ref64.abs().max()),
        error_rms=rms(error),
        allowed_rms=2 * rms(unavoidable) + (0.5 + 0.5 * extra) * eps * rms(ref64),
        worst=tuple(int(i) for i in worst), problem=problem,
    )


# dtype: (numbers it takes to judge by, bound on the RMS error relative to the RMS of the truth). One rounding to bf16
# costs 1.66e-3 and partial sums in bf16 over three frames of taps 2.8e-3; sums in float32 cost 1e-7 to 2e-7.
_CONVOLUTION = {torch.bfloat16: (100_000, 1.72e-3), torch.float32: (1_000, 1e-6)}


def _bound_convolution(result: Comparison, ref64: torch.Tensor, inputs: Mapping[str, object]) -> Comparison:
    """``result`` of a convolution's output, with its problem if the sums were not made in float32."""
    least, bound = _CONVOLUTION.get(result.dtype, (float("inf"), 0.0))
    size = float(torch.linalg.vector_norm(ref64.detach())) / max(ref64.numel(), 1) ** 0.5
    if result.problem or ref64.numel() < least or size == 0:
        return result
    # cuDNN's bias and a residual are added by kernels of their own, each after a rounding as large as the last
    rounds = 1 + sum(inputs.get(name) is not None for name in ("bias", "residual"))
    bound *= rounds**0.5
    if result.error_rms < bound * size:
        return result
    return replace(result, problem=f"the RMS error is {result.error_rms / size:.2e} of the truth's RMS, expected less than "
                                   f"{bound:.2e} of a convolution that sums in float32")


def _map(value, change: Callable):
    """Apply ``change`` to every tensor of an argument (a tensor, a list of them, or something else)."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return [change(v) for v in value]
    return value


def _leaves(inputs: Mapping[str, object]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in inputs.items():
        for place, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                found[f"{name}[{place}]" if isinstance(value, list) else name] = tensor
    return found


def tensors(value) -> list[torch.Tensor]:
    """Every tensor in arguments or outputs: a tensor, or mappings and sequences of what may hold some."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for each in value for tensor in tensors(each)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _double(t: torch.Tensor) -> torch.Tensor:
    return t.detach().double() if t.is_floating_point() else t


def _finite_part(output: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """``cotangent`` with 0 where the output is -inf; itself, strides of 0 included, where it is nowhere."""
    absent = torch.isneginf(output)
    return torch.where(absent, 0, cotangent) if bool(absent.any()) else cotangent


def run(fn: Callable, inputs: Mapping[str, object], cotangents: list[torch.Tensor] | None,
        names: Iterable[str] | None = None):
    """Outputs of ``fn(**inputs)`` and, where ``cotangents`` are given, the gradients of all floating inputs.

    ``names``: of the inputs that get a gradient; None: every floating one.
    """
    wanted = set(inputs if names is None else names) if cotangents is not None else set()
    fresh = {name: _map(value, lambda t, name=name: t.detach().requires_grad_(name in wanted and t.is_floating_point()))
             for name, value in inputs.items()}
    outputs = tensors(fn(**fresh))
    if cotangents is None:
        return outputs, {}
    leaves = _leaves(fresh)
    if [o.shape for o in outputs] != [c.shape for c in cotangents]:  # the comparison of outputs says what is wrong
        return outputs, {}
    pairs = [(o, _finite_part(o.detach(), c).to(o.dtype))
             for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs or not leaves:
        return outputs, {name: None for name in leaves}
    found = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves.values(), strict=True)]
    return outputs, dict(zip(leaves, found, strict=True))


_EPS_RATIO = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def _low(definition: Callable, inputs: Mapping[str, object], cotangents, names, ref: tuple[list, dict]):
    """Outputs and gradients of the reference on ``inputs`` themselves; in float64 the scaled error of float32."""
    low_out, low_grads = run(definition, inputs, cotangents, names)
    if not any(t.dtype == torch.float64 for t in (*low_out, *low_grads.values()) if t is not None):
        return low_out, low_grads
    single = {name: _map(value, lambda t: t.float() if t.dtype == torch.float64 else t)
              for name, value in inputs.items()}
    single_out, single_grads = run(definition, single, cotangents, names)

    def scaled(low, single, ref):
        if low is None or low.dtype != torch.float64:
            return low
        return torch.where(torch.isneginf(ref), ref, ref + (single.double() - ref) * _EPS_RATIO)

    return ([scaled(*each) for each in zip(low_out, single_out, ref[0], strict=True)],
            {name: scaled(low_grads[name], single_grads[name], ref[1][name]) for name in low_grads})


@dataclass(frozen=True)
class Truth:
    """What one call of an op must give: computed once, compared with as many implementations as there are.

    ``ref`` and ``low`` are (outputs, gradients by input name), of the reference in float64 and in the inputs' dtype.
    ``part`` takes (tensor name, tensor) to what is compared of it (None: all of it); ``scope`` says so in words.
    """

    op: str
    inputs: Mapping[str, object]
    cotangents: list[torch.Tensor] | None
    names: tuple[str, ...] | None
    ref: tuple[list[torch.Tensor], dict[str, torch.Tensor]]
    low: tuple[list[torch.Tensor], dict[str, torch.Tensor]]
    part: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    scope: str = "every element"

    def compare(self, got, inputs: Mapping[str, object] | None = None) -> list[Comparison]:
        """Comparisons of every output and gradient.

        ``got`` is a function of the op's keyword arguments, or its outputs; ``inputs``: other memory with the same
        numbers, to call it with.
        """
        (ref_out, ref_grads), (low_out, low_grads) = self.ref, self.low
        got_out, got_grads = (run(got, inputs or self.inputs, self.cotangents, self.names) if callable(got)
                              else (tensors(got), {}))
        if len(got_out) != len(ref_out):
            return [Comparison("outputs", torch.float32, (), math.inf, 0.0, math.inf, 0.0, (),
                               f"expected {len(ref_out)} outputs, got {len(got_out)}; return what the op returns")]
        rounds_p = self.op in ROUNDS_P
        part = lambda name, t: t if self.part is None or t is None else self.part(name, t)
        label = lambda place: f"output {place}" if len(ref_out) > 1 else "output"
        results = [compare(label(place), part(label(place), g), low, ref, rounds_p=rounds_p)
                   for place, (g, low, ref) in enumerate(zip(got_out, low_out, ref_out, strict=True))]
        if self.op == "causal_conv3d":
            results = [_bound_convolution(result, ref, self.inputs)
                       for result, ref in zip(results, ref_out, strict=True)]
        if callable(got):
            results += [compare(f"d {name}", part(name, got_grads.get(name)), low_grads[name], ref_grads[name],
                                rounds_p=rounds_p)
                        for name in ref_grads]
        return results


def random_cotangents(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """One random cotangent per output, of its dtype and device, drawn on that device."""
    if not outputs:
        return []
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    wide = lambda o: torch.float64 if o.device.type == "cpu" else torch.float32
    return [torch.randn(o.shape, generator=generator, dtype=wide(o), device=o.device).to(o.dtype) for o in outputs]


@float32_kept()  # or on CUDA a convolution would be held to what TF32 is off by
def truth(op: str, inputs: Mapping[str, object], *, grads: bool = True, names: Iterable[str] | None = None,
          seed: int = 0, flat_cotangent: bool = False, definition: Callable | None = None) -> Truth:
    """The Truth of ``op(**inputs)``.

    Args:
        op: name of an op, as in ``sora_fast.ops``.
        inputs: the op's keyword arguments.
        grads: whether gradients are wanted too, for one random cotangent. names: of which inputs, default all.
        flat_cotangent: use a cotangent of stride 0, as ``.sum().backward()`` makes.
        seed: of the cotangent.
        definition: a function of ``inputs`` in place of the op's reference.

    Raises:
        ValueError: an unknown op.
    """
    if op not in ops.__all__:
        raise ValueError(f"testing: expected op to be one of {', '.join(ops.__all__)}, got {op!r}; name a public op")
    definition = definition or partial(getattr(ops, op), backend="reference")
    inputs = {name: value for name, value in inputs.items() if name != "backend"}
    names = None if names is None else tuple(names)
    # a dtype asked for is what the result is rounded to, and the truth is not rounded
    doubled = {name: torch.float64 if isinstance(value, torch.dtype) else _map(value, _double)
               for name, value in inputs.items()}
    cotangents = None
    if grads:
        low_out, _ = run(definition, inputs, None)
        if any(o.is_floating_point() for o in low_out):
            flat = lambda o: torch.ones((), dtype=o.dtype, device=o.device).expand(o.shape)
            cotangents = [flat(o) for o in low_out] if flat_cotangent else random_cotangents(low_out, seed)
    ref = run(definition, doubled, cotangents, names)
    return Truth(op, inputs, cotangents, names, ref, _low(definition, inputs, cotangents, names, ref))


@float32_kept()
def compare_with_reference(op: str, got, inputs: Mapping[str, object], *, grads: bool = True, seed: int = 0,
                           flat_cotangent: bool = False) -> list[Comparison]:
    """Comparisons of every output and gradient of ``op``; products and convolutions of float32 are made without TF32.

    Args:
        got: a function taking the op's keyword arguments (then gradients are compared too), or the output tensors.
        Other arguments as in ``truth``.

    Raises:
        ValueError: an unknown op.
    """
    return truth(op, inputs, grads=grads and callable(got), seed=seed, flat_cotangent=flat_cotangent).compare(got)


def assert_matches(op: str, got, inputs: Mapping[str, object], **options) -> list[Comparison]:
    """Raise AssertionError with every failed comparison unless ``got`` obeys the error rule for ``op(**inputs)``.

    ``options`` and other arguments as in ``compare_with_reference``; returns the comparisons.

    Raises:
        AssertionError: a comparison failed. ValueError: an unknown op.

    >>> mine = lambda x, y, gate, rows: x + gate[rows] * y
    >>> given = dict(x=torch.randn(4, 8), y=torch.randn(4, 8), gate=torch.randn(2, 8))
    >>> given["rows"] = torch.tensor([0, 0, 1, 1]).int()
    >>> results = assert_matches("gate_residual", mine, given)
    """
    results = compare_with_reference(op, got, inputs, **options)
    failed = [str(result) for result in results if not result.passed]
    if failed:
        raise AssertionError(f"{op} departs from its reference:\n  " + "\n  ".join(failed))
    return results
