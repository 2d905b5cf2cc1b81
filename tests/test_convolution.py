"""causal_conv3d and norm_act_conv3d."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import op_checks
import pytest
import torch
import torch.nn.functional as F
from convolution_checks import EXACT, integers
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import explain, ops, reference
from sora_fast.dispatch import Op
from sora_fast.ops import convolution, convolution_torch
from sora_fast.testing import assert_matches

OPS = ("causal_conv3d", "norm_act_conv3d")

test_error_rule = op_checks.error_rule(OPS)


def good(op):
    inputs = dict(x=torch.randn(2, 4, 3, 5, 6), weight=torch.randn(3, 4, 3, 3, 3), bias=torch.randn(3),
                  cache=torch.randn(2, 4, 2, 5, 6), residual=torch.randn(2, 3, 3, 5, 6))
    if op == "norm_act_conv3d":
        inputs |= dict(norm_weight=torch.randn(4), norm_bias=torch.randn(4))
    return inputs


test_every_tensor_is_checked = op_checks.every_tensor_is_checked(OPS, good)


def _table():
    table = []
    for op in OPS:
        table += [
            (op, "x of rank 4", dict(x=torch.zeros(2, 4, 5, 6)), ("x", "(B,", "x[:, :, None]")),
            (op, "weight of a 2-D convolution", dict(weight=torch.zeros(3, 4, 3, 3)), ("weight",)),
            (op, "groups", dict(weight=torch.zeros(3, 2, 3, 3, 3)), ("weight", "groups")),
            (op, "bias of another length", dict(bias=torch.zeros(4)), ("bias", "(3,)", "(4,)")),
            (op, "cache of other frames", dict(cache=torch.zeros(2, 4, 2, 5, 5)), ("cache", "(2, 4, 2, 5, 5)")),
            (op, "cache too long", dict(cache=torch.zeros(2, 4, 3, 5, 6)), ("at most kT - 1 = 2", "got 3")),
            (op, "residual of another shape", dict(residual=torch.zeros(2, 3, 2, 5, 6)), ("residual",)),
            (op, "weight in another dtype", dict(weight=torch.zeros(3, 4, 3, 3, 3).double()), ("weight", "float64")),
            (op, "cache in another dtype", dict(cache=torch.zeros(2, 4, 2, 5, 6).half()), ("cache", "float16")),
            (op, "stride 0", dict(stride=0), ("stride", "1 or more")),
            (op, "stride of two", dict(stride=(1, 2)), ("stride", "(1, 2)")),
            (op, "stride of floats", dict(stride=1.5), ("stride", "1.5")),
            (op, "padding as an int", dict(padding=1), ("padding", "left, right, top, bottom")),
            (op, "padding below 0", dict(padding=(0, -1, 0, 0)), ("padding", "0 or more")),
            (op, "unknown time_pad", dict(time_pad="reflect"), ("'zeros', 'replicate'", "'reflect'")),
            (op, "unknown space_pad", dict(space_pad="circular"), ("'reflect'", "'circular'")),
            (op, "reflection wider than the frame", dict(space_pad="reflect", padding=(6, 0, 0, 0)), ("reflect",)),
            (op, "kernel larger than the frame", dict(padding=(0, 0, 0, 0), weight=torch.zeros(3, 4, 3, 7, 3)),
             ("7 x 3 kernel", "5 x 6")),
            (op, "phase below 0", dict(phase=-1), ("phase", "-1")),
            (op, "phase as text", dict(phase="1"), ("phase",)),
            (op, "upsample 0", dict(upsample=0), ("upsample of 1 or more", "got 0")),
            (op, "upsample by halves", dict(upsample=1.5), ("upsample to be an int", "1.5")),
            (op, "upsample per axis", dict(upsample=(2, 2)), ("upsample to be an int",)),
            (op, "cache of upsampled frames", dict(upsample=2, residual=None, cache=torch.zeros(2, 4, 2, 10, 12)),
             ("cache", "(2, 4, frames, 5, 6)", "(2, 4, 2, 10, 12)")),
            (op, "residual of frames before upsampling", dict(upsample=2), ("residual", "(2, 3, 3, 10, 12)")),
            (op, "kernel larger than the upsampled frame", dict(upsample=2, padding=(0, 0, 0, 0), residual=None,
                                                               weight=torch.zeros(3, 4, 3, 11, 3)),
             ("11 x 3 kernel", "10 x 12")),
            (op, "lookahead with a cache", dict(lookahead=1), ("lookahead",)),
            (op, "lookahead of kT", dict(lookahead=3, cache=None), ("lookahead", "got 3")),
            (op, "lookahead with return_cache", dict(lookahead=1, cache=None, return_cache=True), ("lookahead",)),
            (op, "lookahead without frames", dict(lookahead=1, cache=None, residual=None,
                                                  x=torch.zeros(2, 4, 0, 5, 6)), ("at least one frame",)),
        ]
    table += [
        ("norm_act_conv3d", "unknown norm", dict(norm="layer"), ("'rms', 'group'", "'layer'")),
        ("norm_act_conv3d", "unknown act", dict(act="relu"), ("'silu'", "'relu'")),
        ("norm_act_conv3d", "groups that do not divide", dict(norm="group", groups=3), ("4 channels", "got 3")),
        ("norm_act_conv3d", "norm_weight of another length", dict(norm_weight=torch.zeros(3)), ("norm_weight",)),
    ]
    return table


test_refusals = op_checks.refusals(_table(), good)


# ---------------------------------------------------------------------------------------------------- gradcheck
_PADS = dict(padding=(1, 0, 1, 1))
test_gradcheck = op_checks.gradchecks([
    ("conv, cache, residual, cache_out",
     lambda x, w, b, c, r: reference.causal_conv3d(x, w, b, padding=(1, 1, 0, 0), cache=c, residual=r,
                                                   return_cache=True),
     (double(1, 2, 2, 1, 2), double(1, 2, 3, 1, 3), double(1), double(1, 2, 1, 1, 2), double(1, 1, 2, 1, 2))),
    ("conv, replicate, stride, phase",
     lambda x, w: reference.causal_conv3d(x, w, stride=(2, 1, 2), phase=1, time_pad="replicate",
                                          space_pad="replicate", **_PADS),
     (double(1, 1, 4, 2, 2), double(1, 1, 3, 2, 2))),
    ("conv, reflect, lookahead",
     lambda x, w: reference.causal_conv3d(x, w, lookahead=1, time_pad="replicate", space_pad="reflect", **_PADS),
     (double(1, 1, 2, 2, 2), double(2, 1, 3, 2, 2))),
    ("conv, upsampled, replicate, cache, residual",
     lambda x, w, c, r: reference.causal_conv3d(x, w, upsample=2, stride=(1, 1, 2), space_pad="replicate", cache=c,
                                                residual=r, return_cache=True, **_PADS),
     (double(1, 1, 2, 1, 2), double(1, 1, 2, 3, 2), double(1, 1, 1, 1, 2), double(1, 1, 2, 2, 2))),
    ("norm_act_conv rms", lambda x, w, b, nw, nb, c: reference.norm_act_conv3d(
        x, w, b, norm_weight=nw, norm_bias=nb, cache=c, padding=(0, 0, 0, 0), return_cache=True),
     (double(1, 2, 2, 1, 2), double(1, 2, 2, 1, 1), double(1), double(2), double(2), double(1, 2, 1, 1, 2))),
    ("norm_act_conv group", lambda x, w, nw: reference.norm_act_conv3d(
        x, w, norm_weight=nw, norm="group", groups=1, act=None, eps=0.1, padding=(0, 0, 0, 0)),
     (double(1, 2, 2, 1, 2), double(1, 2, 2, 1, 1), double(2))),
])


# ---------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("setting", EXACT, ids=str)
def test_small_integers_bit_for_bit(setting, backend):
    inputs, want = integers(setting)
    assert same_bits(ops.causal_conv3d(**inputs, backend=backend), want)
    for dtype in op_checks.DTYPES:  # these integers are exact in every dtype
        cast = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
        got = ops.causal_conv3d(**cast, backend=backend)
        assert got.dtype == dtype and torch.equal(got.float(), want)


def test_equals_conv3d_on_a_padded_clip():
    x, weight, bias = torch.randn(1, 4, 5, 6, 7), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
    want = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight, bias)
    torch.testing.assert_close(ops.causal_conv3d(x, weight, bias), want)


def test_upsampling_is_interpolation_before_the_convolution():
    """And the cache holds frames from before it, whose past is upsampled like the clip."""
    x, weight, bias = torch.randn(2, 4, 3, 5, 6), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
    large = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
    for op in OPS:
        fn = getattr(ops, op)
        want = fn(large, weight, bias)
        got, cache = fn(x, weight, bias, upsample=2, return_cache=True)
        torch.testing.assert_close(got, want)
        assert same_bits(cache, fn(x, weight, bias, return_cache=True)[1])
        _, cache = fn(x[:, :, :1], weight, bias, upsample=2, return_cache=True)
        torch.testing.assert_close(fn(x[:, :, 1:], weight, bias, upsample=2, cache=cache), want[:, :, 1:])


# ---------------------------------------------------------------------------------------------------- streaming
def _plans(frames):
    for parts in range(1, frames + 1):
        for cuts in itertools.combinations(range(1, frames), parts - 1):
            edges = (0, *cuts, frames)
            yield [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("time_pad", ("zeros", "replicate"))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_every_chunk_plan_equals_one_shot(backend, stride, time_pad, op):
    """All 63 plans of 1 to 6 frames, an empty chunk among them, with cache and phase carried; gradients too."""
    weight = torch.randn(2, 3, 3, 1, 1, dtype=torch.float64).requires_grad_()
    settings = dict(stride=(stride, 1, 1), time_pad=time_pad, padding=(0, 0, 0, 0), backend=backend)
    fn = getattr(ops, op)
    for frames in range(1, 7):
        x = torch.randn(1, 3, frames, 1, 2, dtype=torch.float64).requires_grad_()
        want, want_cache = fn(x, weight, return_cache=True, **settings)
        want_grads = torch.autograd.grad(want.square().sum() + want_cache.sum(), (x, weight))
        for plan in _plans(frames):
            cache, phase, parts = None, 0, []
            for chunk in x.split([*plan[:1], 0, *plan[1:]], dim=2):
                y, cache = fn(chunk, weight, cache=cache, phase=phase, return_cache=True, **settings)
                phase += y.shape[2] * stride - chunk.shape[2]
                parts.append(y)
            got = torch.cat(parts, dim=2)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            assert cache.shape[2] == min(2, frames)
            torch.testing.assert_close(cache, want_cache, rtol=1e-12, atol=1e-12)
            grads = torch.autograd.grad(got.square().sum() + cache.sum(), (x, weight))
            torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_cache_out_is_a_tensor_of_its_own(backend, op):
    weight = torch.randn(2, 3, 3, 1, 1)
    for frames, cached, grad in itertools.product((0, 1, 2, 5), (None, 0, 1, 2), (False, True)):
        x = torch.randn(2, 3, frames, 4, 4, requires_grad=grad)
        cache = None if cached is None else torch.randn(2, 3, cached, 4, 4)
        settings = dict(act=None, norm="rms", eps=1.0) if op == "norm_act_conv3d" else {}
        _, out = getattr(ops, op)(x, weight, padding=(0, 0, 0, 0), cache=cache, return_cache=True, backend=backend,
                                  **settings)
        assert out.shape[2] == min(2, frames + (cached or 0))
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
        if out.numel():
            storages = {t.untyped_storage().data_ptr() for t in (x, cache) if t is not None}
            assert out.untyped_storage().data_ptr() not in storages
        if op == "causal_conv3d":
            seen = x if cache is None else torch.cat([cache, x], 2)
            assert same_bits(out.detach(), seen[:, :, max(0, seen.shape[2] - 2):].detach())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_causality_and_prefix_stability(backend, op):
    weight, x = torch.randn(4, 4, 3, 3, 3), torch.randn(1, 4, 6, 5, 4)
    fn = lambda clip: getattr(ops, op)(clip, weight, stride=(2, 1, 1), backend=backend)
    whole = fn(x)
    for frames in (1, 3, 5):
        later = x.clone()
        later[:, :, frames:] = float("nan")
        shown = (frames + 1) // 2
        assert same_bits(fn(later)[:, :, :shown], whole[:, :, :shown])
        torch.testing.assert_close(fn(x[:, :, :frames]), whole[:, :, :shown])
    leaf = x.clone().requires_grad_()
    fn(leaf)[:, :, :2].sum().backward()  # outputs at frames 0 and 2
    assert leaf.grad[:, :, :3].any() and not leaf.grad[:, :, 3:].any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
def test_isolation_in_a_batch(poison, backend, op):
    inputs = good(op) | dict(cache=None, residual=None)

    def outcome(change):
        fresh, leaves = with_grad(inputs)
        with torch.no_grad():
            if change:
                fresh["x"][1] += poison
        y = getattr(ops, op)(**fresh, backend=backend)
        return y, torch.autograd.grad(y.sum(), leaves["x"])[0]

    (want, dwant), (got, dgot) = outcome(False), outcome(True)
    assert not same_bits(want, got)
    assert same_bits(want[0], got[0]) and same_bits(dwant[0], dgot[0])


# --------------------------------------------------------------------------------------------- memory, autocast
def _saved_bytes(fn, shape):
    """Bytes saved for backward in tensors of at least a tenth of x's numbers, each storage once."""
    storages = {}

    def pack(t):
        if t.numel() >= shape.numel() // 10:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return sum(storages.values())


