"""The kernels of causal_conv3d and norm_act_conv3d where no kernel runs.

What takes them, and how they would be launched; tests/interpreted runs them, tests/test_aot.py compiles them.
"""

import subprocess
import sys

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops.convolution import CAUSAL_CONV3D, NORM_ACT_CONV3D, ConvolutionProblem

pytest.importorskip("triton")

import aot  # noqa: E402
import triton  # noqa: E402

from sora_fast.kernels import convolution as kernels  # noqa: E402
from sora_fast.kernels import norm_convolution, normalization  # noqa: E402
from sora_fast.kernels.convolution_config import loads_by_tma  # noqa: E402

CHANNELS = (3, 12, 16, 32, 48, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
GPUS = ("sm80", "sm86", "sm89", "sm90-H200", "sm100", "sm120")


def _problem(device, dtype, **change):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ConvolutionProblem(device, dtype, True, **(dict(
        in_channels=96, out_channels=96, kernel=(3, 3, 3), stride=(1, 1, 1), time_pad="zeros", space_pad="zeros",
        lookahead=0, upsample=1, norm=None, wide=wide) | change))


@pytest.mark.parametrize("device, dtype, change, sentence", [
    ("cpu", torch.float32, {}, "TRITON_INTERPRET=1"),
    ("mps", torch.float32, {}, "on mps"),
    ("cuda:sm75", torch.float16, {}, "sm75"),
    ("cuda:sm90", torch.float64, {}, "float64"),
    ("cuda:sm90", torch.bfloat16, dict(norm="rms", wide=torch.float64), "float64"),
    ("cuda:sm90", torch.bfloat16, dict(norm="rms", in_channels=2049), "2,049"),
])
def test_what_it_cannot_run(device, dtype, change, sentence):
    for op in (CAUSAL_CONV3D, NORM_ACT_CONV3D):
        triton_backend = op.backends["triton"]
        reasons = triton_backend.unsupported(_problem(device, dtype, **change))
        assert len(reasons) == 1 and sentence in reasons[0] and reasons[0].endswith(".")
        for good in (dict(stride=(2, 2, 2)), dict(upsample=2, space_pad="reflect"), dict(in_channels=2049)):
            assert triton_backend.unsupported(_problem("cuda:sm90", torch.bfloat16, **good)) == []


def test_a_call_that_cannot_run_raises_its_reasons():
    with pytest.raises(NotImplementedError, match="causal_conv3d.*TRITON_INTERPRET=1"):
        ops.causal_conv3d(torch.randn(1, 4, 1, 2, 2), torch.randn(3, 4, 1, 1, 1), backend="triton")
    with pytest.raises(NotImplementedError, match="norm_act_conv3d.*float64"):
        ops.norm_act_conv3d(torch.randn(1, 4, 1, 2, 2), torch.randn(3, 4, 1, 1, 1), backend="triton",
                            norm_weight=torch.ones(4, dtype=torch.float64))


def test_explain_shows_kernel_and_config():
    lines = explain("convolution", device="cuda:sm90", assume_validated=True).splitlines()
    taken = [line for line in lines if " * " in line]
    assert len(taken) == 2
    for line in taken:
        assert " triton " in line and "tma=True" in line and "channels=128" in line and "the heuristic" in line
    without = explain("convolution", device="cuda:sm90")
    assert " * " in without and all(" torch " in line for line in without.splitlines() if " * " in line)


def test_triton_loads_with_the_first_launch():
    code = "import sys, sora_fast.ops, sora_fast.ops.convolution; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def _launches(dtypes=(torch.bfloat16, torch.float16, torch.float32)):
    for channels in CHANNELS:
        for other in (channels, 3, 96, 384):
            for dtype in dtypes:
                yield kernels.Launch(channels, other, (3, 3, 3), (1, 1, 1), 1, "zeros", dtype)
                yield kernels.Launch(channels, other, (1, 3, 3), (1, 2, 2), 1, "replicate", dtype)


@pytest.mark.parametrize("gpu", (*GPUS, "cpu"))
def test_heuristics_fit(gpu):
    """Powers of two that a product takes, and sums within the registers."""
    power = lambda *numbers: all(n >= 1 and n & (n - 1) == 0 for n in numbers)
    for launch in _launches():
        for kernel in ("forward", "dgrad"):
            config = kernels.HEURISTICS[kernel](launch, gpu)
            assert power(config.pixels, config.channels, config.block_k, config.warps) and config.block_k >= 16
            assert (config.channels + config.more) * config.pixels <= 32 * config.warps * 192
            assert config.more == 0 or config.tma and power(config.more)
            assert config.tma == (loads_by_tma(launch, gpu))
        config = kernels.HEURISTICS["wgrad"](launch, gpu)
        assert power(config.outputs, config.inputs, config.pixels, config.warps) and (config.more == 0 or power(config.more))
        assert config.outputs * (config.inputs + config.more) <= 32 * config.warps * 192
        assert min(config.outputs, config.inputs, config.pixels) >= 16


def test_who_has_tma():
    launch = kernels.Launch(96, 96, (3, 3, 3), (1, 1, 1), 1, "zeros", torch.bfloat16)
    assert [loads_by_tma(launch, gpu) for gpu in GPUS] == [False, False, False, True, True, True]
    for change in (dict(inputs=12), dict(outputs=3), dict(stride=(1, 2, 2)), dict(upsample=2), dict(space_pad="reflect"),
                   dict(dtype=torch.float32)):
        assert not loads_by_tma(kernels.Launch(**{**vars(launch), **change}), "sm90")
    assert loads_by_tma(kernels.Launch(**{**vars(launch), "kernel": (3, 1, 1), "space_pad": "reflect"}), "sm90")


@pytest.mark.parametrize("gpu", GPUS)
def test_work_on_padding(gpu):
    """Of K and N together: none at 128, 192, 256 and 384 channels, at most a quarter at 96 and 160."""
    share = lambda channels: kernels._padding(channels, channels, torch.bfloat16, gpu, {})
    assert [share(channels) for channels in (128, 192, 256, 384, 512, 640, 768, 1024)] == [0] * 8
    assert 0 < share(96) <= 0.25 and 0 < share(160) <= 0.25
    assert kernels.padding_share(96, 96, 128, 64) == 1 - 96 * 96 / (128 * 128)


def test_candidates_are_launches():
    """All fit, none twice, and the heuristic's tiles come first."""
    for launch in _launches((torch.bfloat16,)):
        for kernel, heuristic in kernels.HEURISTICS.items():
            found = list(kernels.candidates(kernel, launch, "sm90"))
            assert 12 <= len(found) <= 200 and len(set(found)) == len(found)
            assert all(type(config) is type(heuristic(launch, "sm90")) for config in found)


def _calls(op):
    """Launches of one op at sizes that share nothing but channels."""
    for batch, frames, height, width, cached, phase in ((1, 4, 32, 32, 2, 0), (3, 1, 16, 48, 1, 0), (2, 17, 15, 33, 2, 1),
                                                        (1, 16, 1, 17, 1, 3)):
        geometry = kernels.Geometry((3, 3, 3), (1, 1, 1), (1, 1, 1, 1), "zeros", "zeros", phase, 0, 1)
        make = lambda *shape: kernels.dense(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        x, weight = make(batch, 96, frames, height, width), make(96, 96, 3, 3, 3)
        cache = make(batch, 96, cached, height, width)
        dy = make(batch, 96, *geometry.out_sizes(frames, height, width))
        launch = kernels.Launch(96, 96, (3, 3, 3), (1, 1, 1), 1, "zeros", torch.bfloat16)
        for gpu in ("sm80", "sm90"):
            config = {name: heuristic(launch, gpu) for name, heuristic in kernels.HEURISTICS.items()}
            if op == "forward":
                yield lambda a=(x, weight, None, cache, dy, geometry), c=config: kernels.forward(
                    *a, tf32=False, config=c["forward"])
            elif op == "dgrad":
                yield lambda a=(dy, weight, cache, x.shape, cached, geometry), c=config: kernels.dgrad(
                    *a, want_x=True, want_cache=True, tf32=False, config=c["dgrad"])
            elif gpu == "sm80":
                yield lambda a=(dy, x, cache, weight, geometry), c=config: kernels.wgrad(*a, tf32=False, config=c["wgrad"])


@pytest.mark.parametrize("op", ("forward", "dgrad", "wgrad"))
def test_keys_are_free_of_sizes(op):
    """Batch, frames, height, width, cached frames and phase are in no compile key."""
    if triton.knobs.runtime.interpret:
        pytest.skip("this process interprets kernels, and an interpreted kernel has no key")
    assert aot.cache_violations(_calls(op)) == []


def test_the_fused_op_s_record_covers_both_families():
    """Its kernels are those of norm_convolution and all that this imports."""
    assert NORM_ACT_CONV3D.backends["triton"].kernel == norm_convolution.__name__.rpartition(".")[2]
    assert norm_convolution.normalization is normalization and norm_convolution.convolution is kernels
