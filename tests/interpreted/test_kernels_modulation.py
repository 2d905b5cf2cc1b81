"""The kernels of norm_modulate, gate_residual and gate_residual_norm_modulate, interpreted.

In float32 and float16: the interpreter's bfloat16 arithmetic is wrong.
"""

from functools import partial

import op_checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import Guarded, Short
from op_checks import gradients, same_bits, tensors, with_grad

from sora_fast import Pack, configs, ops
from sora_fast.kernels import modulation as kernels
from sora_fast.testing import assert_matches, cases

OPS = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
DTYPES = (torch.float32, torch.float16)


def on_kernel(op):
    return partial(getattr(ops, op), backend="triton")


def inputs_of(op, rows, tokens, count, width, *, norm="layer", affine=False, x=torch.float32, y=None, table=None):
    """Random inputs; ``count`` modulation rows."""
    draw = lambda *shape, dtype: torch.randn(*shape, dtype=torch.float64).to(dtype)
    inputs = dict(x=draw(tokens, width, dtype=x), rows=rows)
    if op != "norm_modulate":
        inputs |= dict(y=draw(tokens, width, dtype=y or x), gate=draw(count, width, dtype=table or x))
    if op != "gate_residual":
        inputs |= {name: draw(count, width, dtype=table or x) for name in ("shift", "scale")} | dict(norm=norm)
        # a norm of one number is all cancellation: keep it away from division by nearly 0
        inputs |= dict(eps=1e-6 if width > 1 else 0.1)
        if affine:
            inputs |= dict(weight=draw(width, dtype=x), bias=draw(width, dtype=x))
    return inputs


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_error_rule(op, dtype):
    for _, inputs in cases(op, dtype):
        for flat in (False, True):
            assert_matches(op, on_kernel(op), inputs, flat_cotangent=flat)


LAYOUTS = {
    "one token": (ints(0), 1),
    "15 tokens, one row": (ints(*[0] * 15), 1),
    "16 tokens, rows skipped": (ints(*[1] * 7, *[4] * 9), 6),
    "17 tokens, a row each": (ints(*range(17)), 17),
    "31 tokens, tails before, between and after": (ints(-1, -1, *[0] * 10, -1, *[0] * 3, *[2] * 9, -1, -1, *[3], -1, -1, -1),
                                                   5),
    "37 tokens, one row from run to run": (ints(*[0] * 3, *[1] * 30, *[2] * 4), 3),
    "20 tokens, rows in int64": (ints(*[0] * 13, *[1] * 7).long(), 2),
    "no tokens": (ints(), 2),
    "all tail": (ints(*[-1] * 9), 1),
    "no rows at all": (ints(*[-1] * 9), 0),
    "None, one row": (13, 1),
    "None, a row each": (13, 13),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("label", LAYOUTS)
def test_layouts(label, op):
    layout, count = LAYOUTS[label]
    rows, tokens = (None, layout) if isinstance(layout, int) else (layout, len(layout))
    for place, (width, x, y, table) in enumerate((
            (8, torch.float32, None, None), (37, torch.float32, torch.float16, torch.float32),
            (40, torch.float16, None, torch.float32))):
        inputs = inputs_of(op, rows, tokens, count, width, norm=("layer", "rms")[place % 2], affine=place != 1, x=x, y=y,
                           table=table)
        op_checks.assert_close_to_reference(op, on_kernel(op), inputs)


@pytest.mark.parametrize("width", (384, 1152))
@pytest.mark.parametrize("op", OPS)
def test_widths_of_models(op, width):
    table = torch.randn(3, 6 * width).chunk(6, dim=-1)
    inputs = inputs_of(op, ints(*[0] * 9, *[1] * 2, *[2] * 6, -1), 18, 3, width, y=torch.float16)
    inputs |= {name: part for name, part in zip(("shift", "scale", "gate"), table, strict=False) if name in inputs}
    assert_matches(op, on_kernel(op), inputs)


@op_checks.drawn
@given(lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), max_size=5), width=st.sampled_from((1, 7, 16, 33)),
       first=st.integers(0, 2), op=st.sampled_from(OPS), norm=st.sampled_from(("layer", "rms")), affine=st.booleans(),
       x=st.sampled_from(DTYPES), y=st.sampled_from(DTYPES), table=st.sampled_from(DTYPES), run=st.sampled_from((1, 3, 8)))
def test_drawn(lengths, width, first, op, norm, affine, x, y, table, run):
    """Runs of one row each, rows skipped and tokens of no sample between them, programs of few tokens and of many."""
    numbers, row = [], first
    for length, gap in lengths:
        numbers += [row] * length + [-1] * gap
        row += 1 + gap
    inputs = inputs_of(op, ints(*numbers), len(numbers), row + 1, width, norm=norm, affine=affine, x=x, y=y, table=table)
    with (configs.override("modulation", "forward", kernels.ForwardConfig(warps=1, tokens=4)),
          configs.override("modulation", "backward", kernels.BackwardConfig(warps=1, tokens=run, programs=16))):
        op_checks.assert_close_to_reference(op, on_kernel(op), inputs)


