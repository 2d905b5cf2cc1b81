"""The kernels of patch_embed and unpatchify where no kernel runs.

What takes them, and how they would be launched; tests/interpreted runs them, tests/test_aot.py compiles them.
"""

import subprocess
import sys
from functools import partial
from math import prod

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops import patches
from sora_fast.ops.patches import OPS, PatchesProblem

pytest.importorskip("triton")

import aot  # noqa: E402

from sora_fast.kernels import patches as kernels  # noqa: E402

TRITON = [op.backends["triton"] for op in OPS]
HEURISTICS = (kernels.embed_heuristic, kernels.latents_heuristic, kernels.weight_heuristic)
GPUS = ("sm80-A100", "sm86-RTX-A6000", "sm89-L40S", "sm90-H200", "sm100-B200", "sm120-RTX-5090")


def _problem(device, dtype, **change):
    return PatchesProblem(device, dtype, True, **dict(width=1536, rows=32, run=2, sizes_hidden=False) | change)


@pytest.mark.parametrize("backend", TRITON, ids=[op.name for op in OPS])
@pytest.mark.parametrize("device, dtype, change, sentence", [
    ("cpu", torch.float32, {}, "TRITON_INTERPRET=1"),
    ("mps", torch.float32, {}, "on mps"),
    ("cuda:sm75", torch.float16, {}, "sm75"),
    ("cuda:sm90", torch.float64, {}, "float64"),
    ("cuda:sm90", torch.float8_e4m3fn, {}, "float8_e4m3fn"),
    ("cuda:sm90", torch.bfloat16, dict(run=65), "at most 64 numbers along w, and these have 65"),
])
def test_what_it_cannot_run(backend, device, dtype, change, sentence):
    reasons = backend.unsupported(_problem(device, dtype, **change))
    assert len(reasons) == 1 and sentence in reasons[0] and reasons[0].endswith(".")
    for good in (dict(run=64), dict(sizes_hidden=True)):
        assert backend.unsupported(_problem("cuda:sm90", torch.bfloat16, **good)) == []


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON[0].unsupported(_problem("cpu", torch.float32)) == []
    (reason,) = TRITON[0].unsupported(_problem("cuda:sm90", torch.float32))
    assert "CPU tensors and no others" in reason


def test_a_call_that_cannot_run_raises_its_reasons():
    with pytest.raises(NotImplementedError, match="patch_embed.*TRITON_INTERPRET=1"):
        ops.patch_embed(torch.randn(1, 3, 1, 2, 2), torch.randn(4, 3, 1, 2, 2), backend="triton")
    with pytest.raises(NotImplementedError, match="unpatchify.*float64.*at most 64 numbers along w, and these have 80"):
        ops.unpatchify(torch.randn(1, 80).double(), [(1, 1, 1)], (1, 1, 80), 1, backend="triton")


def test_explain_shows_kernel_and_config():
    lines = explain("patches", device="cuda:sm90", assume_validated=True).splitlines()
    taken = [line for line in lines if " * " in line]
    assert len(taken) == len(OPS)
    assert all(" triton " in line and "block_n=" in line and "the heuristic" in line for line in taken)


def test_triton_loads_with_the_first_launch():
    code = "import sys, sora_fast.ops, sora_fast.ops.patches; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


SHAPES = [(channels, patch, width) for channels in (1, 3, 4, 12, 16, 48, 128) for width in (1, 37, 384, 1152, 5120)
          for patch in ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 3, 5), (1, 16, 16), (2, 16, 16), (1, 32, 32), (1, 1, 64))]


def test_candidates():
    """What the tuner tries beside the heuristics: tiles that tl.dot takes, in powers of two."""
    for kernel in ("embed", "latents", "weight", "permute"):
        width, rows = (16, 4) if kernel == "permute" else (1536, 32)
        launch = kernels.Launch(32768, width, rows, 2, torch.bfloat16)
        found = list(kernels.candidates(kernel, launch, "sm90"))
        assert getattr(kernels, f"{kernel}_heuristic")(launch, "sm90") in found and len(set(found)) > 4
        for config in found:
            assert config.warps in (2, 4, 8) and config.block_n >= 8 and config.block_n & (config.block_n - 1) == 0
            if kernel != "permute":
                assert min(config.block_n, config.block_d) >= 16 and config.stages >= 1


