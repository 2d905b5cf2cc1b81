"""The kernels of norm_modulate, gate_residual and gate_residual_norm_modulate, executed by the emulator."""

import op_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, Short, assert_every_case
from kernel_inputs import DTYPES, ints, on_kernel
from kernel_inputs import modulation as inputs_of

from sora_fast import configs
from sora_fast.kernels import modulation as kernels
from sora_fast.testing import assert_matches, cases

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

OPS = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_error_rule(op, dtype):
    assert_every_case(op, on_kernel(op), dtype)


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


@settings(op_checks.drawn, max_examples=12)
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


# -------------------------------------------------------------------------------------------- what is read and written
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
def test_without_rows_the_gradient_passes_through():
    """x + gate * y with no token to leave out: the gradient of x is the very one that came."""
    x = torch.randn(5, 8, requires_grad=True)
    came = torch.randn(5, 8)
    out = on_kernel("gate_residual")(x, torch.randn(5, 8), torch.randn(1, 8, requires_grad=True))
    (got,) = torch.autograd.grad(out, [x], came)
    assert got.data_ptr() == came.data_ptr()


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernel, keep", (("forward_kernel", None), ("backward_kernel", None), ("reduce_slots_kernel", 0)))
def test_wrong_kernels_fail(op, kernel, keep, monkeypatch):
    label, inputs = next(iter(cases(op, torch.float32)))
    monkeypatch.setattr(kernels, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    assert_matches(op, on_kernel(op), inputs)
    monkeypatch.setattr(kernels, kernel, Short(getattr(kernels, kernel), keep))
    with pytest.raises(AssertionError, match=op):
        assert_matches(op, on_kernel(op), inputs)
