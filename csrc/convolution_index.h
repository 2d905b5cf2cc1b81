// Indexing of the causal convolution: tiles, taps, K iterations and coordinates of boxes. Integer functions shared by the
// kernel's producer and consumers; a host test checks them against brute force.
//
// Frame 0 is the clip's first: 0 .. frames - 1 are the clip's, -cached .. -1 the cache's.
#pragma once

#include <cstdint>

#include "layout.h"

namespace sf {

struct ConvolutionShape {
  int frames, cached;                  // of the clip and of its cache
  int out_frames, out_height, out_width, samples;
  int kt, kh, kw;                      // taps
  int stride_t, phase, lookahead;      // output o is at frame o * stride_t + phase and sees `lookahead` frames after it
  int top, left;                       // zeros before the first row and column
  bool replicate;                      // pad in time by replicating the first and last frame, not with zeros
  int slices;                          // of 64 input channels, or fewer in a tail: K iterations per tap
  int out_tiles;                       // of the output channels
  int rows, columns;                   // of a tile's pixels; columns a power of two
};

// The time taps first .. last - 1 of an output frame that fall on existing frames; taps on zero padding are skipped.
struct Taps {
  int first, last;
};

SF_HOST_DEVICE constexpr int first_input_frame(const ConvolutionShape& s, int out_frame) {
  return out_frame * s.stride_t + s.phase - (s.kt - 1 - s.lookahead);
}

SF_HOST_DEVICE constexpr Taps valid_taps(const ConvolutionShape& s, int out_frame) {
  if (s.replicate) return {0, s.kt};
  const int base = first_input_frame(s, out_frame);
  const int first = -s.cached - base > 0 ? -s.cached - base : 0;
  const int last = s.frames - base < s.kt ? s.frames - base : s.kt;
  return {first, last > first ? last : first};
}

// The input frame under time tap `tap` of an output frame, for a tap of valid_taps.
SF_HOST_DEVICE constexpr int input_frame(const ConvolutionShape& s, int out_frame, int tap) {
  const int frame = first_input_frame(s, out_frame) + tap;
  if (!s.replicate) return frame;
  return frame < -s.cached ? -s.cached : frame > s.frames - 1 ? s.frames - 1 : frame;
}

// An output tile: `rows` x `columns` pixels of one frame (M) x one block of output channels (N).
struct Tile {
  int out_tile, column, row, frame, sample;
};

SF_HOST_DEVICE constexpr int64_t count_tiles(const ConvolutionShape& s) {
  return int64_t(s.out_tiles) * ((s.out_width + s.columns - 1) / s.columns) * ((s.out_height + s.rows - 1) / s.rows) *
         s.out_frames * s.samples;
}

// Rasterised with output channels fastest, then neighbouring pixels: tiles in flight share their inputs in L2.
SF_HOST_DEVICE constexpr Tile tile_at(const ConvolutionShape& s, int64_t index) {
  const int tiles_w = (s.out_width + s.columns - 1) / s.columns, tiles_h = (s.out_height + s.rows - 1) / s.rows;
  Tile tile{};
  tile.out_tile = int(index % s.out_tiles);
  index /= s.out_tiles;
  tile.column = int(index % tiles_w) * s.columns;
  index /= tiles_w;
  tile.row = int(index % tiles_h) * s.rows;
  index /= tiles_h;
  tile.frame = int(index % s.out_frames);
  tile.sample = int(index / s.out_frames);
  return tile;
}

// Whether a tile's pixel is in bounds of the output, and its linear index there.
struct Pixel {
  bool in_bounds;
  int64_t index;
};

SF_HOST_DEVICE constexpr Pixel pixel_of(const ConvolutionShape& s, const Tile& tile, int pixel) {
  const int row = tile.row + pixel / s.columns, column = tile.column + pixel % s.columns;
  return {row < s.out_height && column < s.out_width,
          ((int64_t(tile.sample) * s.out_frames + tile.frame) * s.out_height + row) * s.out_width + column};
}

// One K iteration: the coordinates of its two boxes.
struct KIteration {
  bool from_cache;
  int channel, column, row, frame;  // of the input's box; rows and columns out of bounds are filled with 0
  int tap;                          // of kt * kh * kw; the weight's box is at (channel, tap, first output channel)
  int slice, tap_w, tap_h, tap_t;            // slice is fastest, then tap_w, tap_h and tap_t (time)
};

SF_HOST_DEVICE constexpr int count_k_iterations(const ConvolutionShape& s, const Taps& taps) {
  return (taps.last - taps.first) * s.kh * s.kw * s.slices;
}

SF_HOST_DEVICE constexpr void set_frame(const ConvolutionShape& s, const Tile& tile, KIteration* k) {
  const int frame = input_frame(s, tile.frame, k->tap_t);
  k->from_cache = frame < 0;
  k->frame = frame < 0 ? frame + s.cached : frame;
}

SF_HOST_DEVICE constexpr KIteration first_k_iteration(const ConvolutionShape& s, const Tile& tile, const Taps& taps) {
  KIteration k{};
  k.column = tile.column - s.left;
  k.row = tile.row - s.top;
  k.tap_t = taps.first;
  k.tap = taps.first * s.kh * s.kw;
  set_frame(s, tile, &k);
  return k;
}

// Increments without divisions: the one producer thread must keep ahead of the consumers' wgmma.
SF_HOST_DEVICE constexpr void next_k_iteration(const ConvolutionShape& s, const Tile& tile, KIteration* k) {
  k->channel += 64;
  if (++k->slice < s.slices) return;
  k->slice = k->channel = 0;
  ++k->tap;
  ++k->column;
  if (++k->tap_w < s.kw) return;
  k->tap_w = 0;
  k->column -= s.kw;
  ++k->row;
  if (++k->tap_h < s.kh) return;
  k->tap_h = 0;
  k->row -= s.kh;
  ++k->tap_t;
  set_frame(s, tile, k);
}

// The tile width that covers the fewest pixels out of bounds; ties go to the widest, which TMA loads fastest.
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