@pytest.mark.parametrize("norm", ("rms", "group"))
@pytest.mark.parametrize("cached", (False, True))
def test_saves_only_x(norm, cached):
    """One tensor of x's size is saved, where the composition saves several."""
    x = torch.randn(1, 8, 6, 32, 32).requires_grad_()
    weight, norm_weight = torch.randn(8, 8, 3, 3, 3).requires_grad_(), torch.randn(8).requires_grad_()
    cache = torch.randn(1, 8, 1, 32, 32) if cached else None
    settings = dict(norm=norm, groups=4)
    rest = dict(residual=torch.randn(1, 8, 6, 32, 32).requires_grad_(), cache=cache, return_cache=True)
    one = _saved_bytes(lambda: ops.norm_act_conv3d(x, weight, norm_weight=norm_weight, **settings, **rest,
                                                   backend="torch"), x.shape)
    cache_bytes = cache.untyped_storage().nbytes() if cached else 0
    assert one == x.untyped_storage().nbytes() + cache_bytes
    two = _saved_bytes(lambda: ops.causal_conv3d(ops.norm_act(x, norm_weight, **settings), weight, **rest), x.shape)
    assert two > 2 * one
    rest["residual"] = torch.randn(1, 8, 6, 64, 64)
    assert one == _saved_bytes(lambda: ops.norm_act_conv3d(x, weight, norm_weight=norm_weight, upsample=2, **settings,
                                                           **rest, backend="torch"), x.shape), "the small x is saved"


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_autocast_is_that_of_conv3d(backend, low):
    for dtype in op_checks.DTYPES:
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((1, 4, 3, 5, 6), (2, 4, 3, 3, 3), (2,)))
        with torch.autocast("cpu", low):
            want = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight, bias)
            got, cache = ops.causal_conv3d(x, weight, bias, return_cache=True, backend=backend)
            fused, fused_cache = ops.norm_act_conv3d(x, weight, bias, return_cache=True, backend=backend)
            two, two_cache = ops.causal_conv3d(ops.norm_act(x, backend=backend), weight, bias, return_cache=True,
                                               backend=backend)
        expected = torch.float64 if dtype == torch.float64 else low
        assert got.dtype == want.dtype == cache.dtype == fused.dtype == fused_cache.dtype == expected
        tolerance = 0 if backend == "torch" else 4 * torch.finfo(expected).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=8 * tolerance)
        assert same_bits(fused_cache, two_cache)
        torch.testing.assert_close(fused, two, rtol=tolerance, atol=8 * tolerance)
        # gradients come back in the dtypes of what was passed
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", low):
            y = ops.norm_act_conv3d(*leaves, backend=backend)
        y.float().sum().backward()
        assert [t.grad.dtype for t in leaves] == [dtype] * 3


