"""The kernels of qk_norm_rope, executed by the emulator."""

import itertools
import math
from functools import partial

import op_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, Short, assert_every_case
from kernel_inputs import DTYPES, ints, rotary_tiles
from kernel_inputs import rotary as inputs_of
from op_checks import gradients, same_bits, with_grad

from sora_fast import configs, ops
from sora_fast.kernels import rotary as kernels
from sora_fast.kernels.rotary_config import HEURISTICS, Launch
from sora_fast.testing import assert_matches, cases, truth

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

OP = "qk_norm_rope"
NORMS = ("rms_head", "rms_all", "layer_head", None)

on_kernel = partial(ops.qk_norm_rope, backend="triton")


@pytest.fixture(autouse=True)
def few_programs():
    """The emulator takes its time for each program."""
    with rotary_tiles():
        yield


def assert_obeys(inputs, factor=1, floor=0):
    """The error rule, for every gradient but that of coords, which kernels do not give.

    With a ``factor`` and a ``floor`` of some eps for drawn numbers, as op_checks.assert_close_to_reference says.
    """
    names = [name for name in inputs if name != "coords"]
    for c in truth(OP, inputs, names=names).compare(on_kernel):
        margin = floor * torch.finfo(c.dtype).eps
        assert not c.problem and c.error_max <= factor * c.allowed_max + margin, str(c)
        assert factor > 1 or c.passed, str(c)


def assert_close(inputs):
    assert_obeys(inputs, factor=8, floor=64)


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_rule(dtype):
    assert_every_case(OP, on_kernel, dtype)


FORMS = dict(norm=NORMS, pairing=("interleaved", "half"), angles=("full", "part", "learned", "per head", None),
             affine=("", "weight", "both"), key_heads=(4, 2, 0), dtype=DTYPES, whole=(True, False))


def _pairwise():
    """Forms of a call such that every two values of two settings that may stand together do so once."""
    def legal(form):
        still = form["angles"] is None  # then coords and pairing do not matter
        return not (form["norm"] is None and form["affine"] or form["angles"] == "per head" and form["key_heads"] == 2
                    or still and (form["pairing"] == "half" or not form["whole"]))

    forms = [dict(zip(FORMS, values, strict=True)) for values in itertools.product(*FORMS.values())]
    forms = [form for form in forms if legal(form)]
    met = lambda form: set(itertools.combinations(form.items(), 2))
    missing = set().union(*map(met, forms))
    while missing:
        best = max(forms, key=lambda form: len(met(form) & missing))
        missing -= met(best)
        yield best


@pytest.mark.parametrize("form", list(_pairwise()), ids=lambda form: "-".join(map(str, form.values())))
def test_every_two_settings_together(form):
    assert_close(inputs_of(18, **form, rows=ints(*[0] * 13, -1, *[1] * 2, -1, -1)))


@pytest.mark.parametrize("tokens", (0, 1, 15, 16, 17))
def test_numbers_of_tokens(tokens):
    for rows in (None, torch.full((tokens,), -1, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int64)):
        assert_close(inputs_of(tokens, norm="rms_all", angles="learned", rows=rows))
    inputs = inputs_of(tokens, angles=None)
    inputs["k"] = torch.randn(3, 2, 12)
    assert_close(inputs)


@pytest.mark.parametrize("heads, key_heads, head_dim, norm, pairing, axes", (
    (12, 12, 128, "rms_all", "interleaved", (44, 42, 42)), (24, 8, 128, "rms_head", "half", (16, 56, 56)),
    (16, 16, 72, "layer_head", "interleaved", (24, 24, 24)), (4, 4, 80, "rms_head", "half", (16, 24, 24)),
    (3, 3, 96, "rms_all", "half", (32, 32, 32)), (5, 5, 44, "rms_head", "interleaved", (12, 16, 16))))
def test_heads_of_models(heads, key_heads, head_dim, norm, pairing, axes):
    """As their heuristics launch them."""
    shape = dict(heads=heads, key_heads=key_heads, head_dim=head_dim)
    launch = Launch(**shape, tokens=4, dtype=torch.float16, norm=norm, affine=True, freqs="fixed", pairing=pairing)
    inputs = inputs_of(3, **shape, norm=norm, pairing=pairing, dtype=torch.float16) | dict(axes=axes, theta=1e4)
    with (configs.override("rotary", "forward", HEURISTICS["forward"](launch, "cpu")),
          configs.override("rotary", "backward", HEURISTICS["backward"](launch, "cpu"))):
        assert_matches(OP, on_kernel, inputs)