def test_heuristics_fit():
    """Powers of two that tl.dot takes, whole rows of a patch, and what a stage needs within the shared memory of the GPU."""
    for channels, patch, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for gpu in (*GPUS, "cpu"):
                launch = kernels.Launch(1024, width, channels * patch[0] * patch[1], patch[2], dtype)
                shared = aot.SHARED[int(gpu.split("-")[0].removeprefix("sm"))] if gpu != "cpu" else 1 << 30
                for heuristic in HEURISTICS:
                    c = heuristic(launch, gpu)
                    for size in (c.block_n, c.block_d, c.block_k):
                        assert size >= 16 and size & (size - 1) == 0
                    assert c.block_k >= patch[2] and c.warps in (4, 8) and c.stages >= 1
                    tiles = c.block_n * c.block_d + max(c.block_n, c.block_d) * c.block_k
                    both = {kernels.embed_heuristic: c.block_k * (c.block_n + c.block_d)}.get(heuristic, tiles)
                    assert both * c.stages * dtype.itemsize <= shared, (heuristic, launch, gpu)
                c = kernels.permute_heuristic(kernels.Launch(1024, channels, prod(patch[:2]), patch[2], dtype), gpu)
                for size in (c.block_n, c.block_r, c.block_c):
                    assert size >= 1 and size & (size - 1) == 0
                assert c.block_n * c.block_r * c.block_c * kernels.triton.next_power_of_2(patch[2]) <= 8192


def test_a_row_is_as_long_as_the_kernels_say():
    assert patches.LONGEST_RUN == kernels.LONGEST_RUN


def _call(tokens, samples, tail=0, both=True):
    """Both ops, forward and backward, on tensors without memory."""
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    grids, cu_seqlens = make(samples, 3, dtype=torch.int32), make(samples + 1, dtype=torch.int32)
    weight, bias, latents = make(32, 4, 1, 2, 2), make(32), make((tokens + tail) * 16)
    launch = kernels.Launch(1024, 32, 8, 2, torch.bfloat16)
    config = kernels.ProductConfig(64, 32, 16, 4, 2)
    out = kernels.embed(latents, weight, bias, grids, cu_seqlens, config=config)
    kernels.embed_latents_gradient(out, weight, grids, cu_seqlens, config=config)
    kernels.embed_weight_gradient(out, latents, weight, grids, cu_seqlens, want_weight=True, want_bias=True, config=config)
    config = kernels.permute_heuristic(launch, "sm90")
    kernels.permute(latents, grids, cu_seqlens, (1, 2, 2), 4, back=True, config=config)


def _cut(tokens, samples):
    """The forward of unpatchify, which is the same kernel with another constant."""
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    config = kernels.permute_heuristic(kernels.Launch(1024, 4, 2, 2, torch.bfloat16), "sm90")
    grids, cu_seqlens = make(samples, 3, dtype=torch.int32), make(samples + 1, dtype=torch.int32)
    kernels.permute(make(tokens, 16), grids, cu_seqlens, (1, 2, 2), 4, back=False, config=config)


SIZES = [(1, 1), (15, 2), (16, 64), (17, 1), (48, 3), (2**27 + 1, 16), (2**31 + 1, 2)]


def test_sizes_are_no_compile_keys():
    assert aot.cache_violations([partial(_call, *size) for size in SIZES]) == []
    assert aot.cache_violations([partial(_cut, *size) for size in SIZES]) == []


def test_places_of_grids_in_memory_are_no_compile_keys():
    """Uploaded grids and cu_seqlens are parts of one memory: the second begins anywhere."""
    def call(start):
        table = torch.empty(64, dtype=torch.int32)[start:]
        latents, weight, config = torch.empty(32 * 16), torch.empty(8, 4, 1, 2, 2), kernels.ProductConfig(32, 16, 16, 4, 1)
        kernels.embed(latents, weight, None, table[:6].view(2, 3), table[6:9], config=config)

    assert aot.cache_violations([partial(call, start) for start in (0, 1, 2, 4)]) == []


def test_no_grid_is_too_large():
    """Only the first axis of a grid may have more than 65,535 programs."""
    found = aot.launches(partial(_call, 2**31 + 1, 2)) + aot.launches(partial(_cut, 2**31 + 1, 2))
    assert len(found) == 5
    for launch in found:
        assert 1 <= launch.grid[0] < 2**31 and all(size <= 65535 for size in launch.grid[1:])
    assert max(launch.grid[0] for launch in found) > 65535


def _products(dtype):
    """PRECISION of each product that is launched, by kernel."""
    found = aot.launches(partial(kernels._embedding, 16, (1, 2, 2), 64, dtype, "sm90"))
    return {launch.fn.__name__: launch.kwargs["PRECISION"] for launch in found}


def test_products_of_float32_are_no_tf32_unless_allowed():
    """The machine code itself is looked at by tests/test_aot.py: it refuses TF32 in any case of aot_cases."""
    names = ("embed_kernel", "latents_kernel", "weight_kernel")
    assert _products(torch.float32) == dict.fromkeys(names, "tf32x3")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert _products(torch.float32) == dict.fromkeys(names, "tf32")
    torch.backends.cuda.matmul.allow_tf32 = False
    assert _products(torch.float32) == dict.fromkeys(names, "tf32x3")


def test_a_planted_tf32_is_seen():
    """A launch that says TF32 for float32 is refused by the proof."""
    torch.backends.cuda.matmul.allow_tf32 = True
    case = aot.cases_of("plain", partial(kernels._embedding, 16, (1, 2, 2), 64, torch.float32, "sm90"), {})[0]
    _, wrong = aot.check_all([case], (80,))
    assert any("got TF32" in sentence for sentence in wrong)
