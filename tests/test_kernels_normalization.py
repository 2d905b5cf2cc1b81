"""The kernels of norm_act where no kernel runs.

What takes them, and how they would be launched; tests/interpreted runs them, tests/test_aot.py compiles them.
"""

import subprocess
import sys
from functools import partial

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops.normalization import NORM_ACT, NormalizationProblem

pytest.importorskip("triton")

import aot  # noqa: E402
import triton  # noqa: E402

from sora_fast.kernels import normalization as kernels  # noqa: E402

TRITON = NORM_ACT.backends["triton"]


def _problem(device, dtype, **change):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return NormalizationProblem(device, dtype, True, **(dict(channels=96, norm="rms", act="silu", wide=wide) | change))


@pytest.mark.parametrize("device, dtype, change, sentence", [
    ("cpu", torch.float32, {}, "TRITON_INTERPRET=1"),
    ("mps", torch.float32, {}, "on mps"),
    ("cuda:sm75", torch.float16, {}, "sm75"),
    ("cuda:sm90", torch.float64, {}, "float64"),
    ("cuda:sm90", torch.float8_e4m3fn, {}, "float8_e4m3fn"),
    ("cuda:sm90", torch.bfloat16, dict(wide=torch.float64), "float64"),
    ("cuda:sm90", torch.bfloat16, dict(channels=2049), "2,049"),
])
def test_what_it_cannot_run(device, dtype, change, sentence):
    reasons = TRITON.unsupported(_problem(device, dtype, **change))
    assert len(reasons) == 1 and sentence in reasons[0] and reasons[0].endswith(".")
    for good in (dict(norm="rms"), dict(norm="group", act=None), dict(channels=2048)):
        assert TRITON.unsupported(_problem("cuda:sm90", torch.bfloat16, **good)) == []


def test_a_call_that_cannot_run_raises_its_reasons():
    with pytest.raises(NotImplementedError, match="norm_act.*TRITON_INTERPRET=1"):
        ops.norm_act(torch.randn(1, 4, 1, 2, 2), backend="triton")
    with pytest.raises(NotImplementedError, match="norm_act.*float64"):
        ops.norm_act(torch.randn(1, 4, 1, 2, 2), torch.randn(4, dtype=torch.float64), backend="triton")


def test_explain_shows_kernel_and_config():
    lines = explain("normalization", device="cuda:sm90", assume_validated=True).splitlines()
    (taken,) = [line for line in lines if " * " in line]
    assert " triton " in taken and "warps=4, pixels=32" in taken and "the heuristic" in taken


def test_triton_loads_with_the_first_launch():
    code = "import sys, sora_fast.ops, sora_fast.ops.normalization; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


LAUNCHES = [kernels.Launch(channels, pixels, norm, "silu", dtype, torch.bfloat16)
            for channels in (1, 3, 16, 48, 96, 160, 192, 384, 512, 1024, 2048) for pixels in (1, 2**13, 2**24)
            for norm in ("rms", "group") for dtype in (torch.bfloat16, torch.float32)]


def _fits(launch, config, numbers):
    block = triton.next_power_of_2(launch.channels)
    powers = all(number >= 1 and number & (number - 1) == 0 for number in (config.warps, config.pixels))
    return powers and config.warps <= 16 and config.pixels * block <= 32 * config.warps * numbers and (
        1 <= config.programs and config.programs * config.warps <= 32)


def test_heuristics_fit_every_width():
    """Powers of two, at most 32 numbers a thread, 16 where sums are held besides, and registers for those."""
    for launch in LAUNCHES:
        forward, backward = kernels.forward_heuristic(launch, "sm90"), kernels.backward_heuristic(launch, "sm80")
        assert _fits(launch, forward, 16 if launch.norm == "group" else 32) and _fits(launch, backward, 16)
        assert backward.programs * backward.warps <= 16 and kernels._registers(backward) >= 128
        assert launch.norm == "rms" or kernels._registers(forward) >= 128


def test_a_small_video_has_programs_for_the_whole_gpu():
    """A frame of 60 x 104 with 384 channels: several programs for each of 132 multiprocessors."""
    launch = kernels.Launch(384, 8192, "rms", "silu", torch.bfloat16, torch.bfloat16)
    assert 60 * 104 / kernels.forward_heuristic(launch, "sm90").pixels > 4 * 132


