"""The kernels of norm_act, executed by the emulator."""

from functools import partial

import op_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, Short, assert_every_case
from kernel_inputs import DTYPES, draw
from kernel_inputs import normalization as inputs_of
from kernel_inputs import normalization_tiles as tiles
from op_checks import same_bits, with_grad

from sora_fast import ops
from sora_fast.kernels import normalization as kernels
from sora_fast.ops.normalization_triton import launch_backward, launch_forward
from sora_fast.testing import assert_matches, cases

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

norm_act = partial(ops.norm_act, backend="triton")


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_rule(dtype):
    assert_every_case("norm_act", norm_act, dtype)


@pytest.mark.parametrize("channels, dtype", [*zip((1, 3, 16, 48, 96, 160), 3 * DTYPES, strict=True)], ids=str)
def test_channels(channels, dtype):
    for norm, groups in (("rms", 1), ("group", {1: 1, 3: 3, 16: 4, 48: 16, 96: 32, 160: 2}[channels])):
        inputs = inputs_of((2, channels, 2, 3, 5), norm=norm, groups=groups, x=dtype, weight=dtype, bias=dtype, last=True)
        if channels > 3:
            assert_matches("norm_act", norm_act, inputs | dict(eps=1e-6))
        else:  # what the rule allows a bias of one number is luck
            op_checks.assert_close_to_reference("norm_act", norm_act, inputs)


@pytest.mark.parametrize("of_group", (1, 3, 8, 30))
def test_channels_of_a_group(of_group):
    inputs = inputs_of((2, 2 * of_group, 3, 2, 5), norm="group", groups=2, bias=torch.float32)
    assert_matches("norm_act", norm_act, inputs)


@pytest.mark.parametrize("norm", ("rms", "group"))
@pytest.mark.parametrize("pixels", (1, 7, 8, 9, 31, 32, 33, 65, 129))
def test_pixels(pixels, norm):
    """One below, at and above a tile of 8 and a run of 32; and more runs than one."""
    with tiles(8):
        assert_matches("norm_act", norm_act, inputs_of((2, 6, 1, 1, pixels), norm=norm, groups=2, bias=torch.float32))


@settings(op_checks.drawn, max_examples=12)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), *[st.integers(1, 4)] * 3), groups=st.integers(1, 4),
       norm=st.sampled_from(("rms", "group")), act=st.sampled_from(("silu", None)), x=st.sampled_from(DTYPES),
       weight=st.sampled_from((*DTYPES, None)), bias=st.sampled_from((*DTYPES, None)), pixels=st.sampled_from((1, 4, 16)),
       last=st.booleans())
def test_drawn(shape, groups, norm, act, x, weight, bias, pixels, last):
    shape = (shape[0], shape[1] * groups, *shape[2:])
    inputs = inputs_of(shape, norm=norm, groups=groups, act=act, x=x, weight=weight, bias=bias, last=last)
    with tiles(pixels):
        op_checks.assert_close_to_reference("norm_act", norm_act, inputs)


# ---------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("norm", ("rms", "group"))
def test_zeros(norm):
    """A pixel of rms and a group of a group norm stay 0 with Wan's eps; their gradient is 1e12 times the one that came."""
    x = draw(1, 4, 2, 3, 3)
    zero = (slice(None), slice(0, 2)) if norm == "group" else (slice(None), slice(None), 1, 2, 0)
    x[zero] = 0
    assert_matches("norm_act", norm_act, dict(x=x, weight=draw(4), norm=norm, groups=2, eps=1e-24))
    y = norm_act(x, norm=norm, groups=2, eps=1e-24)
    assert not y[zero].any() and torch.isfinite(y).all()


def test_without_eps_nothing_is_divided_by_a_pixel_that_is_not_there():
    assert_matches("norm_act", norm_act, inputs_of((1, 5, 1, 1, 3)) | dict(eps=0.0))


def test_large_numbers_before_the_activation():
    """Where exp overflows, silu is 0 and so is its gradient."""
    x = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(1, 4, 1, 1, 1)
    weight = torch.tensor([1e4, 1e4, 120.0, 120.0])
    assert_matches("norm_act", norm_act, dict(x=x, weight=weight))
    assert torch.equal(norm_act(x, weight, eps=0.0).flatten(), torch.tensor([0, 1e4, 0, 120]))


def test_statistics_far_from_zero():
    """Mean 1000, deviation 1: sums of squares in float32 would keep two digits. The first pixel is far from the others."""
    x = draw(2, 8, 3, 8, 9) + 1000
    x[:, :, 0, 0, 0] = -3000
    with tiles(8):
        assert_matches("norm_act", norm_act, dict(x=x, norm="group", groups=4, weight=draw(8), bias=draw(8)))


