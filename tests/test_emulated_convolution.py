"""The kernels of causal_conv3d and norm_act_conv3d, executed by the emulator."""

import itertools

import op_checks
import pytest
import torch
from convolution_checks import EXACT, integers
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, Short
from kernel_inputs import DTYPES, on_kernel
from kernel_inputs import convolution as _small
from kernel_inputs import convolution_tiles as tiles
from op_checks import same_bits, tensors, with_grad

from sora_fast import nn, ops, use_backend
from sora_fast.kernels import convolution as kernels
from sora_fast.testing import assert_matches, cases

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

OPS = ("causal_conv3d", "norm_act_conv3d")
TENSORS = ("x", "weight", "bias", "cache", "residual", "norm_weight", "norm_bias")


def backward(op, inputs, backend):
    """Outputs, and the gradients of all that is floating for cotangents of small integers."""
    inputs, leaves = with_grad({name: value for name, value in inputs.items() if value is not None})
    outs = tensors(getattr(ops, op)(**inputs, backend=backend))
    drawn = [torch.randint(-2, 3, o.shape, generator=torch.Generator().manual_seed(o.numel())).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), drawn, allow_unused=True)
    return [*(o.detach() for o in outs), *grads]


def assert_equal(got, want):
    """To the bit; None is the gradient of what has no part in the result, and as good as zeros."""
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is b or not (b if a is None else a).any()
        else:
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_error_rule(op, dtype):
    for _, inputs in cases(op, dtype):
        assert_matches(op, on_kernel(op), inputs)
    assert_matches(op, on_kernel(op), inputs, flat_cotangent=True)  # of stride 0


KERNELS = {(3, 3, 3): None, (1, 3, 3): (0, 1, 0, 1), (3, 1, 1): None, (1, 1, 1): None, (2, 2, 4): (1, 2, 0, 1)}
CHANNELS = (3, 16, 48, 96, 160)
AXES = dict(op=(("causal_conv3d", None), ("norm_act_conv3d", "rms"), ("norm_act_conv3d", "group")), dtype=DTYPES,
            time_pad=("zeros", "replicate"), space_pad=("zeros", "replicate", "reflect"), cache=(0, 1, 2),
            stride=(((1, 1, 1), 0), ((1, 2, 2), 0), ((2, 1, 1), 1), ((2, 2, 2), 2)), lookahead=(0, 1), upsample=(1, 2),
            kernel=tuple(KERNELS), inputs=CHANNELS, outputs=CHANNELS, frames=(1, 2, 3, 4, 5), residual=(False, True))


def _legal(row) -> bool:
    past = row["kernel"][0] - 1
    return row["cache"] <= past and row["lookahead"] <= past and not (row["lookahead"] and row["cache"])


