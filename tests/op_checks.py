"""Checks that every op gets, made per family: ``test_error_rule = op_checks.error_rule(OPS)``.

Each factory returns a test function; the module that calls it gives it its name.
"""

import functools
import re

import pytest
import torch
from hypothesis import settings
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from sora_fast import ops
from sora_fast.testing import assert_matches, cases, compare_with_reference

# By default the torch backend alone is under test: the definition compared with itself, or auto, which is torch on a CPU,
# prove nothing. test_op_matrices.py has the other dtypes and the definition's own wrappers.
BACKENDS = ("torch",)
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def all_cases(op, dtype):
    return tuple(cases(op, dtype))


def runs_on(op, backend, inputs):
    """Whether ``backend`` has to run this call; SDPA returns no log-sum-exp and has no raw forward and backward."""
    no_lse = op in ("varlen_attention_forward", "varlen_attention_backward") or inputs.get("return_lse")
    return not (backend == "torch" and no_lse)


def tensors(outputs):
    if outputs is None:
        return []
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for output in outputs for t in tensors(output)]


def with_grad(inputs, names=None):
    """Copies of ``inputs`` whose floating tensors (those in ``names``) require gradients, and these leaves by name."""
    leaves = {}

    def leaf(name, t):
        t = t.detach().clone()
        if t.is_floating_point() and (names is None or name in names):
            leaves[name] = t.requires_grad_()
        return t

    fresh = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            fresh[name] = leaf(name, value)
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            fresh[name] = [leaf(f"{name}[{place}]", t) for place, t in enumerate(value)]
        else:
            fresh[name] = value
    return fresh, leaves


def gradients(outputs, leaves, seed=0):
    """Gradients of all leaves for one random cotangent (0 where the output is -inf); None for a leaf not used."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for out in tensors(outputs):
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        if out.requires_grad:
            pairs.append((out, torch.where(torch.isneginf(out.detach()), 0, cotangent)))
    found = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def same_bits(a, b):
    """Equal to the last bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(
        a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))


# ---------------------------------------------------------------------------------------------------- sentences
def assert_sentence(message, op):
    """One sentence: op, expectation, what came, remedy."""
    assert message.startswith(f"{op}: "), message
    assert "\n" not in message and not message.endswith("."), message
    assert not re.search(r"[.!?] [A-Z]", message), f"more than one sentence: {message}"
    assert re.search(r"\b(expected|must)\b", message), f"no expectation: {message}"
    assert re.search(r"\bgot\b", message), f"does not say what came: {message}"
    assert re.search(r"; \w+", message), f"no remedy: {message}"


