"""The backward of convolution.py: the gradient of what is convolved, dgrad, and of the weight, wgrad.

dgrad is the transposed convolution: a frame of the clip or the cache collects from the outputs that saw it. With a stride,
pixels of one remainder share their taps, so a program takes pixels of one remainder and no MMA is with zeros. Where the
edge of space is repeated, the gradients of padding and frame together go to a float32 workspace and are folded there.

wgrad is a GEMM whose K is all output pixels, far longer than wide: split-K. Each slice is summed in float32 in a workspace,
and the slices are added in their order. No atomics: two runs give the same bits.
"""

import triton
import triton.language as tl

from .convolution_forward import SIZES
from .convolution_indexing import aliased_frames, clamp_frame, frame_address, input_frame, input_pixel, locate_box, next_box


@triton.jit(do_not_specialize=[*SIZES, "keep", "first_frame"])
def dgrad_kernel(dy, weight, added, dx, dcache, frames: tl.int64, cached: tl.int64, height: tl.int32, width: tl.int32,
                 out_frames: tl.int64, out_height: tl.int32, out_width: tl.int32, phase: tl.int64, before: tl.int64,
                 top: tl.int32, left: tl.int32, keep: tl.int64, first_frame: tl.int64, CIN: tl.constexpr,
                 COUT: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ST: tl.constexpr,
                 SH: tl.constexpr, SW: tl.constexpr, UP: tl.constexpr, REPLICATE: tl.constexpr, PRECISION: tl.constexpr,
                 WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """dx: BLOCK_P pixels of one remainder by SH and SW, of one frame from ``first_frame`` on, BLOCK_C channels of them.

    ``added``: the gradient of the last ``keep`` frames, as the next chunk's cache. Frames below 0 go to ``dcache``, or,
    where WIDE, all to dx, which then is (B, cached + frames, height, width, CIN) of ``height`` x ``width``
    pixels with their padding, and ``top`` and ``left`` are 0.
    """
    KC: tl.constexpr = (COUT + BLOCK_K - 1) // BLOCK_K
    rows, columns = tl.cdiv(height, SH), tl.cdiv(width, SW)  # of the first remainder, which has the most
    tiles = tl.cdiv(rows * columns, BLOCK_P)
    program = tl.program_id(0)
    block = program // tl.cdiv(CIN, BLOCK_C)
    channel = program % tl.cdiv(CIN, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = block % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    block = block // tiles
    rest = block % (SH * SW)
    place = (block // (SH * SW)).to(tl.int64)
    count = frames - first_frame
    sample, frame = place // count, place % count + first_frame
    row, column = pixel // columns * SH + rest // SW, pixel % columns * SW + rest % SW
    in_bounds = (pixel < rows * columns) & (row < height) & (column < width)
    first_h, first_w = (top + rest // SW) % SH, (left + rest % SW) % SW  # the first taps that see this remainder
    taps_h, taps_w = tl.cdiv(tl.maximum(KH - first_h, 0), SH), tl.cdiv(tl.maximum(KW - first_w, 0), SW)
    steps = UP * UP * taps_h * taps_w * KC

    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    first, times = aliased_frames(frame, frames, cached, out_frames, phase, before, KT, ST, REPLICATE)
    for place in range(first, first + times):
        # ``latest`` is the last output that sees this place, through tap ``first_t``; the next tap belongs to the one before
        distance = place + before - phase
        first_t, latest = (distance % ST).to(tl.int32), distance // ST
        lo = tl.maximum(latest - out_frames + 1, 0).to(tl.int32)
        hi = tl.where(distance < 0, 0, tl.minimum(latest + 1, tl.cdiv(KT - first_t, ST))).to(tl.int32)
        for step in range(lo * steps, hi * steps):
            turn, tap = step // steps, step % steps // KC
            k = step % KC * BLOCK_K + tl.arange(0, BLOCK_K)
            twin = tap // (taps_h * taps_w)
            kt, kh, kw = first_t + turn * ST, first_h + tap // taps_w % taps_h * SH, first_w + tap % taps_w * SW
            seeing = dy + (sample * out_frames + latest - turn) * out_height * out_width * COUT
            from_h, from_w = top + row * UP + twin // UP - kh, left + column * UP + twin % UP - kw
            h, w = from_h // SH, from_w // SW
            sees = in_bounds & (from_h >= 0) & (h < out_height) & (from_w >= 0) & (w < out_width)
            dy_PK = tl.load(seeing + (h * out_width + w).to(tl.int64)[:, None] * COUT + k[None, :],
                            mask=sees[:, None] & (k < COUT)[None, :], other=0.0)
            w_CK = tl.load(weight + (k.to(tl.int64) * (KT * KH * KW) + ((kt * KH + kh) * KW + kw))[None, :] * CIN
                           + channel[:, None], mask=(k < COUT)[None, :] & (channel < CIN)[:, None], other=0.0)
            acc = tl.dot(w_CK, dy_PK.T, acc, input_precision=PRECISION)

    dx_PC = acc.T
    at = (row * width + column).to(tl.int64)[:, None] * CIN + channel[None, :]
    mask = in_bounds[:, None] & (channel < CIN)[None, :]
    size = height.to(tl.int64) * width * CIN
    if added is not None:
        late = frame + keep - frames
        is_late = in_bounds[:, None] & (channel < tl.where(late >= 0, CIN, 0))[None, :]
        dx_PC += tl.load(added + (sample * keep + late) * size + at, mask=is_late, other=0.0).to(tl.float32)
    if WIDE:
        dx += (sample * (cached + frames) + cached + frame) * size
    elif dcache is None:
        dx += (sample * frames + frame) * size
    else:
        dx = frame_address(dx, dcache, sample, frame, frames, cached, size)
    tl.store(dx + at, dx_PC, mask=mask)


@triton.jit
def _seen_pixels(seen, row, column, in_bounds, channel, height, width, CIN: tl.constexpr, UP: tl.constexpr,
                 SPACE: tl.constexpr):
    has_row, h = input_pixel(row, height, UP, SPACE)
    has_column, w = input_pixel(column, width, UP, SPACE)
    return tl.load(seen + (h * width + w).to(tl.int64)[:, None] * CIN + channel[None, :],
                   mask=(in_bounds & has_row & has_column)[:, None] & (channel < CIN)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*SIZES, "units", "run"])
def wgrad_kernel(dy, x, cache, sums, frames: tl.int64, cached: tl.int64, height: tl.int32, width: tl.int32,
                 out_frames: tl.int64, out_height: tl.int32, out_width: tl.int32, phase: tl.int64, before: tl.int64,
                 top: tl.int32, left: tl.int32, units: tl.int64, run: tl.int64, CIN: tl.constexpr, COUT: tl.constexpr,
                 KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr,
                 SW: tl.constexpr, UP: tl.constexpr, REPLICATE: tl.constexpr, SPACE: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, EXTRA_I: tl.constexpr,
                 TH: tl.constexpr, TW: tl.constexpr):
    """sums (splits, COUT, KT, KH, KW, CIN): one tap, BLOCK_O output, BLOCK_I + EXTRA_I input channels, one split's pixels.

    A unit is a box of TH x TW pixels of one output frame; a split is ``run`` of them. All taps of a split follow one
    another, so that they find its pixels in the L2 cache.
    """
    TAPS: tl.constexpr = KT * KH * KW
    tiles_i: tl.constexpr = (CIN + BLOCK_I + EXTRA_I - 1) // (BLOCK_I + EXTRA_I)
    tiles_o: tl.constexpr = (COUT + BLOCK_O - 1) // BLOCK_O
    program = tl.program_id(0)
    tap = program % TAPS
    tile = program // TAPS % (tiles_i * tiles_o)
    split = (program // (TAPS * tiles_i * tiles_o)).to(tl.int64)
    kt, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
    out_channel = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tile % tiles_i * (BLOCK_I + EXTRA_I)
    channel = first + tl.arange(0, BLOCK_I)
    pixel = tl.arange(0, TH * TW)
    sample, output, row, column = locate_box(split * run, out_frames, out_height, out_width, TH, TW)

    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    if EXTRA_I > 0:
        extra = tl.zeros([BLOCK_O, EXTRA_I], tl.float32)
        extra_channel = first + BLOCK_I + tl.arange(0, EXTRA_I)
    for _ in range(tl.minimum(run, units - split * run)):
        valid, frame = clamp_frame(input_frame(output, kt, phase, before, ST), frames, cached, REPLICATE)
        seen = frame_address(x, cache, sample, frame, frames, cached, height.to(tl.int64) * width * CIN)
        out_row, out_column = row + pixel // TW, column + pixel % TW
        in_bounds = (out_row < tl.where(valid, out_height, 0)) & (out_column < out_width)
        dy_at = (sample * out_frames + output) * out_height * out_width * COUT
        pixel_at = (out_row * out_width + out_column).to(tl.int64)
        # channels x pixels, as a transposed load would be stored to shared memory by all threads
        dy_OP = tl.load(dy + dy_at + pixel_at[None, :] * COUT + out_channel[:, None],
                        mask=in_bounds[None, :] & (out_channel < COUT)[:, None], other=0.0)
        x_row, x_column = out_row * SH - top + kh, out_column * SW - left + kw
        x_PI = _seen_pixels(seen, x_row, x_column, in_bounds, channel, height, width, CIN, UP, SPACE)
        acc = tl.dot(dy_OP, x_PI, acc, input_precision=PRECISION)
        if EXTRA_I > 0:
            x_PI = _seen_pixels(seen, x_row, x_column, in_bounds, extra_channel, height, width, CIN, UP, SPACE)
            extra = tl.dot(dy_OP, x_PI, extra, input_precision=PRECISION)
        sample, output, row, column = next_box(sample, output, row, column, out_frames, out_height, out_width, TH, TW)

    row_O = sums + ((split * COUT + out_channel) * TAPS + tap)[:, None] * CIN
    here = (out_channel < COUT)[:, None]
    tl.store(row_O + channel[None, :], acc, mask=here & (channel < CIN)[None, :])
    if EXTRA_I > 0:
        tl.store(row_O + extra_channel[None, :], extra, mask=here & (extra_channel < CIN)[None, :])