def test_autocast_refuses_what_conv3d_refuses():
    x, weight = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, 3)
    for op in OPS:
        with torch.autocast("cpu", torch.bfloat16):
            op_checks.assert_refused(lambda op=op: getattr(ops, op)(x, weight), op, "float64", "bfloat16")
    mixed = ops.norm_act_conv3d  # under autocast x and weight may differ, as for nn.Conv3d
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(x.half(), weight).dtype == torch.bfloat16
    op_checks.assert_refused(lambda: mixed(x.half(), weight), "norm_act_conv3d", "float16")


def test_channels_last_and_strided_inputs():
    x = torch.randn(2, 4, 3, 5, 6).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(6, 8, 3, 3, 3)[::2, ::2]
    for op in OPS:
        inputs = dict(x=x, weight=weight)
        assert_matches(op, lambda op=op, **a: getattr(ops, op)(**a), inputs)
        torch.testing.assert_close(getattr(ops, op)(x, weight), getattr(ops, op)(x.contiguous(), weight.contiguous()))


# ------------------------------------------------------------------------------------------------- wrong cuDNNs
@pytest.mark.parametrize("version, tf32, dtype, wrong", [
    (90701, True, torch.bfloat16, ""), (90800, False, torch.bfloat16, "torch"), (90800, True, torch.float16, "torch"),
    (91002, False, torch.bfloat16, "torch"), (91002, True, torch.bfloat16, "torch reference"),
    (91499, True, torch.float16, "torch reference"), (91500, True, torch.bfloat16, "reference"),
    (91500, True, torch.float32, "torch reference"), (91500, False, torch.float32, ""),
    (91001, True, torch.float32, ""), (91600, True, torch.float32, ""), (91002, True, torch.float64, ""),
    (91900, True, torch.bfloat16, ""), (0, True, torch.bfloat16, "")])