@pytest.mark.parametrize("kernel", ("forward", "backward"))
def test_candidates(kernel):
    for launch in LAUNCHES:
        tried = list(kernels.candidates(kernel, launch, "sm90"))
        assert 2 <= len(tried) == len(set(tried)) <= 64
        assert all(_fits(launch, config, 32) for config in tried)
        heuristic = {"forward": kernels.forward_heuristic, "backward": kernels.backward_heuristic}[kernel](launch, "sm90")
        walks = kernel == "backward" or launch.norm == "group"
        seen = lambda config, walks=walks: (config.warps, config.pixels, walks and config.programs)
        assert seen(heuristic) in map(seen, tried)


def _call(shape, norm, cached=None, keep=0, wanted=(True, True, True)):
    """Forward and backward on tensors without memory."""
    batch, frames, height, width = shape
    video = lambda frames: torch.empty(batch, frames, height, width, 16, dtype=torch.bfloat16, device="meta").movedim(-1, 1)
    x, weight = video(frames), torch.empty(16, dtype=torch.bfloat16, device="meta")
    launch = kernels.Launch(16, 2**20, norm, "silu", x.dtype, x.dtype)
    facts = dict(norm=norm, groups=4, eps=1e-24, act="silu")
    y, _, stats = kernels.forward(x, weight, weight, dtype=x.dtype, config=kernels.forward_heuristic(launch, "sm90"),
                                  cache=None if cached is None else video(cached), keep=keep, **facts)
    kernels.backward(y, x, weight, weight, stats, wanted=wanted, config=kernels.backward_heuristic(launch, "sm90"), **facts)


@pytest.mark.parametrize("norm", ("rms", "group"))
def test_sizes_are_no_compile_keys(norm):
    sizes = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 16, 16, 16), (16, 1, 15, 1), (17, 4, 64, 16), (1, 2, 2**15, 2**15 + 1)]
    wanted = (True, False, False) if norm == "group" else (True, True, True)
    calls = [partial(_call, size, norm, wanted=wanted) for size in sizes]
    by_kernel = [[launch for launch in aot.launches(call)] for call in calls]
    assert all(len(launches) == len(by_kernel[0]) >= 2 for launches in by_kernel)
    for place in range(len(by_kernel[0])):  # backward_kernel is launched twice for a group norm, with other tensors
        launches = [each[place] for each in by_kernel]
        assert len(aot.specialization_keys(launches[0].fn, [(launch.args, launch.kwargs) for launch in launches])) == 1


def test_cached_frames_are_no_compile_keys():
    """A cache of which frames are copied is another kernel; how many, and of how many, is not."""
    sizes = [((1, 1, 3, 3), 1, 2), ((2, 1, 16, 16), 2, 2), ((1, 3, 5, 7), 16, 17), ((1, 1, 1, 1), 15, 3)]
    calls = [[aot.launches(partial(_call, size, "rms", cached, keep))[0]] for size, cached, keep in sizes]
    keys = aot.specialization_keys(kernels.forward_kernel, [(call[0].args, call[0].kwargs) for call in calls])
    assert len(keys) == 1


def test_what_is_launched():
    """One launch writes y and the cache; a group norm adds two for its statistics and two to its backward."""
    def names(*call, **more):
        return [launch.fn.__name__ for launch in aot.launches(partial(_call, (2, 1, 4, 4), *call, **more))]

    assert names("rms", 2, 2) == ["forward_kernel", "backward_kernel"]
    statistics = ["stats_kernel", "join_stats_kernel", "forward_kernel", "backward_kernel"]
    assert names("group", 2, 2) == [*statistics, "join_sums_kernel", "backward_kernel"]
    assert names("group", wanted=(False, True, False)) == statistics
    assert names("rms", wanted=(False, False, False)) == ["forward_kernel"]


def test_no_grid_is_too_large():
    """Only the first axis of a grid may have more than 65,535 programs."""
    for norm in ("rms", "group"):
        for launch in aot.launches(partial(_call, (70000, 2, 256, 256), norm, 1, 2)):
            assert len(launch.grid) == 1 and launch.grid[0] < 2**31


def test_a_wrong_heuristic_is_seen():
    """Twice the numbers that a thread may hold, and a tile that is no power of two."""
    launch = LAUNCHES[-1]
    config = kernels.forward_heuristic(launch, "sm90")
    assert not _fits(launch, kernels.Config(config.warps, config.pixels * 4, config.programs), 16)
    assert not _fits(launch, kernels.Config(config.warps, 3, config.programs), 2**20)
