"""Causal 3-D convolution as an implicit GEMM per tap, gathered from video in channels_last_3d memory.

B batch, T frames, H height, W width; CIN, COUT channels; KT, KH, KW kernel, ST, SH, SW stride, UP upsampling.

Nothing is padded, joined or upsampled in memory: every tap works out which pixel of which frame it sees, the cache's or the
clip's, and reads 0 where there is none. A program takes some pixels of one output frame, so that a tap's frame is one
scalar. Operands are swapped, A = weights (M = channels), B = pixels (N): on sm_90 wgmma then reads both from shared memory,
and 256 pixels keep the Tensor Cores busiest for each byte read.
"""

import triton
import triton.language as tl

from .convolution_indexing import clamp_frame, frame_address, input_frame, input_pixel

# of tensors: in no compile key
SIZES = ["frames", "cached", "height", "width", "out_frames", "out_height", "out_width", "phase", "before", "top", "left"]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(x, cache, weight, bias, residual, y, frames: tl.int64, cached: tl.int64, height: tl.int32,
                   width: tl.int32, out_frames: tl.int64, out_height: tl.int32, out_width: tl.int32, phase: tl.int64,
                   before: tl.int64, top: tl.int32, left: tl.int32, CIN: tl.constexpr, COUT: tl.constexpr,
                   KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr,
                   SW: tl.constexpr, UP: tl.constexpr, REPLICATE: tl.constexpr, SPACE: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """y: BLOCK_P pixels of one output frame, BLOCK_C channels of them. weight (Cout, KT, KH, KW, Cin)."""
    KC: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(out_height * out_width, BLOCK_P)
    program = tl.program_id(0)
    block = program // tl.cdiv(COUT, BLOCK_C)
    channel = program % tl.cdiv(COUT, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = block % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    place = (block // tiles).to(tl.int64)  # of the frame among all samples' out_frames
    sample, output = place // out_frames, place % out_frames
    in_bounds = pixel < out_height * out_width
    row, column = pixel // out_width * SH - top, pixel % out_width * SW - left
    weight_C = weight + channel.to(tl.int64) * (KT * KH * KW * CIN)

    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    # the time taps behind which something stands: one loop over them and their pixels, or each would fill its pipeline anew
    base = input_frame(output, 0, phase, before, ST)
    lo, hi = tl.maximum(-cached - base, 0).to(tl.int32), tl.minimum(frames - base, KT).to(tl.int32)
    if REPLICATE:
        lo, hi = 0, KT
    size = height.to(tl.int64) * width * CIN
    for step in range(lo * (KH * KW * KC), hi * (KH * KW * KC)):
        tap = step // KC
        k = step % KC * BLOCK_K + tl.arange(0, BLOCK_K)
        _, frame = clamp_frame(base + tap // (KH * KW), frames, cached, REPLICATE)
        seen = frame_address(x, cache, sample, frame, frames, cached, size)
        has_row, h = input_pixel(row + tap // KW % KH, height, UP, SPACE)
        has_column, w = input_pixel(column + tap % KW, width, UP, SPACE)
        valid = in_bounds & has_row & has_column
        x_PK = tl.load(seen + (h * width + w).to(tl.int64)[:, None] * CIN + k[None, :],
                       mask=valid[:, None] & (k < CIN)[None, :], other=0.0)
        w_CK = tl.load(weight_C[:, None] + (tap * CIN + k)[None, :],
                       mask=(channel < COUT)[:, None] & (k < CIN)[None, :], other=0.0)
        acc = tl.dot(w_CK, x_PK.T, acc, input_precision=PRECISION)

    y_PC = acc.T
    if bias is not None:
        y_PC += tl.load(bias + channel, mask=channel < COUT, other=0.0).to(tl.float32)[None, :]
    at = (place * out_height * out_width + pixel)[:, None] * COUT + channel[None, :]
    mask = in_bounds[:, None] & (channel < COUT)[None, :]
    if residual is not None:
        y_PC += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, y_PC, mask=mask)
