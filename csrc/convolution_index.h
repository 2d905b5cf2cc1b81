// Which frames, pixels and channels a tile of a causal convolution sees. Plain functions of numbers: the kernel's
// producer and its consumers ask them alike, and a test on the host compares them with brute force.
//
// Frames are counted from the clip's first one: 0 .. frames - 1 are the clip's, -cached .. -1 the cache's.
#pragma once

#include <cstdint>

#include "layout.h"

namespace sf {

struct ConvolutionShape {
  int frames, cached;                  // of the clip and of its cache
  int out_frames, out_height, out_width, samples;
  int kt, kh, kw;                      // taps
  int stride_t, phase, lookahead;      // output o stands at frame o * stride_t + phase
  int top, left;                       // zeros before the first row and column
  bool replicate;                      // before the earliest frame and past the last one: these again, not zeros
  int slices;                          // of the input channels, per tap
  int out_tiles;                       // of the output channels
  int rows, columns;                   // of pixels in a tile; columns a power of two
};

// Time taps first .. last - 1 of an output frame see something; the others, where frames of zeros stand, are left out.
struct Taps {
  int first, last;
};

SF_HOST_DEVICE constexpr int first_frame_seen(const ConvolutionShape& s, int out_frame) {
  return out_frame * s.stride_t + s.phase - (s.kt - 1 - s.lookahead);
}

SF_HOST_DEVICE constexpr Taps taps_seeing(const ConvolutionShape& s, int out_frame) {
  if (s.replicate) return {0, s.kt};
  const int base = first_frame_seen(s, out_frame);
  const int first = -s.cached - base > 0 ? -s.cached - base : 0;
  const int last = s.frames - base < s.kt ? s.frames - base : s.kt;
  return {first, last > first ? last : first};
}

// The frame whose numbers time tap `tap` of an output frame sees, if the tap is one of taps_seeing.
SF_HOST_DEVICE constexpr int frame_seen(const ConvolutionShape& s, int out_frame, int tap) {
  const int frame = first_frame_seen(s, out_frame) + tap;
  if (!s.replicate) return frame;
  return frame < -s.cached ? -s.cached : frame > s.frames - 1 ? s.frames - 1 : frame;
}

// A tile: `rows` x `columns` pixels of one output frame, and one of the tiles of output channels.
struct Tile {
  int out_tile, column, row, frame, sample;
};

SF_HOST_DEVICE constexpr int64_t count_tiles(const ConvolutionShape& s) {
  return int64_t(s.out_tiles) * ((s.out_width + s.columns - 1) / s.columns) * ((s.out_height + s.rows - 1) / s.rows) *
         s.out_frames * s.samples;
}

// Tiles of the same pixels follow each other, then their neighbours: what multiprocessors read at one time overlaps.
SF_HOST_DEVICE constexpr Tile tile_at(const ConvolutionShape& s, int64_t index) {
  const int across = (s.out_width + s.columns - 1) / s.columns, down = (s.out_height + s.rows - 1) / s.rows;
  Tile tile{};
  tile.out_tile = int(index % s.out_tiles);
  index /= s.out_tiles;
  tile.column = int(index % across) * s.columns;
  index /= across;
  tile.row = int(index % down) * s.rows;
  index /= down;
  tile.frame = int(index % s.out_frames);
  tile.sample = int(index / s.out_frames);
  return tile;
}

// Pixel `pixel` of a tile lies in the output, and there it is number `at` of all its pixels.
struct Pixel {
  bool inside;
  int64_t at;
};

SF_HOST_DEVICE constexpr Pixel pixel_of(const ConvolutionShape& s, const Tile& tile, int pixel) {
  const int row = tile.row + pixel / s.columns, column = tile.column + pixel % s.columns;
  return {row < s.out_height && column < s.out_width,
          ((int64_t(tile.sample) * s.out_frames + tile.frame) * s.out_height + row) * s.out_width + column};
}

// One step of a tile: a box of the input and one of the weight are multiplied.
struct Step {
  bool from_cache;
  int channel, column, row, frame;  // where the input's box begins; rows and columns past the frame's edges are zeros
  int tap;                          // of all kt * kh * kw; the weight's box begins at (channel, tap, first output channel)
  int slice, kx, ky, kz;            // slices change fastest, then columns, rows and frames
};

SF_HOST_DEVICE constexpr int steps_of(const ConvolutionShape& s, const Taps& taps) {
  return (taps.last - taps.first) * s.kh * s.kw * s.slices;
}

SF_HOST_DEVICE constexpr void see_frame(const ConvolutionShape& s, const Tile& tile, Step* step) {
  const int frame = frame_seen(s, tile.frame, step->kz);
  step->from_cache = frame < 0;
  step->frame = frame < 0 ? frame + s.cached : frame;
}

SF_HOST_DEVICE constexpr Step first_step(const ConvolutionShape& s, const Tile& tile, const Taps& taps) {
  Step step{};
  step.column = tile.column - s.left;
  step.row = tile.row - s.top;
  step.kz = taps.first;
  step.tap = taps.first * s.kh * s.kw;
  see_frame(s, tile, &step);
  return step;
}

// Counts on without a division: one thread must be faster at this than the multiplying warpgroups at their products.
SF_HOST_DEVICE constexpr void next_step(const ConvolutionShape& s, const Tile& tile, Step* step) {
  step->channel += 64;
  if (++step->slice < s.slices) return;
  step->slice = step->channel = 0;
  ++step->tap;
  ++step->column;
  if (++step->kx < s.kw) return;
  step->kx = 0;
  step->column -= s.kw;
  ++step->row;
  if (++step->ky < s.kh) return;
  step->ky = 0;
  step->row -= s.kh;
  ++step->kz;
  see_frame(s, tile, step);
}

// The box of pixels x columns with the fewest pixels outside the output; wide ones first, for the copy engine's sake.
SF_HOST_DEVICE constexpr int best_columns(int height, int width, int pixels) {
  int best = 0;
  int64_t fewest = 0;
  for (int columns = 64; columns >= 4; columns /= 2) {
    const int rows = pixels / columns;
    const int64_t covered = int64_t((width + columns - 1) / columns) * ((height + rows - 1) / rows);
    if (best == 0 || covered < fewest) {
      best = columns;
      fewest = covered;
    }
  }
  return best;
}

}  // namespace sf
