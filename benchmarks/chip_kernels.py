"""The kernels of chip.py: dependent loads, streams of tiles out of L2, and WGMMAs with so many groups in flight.

Each writes a result that is known beforehand, so that a kernel that loads or multiplies something else is noticed.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper


@triton.jit(do_not_specialize=["steps"])
def chase_kernel(places, state, steps):
    """``steps`` loads, each of the place that the one before names; ``state`` is where the next call goes on."""
    at = tl.load(state)
    for _ in range(0, steps):
        at = tl.load(places + at, cache_modifier=".cg")
    tl.store(state, at)


@triton.jit(do_not_specialize=["turns", "tiles"])
def stream_kernel(source, out, turns, tiles, SHARED: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """out[program] is the exclusive or of ``turns`` tiles of ``source``, a matrix of COLUMNS int32 or a descriptor of one.

    A program goes round and round ``tiles`` tiles: of its own, or SHARED by all.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    program = tl.program_id(0)
    first = 0 if SHARED else program * tiles
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        top = (first + turn % tiles) * ROWS
        if TMA:
            sums ^= source.load([top, 0])
        else:
            sums ^= tl.load(source + (top + row) * COLUMNS + column)
    tl.store(out + (program * ROWS + row) * COLUMNS + column, sums)


@gluon.jit(do_not_specialize=["turns"])
def wgmma_kernel(out, turns, N: gl.constexpr, K: gl.constexpr, DEPTH: gl.constexpr):
    """out[program] (64, N) is ``turns`` times K: products of ones, DEPTH groups of K / 16 instructions in flight."""
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], gl.bfloat16)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, K], gl.bfloat16)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    a = gl.allocate_shared_memory(gl.bfloat16, [64, K], a_layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [N, K], b_layout)
    a.store(gl.full([64, K], 1.0, gl.bfloat16, plain))
    b.store(gl.full([N, K], 1.0, gl.bfloat16, plain))
    hopper.fence_async_shared()
    acc = gl.zeros([64, N], gl.float32, acc_layout)
    for _ in range(turns):
        acc = hopper.warpgroup_mma(a, b.permute((1, 0)), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(DEPTH - 1, deps=[acc])
    sums = hopper.warpgroup_mma_wait(0, deps=[acc])
    row = gl.arange(0, 64, gl.SliceLayout(1, acc_layout))[:, None]
    column = gl.arange(0, N, gl.SliceLayout(0, acc_layout))[None, :]
    gl.store(out + (gl.program_id(0) * 64 + row) * N + column, sums)