@pytest.mark.parametrize("op", OPS)
def test_indexing_bit_for_bit(op):
    """Small integers, and a norm that leaves them alone: each token takes its own row, forward and backward."""
    rows = Pack([(2, 2, 3), (0, 1, 1), (3, 1, 2)], modulation="frame").pad_to(21).rows
    count = int(rows.max()) + 1
    inputs = inputs_of(op, rows, 21, count, 5)
    if op == "gate_residual":
        for name in ("x", "y", "gate"):
            inputs[name] = torch.randint(-4, 5, inputs[name].shape).float()
        fresh, leaves = with_grad(inputs)
        got = on_kernel(op)(**fresh)
        index, inside = rows.clamp(min=0).long(), (rows >= 0)[:, None]
        assert torch.equal(got, torch.where(inside, fresh["x"] + fresh["gate"][index] * fresh["y"], 0))
        got.sum().backward()
        want = torch.stack([inputs["y"][rows == row].sum(0) for row in range(count)])
        assert torch.equal(leaves["gate"].grad, want)
    else:
        inputs |= dict(x=torch.zeros(21, 5), shift=torch.arange(count)[:, None].expand(-1, 5).float())
        if "y" in inputs:
            inputs["y"] = torch.zeros(21, 5)
        fresh, leaves = with_grad(inputs)
        got = tensors(on_kernel(op)(**fresh))[-1]
        assert torch.equal(got, torch.where(rows >= 0, rows, 0)[:, None].expand(-1, 5).float())
        got.sum().backward()
        want = torch.stack([(rows == row).sum() for row in range(count)])[:, None].expand(-1, 5)
        assert torch.equal(leaves["shift"].grad, want.float())


# -------------------------------------------------------------------------------------------- what is read and written
@pytest.mark.parametrize("op", OPS)
def test_nan_in_the_tail_is_never_read(op):
    """Nor in gradients there; without a weight's infinity either, which 0 times would make NaN."""
    rows = ints(*[0] * 4, -1, *[1] * 6, -1, -1, -1)
    inputs = inputs_of(op, rows, 14, 2, 8, affine=True)
    for name in ("x", "y"):
        if name in inputs:
            inputs[name][rows < 0] = float("nan")
    fresh, leaves = with_grad(inputs)
    outs = tensors(on_kernel(op)(**fresh))
    torch.autograd.backward(outs, [torch.where(rows[:, None] < 0, float("nan"), torch.ones_like(o)) for o in outs])
    for out in outs:
        assert torch.isfinite(out).all() and not out[rows < 0].any()
    for name, leaf in leaves.items():
        assert torch.isfinite(leaf.grad).all(), name
        if name in ("x", "y"):
            assert not leaf.grad[rows < 0].any()


@pytest.mark.parametrize("op", OPS)
def test_isolation(op):
    """NaN in one sample changes no bit of the others' outputs and gradients, the modulation's included."""
    rows = ints(*[0] * 5, *[1] * 11, *[2] * 6)
    inputs = inputs_of(op, rows, 22, 3, 24)
    poisoned = dict(inputs)
    for name in ("x", "y"):
        if name in inputs:
            poisoned[name] = torch.where((rows == 1)[:, None], float("nan"), inputs[name])
    results = []
    for each in (inputs, poisoned):
        fresh, leaves = with_grad(each)
        outs = tensors(on_kernel(op)(**fresh))
        results.append((outs, gradients(outs, leaves)))
    (want, want_grads), (got, got_grads) = results
    assert all(torch.isnan(out[rows == 1]).all() for out in got)
    for a, b in zip(want, got, strict=True):
        assert same_bits(a[rows != 1], b[rows != 1])
    for name, a in want_grads.items():
        others = rows != 1 if name in ("x", "y") else torch.tensor([0, 2])
        assert same_bits(a[others], got_grads[name][others]), name


@pytest.mark.parametrize("width", (7, 33))
@pytest.mark.parametrize("op", OPS)
def test_nothing_outside_is_read_or_written(op, width, monkeypatch):
    rows = ints(*[0] * 5, *[2] * 9, *[3] * 3, -1)
    inputs = inputs_of(op, rows, 18, 4, width, affine=True)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():  # numbers of others before, after and between
            room = torch.full((value.shape[0] + 4, *(n + 3 for n in value.shape[1:])), float("nan"))
            if value.dim() == 1:
                inputs[name] = room[2:2 + value.shape[0]].copy_(value)
            else:
                place = room[2:2 + value.shape[0], :width] if name in ("gate", "shift", "scale") else room.flatten()[
                    3:3 + value.numel()].view(value.shape)
                inputs[name] = place.copy_(value)
    guarded = Guarded()
    monkeypatch.setattr(kernels, "torch", guarded)
    assert_matches(op, on_kernel(op), inputs)
    assert len(guarded.buffers) >= 6
    guarded.assert_whole()


