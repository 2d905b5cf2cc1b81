"""norm_act."""

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import ops, reference
from sora_fast.testing import assert_matches

OPS = ("norm_act",)

test_error_rule = op_checks.error_rule(OPS)


def good(op):
    return dict(x=torch.randn(2, 6, 3, 4, 5), weight=torch.randn(6), bias=torch.randn(6))


test_every_tensor_is_checked = op_checks.every_tensor_is_checked(OPS, good)
test_refusals = op_checks.refusals([
    ("norm_act", "x of rank 4", dict(x=torch.zeros(2, 6, 4, 5)), ("x", "x[:, :, None]", "(2, 6, 4, 5)")),
    ("norm_act", "weight of another length", dict(weight=torch.zeros(5)), ("weight", "(6,)", "(5,)")),
    ("norm_act", "bias of rank 2", dict(bias=torch.zeros(6, 1)), ("bias", "(6, 1)")),
    ("norm_act", "unknown norm", dict(norm="layer"), ("'rms', 'group'", "'layer'")),
    ("norm_act", "unknown act", dict(act="gelu"), ("'silu', None", "'gelu'")),
    ("norm_act", "groups that do not divide", dict(norm="group", groups=4), ("6 channels", "got 4")),
    ("norm_act", "no groups", dict(norm="group", groups=0), ("groups", "got 0")),
    ("norm_act", "half a group", dict(norm="group", groups=1.5), ("groups", "1.5")),
    ("norm_act", "eps None", dict(eps=None), ("eps", "None")),
    ("norm_act", "eps below 0", dict(eps=-1.0), ("eps of 0 or more", "-1.0")),
    ("norm_act", "eps not a number", dict(eps=float("nan")), ("eps of 0 or more", "nan")),
], good)


test_gradcheck = op_checks.gradchecks([
    ("rms, silu", reference.norm_act, (double(1, 3, 2, 1, 2), double(3), double(3))),
    ("rms, no act", lambda x: reference.norm_act(x, eps=1e-24, act=None), (double(1, 3, 2, 1, 2),)),
    ("group", lambda x, w, b: reference.norm_act(x, w, b, norm="group", groups=2),
     (double(1, 4, 2, 1, 2), double(4), double(4))),
])


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_formula(backend):
    x, weight, bias = double(2, 6, 3, 2, 2), double(6), double(6)
    shape = (6, 1, 1, 1)
    got = ops.norm_act(x, weight, bias, norm="group", groups=3, eps=0.1, backend=backend)
    torch.testing.assert_close(got, F.silu(F.group_norm(x, 3, weight, bias, 0.1)))
    got = ops.norm_act(x, weight, bias, eps=0.1, act=None, backend=backend)
    want = x / (x.square().mean(1, keepdim=True) + 0.1).sqrt() * weight.view(shape) + bias.view(shape)
    torch.testing.assert_close(got, want)
    # Wan's RMS_norm divides by the vector's length: F.normalize(x) * sqrt(C) * gamma
    got = ops.norm_act(x, weight, eps=1e-24, act=None, backend=backend)
    torch.testing.assert_close(got, F.normalize(x, dim=1) * 6**0.5 * weight.view(shape))


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_a_zero_pixel_gives_zero(dtype, backend):
    x = torch.randn(1, 4, 2, 3, 3).to(dtype)
    x[:, :, 1, 2, 0] = 0
    x.requires_grad_()
    y = ops.norm_act(x, eps=1e-24, backend=backend)
    assert y.dtype == dtype and not y[:, :, 1, 2, 0].any() and torch.isfinite(y).all()


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
def test_isolation(poison, backend):
    """rms: pixels know nothing of each other (so no frame of the future either); group: samples do not."""
    for norm in ("rms", "group"):
        inputs = dict(x=torch.randn(2, 6, 3, 4, 5))

        def outcome(change, norm=norm, inputs=inputs):
            fresh, leaves = with_grad(inputs)
            with torch.no_grad():
                if change and norm == "rms":
                    fresh["x"][:, :, 2] += torch.rand(6, 1, 1) * poison
                elif change:
                    fresh["x"][1, 0] += poison
            y = ops.norm_act(**fresh, norm=norm, groups=2, backend=backend)
            return y, torch.autograd.grad(y.sum(), leaves["x"])[0]

        (want, dwant), (got, dgot) = outcome(False), outcome(True)
        assert not same_bits(want, got)
        part = (slice(None), slice(None), slice(0, 2)) if norm == "rms" else (0,)
        assert same_bits(want[part], got[part]) and same_bits(dwant[part], dgot[part])


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("norm", ("rms", "group"))
@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (2, 4, 0, 3, 3), (1, 4, 1, 1, 1), (1, 4, 2, 0, 3)])
def test_empty(shape, norm, backend):
    fresh, leaves = with_grad(dict(x=torch.randn(shape), weight=torch.randn(4), bias=torch.randn(4)))
    y = ops.norm_act(**fresh, norm=norm, groups=2, backend=backend)
    assert y.shape == shape
    y.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


@op_checks.drawn
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 4), *[st.integers(1, 5)] * 3), groups=st.integers(1, 3),
       norm=st.sampled_from(("rms", "group")), act=st.sampled_from(("silu", None)), affine=st.integers(0, 3),
       dtype=st.sampled_from(op_checks.DTYPES))
def test_drawn_shapes(shape, groups, norm, act, affine, dtype):
    channels = shape[1] * groups
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    inputs = dict(x=draw(shape[0], channels, *shape[2:]), weight=draw(channels) if affine & 1 else None,
                  bias=draw(channels) if affine & 2 else None, norm=norm, groups=groups, act=act, eps=0.1)
    op_checks.assert_close_to_reference("norm_act", lambda **a: ops.norm_act(**a, backend="torch"), inputs)


def test_wrong_kernels_fail():
    """The norm over frames instead of channels; act before the affine; the last frame left as it was."""
    inputs = dict(x=torch.randn(2, 6, 6, 4, 5).bfloat16(), weight=torch.randn(6).bfloat16())
    wrong = (
        lambda x, weight: ops.norm_act(x.transpose(1, 2), weight).transpose(1, 2),
        lambda x, weight: ops.norm_act(x) * weight.view(-1, 1, 1, 1),
        lambda x, weight: torch.cat([ops.norm_act(x, weight)[:, :, :-1], x[:, :, -1:]], 2),
    )
    for kernel in wrong:
        with pytest.raises(AssertionError, match="norm_act"):
            assert_matches("norm_act", kernel, inputs)
