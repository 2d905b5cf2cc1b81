"""The backends "cuda" of norm_act, causal_conv3d and norm_act_conv3d, with stand-ins for their kernels."""

import itertools
from dataclasses import fields

import cuda_stand_ins
import pytest
import torch

import sora_fast
from sora_fast import ops
from sora_fast.explanation import all_ops
from sora_fast.kernels.convolution_settings import ConvSettings
from sora_fast.ops import cuda_backend
from sora_fast.testing import assert_matches, cases

BF16 = torch.bfloat16


@pytest.fixture
def stand_ins(monkeypatch):
    """Kernels that run on the CPU, and that nobody finds a reason against but those of the op itself."""
    monkeypatch.setattr(cuda_backend, "launch", cuda_stand_ins.launch)
    monkeypatch.setattr(cuda_backend, "unsupported", lambda problem, kernel, wide: [])


def video(*shape, dtype=BF16):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("time_pad, space_pad, cached", [*itertools.product(
    ("zeros", "replicate"), ("zeros", "replicate", "reflect"), (0, 1, 2))])
def test_causal_conv3d(stand_ins, time_pad, space_pad, cached):
    inputs = dict(x=video(2, 96, 3, 4, 5), weight=video(96, 96, 3, 3, 3) / 51, bias=video(96), time_pad=time_pad,
                  space_pad=space_pad, return_cache=True, residual=video(2, 96, 3, 4, 5),
                  cache=video(2, 96, cached, 4, 5) if cached else None)
    assert_matches("causal_conv3d", lambda **given: ops.causal_conv3d(**given, backend="cuda"), inputs, grads=False)
    inputs |= dict(norm_weight=video(96), norm_bias=video(96, dtype=torch.float32))
    assert_matches("norm_act_conv3d", lambda **given: ops.norm_act_conv3d(**given, backend="cuda"), inputs, grads=False)


@pytest.mark.parametrize("settings", [
    dict(kernel=(1, 3, 3), padding=(0, 1, 2, 1)), dict(kernel=(3, 1, 1), stride=(2, 1, 1), phase=1),
    dict(kernel=(1, 1, 1), return_cache=True), dict(lookahead=1), dict(phase=3), dict(batch=0), dict(act=None, bias=None),
    dict(padding=(0, 0, 0, 0), space_pad="replicate"), dict(channels=160, outputs=128), dict(channels=384, outputs=384),
], ids=str)
def test_other_calls(stand_ins, settings):
    settings = dict(settings)
    channels, outputs = settings.pop("channels", 96), settings.pop("outputs", 96)
    weight = video(outputs, channels, *settings.pop("kernel", (3, 3, 3))) / 50
    inputs = dict(x=video(settings.pop("batch", 1), channels, 3, 3, 6), weight=weight) | settings
    assert_matches("norm_act_conv3d", lambda **given: ops.norm_act_conv3d(**given, backend="cuda"), inputs, grads=False)
    inputs.pop("act", None)
    assert_matches("causal_conv3d", lambda **given: ops.causal_conv3d(**given, backend="cuda"), inputs, grads=False)


def test_strided_views_and_float32_under_autocast(stand_ins):
    x = video(1, 192, 3, 4, 10, dtype=torch.float32)[:, ::2, :, :, ::2]
    weight = video(96, 96, 3, 3, 3, dtype=torch.float32) / 51
    with torch.autocast("cpu", dtype=BF16):
        got = ops.norm_act_conv3d(x, weight, backend="cuda")
        expected = ops.norm_act_conv3d(x, weight, backend="torch")
    assert got.dtype == expected.dtype == BF16
    assert (got.float() - expected.float()).abs().max() <= 2 ** -7 * expected.float().abs().max()


