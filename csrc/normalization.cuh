// Norm and activation of every pixel, spatial padding and cache update in one pass over the video: the input of a causal
// convolution. Channels last: a pixel is C contiguous channels. All arithmetic is in float32.
//
// L lanes of a warp share a pixel, mostly 8 to 24 elements per lane, which stay in registers from the only load to the only
// store. A CTA processes as many pixels of a row as it has such groups, in a grid-stride loop; its position is uniform
// across the CTA, which saves registers.
#pragma once

#include <cstdint>

#include "layout.h"

struct CUstream_st;

namespace sf {

enum NormActType { kFloat32, kBFloat16, kFloat16 };
enum NormActPad { kZeros, kReplicate, kReflect };

struct NormActArgs {
  const void *x, *cache;        // (samples, frames, height, width, channels); (samples, cached, ...), y's type, normed
  const float *weight, *bias;   // (channels,), or null
  void *y;                      // (samples, front + frames, top + height + bottom, left + width + right, channels)
  void *cache_out;              // (samples, kept, height, width, channels): the last of the cached and the normed frames
  int samples, frames, height, width, channels;
  int cached, kept, front;      // frames; front: cached frames to prepend to y, 0 or all
  int left, right, top, bottom, space_pad, x_dtype, y_dtype;
  bool rms, silu;               // without rms, pixels are copied; weight and bias are null and silu false
  float eps;                    // under the square root

