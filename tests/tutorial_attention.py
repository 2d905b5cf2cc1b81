"""The forward of Triton's tutorial 06 (fused attention), written anew, to calibrate the cycle model with.

No mask: a causal kernel runs the same loop on its interior tiles.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(q, k, v, out, lse, scale, length, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   TMA: tl.constexpr):
    """q, k, v, out (heads, length, D), lse (heads, length); ``length`` a multiple of both blocks."""
    row, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    start = head.to(tl.int64) * length * D
    rows, column = row + tl.arange(0, BLOCK_M), tl.arange(0, D)
    if TMA:
        q_view = tl.make_tensor_descriptor(q + start, [length, D], [D, 1], [BLOCK_M, D])
        k_view = tl.make_tensor_descriptor(k + start, [length, D], [D, 1], [BLOCK_N, D])
        v_view = tl.make_tensor_descriptor(v + start, [length, D], [D, 1], [BLOCK_N, D])
        q_tile = q_view.load([row, 0])
    else:
        at = tl.arange(0, BLOCK_N)[:, None] * D + column[None, :]
        q_tile = tl.load(q + start + rows[:, None] * D + column[None, :])
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    scale *= 1.44269504
    for key in range(0, length, BLOCK_N):
        key = tl.multiple_of(key, BLOCK_N)
        k_tile = k_view.load([key, 0]) if TMA else tl.load(k + start + key * D + at)
        s = tl.dot(q_tile, k_tile.T)
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - m_new[:, None])
        alpha = tl.math.exp2(m_i - m_new)
        l_new = tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v_tile = v_view.load([key, 0]) if TMA else tl.load(v + start + key * D + at)
        acc = tl.dot(p.to(q_tile.dtype), v_tile, acc)
        l_i = l_i * alpha + l_new
        m_i = m_new
    tl.store(lse + head * length + rows, m_i + tl.math.log2(l_i))
    tl.store(out + start + rows[:, None] * D + column[None, :], (acc / l_i[:, None]).to(out.dtype.element_ty))