# ------------------------------------------------------------------------------------------------- what is read, written
@pytest.mark.parametrize("norm", ("rms", "group"))
def test_layouts_of_memory(norm):
    """The same numbers, whatever the strides, give the same bits; y and dx are channels_last_3d."""
    base = draw(2, 6, 3, 4, 5)
    room = torch.full((base.numel() + 1,), float("nan"))
    layouts = dict(
        NCDHW=base, channels_last=base.contiguous(memory_format=torch.channels_last_3d),
        strided=base.repeat_interleave(2, dim=-1)[..., ::2], transposed=base.transpose(2, 4).contiguous().transpose(2, 4),
        unaligned=room[1:].view(2, 3, 4, 5, 6).movedim(-1, 1).copy_(base),
        every_other=draw(2, 12, 3, 4, 5)[:, ::2].copy_(base))
    cotangent, found = draw(2, 6, 3, 4, 5), {}
    weight = draw(6)
    for name, x in layouts.items():
        x = x.detach().requires_grad_()
        y = norm_act(x, weight, norm=norm, groups=3)
        (dx,) = torch.autograd.grad(y, [x], cotangent)
        assert y.is_contiguous(memory_format=torch.channels_last_3d) and y.stride(1) == 1
        found[name] = y, dx
    for y, dx in found.values():
        assert same_bits(y, found["NCDHW"][0]) and same_bits(dx, found["NCDHW"][1])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("norm", ("rms", "group"))
def test_a_gradient_of_another_dtype(norm, dtypes):
    """What the convolution family does: y and dy in a dtype of their own; rounding dy first would cost digits."""
    x_dtype, y_dtype = dtypes
    inputs = inputs_of((2, 6, 2, 3, 4), norm=norm, groups=2, x=x_dtype, bias=torch.float16)
    facts = norm, 2, 0.1, "silu"
    vectors = inputs["weight"], inputs["bias"]
    y, cache_out, stats = launch_forward(inputs["x"], *vectors, *facts, y_dtype)
    assert y.dtype == y_dtype and cache_out is None
    dy = draw(2, 6, 2, 3, 4, dtype=y_dtype)
    got = launch_backward(dy, inputs["x"], *vectors, stats, *facts, (True, True, True))
    leaves = [t.double().requires_grad_() for t in (inputs["x"], *vectors)]
    truth = ops.norm_act(*leaves, norm=norm, groups=2, eps=0.1, backend="reference")
    torch.testing.assert_close(y.double(), truth.detach(), rtol=2e-3, atol=2e-3 if y_dtype == torch.float16 else 2e-6)
    for found, want, leaf in zip(got, torch.autograd.grad(truth, leaves, dy.double()), (inputs["x"], *vectors), strict=True):
        assert found.dtype == leaf.dtype
        small = 1e-3 if leaf.dtype == torch.float16 else 2e-6
        torch.testing.assert_close(found.double(), want, rtol=small, atol=small)


@pytest.mark.parametrize("norm", ("rms", "group"))
@pytest.mark.parametrize("channels", (6, 16))
def test_nothing_outside_is_read_or_written(channels, norm, monkeypatch):
    inputs = inputs_of((2, channels, 3, 3, 5), norm=norm, groups=2, bias=torch.float32)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):  # numbers of others before and after, and x dense, so that it is not copied
            room = torch.full((value.numel() + 64,), float("nan"))[32:32 + value.numel()]
            inputs[name] = (room if value.dim() == 1 else room.view(2, 3, 3, 5, channels).movedim(-1, 1)).copy_(value)
    guarded = Guarded()
    monkeypatch.setattr(kernels, "torch", guarded)
    with tiles(8):
        assert_matches("norm_act", norm_act, inputs)
    assert len(guarded.buffers) == (4 if norm == "rms" else 8)
    guarded.assert_whole()


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (2, 4, 0, 3, 3), (2, 4, 2, 0, 3), (2, 4, 2, 3, 0), (2, 0, 2, 3, 3)])
@pytest.mark.parametrize("norm", ("rms", "group"))
def test_empty(norm, shape):
    fresh, leaves = with_grad(dict(x=torch.randn(shape), weight=torch.randn(shape[1]), bias=torch.randn(shape[1])))
    y = norm_act(**fresh, norm=norm, groups=2)
    assert y.shape == shape
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves.values())