  template <class F>
  static void fields(F&& f) {
    using A = NormActArgs;
    f("x", &A::x), f("cache", &A::cache), f("weight", &A::weight), f("bias", &A::bias), f("y", &A::y);
    f("cache_out", &A::cache_out), f("samples", &A::samples), f("frames", &A::frames), f("height", &A::height);
    f("width", &A::width), f("channels", &A::channels), f("cached", &A::cached), f("kept", &A::kept);
    f("front", &A::front), f("left", &A::left), f("right", &A::right), f("top", &A::top), f("bottom", &A::bottom);
    f("space_pad", &A::space_pad), f("x_dtype", &A::x_dtype), f("y_dtype", &A::y_dtype), f("rms", &A::rms);
    f("silu", &A::silu), f("eps", &A::eps);
  }
};

const char* why_invalid(const NormActArgs& args);

// Lanes per pixel: at most 24 elements per lane as long as 32 lanes suffice, because more registers would lower the
// occupancy that hides memory latency; and at least two if a pixel has more than one vector, so that accesses cover whole
// 32-byte sectors.
constexpr int kMaxChannels = 32 * 32;

SF_HOST_DEVICE constexpr int norm_act_lanes(int channels) {
  int lanes = channels > 8 ? 2 : 1;
  while (lanes * 24 < channels && lanes < 32) lanes *= 2;
  return lanes;
}

// Elements per lane: 8, 16, 24 or 32, some of which may be past the last channel.
SF_HOST_DEVICE constexpr int norm_act_elements(int channels) {
  const int lanes = norm_act_lanes(channels);
  return (channels + 8 * lanes - 1) / (8 * lanes) * 8;
}

// Bytes of shared memory: weight and bias of all elements, interleaved in groups of four.
constexpr int norm_act_shared(int channels) {
  return norm_act_lanes(channels) * norm_act_elements(channels) * 2 * int(sizeof(float));
}

// ---------------------------------------------------------------------------------------------------------- indexing
// A CTA's tile: a run of pixels in a row of y. Runs are fastest; frames count from first_frame.
struct NormActTile {
  int run, row, frame, sample;
};

struct NormActSchedule {
  int lanes, pixels;  // per pixel; per run
  int runs, rows, frames, samples;
  int first_frame;    // 0 is the clip's first; -cached .. -1 are the cache's
};

SF_HOST_DEVICE constexpr int norm_act_rows(const NormActArgs& a) { return a.top + a.height + a.bottom; }
SF_HOST_DEVICE constexpr int norm_act_columns(const NormActArgs& a) { return a.left + a.width + a.right; }

// Covers every frame of y, and those copied from cache to cache_out, with CTAs of `threads`.
SF_HOST_DEVICE constexpr NormActSchedule norm_act_schedule(const NormActArgs& a, int threads) {
  const int lanes = norm_act_lanes(a.channels), pixels = threads / lanes;
  const int before = a.front > a.kept - a.frames ? a.front : a.kept - a.frames;
  const int runs = (norm_act_columns(a) + pixels - 1) / pixels;
  return {lanes, pixels, runs, norm_act_rows(a), before + a.frames, a.samples, -before};
}

SF_HOST_DEVICE constexpr int64_t norm_act_count_tiles(const NormActSchedule& w) {
  return int64_t(w.samples) * w.frames * w.rows * w.runs;
}

SF_HOST_DEVICE constexpr NormActTile norm_act_tile(const NormActSchedule& w, int64_t index) {
  NormActTile tile{};
  tile.run = int(index % w.runs);
  index /= w.runs;
  tile.row = int(index % w.rows);
  index /= w.rows;
  tile.frame = int(index % w.frames);
  tile.sample = int(index / w.frames);
  return tile;
}

// Advances by norm_act_tile(stride) without divisions.
SF_HOST_DEVICE constexpr NormActTile norm_act_advance(const NormActSchedule& w, NormActTile tile,
                                                      const NormActTile& stride) {
  tile.run += stride.run;
  tile.row += stride.row;
  tile.frame += stride.frame;
  tile.sample += stride.sample;
  if (tile.run >= w.runs) tile.run -= w.runs, ++tile.row;
  if (tile.row >= w.rows) tile.row -= w.rows, ++tile.frame;
  if (tile.frame >= w.frames) tile.frame -= w.frames, ++tile.sample;
  return tile;
}

// The source index of index `at` of an axis of `size`, padded with `before` in front; -1: zero.
SF_HOST_DEVICE constexpr int source_index(int at, int before, int size, int pad) {
  const int from = at - before, last = size - 1;
  if (from >= 0 && from <= last) return from;
  if (pad == kZeros) return -1;
  if (pad == kReplicate) return from < 0 ? 0 : last;
  return from < 0 ? -from : 2 * last - from;
}

// Source and destinations of a row of y: the linear index of its first pixel, or -1 for none.
struct NormActRow {
  int64_t from;  // in the clip or, for earlier frames, in the cache; -1: zeros
  int64_t y, cache_out;
};

SF_HOST_DEVICE constexpr NormActRow norm_act_row(const NormActArgs& a, int sample, int frame, int row) {
  NormActRow found{-1, -1, -1};
  const int from = source_index(row, a.top, a.height, a.space_pad), kept = frame - a.frames + a.kept;
  const int64_t from_frame = frame < 0 ? int64_t(sample) * a.cached + a.cached + frame : int64_t(sample) * a.frames + frame;
  if (from >= 0) found.from = (from_frame * a.height + from) * a.width;
  if (frame >= -a.front) {
    const int64_t to_frame = int64_t(sample) * (a.front + a.frames) + a.front + frame;
    found.y = (to_frame * norm_act_rows(a) + row) * norm_act_columns(a);
  }
  if (kept >= 0 && from >= 0 && from == row - a.top)
    found.cache_out = ((int64_t(sample) * a.kept + kept) * a.height + from) * a.width;
  return found;
}

// The same for a pixel within these rows. Columns past the last have no source and no destination.
struct NormActColumn {
  int from, y, cache_out;
};

SF_HOST_DEVICE constexpr NormActColumn norm_act_column(const NormActArgs& a, int column) {
  if (column >= norm_act_columns(a)) return {-1, -1, -1};
  const int from = source_index(column, a.left, a.width, a.space_pad);
  return {from, column, from == column - a.left ? from : -1};
}

}  // namespace sf

int sf_norm_act(const sf::NormActArgs& args, CUstream_st* stream);

// ------------------------------------------------------------------------------------------------------- device code
#if defined(__CUDACC__) || defined(SF_SIMT)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef SF_SIMT
#include "simt.h"  // tests/csrc: a block on the host
#else
#include "runtime.h"
#define SF_SHARED(name) extern __shared__ float4 name[]
#define SF_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  launch_kernel<kernel>(blocks, threads, shared, stream, __VA_ARGS__)

