"""The CUDA kernels of csrc/ in the emulator: the extension as it was built, its launchers and its PTX, on CPU tensors."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from sora_fast import ops  # noqa: E402
from sora_fast.emulator.memory import Fault  # noqa: E402
from sora_fast.environment import build_info  # noqa: E402
from sora_fast.ops import cuda_backend  # noqa: E402
from sora_fast.testing import assert_matches, emulated_gpu  # noqa: E402

pytestmark = pytest.mark.skipif("skipped" in build_info(), reason=f"not built: {build_info().get('skipped')}")


def video(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("arch", ("sm80", "sm90"))
def test_the_norm_is_right(arch):
    with emulated_gpu(arch, race=True) as emulator:
        for dtype, channels in ((torch.bfloat16, 96), (torch.float32, 24)):
            assert_matches("norm_act", partial(ops.norm_act, backend="cuda"), dict(
                x=video(1, channels, 2, 3, 7, dtype=dtype), weight=video(channels, dtype=dtype)), grads=False)
    assert emulator.records[0].name == "norm_act_kernel<__nv_bfloat16, __nv_bfloat16, 8, 3>"
    assert f".target sm_{arch[2:]}" in emulator.records[0].ptx


@pytest.mark.parametrize("schedule", ("late", "early"))
def test_the_convolution_is_right(schedule):
    """TMA, WGMMA and mbarriers of a persistent kernel, with its cache; as fast and as slow as the ISA allows."""
    inputs = dict(x=video(1, 96, 2, 4, 9), weight=video(96, 96, 3, 3, 3) / 50, bias=video(96), cache=video(1, 96, 1, 4, 9))
    with emulated_gpu("sm90", schedules=schedule) as emulator:
        assert_matches("causal_conv3d", partial(ops.causal_conv3d, backend="cuda"), inputs, grads=False)
    assert emulator.records[0].name == "causal_conv3d_kernel<96, 1>"


def test_a_missing_wait_is_reported():
    """Planted in the PTX: each mbarrier is taken to have been waited for."""
    def without_waits(ptx):
        lines = ptx.splitlines()
        waits = [place for place, line in enumerate(lines) if "mbarrier.try_wait" in line]
        for place in waits:
            predicate = lines[place].split("b64")[1].split(",")[0].strip()
            lines[place] = f"setp.eq.u32 {predicate}, 0, 0;"
        assert waits
        return "\n".join(lines)

    inputs = dict(x=video(1, 96, 1, 4, 4), weight=video(96, 96, 1, 1, 1))
    with emulated_gpu("sm90", change=without_waits, race=True), pytest.raises(Fault, match=r"sm90\.cuh|convolution\.cuh"):
        ops.causal_conv3d(**inputs, backend="cuda")


def test_a_launch_outside_goes_to_cuda_again():
    x = video(1, 96, 1, 2, 2)
    with emulated_gpu("sm90"):
        ops.norm_act(x, backend="cuda")
    with pytest.raises(NotImplementedError, match="these tensors are on a CPU"):
        ops.norm_act(x, backend="cuda")
    if not torch.cuda.is_available():
        built, _ = cuda_backend.extension()
        with pytest.raises(RuntimeError, match="expected a driver for CUDA"):
            built.wgmma_selftest(a=1024, b=2048, y=4096, rows=64, columns=96, inner=64, tile_columns=96, slice=64)


def test_an_architecture_without_ptx_is_refused_in_a_sentence():
    x, weight = video(1, 96, 1, 2, 2), video(96, 96, 1, 1, 1)
    refused = pytest.raises(NotImplementedError, match="was built for sm_90a, compute_90a, and this GPU is sm80")
    with emulated_gpu("sm80"), refused:
        ops.causal_conv3d(x, weight, backend="cuda")
