"""kl_sample."""

import math

import op_checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import ops, reference
from sora_fast.testing import assert_matches

OPS = ("kl_sample",)

test_error_rule = op_checks.error_rule(OPS)


def good(op):
    return dict(moments=torch.randn(2, 6, 3, 4), noise=torch.randn(2, 3, 3, 4))


test_every_tensor_is_checked = op_checks.every_tensor_is_checked(OPS, good)
test_refusals = op_checks.refusals([
    ("kl_sample", "odd channels", dict(moments=torch.zeros(2, 5, 3)), ("(B, 2C, ...)", "(2, 5, 3)")),
    ("kl_sample", "moments of rank 1", dict(moments=torch.zeros(6)), ("(B, 2C, ...)", "(6,)")),
    ("kl_sample", "noise of another shape", dict(noise=torch.zeros(2, 6, 3, 4)), ("noise", "(2, 3, 3, 4)")),
], good)


test_gradcheck = op_checks.gradchecks([
    ("sample", reference.kl_sample, (double(2, 4, 3), double(2, 2, 3))),
    ("mean", reference.kl_sample, (double(2, 4, 3),)),
])


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_formula(backend):
    mean, logvar, noise = double(2, 3, 4), double(2, 3, 4) + 0.5, double(2, 3, 4) + 1
    logvar[0, 0, 0], logvar[0, 0, 1] = 40.0, -50.0
    z, kl = ops.kl_sample(torch.cat([mean, logvar], 1), noise, backend=backend)
    clamped = logvar.clamp(-30, 20)
    torch.testing.assert_close(z, mean + (0.5 * clamped).exp() * noise)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (0.5 * clamped).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl, want.sum((1, 2)), rtol=1e-10, atol=0)
    assert torch.equal(ops.kl_sample(torch.cat([mean, logvar], 1), backend=backend)[0], mean)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_exact_numbers_and_dtypes(dtype, backend):
    """logvar 0: z = mean + noise and kl = sum(mean^2) / 2, exact on small integers."""
    mean, noise = torch.randint(-4, 5, (3, 2, 5)).to(dtype), torch.randint(-4, 5, (3, 2, 5)).to(dtype)
    z, kl = ops.kl_sample(torch.cat([mean, torch.zeros_like(mean)], 1), noise, backend=backend)
    assert z.dtype == dtype and torch.equal(z, mean + noise)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and kl.shape == (3,)
    assert torch.equal(kl.double(), mean.double().square().sum((1, 2)) / 2)
    assert ops.kl_sample(torch.cat([mean, mean], 1), noise.double(), backend=backend)[0].dtype == dtype


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_clamped_variances_have_no_gradient(backend):
    moments = torch.tensor([[1.0, 2.0, 25.0, -35.0]], requires_grad=True)
    z, kl = ops.kl_sample(moments, torch.ones(1, 2), backend=backend)
    (z.sum() + kl.sum()).backward()
    assert moments.grad[0].tolist() == [2.0, 3.0, 0.0, 0.0]
    assert kl.item() == pytest.approx(0.5 * (1 + math.exp(20) - 1 - 20 + 4 + math.exp(-30) - 1 + 30), rel=1e-6)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
def test_isolation(poison, backend):
    inputs = good("kl_sample")

    def outcome(change):
        fresh, leaves = with_grad(inputs)
        with torch.no_grad():
            if change:
                fresh["moments"][1] += poison
        z, kl = ops.kl_sample(**fresh, backend=backend)
        return z, kl, *torch.autograd.grad(z.sum() + kl.sum(), list(leaves.values()))

    want, got = outcome(False), outcome(True)
    assert not same_bits(want[0], got[0])
    assert all(same_bits(a[0], b[0]) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (1, 2)])
def test_empty(shape, backend):
    moments = torch.randn(shape, requires_grad=True)
    z, kl = ops.kl_sample(moments, backend=backend)
    assert z.shape == (shape[0], shape[1] // 2, *shape[2:]) and kl.shape == shape[:1]
    (z.sum() + kl.sum()).backward()
    assert moments.grad.shape == shape


@op_checks.drawn
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), channels=st.integers(1, 4), noisy=st.booleans(),
       dtype=st.sampled_from(op_checks.DTYPES))
def test_drawn_shapes(shape, channels, noisy, dtype):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    inputs = dict(moments=draw(shape[0], 2 * channels, *shape[1:]),
                  noise=draw(shape[0], channels, *shape[1:]) if noisy else None)
    # z is compared by the rule; kl is a difference of numbers near 1, of which float32 keeps what it keeps
    op_checks.assert_close_to_reference("kl_sample", lambda **a: ops.kl_sample(**a, backend="torch"), inputs)


def test_wrong_kernels_fail():
    """Mean and log-variance swapped; exp(logvar) for exp(logvar / 2); the mean KL for the sum."""
    inputs = {name: value.bfloat16() for name, value in good("kl_sample").items()}
    wrong = (
        lambda moments, noise: ops.kl_sample(torch.cat(moments.chunk(2, 1)[::-1], 1), noise),
        lambda moments, noise: (moments[:, :3] + moments[:, 3:].exp() * noise, ops.kl_sample(moments)[1]),
        lambda moments, noise: (ops.kl_sample(moments, noise)[0], ops.kl_sample(moments)[1] / moments[0].numel()),
    )
    for kernel in wrong:
        with pytest.raises(AssertionError, match="kl_sample"):
            assert_matches("kl_sample", kernel, inputs)
