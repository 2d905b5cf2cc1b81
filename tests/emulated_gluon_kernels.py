"""Gluon kernels of a user's, for tests of emulated_gpu: y = x through shared memory, rightly, and with one step left out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)  # its name since Triton 3.9


@gluon.jit
def stored_kernel(x, y, STORES: gl.constexpr, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, BLOCK, layout)
    kept = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if STORES:
        kept.store(gl.load(x + at))
    gl.store(y + at, kept.load(layout))  # of what was stored


@gluon.jit
def copied_kernel(x, y, WAITS: gl.constexpr, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, BLOCK, layout)
    kept = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_load(kept, x + at)
    async_copy.commit_group()
    if WAITS:
        async_copy.wait_group(0)
    gl.store(y + at, kept.load(layout))  # of what was copied


@gluon.jit
def transposed_kernel(x, y, turns, BLOCK: gl.constexpr):
    """Rows are stored, columns loaded: all lanes of a warp from one bank."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))[:, None]
    at = row * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    kept = gl.allocate_shared_memory(gl.float32, [BLOCK, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for _ in range(turns):
        kept.store(gl.load(x + at))
        gl.store(y + at, kept.permute((1, 0)).load(layout))