namespace sf {

// Within 2 ulp; subnormals are flushed to 0.
__device__ __forceinline__ float exp2_approx(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float rcp_approx(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

}  // namespace sf
#endif

namespace sf {

// Conversion between a 32-bit word, two 16-bit elements or one float32, and float32 values.
template <class T>
struct NormActWord;

template <>
struct NormActWord<float> {
  static constexpr int kElements = 1;
  static __device__ __forceinline__ void widen(uint32_t word, float* values) { values[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t round(const float* values) { return __float_as_uint(values[0]); }
};

template <>
struct NormActWord<__nv_bfloat16> {
  static constexpr int kElements = 2;
  static __device__ __forceinline__ void widen(uint32_t word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t round(const float* values) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct NormActWord<__half> {
  static constexpr int kElements = 2;
  static __device__ __forceinline__ void widen(uint32_t word, float* values) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    values[0] = pair.x;
    values[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t round(const float* values) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// A vector of `count` elements per memory access: 16 bytes, or 8 bytes of a 16-bit y from a float32 x.
template <int words>
struct NormActBytes;
template <>
struct NormActBytes<2> { using type = uint2; };
template <>
struct NormActBytes<4> { using type = uint4; };

template <class T, int count>
struct NormActVector {
  static constexpr int kStep = NormActWord<T>::kElements;
  using Bytes = typename NormActBytes<count / kStep>::type;

  static __device__ __forceinline__ void widen(const Bytes& bytes, float* values) {
#pragma unroll
    for (int k = 0; k < count; k += kStep)
      NormActWord<T>::widen(reinterpret_cast<const uint32_t*>(&bytes)[k / kStep], values + k);
  }
  static __device__ __forceinline__ Bytes round(const float* values) {
    Bytes bytes;
#pragma unroll
    for (int k = 0; k < count; k += kStep)
      reinterpret_cast<uint32_t*>(&bytes)[k / kStep] = NormActWord<T>::round(values + k);
    return bytes;
  }
};

// exp2 may overflow to inf, which gives 0.
__device__ __forceinline__ float norm_act_silu(float z) {
  return z * rcp_approx(1.0f + exp2_approx(z * -1.44269504f));
}

// A lane's fragment of a pixel: every lanes-th vector from `first` on, masked past the last channel.
template <class T, int count, int vectors>
struct NormActFragment {
  using Bytes = typename NormActVector<T, count>::Bytes;
  Bytes bytes[vectors];

  // `row`, the index of its first pixel, or `column` of -1 masks the access.
  __device__ __forceinline__ void load(const void* base, int64_t row, int column, int first, int lanes, int pixel_vectors) {
    const Bytes* const from =
        static_cast<const Bytes*>(base) + row * pixel_vectors + int64_t(column) * pixel_vectors + first;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      bytes[i] = Bytes{};
      if (row >= 0 && column >= 0 && first + i * lanes < pixel_vectors) bytes[i] = from[i * lanes];
    }
  }
  __device__ __forceinline__ void store(void* base, int64_t row, int column, int first, int lanes, int pixel_vectors) const {
    Bytes* const to = static_cast<Bytes*>(base) + row * pixel_vectors + int64_t(column) * pixel_vectors + first;
#pragma unroll
    for (int i = 0; i < vectors; ++i)
      if (row >= 0 && column >= 0 && first + i * lanes < pixel_vectors) to[i * lanes] = bytes[i];
  }
};

// Norm and activation of a lane's fragment; called by all lanes of a warp.
template <class X, class Y, int count, int vectors>
__device__ __forceinline__ void norm_act(const NormActArgs& args, const NormActFragment<X, count, vectors>& x,
                                         const float4* affine, int first, int lanes,
                                         NormActFragment<Y, count, vectors>* y) {
  float values[vectors][count];
#pragma unroll
  for (int i = 0; i < vectors; ++i) NormActVector<X, count>::widen(x.bytes[i], values[i]);
  if (args.rms) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i)
#pragma unroll
      for (int k = 0; k < count; ++k) sum += values[i][k] * values[i][k];
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    // IEEE square root and divisions: approximate ones would use up the error that the rule allows
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, float(args.channels)) + args.eps));
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
#pragma unroll
      for (int k = 0; k < count; k += 4) {
        const float4* const at = affine + ((first + i * lanes) * count + k) / 2;
        const float4 weight = at[0], bias = at[1];
        float* const four = values[i] + k;
        four[0] = four[0] * scale * weight.x + bias.x;
        four[1] = four[1] * scale * weight.y + bias.y;
        four[2] = four[2] * scale * weight.z + bias.z;
        four[3] = four[3] * scale * weight.w + bias.w;
      }
      if (args.silu) {
#pragma unroll
        for (int k = 0; k < count; ++k) values[i][k] = norm_act_silu(values[i][k]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < vectors; ++i) y->bytes[i] = NormActVector<Y, count>::round(values[i]);
}

// Threads per CTA, and resident CTAs per SM: 64 registers per thread, 80 for more than 16 elements, 96 for more than 24,
// which is enough not to spill. The grid has up to 28 CTAs per SM, several waves, so that SMs finish at about the same time.
constexpr int kNormActThreads = 128, kNormActBlocks = 28;
constexpr int norm_act_blocks_per_sm(int elements) { return elements <= 16 ? 8 : elements <= 24 ? 6 : 5; }

// X, Y: types of x and y. A lane holds `vectors` vectors of `count` elements.
template <class X, class Y, int count, int vectors>
__global__ void __launch_bounds__(kNormActThreads, norm_act_blocks_per_sm(vectors * count))
    norm_act_kernel(const NormActArgs args, const NormActSchedule schedule, const NormActTile stride) {
  SF_SHARED(affine);
  const int lanes = schedule.lanes, pixel_vectors = args.channels / count;
  for (int i = threadIdx.x; i < lanes * vectors * count; i += blockDim.x) {
    float* const at = reinterpret_cast<float*>(affine + i / 4 * 2) + i % 4;
    at[0] = args.weight == nullptr || i >= args.channels ? 1.0f : args.weight[i];
    at[4] = args.bias == nullptr || i >= args.channels ? 0.0f : args.bias[i];
  }
  __syncthreads();

  const int first = threadIdx.x % lanes, pixel = threadIdx.x / lanes;
  NormActTile tile = norm_act_tile(schedule, blockIdx.x);
  for (; tile.sample < schedule.samples; tile = norm_act_advance(schedule, tile, stride)) {
    const int frame = tile.frame + schedule.first_frame;
    const NormActRow row = norm_act_row(args, tile.sample, frame, tile.row);
    const NormActColumn column = norm_act_column(args, tile.run * schedule.pixels + pixel);
    NormActFragment<Y, count, vectors> y;
    if (frame < 0) {
      y.load(args.cache, row.from, column.from, first, lanes, pixel_vectors);
    } else {
      NormActFragment<X, count, vectors> x;
      x.load(args.x, row.from, column.from, first, lanes, pixel_vectors);
      norm_act(args, x, affine, first, lanes, &y);
      if (row.from < 0 || column.from < 0) y = {};  // padding is 0, not the norm of 0
    }
    y.store(args.y, row.y, column.y, first, lanes, pixel_vectors);
    if (row.cache_out >= 0) y.store(args.cache_out, row.cache_out, column.cache_out, first, lanes, pixel_vectors);
  }
}

template <class X, class Y, int count, int vectors>
int norm_act_launch(const NormActArgs& args, int threads, int64_t max_blocks, CUstream_st* stream) {
  const NormActSchedule schedule = norm_act_schedule(args, threads);
  const int64_t blocks = norm_act_count_tiles(schedule) < max_blocks ? norm_act_count_tiles(schedule) : max_blocks;
  constexpr auto kernel = norm_act_kernel<X, Y, count, vectors>;
  return SF_LAUNCH(kernel, int(blocks), threads, norm_act_shared(args.channels), stream, args, schedule,
                   norm_act_tile(schedule, blocks));
}

// Instantiates the kernel for 8, 16, 24 or 32 elements per lane.
template <class X, class Y>
int norm_act_launch(const NormActArgs& args, int threads, int64_t max_blocks, CUstream_st* stream) {
  constexpr int count = sizeof(X) == 4 ? 4 : 8, eight = 8 / count;
  switch (norm_act_elements(args.channels) / 8) {
    case 1: return norm_act_launch<X, Y, count, eight>(args, threads, max_blocks, stream);
    case 2: return norm_act_launch<X, Y, count, 2 * eight>(args, threads, max_blocks, stream);
    case 3: return norm_act_launch<X, Y, count, 3 * eight>(args, threads, max_blocks, stream);
    default: return norm_act_launch<X, Y, count, 4 * eight>(args, threads, max_blocks, stream);
  }
}

inline int norm_act_launch(const NormActArgs& args, int threads, int64_t max_blocks, CUstream_st* stream) {
  if (norm_act_count_tiles(norm_act_schedule(args, threads)) == 0) return 0;
  if (args.x_dtype == kBFloat16) return norm_act_launch<__nv_bfloat16, __nv_bfloat16>(args, threads, max_blocks, stream);
  if (args.x_dtype == kFloat16) return norm_act_launch<__half, __half>(args, threads, max_blocks, stream);
  if (args.y_dtype == kBFloat16) return norm_act_launch<float, __nv_bfloat16>(args, threads, max_blocks, stream);
  if (args.y_dtype == kFloat16) return norm_act_launch<float, __half>(args, threads, max_blocks, stream);
  return norm_act_launch<float, float>(args, threads, max_blocks, stream);
}

}  // namespace sf
#endif