def _covering(axes):
    """Rows of which every pair of values from two axes that may stand together is in one: greedy, always the same."""
    names = list(axes)
    pairs_of = lambda row: {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
               if any(_legal({**row, a: x, b: y}) for row in _corners(axes))}
    generator, rows = torch.Generator().manual_seed(0), []
    while missing:
        a, x, b, y = min(missing, key=str)
        drawn = []
        while len(drawn) < 60:
            row = {name: axes[name][int(torch.randint(len(axes[name]), (), generator=generator))] for name in names}
            row |= {a: x, b: y}
            if _legal(row):
                drawn.append(row)
        rows.append(max(drawn, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows


def _corners(axes):
    """Rows that leave everything else as free as can be."""
    plain = {name: values[0] for name, values in axes.items()}
    return [plain | dict(kernel=kernel) for kernel in axes["kernel"]]


FEWER = AXES | dict(inputs=(3, 16, 96), outputs=(3, 48, 160), frames=(1, 2, 4))  # each row compiles its own kernels
PAIRS = _covering(FEWER)


def _arguments(row):
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(row["dtype"])
    (op, norm), kernel, inputs, outputs = row["op"], row["kernel"], row["inputs"], row["outputs"]
    batch = 2 if row["frames"] < 3 else 1
    stride, phase = row["stride"]
    made = dict(x=draw(batch, inputs, row["frames"], 3, 4), bias=draw(outputs), stride=stride, phase=phase,
                weight=draw(outputs, inputs, *kernel) / (inputs * torch.Size(kernel).numel()) ** 0.5,
                padding=KERNELS[kernel], time_pad=row["time_pad"], space_pad=row["space_pad"],
                lookahead=row["lookahead"], upsample=row["upsample"], return_cache=not row["lookahead"])
    if row["cache"]:
        made["cache"] = draw(batch, inputs, row["cache"], 3, 4)
    if row["frames"] % 2:
        made["x"] = made["x"].to(memory_format=torch.channels_last_3d)
    if norm:
        made |= dict(norm=norm, norm_weight=draw(inputs), norm_bias=draw(inputs), groups=inputs if inputs == 3 else 4)
    if row["residual"]:
        with torch.no_grad():
            out = tensors(getattr(ops, op)(**made, backend="reference"))[0]
        made["residual"] = draw(*out.shape)
    return op, made


def test_all_pairs_are_there():
    for a, b in itertools.combinations(FEWER, 2):
        found = {(row[a], row[b]) for row in PAIRS}
        missing = set(itertools.product(FEWER[a], FEWER[b])) - found
        assert all(not any(_legal({**row, a: x, b: y}) for row in _corners(FEWER)) for x, y in missing)
    assert len(PAIRS) < 40


@pytest.mark.parametrize("part", range(8))
def test_pairs(part):
    for row in PAIRS[part::8]:
        op, inputs = _arguments(row)
        with tiles():
            op_checks.assert_close_to_reference(op, on_kernel(op), inputs)


@settings(op_checks.drawn, max_examples=10)
@given(kernel=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), data=st.data(), op=st.sampled_from(OPS),
       stride=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), phase=st.integers(0, 5),
       sizes=st.tuples(st.integers(0, 4), st.integers(3, 7), st.integers(3, 7)), batch=st.integers(0, 2),
       channels=st.tuples(st.integers(1, 20), st.integers(1, 20)), upsample=st.integers(1, 3),
       time_pad=st.sampled_from(("zeros", "replicate")), space_pad=st.sampled_from(("zeros", "replicate", "reflect")),
       dtype=st.sampled_from(DTYPES))
def test_drawn(kernel, data, op, stride, phase, sizes, batch, channels, upsample, time_pad, space_pad, dtype):
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)
    cached = data.draw(st.integers(0, kernel[0] - 1))
    inputs = dict(x=draw(batch, channels[0], *sizes), weight=draw(channels[1], channels[0], *kernel) / channels[0] ** 0.5,
                  bias=draw(channels[1]), cache=draw(batch, channels[0], cached, *sizes[1:]), stride=stride, phase=phase,
                  padding=data.draw(st.tuples(*[st.integers(0, 2)] * 4)), time_pad=time_pad, space_pad=space_pad,
                  upsample=upsample, return_cache=True)
    if (sizes[1] * upsample + sum(inputs["padding"][2:]) < kernel[1]
            or sizes[2] * upsample + sum(inputs["padding"][:2]) < kernel[2]):
        return
    if op == "norm_act_conv3d":
        inputs |= dict(norm_weight=draw(channels[0]), eps=0.1)
    with tiles(16, 16, 16, wgrad=(16, 16, 0, 16)):
        op_checks.assert_close_to_reference(op, on_kernel(op), inputs)


# ---------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("setting", EXACT, ids=str)
def test_small_integers_bit_for_bit(setting):
    inputs, want = integers(dict(batch=1) | setting)
    with tiles(32, 16, 16, wgrad=(16, 16, 0, 32)):
        got = backward("causal_conv3d", inputs, "triton")
    assert same_bits(got[0], want)
    assert_equal(got, backward("causal_conv3d", inputs, "reference"))


BOXES = [
    dict(cache=2, residual=True, batch=2), dict(cache=1, time_pad="replicate"),
    dict(time_pad="replicate", frames=3, phase=1), dict(lookahead=2, time_pad="replicate"),
    dict(frames=1, cache=2, residual=True), dict(frames=0, cache=2),
    dict(kernel=(1, 3, 3), padding=(2, 0, 1, 2), residual=True), dict(kernel=(3, 1, 1), cache=2), dict(kernel=(1, 1, 1)),
    dict(kernel=(2, 2, 4), padding=(1, 2, 0, 1)), dict(batch=0), dict(space_pad="replicate", padding=(0, 0, 0, 0)),
]