def test_float16_under_bfloat16_autocast_is_rounded_once(stand_ins):
    x, weight = video(1, 96, 2, 4, 4, dtype=torch.float16), video(96, 96, 3, 3, 3)
    with torch.autocast("cpu", dtype=BF16):
        _, cache = ops.norm_act_conv3d(x, weight, act=None, return_cache=True, backend="cuda")
    expected = ops.norm_act(x.double(), act=None, backend="reference")
    assert ((cache - expected).abs() <= expected.abs() * 2**-8 * 1.001).all()


def test_norm_act(stand_ins):
    for dtype in (torch.float32, BF16, torch.float16):
        for label, inputs in cases("norm_act", dtype):
            if inputs.get("norm", "rms") == "rms" and inputs["x"].shape[1] % 8 == 0:
                pytest.fail(f"case {label!r} is no longer one that the kernel refuses; add it here")
        x = video(2, 96, 3, 5, 4, dtype=dtype)
        for given in (dict(), dict(weight=video(96)), dict(weight=video(96), bias=video(96), act=None, eps=1e-24)):
            assert_matches("norm_act", lambda **call: ops.norm_act(**call, backend="cuda"), dict(x=x, **given), grads=False)


def test_each_refusal_has_its_sentence(stand_ins):
    x, weight = video(1, 96, 2, 4, 4), video(96, 96, 3, 3, 3)
    for words, given in {
        "bfloat16, and not float16": dict(x=x.half(), weight=weight.half()),
        "input channels, and not 48": dict(x=x[:, :48], weight=weight[:, :48]),
        "output channels, and not 12": dict(weight=weight[:12]),
        "stride in space": dict(stride=2), "upsample is 2": dict(upsample=2),
    }.items():
        with pytest.raises(NotImplementedError, match=words):
            ops.causal_conv3d(**(dict(x=x, weight=weight) | given), backend="cuda")
    with pytest.raises(NotImplementedError, match="norm is rms, and not group"):
        ops.norm_act_conv3d(x, weight, norm="group", backend="cuda")


@pytest.mark.parametrize("name", ("norm_act", "causal_conv3d", "norm_act_conv3d"))
def test_without_a_record_auto_leaves_them_alone(name):
    """And says why: of a Hopper GPU in sight, that nothing was validated there; of this CPU, that it is none."""
    assert list(all_ops()[name].backends)[0] == "cuda"
    here = "\n".join(str(line) for line in str(sora_fast.explain(name, every=True)).splitlines() if " cuda " in f" {line} ")
    assert "CUDA GPU" in here
    op = all_ops()[name]
    problem = op.example("cuda:sm90", BF16, False)
    assert op.choose(problem).name != "cuda"
    assert op.why_not("cuda", problem)


def test_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(cuda_backend, "launch", cuda_stand_ins.launch)
    x = video(1, 96, 2, 4, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward"):
        ops.norm_act(x, backend="cuda")


def test_traced_without_a_break(stand_ins):
    x, weight = video(1, 96, 2, 4, 4), video(96, 96, 3, 3, 3) / 51
    cache = video(1, 96, 2, 4, 4)
    call = lambda x, cache: ops.norm_act_conv3d(x, weight, cache=cache, return_cache=True, backend="cuda")
    for got, expected in zip(torch.compile(call, fullgraph=True, backend="eager")(x, cache), call(x, cache), strict=True):
        assert torch.equal(got, expected)
    settings = ConvSettings((3, 3, 3), (1, 1, 1), (1, 1, 1, 1), "zeros", "zeros", 0, 0, 1, return_cache=True)
    torch.library.opcheck(torch.ops.sora_fast.convolution_cuda_forward,
                          (x, weight, None, cache, None, None, None, *settings.values),
                          test_utils=("test_schema", "test_faketensor"))


def test_settings_are_given_in_their_order():
    """PyTorch 2.11 traces values only where it names each of them."""
    settings = ConvSettings((3, 3, 3), (1, 1), (2,), *range(len(fields(ConvSettings)) - 3))
    assert ConvSettings.of(torch.empty(1, 1, 3, 3, 3), *settings.values) == settings
    assert len(ConvSettings.SCHEMA.split(",")) == len(settings.values)