@settings(op_checks.drawn, max_examples=12)
@given(tokens=st.integers(1, 9), heads=st.integers(1, 3), copies=st.integers(1, 2), head_dim=st.integers(6, 17),
       norm=st.sampled_from(NORMS), angles=st.sampled_from(("full", "part", "learned")),
       affine=st.sampled_from(("", "both")), pairing=st.sampled_from(("interleaved", "half")),
       dtype=st.sampled_from(DTYPES), whole=st.booleans(),
       tail=st.integers(0, 3), block=st.sampled_from((2, 8)), run=st.sampled_from((1, 2)))
def test_drawn(tokens, heads, copies, head_dim, norm, angles, affine, pairing, dtype, whole, tail, block, run):
    """Odd heads, tails and programs of few tokens and of many."""
    rows = ints(*[0] * tokens, *[-1] * tail)
    inputs = inputs_of(tokens + tail, heads * copies, heads, head_dim, norm=norm, angles=angles, affine=affine,
                       pairing=pairing, dtype=dtype, whole=whole, rows=rows) | dict(eps=0.1)
    with (configs.override("rotary", "forward", kernels.ForwardConfig(warps=1, tokens=block)),
          configs.override("rotary", "backward", kernels.BackwardConfig(warps=1, tokens=block, programs=run))):
        assert_close(inputs)


# ----------------------------------------------------------------------------------------------------------- angles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coordinates_of_thousands(dtype):
    inputs = inputs_of(33, angles="full", dtype=dtype) | dict(theta=1e4)
    for coords in (torch.rand(33, 3) * 9000 - 1000, torch.randint(-5000, 9000, (33, 3))):
        assert_obeys(inputs | dict(coords=coords))


def test_cosine_and_sine_of_every_angle():
    """(1, 0) turned is (cos, sin), to float32's rounding up to 12,000 rad and to the angle's own from there on."""
    angles = torch.cat([torch.linspace(-10, 10, 401), torch.arange(-9, 10) * (math.pi / 4), torch.logspace(-30, 6, 200),
                        torch.rand(200) * 24000 - 12000])
    coords = torch.zeros(len(angles), 3)
    coords[:, 1] = angles
    q = torch.tensor([1.0, 0.0]).expand(len(angles), 1, 2)
    turn = lambda coords: on_kernel(q[:len(coords)], None, coords, freqs=torch.ones(3, 1), norm=None)[0][:, 0]
    with configs.override("rotary", "forward", kernels.ForwardConfig(warps=1, tokens=1024)):
        got = turn(coords)
        want = torch.stack([angles.double().cos(), angles.double().sin()], dim=1)
        allowed = torch.where(angles.abs() <= 12000, 1.5e-7, 2e-7 + 2**-24 * angles.abs())
        assert ((got - want).abs() <= allowed[:, None]).all()
        assert torch.equal(turn(torch.zeros(1, 3)), torch.tensor([[1.0, 0.0]]))
        coords[:, 1] = torch.logspace(6, 38, len(angles))  # the angle has no digit left, but it is one
        assert ((turn(coords).square().sum(1) - 1).abs() < 1e-2).all()