@pytest.mark.parametrize("setting", BOXES, ids=str)
def test_boxes_of_integers(setting):
    """The form that TMA loads: tiles of one part and of two, more than one of them, the last not full."""
    extra, taps = 16 * (BOXES.index(setting) % 2), 1 + BOXES.index(setting) % 3
    inputs, want = integers(dict(channels=(24, 40), batch=1) | setting)
    with tiles(64, 16 + extra, 32, extra, tma=True, wgrad=(16, 16, extra, 16), extra_out=extra, taps=taps):
        got = backward("causal_conv3d", inputs, "triton")
    assert same_bits(got[0], want)
    assert_equal(got, backward("causal_conv3d", inputs, "reference"))


SMALL, PARTS, PIECES = (16, 16, 16, (16, 16, 0, 16), 1), (16, 32, 16, (16, 32, 16, 16), 4), (32, 16, 32, (32, 16, 0, 32), 64)


@pytest.mark.parametrize("sizes, setting", [
    (SMALL, dict(cache=2, frames=2, kernel=(3, 1, 3))), (PARTS, dict(cache=1, frames=2, space_pad="reflect")),
    (PIECES, dict(frames=2)), (PARTS, dict(upsample=2, kernel=(1, 3, 3), frames=2)),
    (SMALL, dict(stride=(1, 2, 2), padding=(0, 1, 0, 1), kernel=(1, 3, 3)))], ids=str)
def test_tiles_of_integers(sizes, setting):
    """Several programs along every axis, the last of each not full; two-part tiles; pixels in one piece and in many."""
    inputs, want = integers(dict(channels=(37, 50), batch=1) | setting)
    pixels, channels, block_k, wgrad, programs = sizes
    with tiles(pixels, channels, block_k, wgrad=wgrad, programs=programs):
        got = backward("causal_conv3d", inputs, "triton")
    assert same_bits(got[0], want)
    assert_equal(got, backward("causal_conv3d", inputs, "reference"))


# ----------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("tma", (False, True))
def test_nothing_outside_is_read_or_written(tma, monkeypatch):
    """Guards around every allocation, NaN where nothing is written yet, and inputs amid NaN."""
    inputs, want = integers(dict(channels=(24, 40), batch=1, frames=2, cache=2, residual=True))
    inputs["return_cache"] = True
    for name in ("x", "weight", "bias", "cache", "residual"):
        value = inputs[name] if inputs[name].dim() == 1 else inputs[name].to(memory_format=torch.channels_last_3d)
        room = torch.full((value.numel() + 64,), float("nan"))[32:-32]
        inputs[name] = room.as_strided(value.shape, value.stride(), 32).copy_(value)
    guarded = Guarded()
    monkeypatch.setattr(kernels, "torch", guarded)
    with tiles(16 if not tma else 64, 16, 16, tma=tma, wgrad=(16, 16, 0, 16), programs=2):
        got = backward("causal_conv3d", inputs, "triton")
    monkeypatch.undo()
    assert same_bits(got[0], want) and len(guarded.buffers) >= 4
    assert_equal(got, backward("causal_conv3d", inputs, "reference"))
    guarded.assert_whole()


def test_unaligned_views():
    """Memory that does not begin at a multiple of 16 bytes is copied, not read by vectors all the same."""
    inputs, want = integers(dict(channels=(8, 8), cache=1))
    for name in ("x", "weight", "cache"):
        value = inputs[name].to(memory_format=torch.channels_last_3d)
        inputs[name] = torch.empty(value.numel() + 1)[1:].as_strided(value.shape, value.stride(), 1).copy_(value)
        assert inputs[name].data_ptr() % 16 and kernels.dense(inputs[name]).data_ptr() % 16 == 0
    assert same_bits(on_kernel("causal_conv3d")(**inputs), want)


# --------------------------------------------------------------------------------------------------- streaming
def _plans(frames):
    for cuts in itertools.product((False, True), repeat=frames - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), frames]
        yield [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]