def test_modulation_rows_beyond_two_to_the_31_numbers():
    """A table of which one row is touched; the rest of it is never given memory."""
    width, count = 4096, 2**19 + 2
    gate = torch.empty(count, width, dtype=torch.float16)
    gate[-1] = 3
    got = on_kernel("gate_residual")(torch.ones(1, width), torch.ones(1, width), gate, ints(count - 1))
    assert torch.equal(got, torch.full((1, width), 4.0))


# ------------------------------------------------------------------------------------------------------- autograd
@pytest.mark.parametrize("op", OPS)
def test_one_gradient_at_a_time(op):
    """Only inputs that ask for a gradient get one, with the bits it has when all ask; and two calls agree to the bit."""
    inputs = inputs_of(op, ints(*[0] * 11, *[1] * 2, *[2] * 9), 22, 3, 24, affine=True, y=torch.float16)
    fresh, leaves = with_grad(inputs)
    want = gradients(on_kernel(op)(**fresh), leaves)
    again, others = with_grad(inputs)
    got = gradients(on_kernel(op)(**again), others)
    assert all(same_bits(want[name], got[name]) for name in want)
    for name in leaves:
        alone, leaf = with_grad(inputs, (name,))
        got = gradients(on_kernel(op)(**alone), leaf)
        assert list(got) == [name] and same_bits(got[name], want[name]), name
    plain, _ = with_grad(inputs, ())
    assert not any(o.requires_grad for o in tensors(on_kernel(op)(**plain)))
    with torch.no_grad():
        outs = tensors(on_kernel(op)(**fresh))
    assert not any(o.requires_grad for o in outs)


@pytest.mark.parametrize("op", OPS)
def test_second_backward_is_refused(op):
    fresh, leaves = with_grad(inputs_of(op, ints(0, 0, 1), 3, 2, 8, affine=True))
    outs = tensors(on_kernel(op)(**fresh))
    grads = torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(o) for o in outs], create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(grad.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        op_checks.assert_sentence(str(caught.value), op)


def test_without_rows_the_gradient_passes_through():
    """x + gate * y with no token to leave out: the gradient of x is the very one that came."""
    x = torch.randn(5, 8, requires_grad=True)
    came = torch.randn(5, 8)
    out = on_kernel("gate_residual")(x, torch.randn(5, 8), torch.randn(1, 8, requires_grad=True))
    (got,) = torch.autograd.grad(out, [x], came)
    assert got.data_ptr() == came.data_ptr()


@pytest.mark.parametrize("op", OPS)
def test_what_is_saved(op):
    """Nothing of x's size but what the formula needs: x or x_new once, and y; x only where there is no gate."""
    inputs = inputs_of(op, ints(*[0] * 11), 11, 1, 16)
    fresh, _ = with_grad(inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        on_kernel(op)(**fresh)
    whole = [t.data_ptr() for t in saved if t.numel() == 11 * 16]
    assert len(whole) == {"norm_modulate": 1, "gate_residual": 1, "gate_residual_norm_modulate": 2}[op]
    assert op == "norm_modulate" or fresh["x"].data_ptr() not in whole


# --------------------------------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    inputs = inputs_of(op, ints(0, 0, 2, -1), 4, 3, 8, affine=True)
    get = inputs.get
    norm = get("norm")
    arguments = [get(name) for name in ("x", "y", "gate", "shift", "scale", "rows", "weight", "bias")]
    for save in (True, False):
        torch.library.opcheck(torch.ops.sora_fast.modulation_forward.default, (*arguments, norm, 1e-6, save, torch.float16))
    made = torch.ops.sora_fast.modulation_forward(*arguments, norm, 1e-6, True, torch.float16)
    stats = made[-1] if norm else None
    dx_new, dh = (None if op == "norm_modulate" else torch.ones(4, 8)), (torch.ones(4, 8) if norm else None)
    there = [value is not None for value in (get("x"), *arguments[1:5], *arguments[6:])]
    for wanted in (there, [True] + [False] * 6):
        torch.library.opcheck(torch.ops.sora_fast.modulation_backward.default,
                              (dx_new, dh, *arguments, stats, norm, wanted))


@pytest.mark.parametrize("op", OPS)
def test_compile(op):
    """One graph, and no new one after the second distinct size."""
    def make(size):
        rows = Pack([(1, 1, size - 2), (1, 1, 2)]).pad_to(size + 2).rows
        return inputs_of(op, rows, size + 2, 2, 8, affine=True)

    counts = op_checks.graphs(on_kernel(op), make, (17, 16, 15, 33), None)
    assert max(counts) <= 2


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernel, keep", (("forward_kernel", None), ("backward_kernel", None), ("join_kernel", 0)))
def test_wrong_kernels_fail(op, kernel, keep, monkeypatch):
    label, inputs = next(iter(cases(op, torch.float32)))
    monkeypatch.setattr(kernels, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    assert_matches(op, on_kernel(op), inputs)
    monkeypatch.setattr(kernels, kernel, Short(getattr(kernels, kernel), keep))
    with pytest.raises(AssertionError, match=op):
        assert_matches(op, on_kernel(op), inputs)