# -------------------------------------------------------------------------------------------- what is read and written
class _Seen:
    """A kernel, and what it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.arguments.append(arguments)
            return self.kernel[grid](*arguments, **options)
        return launch


def test_views_are_taken_as_they_are(monkeypatch):
    """q and k of one product, heads before tokens, and gradients with strides; only numbers apart are copied."""
    forward, backward = _Seen(kernels.forward_kernel), _Seen(kernels.backward_kernel)
    monkeypatch.setattr(kernels, "forward_kernel", forward)
    monkeypatch.setattr(kernels, "backward_kernel", backward)
    inputs = inputs_of(9, 4, 4)
    q, k = inputs.pop("q"), inputs.pop("k")
    apart = lambda t: torch.stack([t, t + 1], dim=-1)[..., 0]
    layouts = {"product": torch.stack([q, k, k], dim=1).unbind(1)[:2],
               "heads first": [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k)],
               "unaligned": [torch.cat([t[..., :1], t], dim=2)[..., 1:] for t in (q, k)], "apart": [apart(q), apart(k)]}
    cotangent = torch.randn(9, 1, 12).expand(9, 4, 12)  # one gradient for all heads
    want = None
    for name, both in {"plain": (q, k), **layouts}.items():
        leaves = [t.detach().requires_grad_() for t in both]
        assert name == "plain" or not any(t.is_contiguous() for t in both)
        outs = on_kernel(*leaves, **inputs)
        grads = torch.autograd.grad(outs, leaves, [cotangent, apart(cotangent)])
        want = want or (outs, grads)
        assert all(map(same_bits, (*outs, *grads), (*want[0], *want[1]))), name
        for place, leaf in enumerate(leaves):
            for seen in (forward.arguments[-1][place], backward.arguments[-1][2 + place]):
                assert (seen.data_ptr() == leaf.data_ptr()) == (name != "apart"), name
        came = backward.arguments[-1][:2]
        assert came[0].data_ptr() == cotangent.data_ptr() and came[1].is_contiguous()


@pytest.mark.parametrize("pairing", ("interleaved", "half"))
@pytest.mark.parametrize("norm, angles", (("rms_all", "full"), ("layer_head", "learned"), ("rms_head", "per head")))
def test_nothing_outside_is_read_or_written(norm, angles, pairing, monkeypatch):
    """Heads of 11 numbers, of which 10 make pairs, with NaN before, after and between all tensors' own numbers."""
    inputs = inputs_of(18, 3, 3, 11, norm=norm, angles=angles, pairing=pairing, rows=ints(*[0] * 5, *[2] * 12, -1))
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            room = torch.full([n + 4 for n in value.shape], math.nan)
            inputs[name] = room[tuple(slice(2, 2 + n) for n in value.shape)].copy_(value)
    guarded = Guarded()
    monkeypatch.setattr(kernels, "torch", guarded)
    assert_matches(OP, on_kernel, inputs)
    assert len(guarded.buffers) == 5  # two outputs, two gradients and the workspace
    guarded.assert_whole()


def test_beyond_two_to_the_31_numbers():
    """Two tokens so far apart; what lies between is never given memory."""
    whole = torch.empty(2**31 + 64, dtype=torch.float16)
    q = whole.as_strided((2, 2, 16), (2**31, 16, 1))
    q.copy_(torch.randn(2, 2, 16))
    assert_matches(OP, on_kernel, dict(q=q, k=None, coords=ints(1, 2, 3, 4, 5, 6).view(2, 3), axes=(4, 6, 6)), grads=False)


# ------------------------------------------------------------------------------------------------------- autograd
@pytest.mark.parametrize("used", (0, 1))
def test_an_output_that_nobody_uses(used):
    inputs = inputs_of(5, angles="learned")
    fresh, leaves = with_grad(inputs)
    got = gradients(on_kernel(**fresh)[used], leaves)
    twin, twins = with_grad(inputs)
    want = gradients(ops.qk_norm_rope(**twin, backend="reference")[used], twins)
    for name, grad in want.items():
        if grad is None or not grad.any():
            assert got[name] is None or not got[name].any(), name
        else:
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("wrong", ("forward_kernel", "backward_kernel", "pairing", "head"))
def test_wrong_kernels_fail(wrong, monkeypatch):
    """The last tokens left out, the other pairing, the last head dropped."""
    label, inputs = next(iter(cases(OP, torch.float32)))
    monkeypatch.setattr(kernels, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    assert_matches(OP, on_kernel, inputs)
    constants = kernels._constants
    if wrong == "pairing":
        monkeypatch.setattr(kernels, "_constants", lambda *a: constants(*a) | dict(PAIRING="half"))
    elif wrong == "head":
        monkeypatch.setattr(kernels, "_constants", lambda *a: (made := constants(*a)) | dict(H=made["H"] - 1))
    else:
        monkeypatch.setattr(kernels, wrong, Short(getattr(kernels, wrong)))
    with pytest.raises(AssertionError, match=OP):
        assert_matches(OP, on_kernel, inputs)