def assert_refused(call, op, *parts, error=(ValueError, TypeError)):
    """``call`` raises one of our sentences, which contains ``parts``."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    if not issubclass(caught.type, NotImplementedError):
        assert_sentence(message, op)
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def refusals(table, good):
    """A test of every (op, label, changed arguments, parts of the message) in ``table``; ``good(op)`` is a legal call.

    The legal call runs first, so that a row cannot pass because of another mistake.
    """
    @pytest.mark.parametrize("op, label, change, parts", table, ids=[f"{row[0]}-{row[1]}" for row in table])
    def test(op, label, change, parts):
        arguments = good(op)
        getattr(ops, op)(**arguments)
        changed = {**arguments, **(change(arguments) if callable(change) else change)}
        assert_refused(lambda: getattr(ops, op)(**changed), op, *parts)
        assert_refused(lambda: getattr(ops, op)(**changed, backend="reference"), op, *parts)
    return test


def every_tensor_is_checked(ops_, good, free=()):
    """Each tensor argument in turn as a list, as a tensor on another device, and in ints: always one sentence.

    ``free``: names of tensors whose dtype may be an int.
    """
    @pytest.mark.parametrize("op", ops_)
    def test(op):
        arguments = good(op)
        fn = getattr(ops, op)
        fn(**arguments)
        # grids are host data, which may be a list, a tensor or a Pack
        names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "grids"]
        assert names
        for name in names:
            value = arguments[name]
            change = lambda new, name=name: (lambda: fn(**{**arguments, name: new}))
            assert_refused(change(value.tolist()), op)
            assert_refused(change("text"), op)
            if len(names) > 1:
                assert_refused(change(value.to("meta")), op, "device", "meta")
            if value.is_floating_point() and name not in free:
                assert_refused(change(value.to(torch.int32)), op, "int32")
            if not value.is_floating_point() and name not in free:
                assert_refused(change(value.float()), op, "float32")
            assert_refused(change(value[None]), op, "shape")
        for unknown in ("fastest", 3, None):
            assert_refused(lambda unknown=unknown: fn(**arguments, backend=unknown), op, "'reference'")
    return test


# --------------------------------------------------------------------------------------------------- error rule
def error_rule(ops_, backends=BACKENDS, dtypes=DTYPES):
    @pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
    @pytest.mark.parametrize("backend", backends)
    @pytest.mark.parametrize("op", ops_)
    def test(op, backend, dtype):
        raw = op in ("varlen_attention_forward", "varlen_attention_backward")
        compared = 0
        for _, inputs in all_cases(op, dtype):
            fn = lambda **arguments: getattr(ops, op)(**arguments, backend=backend)
            if not runs_on(op, backend, inputs):
                with pytest.raises(NotImplementedError, match=op):
                    fn(**inputs)
                continue
            for flat in (False,) if raw else (False, True):
                compared += len(assert_matches(op, fn, inputs, grads=not raw, flat_cotangent=flat))
        assert compared or (raw and backend == "torch")
    return test


drawn = settings(max_examples=25, deadline=None, derandomize=True)


def assert_close_to_reference(op, fn, inputs, **options):
    """The error rule with a margin of 8 and some eps, for drawn shapes.

    On tensors of a few numbers, or where the truth is exactly 0, the reference's own error is luck; a wrong index is
    larger by orders of magnitude.
    """
    for c in compare_with_reference(op, fn, inputs, **options):
        floor = 64 * torch.finfo(c.dtype).eps
        assert not c.problem and c.error_max <= 8 * c.allowed_max + floor, str(c)


def gradchecks(table):
    """``table``: (label, function of tensors, tuple of float64 tensors), checked by finite differences."""
    @pytest.mark.parametrize("label, fn, inputs", table, ids=[row[0] for row in table])
    def test(label, fn, inputs):
        inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
        assert all(t.dtype == torch.float64 for t in inputs)
        assert torch.autograd.gradcheck(fn, inputs, atol=1e-6, rtol=1e-5)
    return test


# ----------------------------------------------------------------------------------------------------- autograd
def second_backward(ops_, backends=BACKENDS):
    @pytest.mark.parametrize("backend", backends)
    @pytest.mark.parametrize("op", ops_)
    def test(op, backend):
        checked = 0
        for _, inputs in all_cases(op, torch.float64):
            if not runs_on(op, backend, inputs):
                continue
            fresh, leaves = with_grad(inputs)
            outs = [o for o in tensors(getattr(ops, op)(**fresh, backend=backend)) if o.requires_grad]
            grads = torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(o) for o in outs],
                                        create_graph=True, allow_unused=True)
            for grad in grads:
                if grad is None:
                    continue
                with pytest.raises(RuntimeError) as caught:
                    torch.autograd.grad(grad.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
                assert_sentence(str(caught.value), op)
                checked += 1
        assert checked
    return test


def one_gradient_at_a_time(ops_, backends=BACKENDS):
    """Only inputs that ask for a gradient get one, and it has the bits it has when all ask."""
    @pytest.mark.parametrize("backend", backends)
    @pytest.mark.parametrize("op", ops_)
    def test(op, backend):
        for _, inputs in all_cases(op, torch.float32):
            if not runs_on(op, backend, inputs):
                continue
            fresh, leaves = with_grad(inputs)
            want = gradients(getattr(ops, op)(**fresh, backend=backend), leaves)
            for name in leaves:
                alone, leaf = with_grad(inputs, (name,))
                got = gradients(getattr(ops, op)(**alone, backend=backend), leaf)
                assert list(got) == [name]
                if want[name] is None:
                    assert got[name] is None or not got[name].any()
                else:
                    torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
            plain, _ = with_grad(inputs, ())
            assert not any(o.requires_grad for o in tensors(getattr(ops, op)(**plain, backend=backend)))
            with torch.no_grad():
                assert not any(o.requires_grad for o in tensors(getattr(ops, op)(**fresh, backend=backend)))
    return test


def checkpointed(ops_):
    @pytest.mark.parametrize("reentrant", (False, True))
    @pytest.mark.parametrize("op", ops_)
    def test(op, reentrant):
        for _, inputs in all_cases(op, torch.float32):
            fresh, leaves = with_grad(inputs)
            names = list(leaves)

            def call(*values, fresh=fresh, names=names):
                arguments = dict(fresh)
                for name, value in zip(names, values, strict=True):
                    if "[" not in name:
                        arguments[name] = value
                return tuple(tensors(getattr(ops, op)(**arguments)))

            want = gradients(call(*leaves.values()), leaves)
            out = checkpoint(call, *leaves.values(), use_reentrant=reentrant)
            # reentrant checkpointing gives gradients through .backward() only
            generator = torch.Generator().manual_seed(0)
            draws = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in tensors(out)]
            pairs = [(o, torch.where(torch.isneginf(o.detach()), 0, c))
                     for o, c in zip(tensors(out), draws, strict=True) if o.requires_grad]
            torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
            for name, leaf in leaves.items():
                if want[name] is not None:
                    assert same_bits(leaf.grad, want[name]), name
    return test


# ------------------------------------------------------------------------------------------------------ compile
def traces_whole(ops_, backends=BACKENDS):
    """One graph in the dtypes that models run in too: a backend may take another path there than in float64."""
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("backend", backends)
    @pytest.mark.parametrize("op", ops_)
    def test(op, backend, dtype):
        torch._dynamo.reset()
        inputs = next(inputs for _, inputs in all_cases(op, dtype))
        if not runs_on(op, backend, inputs):
            return
        traced = torch.compile(functools.partial(getattr(ops, op), backend=backend), fullgraph=True, backend="eager")
        assert_matches(op, traced(**inputs), inputs)
    return test


def graphs(fn, inputs_of, sizes, dynamic):
    """Compile ``fn``, run it at ``sizes``, compare with eager forward and backward; graph count after each size."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    counts = []
    for size in sizes:
        inputs = inputs_of(size)
        results = []
        for call in (fn, compiled):
            fresh, leaves = with_grad(inputs)
            out = call(**fresh)
            results.append((tensors(out), gradients(out, leaves) if leaves else {}))
        (want, want_grads), (got, got_grads) = results
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
        for name, a in want_grads.items():
            b = got_grads[name]
            assert (a is None or not a.any()) if b is None else a is not None, name
            if b is not None:
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
        counts.append(counters["stats"]["unique_graphs"])
    return counts