@pytest.mark.parametrize("stride", (1, 2))
def test_any_chunk_plan_is_one_shot(stride):
    """Every plan of 5 frames through a layer with a stream's state: integers, so to the bit; gradients through the chain."""
    conv = nn.CausalConv3d(2, 3, (3, 1, 3), stride=(stride, 1, stride), phase=stride - 1)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-3, 4, conv.weight.shape)), conv.bias.copy_(torch.randint(-3, 4, (3,)))
    x = torch.randint(-3, 4, (1, 2, 5, 2, 5)).float().requires_grad_()
    leaves = [x, conv.weight, conv.bias]
    with use_backend("triton"):
        want = conv(x)
        grads = torch.autograd.grad(want, leaves, torch.ones_like(want))
        for plan in _plans(5):
            state = nn.StreamState()
            got = torch.cat([conv(part, state) for part in x.split(plan, dim=2)], dim=2)
            assert same_bits(got.detach(), want.detach()), plan
            for a, b in zip(torch.autograd.grad(got, leaves, torch.ones_like(got)), grads, strict=True):
                assert torch.equal(a, b), plan


@pytest.mark.parametrize("stride", (1, 2))
def test_a_normed_stream_is_one_shot(stride):
    norm, conv = nn.RMSNorm(12, act="silu"), nn.CausalConv3d(12, 16, 3, stride=(stride, 1, 1))
    x = torch.randn(1, 12, 4, 3, 4, requires_grad=True)
    leaves = [x, conv.weight, conv.bias, norm.weight]
    with use_backend("triton"), tiles():
        want = nn.norm_act_conv(norm, conv, x)
        weights = torch.randn_like(want)
        grads = torch.autograd.grad(want, leaves, weights)
        for plan in ((1, 1, 1, 1), (1, 3), (2, 2)):
            state = nn.StreamState()
            got = torch.cat([nn.norm_act_conv(norm, conv, part, state) for part in x.split(plan, dim=2)], dim=2)
            assert (got - want).norm() <= 1e-6 * want.norm()
            for a, b in zip(torch.autograd.grad(got, leaves, weights), grads, strict=True):
                assert (a - b).norm() <= 1e-6 * b.norm()


# ----------------------------------------------------------------------------------------------------- autograd
@pytest.mark.parametrize("op", OPS)
def test_only_the_cache_is_used(op):
    inputs, leaves = with_grad(_small(op, residual=None))
    _, cache = on_kernel(op)(**inputs)
    got = torch.autograd.grad(cache.square().sum(), list(leaves.values()), allow_unused=True)
    inputs, leaves = with_grad(_small(op, residual=None) | {n: t.detach() for n, t in leaves.items()})
    _, cache = getattr(ops, op)(**inputs, backend="reference")
    want = torch.autograd.grad(cache.square().sum(), list(leaves.values()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(a) if b is None else b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_under_autocast(op):
    """What is convolved is cast as F.conv3d casts it; the norm is of x as it came."""
    inputs = _small(op, cache=None, residual=None)
    with torch.autocast("cpu", dtype=torch.float16):
        got = tensors(on_kernel(op)(**inputs))
        want = tensors(getattr(ops, op)(**inputs, backend="reference"))
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert got[0].dtype == (torch.float16 if op == "causal_conv3d" else want[0].dtype)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-2)


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("kernel", ("forward_kernel", "dgrad_kernel", "wgrad_kernel", "tma_kernel", "wgrad_tma_kernel"))
def test_wrong_kernels_fail(kernel, monkeypatch):
    """Their last program left out."""
    from sora_fast.kernels import convolution_tma

    tma = kernel.endswith("tma_kernel")
    module = convolution_tma if tma else kernels
    inputs = _small("causal_conv3d", weight=torch.randn(16, 8, 3, 3, 3), bias=torch.randn(16), residual=None)
    monkeypatch.setattr(kernels, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    with tiles(64, 16, 16, tma=tma):
        assert_matches("causal_conv3d", on_kernel("causal_conv3d"), inputs)
        monkeypatch.setattr(module, kernel, Short(getattr(module, kernel)))
        with pytest.raises(AssertionError, match="causal_conv3d"):
            assert_matches("causal_conv3d", on_kernel("causal_conv3d"), inputs)