# ------------------------------------------------------------------------------------------------------------ cache
@pytest.mark.parametrize("norm", ("rms", "group"))
@pytest.mark.parametrize("keep", (1, 2, 3))
def test_cache_out(keep, norm, monkeypatch):
    """The last frames of cache and y, bit for bit, for every number of frames of both; nothing else is touched."""
    weight = draw(6)
    for frames in (0, 1, 2, 5):
        for cached in (None, 0, 1, 2, 4):
            x = draw(2, 6, frames, 3, 3)
            cache = None if cached is None else draw(2, 6, cached, 3, 3)
            facts = norm, 3, 1e-6, "silu"
            plain, nothing, _ = launch_forward(x, weight, None, *facts, torch.float16)
            assert nothing is None
            with monkeypatch.context() as patch:
                guarded = Guarded()
                patch.setattr(kernels, "torch", guarded)
                half = None if cache is None else cache.half()
                y, cache_out, _ = launch_forward(x, weight, None, *facts, torch.float16, cache=half, keep=keep)
            guarded.assert_whole()
            assert same_bits(y, plain)
            joined = y if half is None else torch.cat([half, y], dim=2)
            assert cache_out.dtype == torch.float16 and same_bits(cache_out, joined[:, :, -keep:]), (frames, cached)
            assert not cache_out.numel() or cache_out.is_contiguous(memory_format=torch.channels_last_3d)


def test_streaming_gives_the_bits_of_one_pass():
    x = draw(1, 12, 7, 3, 4, dtype=torch.float16)
    facts = None, None, "rms", 1, 1e-24, "silu", torch.float16
    whole, last, _ = launch_forward(x, *facts, keep=2)
    cache, parts = None, []
    for part in x.split((1, 1, 4, 1), dim=2):
        y, cache, _ = launch_forward(part, *facts, cache=cache, keep=2)
        parts.append(y)
    assert same_bits(torch.cat(parts, dim=2), whole) and same_bits(cache, last)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (2, 4, 2, 0, 3), (2, 0, 2, 3, 3)])
def test_cache_of_nothing(shape):
    y, cache_out, _ = launch_forward(torch.randn(shape), None, None, "rms", 1, 1e-6, "silu", torch.float32, keep=3)
    assert y.shape == shape and cache_out.shape == shape


def test_a_cache_beyond_two_to_the_31_numbers():
    """Its last frame is copied; the rest of it is never given memory."""
    cached = 2**17 + 2
    cache = torch.empty(1, cached, 4, 4, 1024, dtype=torch.float16).movedim(-1, 1)
    cache[:, :, -1] = 3
    x = torch.ones(1, 1024, 1, 4, 4, dtype=torch.float16)
    _, cache_out, _ = launch_forward(x, None, None, "rms", 1, 0.0, None, torch.float16, cache=cache, keep=2)
    assert torch.equal(cache_out, torch.tensor([3.0, 1.0]).half()[:, None, None].expand(1, 1024, 2, 4, 4))


# ------------------------------------------------------------------------------------------------------- autograd
def test_weight_and_bias_may_be_one_tensor():
    both = draw(6).requires_grad_()
    x = draw(1, 6, 2, 3, 4)
    want, got = (torch.autograd.grad(fn(x, both, both).square().sum(), [both])[0]
                 for fn in (partial(ops.norm_act, backend="reference"), norm_act))
    torch.testing.assert_close(got, want)


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("norm, kernel, keep", [
    ("rms", "forward_kernel", None), ("rms", "backward_kernel", None), ("group", "stats_kernel", None),
    ("group", "merge_stats_kernel", None), ("group", "forward_kernel", None), ("group", "backward_kernel", None),
    ("group", "reduce_sums_kernel", 0)])
def test_wrong_kernels_fail(norm, kernel, keep, monkeypatch):
    inputs = next(inputs for _, inputs in cases("norm_act", torch.float32) if inputs.get("norm", "rms") == norm)
    monkeypatch.setattr(kernels, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    assert_matches("norm_act", norm_act, inputs)
    monkeypatch.setattr(kernels, kernel, Short(getattr(kernels, kernel), keep))
    with pytest.raises(AssertionError, match="norm_act"):
        assert_matches("norm_act", norm_act, inputs)


def test_a_wrong_cache_is_seen(monkeypatch):
    """The programs that copy old frames left out."""
    monkeypatch.setattr(kernels, "torch", Guarded())
    monkeypatch.setattr(kernels, "forward_kernel", Short(kernels.forward_kernel))
    cache = draw(1, 6, 2, 3, 3)
    y, cache_out, _ = launch_forward(draw(1, 6, 1, 3, 3), None, None, "rms", 1, 1e-6, "silu", torch.float32, cache=cache,
                                     keep=2)
    assert torch.isfinite(y).all() and not same_bits(cache_out, torch.cat([cache, y], dim=2)[:, :, -2:])