def compiles(table, sizes=(17, 16, 15, 33)):
    """``table``: (label, fn(backend, **tensors), inputs_of(size) float64, backends); dynamic=True for the first only.

    dynamic=True makes one graph; automatic dynamic a second at the second distinct size and none after it. Size 1 is
    torch.compile's own special case (a plain ``x + x`` compiles anew there): one graph more at most.
    """
    rows = [(*row[:3], backend, "automatic") for row in table for backend in row[3]]
    rows.append((*table[0][:3], table[0][3][0], "dynamic"))

    @pytest.mark.parametrize("label, fn, inputs_of, backend, mode", rows,
                             ids=[f"{row[0]}-{row[3]}-{row[4]}" for row in rows])
    def test(label, fn, inputs_of, backend, mode):
        dynamic = True if mode == "dynamic" else None
        counts = graphs(functools.partial(fn, backend), inputs_of, (*sizes, 1), dynamic)
        first = 1 if dynamic else 2
        assert max(counts[:-1]) <= first, f"{label}: graphs after each of {sizes}: {counts}"
        assert counts[-1] <= first + 1
    return test


# ----------------------------------------------------------------------------------------------------- autocast
def autocast_changes_nothing(ops_):
    """Ops without a matrix product leave dtypes and bits alone."""
    @pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
    @pytest.mark.parametrize("backend", ("torch", "reference"))
    @pytest.mark.parametrize("op", ops_)
    def test(op, backend, low):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for _, inputs in all_cases(op, dtype):
                if not runs_on(op, backend, inputs):
                    continue
                want = tensors(getattr(ops, op)(**inputs, backend=backend))
                with torch.autocast("cpu", low):
                    got = tensors(getattr(ops, op)(**inputs, backend=backend))
                for a, b in zip(want, got, strict=True):
                    assert same_bits(a, b)
    return test