def test_a_cudnn_that_computes_wrongly_is_refused(monkeypatch, version, tf32, dtype, wrong):
    """By version, as PyTorch's issues 163539 (16 bits) and 167024 (TF32) have it."""
    monkeypatch.setattr(convolution, "_cudnn", lambda: (version, tf32))
    for op in convolution.OPS:
        problem = op.example("cuda:sm90", dtype, True)
        refused = {name: op.backends[name].unsupported(problem) for name in ("torch", "reference")}
        assert " ".join(name for name, reasons in refused.items() if reasons) == wrong
        for reasons in filter(None, refused.values()):
            (sentence,) = reasons
            found = f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100} was found"
            assert sentence.startswith(found) and sentence.endswith(".") and "pip install 'nvidia-cudnn-cu" in sentence
        assert op.backends["torch"].unsupported(op.example("cpu", dtype, True)) == []
        if dtype != torch.float32:
            pointwise = replace(problem, kernel=(1, 1, 1))
            assert op.backends["torch"].unsupported(pointwise) == [], "products of one tap are right"
        if len(wrong.split()) == 1:
            assert op.choose(problem, assume_validated=True).name != wrong
        with pytest.raises(NotImplementedError, match="9.8 to 9.14|9.10.2 to 9.15") if wrong else nullcontext():
            op.choose(problem, wrong.partition(" ")[0] or "torch")


