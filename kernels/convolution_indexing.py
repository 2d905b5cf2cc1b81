"""Which frames and pixels a causal convolution sees, for its forward and both of its backward's GEMMs.

Frames are counted from the clip's first one: 0 .. frames - 1 are the clip's, -cached .. -1 the cache's. Output o stands at
frame o * ST + phase and sees the KT frames from ``before`` = KT - 1 - lookahead earlier on.
"""

import triton
import triton.language as tl


@triton.jit
def input_frame(output, kt, phase, before, ST: tl.constexpr):
    """The frame that time tap ``kt`` of ``output`` sees, which may be one of padding."""
    return output * ST + phase + kt - before


@triton.jit
def clamp_frame(frame, frames, cached, REPLICATE: tl.constexpr):
    """``(in_bounds, frame)``: whether ``frame`` is the clip's or the cache's, and the frame whose elements are read."""
    if REPLICATE:
        return frame == frame, tl.minimum(tl.maximum(frame, -cached), frames - 1)
    else:
        return (frame >= -cached) & (frame < frames), frame


@triton.jit
def aliased_frames(frame, frames, cached, out_frames, phase, before, KT: tl.constexpr, ST: tl.constexpr,
                   REPLICATE: tl.constexpr):
    """``(first, count)``: the frames, of padding too, whose elements are those of ``frame``."""
    first, last = frame, frame
    if REPLICATE:
        first = tl.where(frame == -cached, tl.minimum(phase - before, frame), frame)
        last = tl.where(frame == frames - 1, tl.maximum((out_frames - 1) * ST + phase + KT - 1 - before, frame), frame)
    return first, last - first + 1


@triton.jit
def output_for_tap(frame, kt, out_frames, phase, before, ST: tl.constexpr):
    """``(in_bounds, output)``: the output that sees ``frame`` through time tap ``kt``, if there is one."""
    distance = frame + before - kt - phase
    output = distance // ST
    return (distance >= 0) & (output * ST == distance) & (output < out_frames), output


@triton.jit
def input_pixel(at, size, UP: tl.constexpr, SPACE: tl.constexpr):
    """``(in_bounds, pixel)``: what is at coordinate ``at`` of a row of ``size`` pixels, each UP times, padded by SPACE."""
    wide = size * UP
    if SPACE == "zeros":
        in_bounds = (at >= 0) & (at < wide)
    elif SPACE == "replicate":
        in_bounds = at == at
        at = tl.minimum(tl.maximum(at, 0), wide - 1)
    else:
        in_bounds = at == at
        at = tl.where(at < 0, -at, at)
        at = tl.where(at >= wide, 2 * (wide - 1) - at, at)
    return in_bounds, at // UP


@triton.jit
def locate_box(unit, out_frames, height, width, TH: tl.constexpr, TW: tl.constexpr):
    """``(sample, output, row, column)``, int32, of box number ``unit`` of TH x TW pixels among those of all out_frames."""
    columns = tl.cdiv(width, TW)
    boxes = tl.cdiv(height, TH).to(tl.int64) * columns
    frame, box = unit // boxes, unit % boxes
    return ((frame // out_frames).to(tl.int32), (frame % out_frames).to(tl.int32), (box // columns).to(tl.int32) * TH,
            (box % columns).to(tl.int32) * TW)


@triton.jit
def next_box(sample, output, row, column, out_frames, height, width, TH: tl.constexpr, TW: tl.constexpr):
    """The box behind this one. By carries: to divide its number in every turn of a loop takes longer than the MMAs."""
    column += TW
    row = tl.where(column < width, row, row + TH)
    column = tl.where(column < width, column, 0)
    output = tl.where(row < height, output, output + 1)
    row = tl.where(row < height, row, 0)
    sample = tl.where(output < out_frames, sample, sample + 1)
    output = tl.where(output < out_frames, output, 0)
    return sample, output, row, column


@triton.jit
def frame_address(x, cache, sample, frame, frames, cached, size):
    """Where ``frame`` of ``sample`` begins, in the clip x or, below 0, in its cache; a frame holds ``size`` elements."""
    clip = x + (sample * frames + frame) * size
    if cache is not None:
        # of 16 bytes, as both are: a choice between pointers would not be known to be, and loads would shrink
        return tl.multiple_of(tl.where(frame < 0, cache + (sample * cached + cached + frame) * size, clip), 16)
    else:
        return clip
