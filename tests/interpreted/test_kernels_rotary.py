"""The kernels of qk_norm_rope, interpreted.

In float32 and float16: the interpreter's bfloat16 arithmetic is wrong.
"""

import itertools
import math
from functools import partial

import op_checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import Guarded, Short
from op_checks import gradients, same_bits, tensors, with_grad

from sora_fast import Pack, configs, ops
from sora_fast.kernels import rotary as kernels
from sora_fast.testing import assert_matches, cases, truth

OP = "qk_norm_rope"
DTYPES = (torch.float32, torch.float16)
NORMS = ("rms_head", "rms_all", "layer_head", None)

on_kernel = partial(ops.qk_norm_rope, backend="triton")


@pytest.fixture(autouse=True)
def few_programs():
    """The interpreter takes its time for each program: 16 tokens at once, and runs of more than one step."""
    with (configs.override("rotary", "forward", kernels.ForwardConfig(warps=1, tokens=16)),
          configs.override("rotary", "backward", kernels.BackwardConfig(warps=1, tokens=16, programs=1))):
        yield


def inputs_of(tokens, heads=4, key_heads=2, head_dim=12, *, norm="rms_head", angles="part", pairing="interleaved",
              affine="both", dtype=torch.float32, whole=True, rows=None):
    """Random inputs. ``angles``: "full", "part" (of the head dim), "learned", "per head" or None; ``affine``: "", "weight"
    or "both"; ``key_heads``: 0 for no k; ``whole``: coords are ints."""
    draw = lambda *shape, dtype=dtype: torch.randn(*shape, dtype=torch.float64).to(dtype)
    inputs = dict(q=draw(tokens, heads, head_dim), k=draw(tokens, key_heads, head_dim) if key_heads else None, norm=norm,
                  pairing=pairing, rows=rows, coords=None)
    if angles is not None:
        inputs["coords"] = torch.randint(0, 40, (tokens, 3)) if whole else 20 * draw(tokens, 3, dtype=torch.float32)
    pairs = head_dim // 2 - 1
    if angles in ("full", "part"):
        inputs["axes"] = (2, 0, head_dim // 2 * 2 - 2) if angles == "full" else (0, 2, 2 * pairs - 2)
        inputs["theta"] = (1e4, 100.0, 77.0)
    elif angles is not None:
        inputs["freqs"] = draw(3, *([heads] if angles == "per head" else []), pairs, dtype=torch.float32)
    if norm is not None:
        for name in {"": (), "weight": ("weight",), "both": ("weight", "bias")}[affine]:
            for side, count in (("q", heads), ("k", key_heads)):
                if count:
                    inputs[f"{side}_{name}"] = draw(count * head_dim if norm == "rms_all" else head_dim)
    return inputs


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


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
    for _, inputs in cases(OP, dtype):
        for flat in (False, True):
            assert_matches(OP, on_kernel, inputs, flat_cotangent=flat)


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
    launch = kernels.Launch(**shape, tokens=4, dtype=torch.float16, norm=norm, affine=True, freqs="fixed", pairing=pairing)
    inputs = inputs_of(3, **shape, norm=norm, pairing=pairing, dtype=torch.float16) | dict(axes=axes, theta=1e4)
    with (configs.override("rotary", "forward", kernels.forward_heuristic(launch, "cpu")),
          configs.override("rotary", "backward", kernels.backward_heuristic(launch, "cpu"))):
        assert_matches(OP, on_kernel, inputs)


@op_checks.drawn
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


@pytest.mark.filterwarnings("ignore:divide by zero")  # the rstd of a tail, which is put away
def test_nan_in_the_tail_is_never_read():
    """Nor in coords and gradients there; nor is a tail's rstd, infinite where eps is 0, multiplied by 0."""
    rows = ints(*[0] * 4, -1, *[1] * 6, -1, -1)
    for norm, angles in itertools.product(NORMS, ("part", "learned")):
        inputs = inputs_of(13, norm=norm, angles=angles, rows=rows, whole=False) | dict(eps=0.0)
        for name in ("q", "k", "coords"):
            inputs[name][rows < 0] = math.nan
        fresh, leaves = with_grad(inputs, [name for name in inputs if name != "coords"])
        outs = tensors(on_kernel(**fresh))
        torch.autograd.backward(outs, [torch.where(rows[:, None, None] < 0, math.nan, torch.ones_like(o)) for o in outs])
        for out in outs:
            assert torch.isfinite(out).all() and not out[rows < 0].any()
        for name, leaf in leaves.items():
            assert torch.isfinite(leaf.grad).all(), name
            assert name not in ("q", "k") or not leaf.grad[rows < 0].any()


@pytest.mark.parametrize("norm", NORMS)
def test_isolation(norm):
    """NaN in one token changes no bit of the others' outputs and gradients."""
    inputs = inputs_of(20, norm=norm, whole=False)
    others = torch.arange(20) != 7
    results = []
    for spoilt in (False, True):
        fresh, leaves = with_grad(inputs, ("q", "k"))
        with torch.no_grad():
            for name in ("q", "k", "coords") if spoilt else ():
                fresh[name][7] = math.nan
        outs = tensors(on_kernel(**fresh))
        results.append((outs, gradients(outs, leaves)))
    (want, want_grads), (got, got_grads) = results
    for a, b in (*zip(want, got, strict=True), *((want_grads[name], got_grads[name]) for name in want_grads)):
        assert same_bits(a[others], b[others]) and torch.isnan(b[7]).any()


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


@pytest.mark.parametrize("pairing", ("interleaved", "half"))
def test_indexing_bit_for_bit(pairing):
    """Small integers and angles of 0: outputs are inputs, and the gradient of freqs is a sum of integers."""
    coords = Pack([(2, 2, 3), (0, 1, 1), (3, 1, 2)]).pad_to(21)
    rows, at = coords.rows, coords.coords
    q, k = (torch.randint(-4, 5, (21, 3, 11)).float() for _ in range(2))
    d_q, d_k = (torch.randint(-4, 5, (21, 3, 11)).float() for _ in range(2))
    freqs = torch.zeros(3, 3, 4, requires_grad=True)
    outs = on_kernel(q, k, at, norm=None, freqs=freqs, pairing=pairing, rows=rows)
    inside = (rows >= 0)[:, None, None]
    assert torch.equal(outs[0], torch.where(inside, q, 0)) and torch.equal(outs[1], torch.where(inside, k, 0))
    torch.autograd.backward(outs, (d_q, d_k))
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if pairing == "interleaved" else (slice(0, 4), slice(4, 8))
    turned = sum(x[..., first] * d[..., second] - x[..., second] * d[..., first] for x, d in ((q, d_q), (k, d_k)))
    assert torch.equal(freqs.grad, torch.einsum("na,nhp->ahp", at.float(), torch.where(inside, turned, 0)))


def test_beyond_two_to_the_31_numbers():
    """Two tokens so far apart; what lies between is never given memory."""
    whole = torch.empty(2**31 + 64, dtype=torch.float16)
    q = whole.as_strided((2, 2, 16), (2**31, 16, 1))
    q.copy_(torch.randn(2, 2, 16))
    assert_matches(OP, on_kernel, dict(q=q, k=None, coords=ints(1, 2, 3, 4, 5, 6).view(2, 3), axes=(4, 6, 6)), grads=False)


# ------------------------------------------------------------------------------------------------------- autograd
@pytest.mark.parametrize("norm, angles", (("rms_all", "full"), ("layer_head", "learned"), ("rms_head", "per head")))
def test_one_gradient_at_a_time(norm, angles):
    """Only inputs that ask for a gradient get one, with the bits it has when all ask; and two calls agree to the bit."""
    inputs = inputs_of(22, 4, 4, norm=norm, angles=angles, rows=ints(*[0] * 20, -1, -1))
    fresh, leaves = with_grad(inputs)
    want = gradients(on_kernel(**fresh), leaves)
    again, others = with_grad(inputs)
    got = gradients(on_kernel(**again), others)
    assert all(same_bits(want[name], got[name]) for name in want)
    for name in leaves:
        alone, leaf = with_grad(inputs, (name,))
        got = gradients(on_kernel(**alone), leaf)
        assert list(got) == [name]
        # q alone is a launch without k, whose programs have runs of another length
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
        assert name not in ("q", "k") or same_bits(got[name], want[name])
    plain, _ = with_grad(inputs, ())
    assert not any(o.requires_grad for o in tensors(on_kernel(**plain)))
    with torch.no_grad():
        assert not any(o.requires_grad for o in tensors(on_kernel(**fresh)))


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


def test_second_backward_is_refused():
    fresh, leaves = with_grad(inputs_of(3, angles="learned"))
    outs = on_kernel(**fresh)
    grads = torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(o) for o in outs], create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(grad.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        op_checks.assert_sentence(str(caught.value), OP)


@pytest.mark.parametrize("norm, angles, count", (("rms_all", "full", 2), (None, "learned", 2), (None, "full", 0)))
def test_what_is_saved(norm, angles, count):
    """q and k themselves, where a formula needs them, and no statistics."""
    fresh, _ = with_grad(inputs_of(11, 4, 4, norm=norm, angles=angles))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        on_kernel(**fresh)
    inputs = {t.data_ptr() for t in fresh.values() if isinstance(t, torch.Tensor)}
    kept = [t for t in saved if t.dim()]  # without one: the tie that refuses a second derivative
    assert {t.data_ptr() for t in kept} <= inputs and sum(t.numel() == 11 * 4 * 12 for t in kept) == count


# --------------------------------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("norm, angles", (("rms_all", "full"), ("layer_head", "per head"), (None, None)))
def test_opcheck(norm, angles):
    inputs = inputs_of(4, 2, 2, norm=norm, angles=angles, rows=ints(0, 0, 1, -1))
    get = inputs.get
    axes, theta = ([], []) if get("axes") is None else (list(get("axes")), list(get("theta")))
    affine = [get(name) for name in ("q_weight", "k_weight", "q_bias", "k_bias")]
    settings = (get("coords"), *affine, get("freqs"), get("rows"), norm, axes, theta, get("pairing"), 1e-6)
    for k in (get("k"), None):
        torch.library.opcheck(torch.ops.sora_fast.rotary_forward.default, (get("q"), k, *settings))
    there = [value is not None for value in (get("q"), get("k"), *affine, get("freqs"))]
    for wanted in (there, [True] + [False] * 6):
        torch.library.opcheck(torch.ops.sora_fast.rotary_backward.default,
                              (torch.ones(4, 2, 12), torch.ones(4, 2, 12), get("q"), get("k"), *settings, wanted))


@pytest.mark.parametrize("norm, angles", (("rms_all", "full"), ("layer_head", "learned")))
def test_compile(norm, angles):
    """One graph, and no new one after the second distinct size."""
    make = lambda size: inputs_of(size, norm=norm, angles=angles)
    tensors_of = lambda size: {name: value for name, value in make(size).items() if isinstance(value, torch.Tensor)}
    settings = {name: value for name, value in make(2).items() if not isinstance(value, (torch.Tensor, type(None)))}
    counts = op_checks.graphs(partial(on_kernel, **settings), tensors_of, (17, 16, 33), None)
    assert max(counts) <= 2


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
        monkeypatch.setattr(kernels, "_constants", lambda *a: constants(*a) | dict(BLOCK_H=2))
    else:
        monkeypatch.setattr(kernels, wrong, Short(getattr(kernels, wrong)))
    with pytest.raises(AssertionError, match=OP):
        assert_matches(OP, on_kernel, inputs)