def test_auto_and_explain_name_the_cudnn(monkeypatch, caplog):
    monkeypatch.setattr(convolution, "_cudnn", lambda: (91002, True))
    plain = Op("causal_conv3d", "convolution", convolution.CAUSAL_CONV3D.example, [
        convolution.CAUSAL_CONV3D.backends[name] for name in ("torch", "reference")])
    problem = plain.example("cuda:sm90", torch.bfloat16, False)
    with pytest.raises(NotImplementedError, match=r"\[torch\] cuDNN 9.10.2 was.* \[reference\] cuDNN 9.10.2 was.*'ieee'"):
        plain.choose(problem)
    text = explain("causal_conv3d", every=True, device="cuda:sm90", dtype=torch.bfloat16)
    assert text.count("cuDNN 9.10.2 was found") >= 2
    monkeypatch.setattr(convolution, "_cudnn", lambda: (91002, False))
    problem = plain.example("cuda:sm90", torch.bfloat16, False)
    taken = plain.choose(problem)  # the definition convolves in float32, which is right with TF32 off
    assert taken.name == "reference"
    plain._tell_if_slow(taken, problem, "auto")
    assert "cuDNN 9.10.2 was found" in caplog.text and "slow" in caplog.text


def test_the_cudnn_that_is_found(monkeypatch):
    """What is read from PyTorch: the version, 0 where cuDNN is missing or switched off, and whether TF32 is on."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert convolution._cudnn() == (91002, False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert convolution._cudnn() == (91002, True)
    with torch.backends.cudnn.flags(enabled=False):
        assert convolution._cudnn()[0] == 0
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert convolution._cudnn()[0] == 0


# --------------------------------------------------------------------------------------------- drawn and wrong
@op_checks.drawn
@given(data=st.data(), op=st.sampled_from(OPS), dtype=st.sampled_from(op_checks.DTYPES))
def test_drawn_shapes(data, op, dtype):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    pick = lambda low, high: data.draw(st.integers(low, high))
    kernel = tuple(pick(1, 3) for _ in range(3))
    batch, channels, frames, height, width = pick(1, 2), 2 * pick(1, 3), pick(0, 5), pick(3, 6), pick(3, 6)
    inputs = dict(x=draw(batch, channels, frames, height, width), weight=draw(pick(1, 4), channels, *kernel),
                  stride=tuple(pick(1, 3) for _ in range(3)), padding=tuple(pick(0, 2) for _ in range(4)),
                  time_pad=data.draw(st.sampled_from(("zeros", "replicate"))), phase=pick(0, 4), upsample=pick(1, 3),
                  space_pad=data.draw(st.sampled_from(("zeros", "replicate", "reflect"))))
    if frames and data.draw(st.booleans()):
        inputs["lookahead"] = pick(0, kernel[0] - 1)
    elif data.draw(st.booleans()):
        inputs |= dict(cache=draw(batch, channels, pick(0, kernel[0] - 1), height, width), return_cache=True)
    if op == "norm_act_conv3d":
        inputs |= dict(norm=data.draw(st.sampled_from(("rms", "group"))), groups=2, norm_weight=draw(channels),
                       norm_bias=draw(channels), eps=0.1)
    op_checks.assert_close_to_reference(op, lambda **a: getattr(ops, op)(**a), inputs)


def test_wrong_kernels_fail():
    """Time taps reversed; one frame too late; the cache put behind the clip; height and width swapped."""
    inputs = dict(x=torch.randn(1, 4, 4, 5, 5).bfloat16(), weight=torch.randn(4, 4, 3, 3, 3).bfloat16(),
                  cache=torch.randn(1, 4, 2, 5, 5).bfloat16())
    conv = ops.causal_conv3d
    wrong = (
        lambda x, weight, cache: conv(x, weight.flip(2), cache=cache),
        lambda x, weight, cache: conv(torch.cat([cache[:, :, 1:], x[:, :, :-1]], 2), weight, cache=cache[:, :, :1]),
        lambda x, weight, cache: conv(torch.cat([x[:, :, 2:], cache], 2), weight, cache=x[:, :, :2]),
        lambda x, weight, cache: conv(x, weight.transpose(3, 4), cache=cache),
    )
    for kernel in wrong:
        with pytest.raises(AssertionError, match="causal_conv3d"):
            assert_matches("causal_conv3d", kernel, inputs)
    with pytest.raises(AssertionError, match="norm_act_conv3d"):
        assert_matches("norm_act_conv3d", lambda **a: ops.norm_act_conv3d(**a, act=None), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_16_bit_convolutions_rounds_float32_ones(dtype, monkeypatch):
    monkeypatch.setattr(convolution_torch, "emulated_on_cpu", lambda asked: asked == dtype)
    seen, plain = [], torch.ops.aten.convolution_backward

    def backward(dy, *arguments):
        seen.append(dy.dtype)
        return plain(dy, *arguments)
    monkeypatch.setattr(F, "conv3d", None)  # these loops are what it goes around
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", backward)
    x, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True)
                       for shape in ((1, 8, 5, 9, 11), (16, 8, 3, 3, 3), (16,)))
    y = ops.causal_conv3d(x, weight, bias, backend="torch")
    wide = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    expected = ops.causal_conv3d(*wide, backend="torch")
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, weight, bias), dy))
    want = (expected, *torch.autograd.grad(expected, wide, dy.float()))
    assert all(a.dtype == dtype and torch.equal(a, b.to(dtype)) for a, b in zip(got, want, strict=True))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("frames, kernel, settings", [
    (4, (3, 3, 3), dict(cache=torch.randn(1, 24, 2, 45, 53), return_cache=True)),
    (5, (2, 3, 5), dict(padding=(2, 1, 0, 3), time_pad="replicate", space_pad="replicate")),
    (5, (1, 5, 3), {}),
], ids=lambda value: str(value) if isinstance(value, tuple) else None)
def test_the_backward_of_a_clip_that_pytorch_would_unfold(frames, kernel, settings, monkeypatch):
    """On a CPU by frames and by taps, as exact as by unfolding: torch.ops.aten.convolution_backward sees frames alone."""
    seen, plain = [], torch.ops.aten.convolution_backward

    def backward(dy, *arguments):
        seen.append(dy.dim())
        return plain(dy, *arguments)

    def grads(dtype, backend):
        given = {name: value.to(dtype).requires_grad_() if isinstance(value, torch.Tensor) else value
                 for name, value in inputs.items()}
        found = ops.causal_conv3d(**given, backend=backend)
        y = found[0] if isinstance(found, tuple) else found
        draw = torch.Generator().manual_seed(0)
        dy = torch.randn(y.shape, generator=draw).to(dtype)
        return torch.autograd.grad(y, [value for value in given.values() if isinstance(value, torch.Tensor)], dy)

    x, weight, bias = torch.randn(1, 24, frames, 45, 53), torch.randn(7, 24, *kernel) / 25, torch.randn(7)
    inputs = dict(x=x, weight=weight, bias=bias) | settings
    exact = grads(torch.float64, "reference")
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", backward)
    for got, want in zip(grads(torch.float32, "torch"), exact, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()
    assert set(seen) == {4}
