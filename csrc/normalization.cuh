// Norm and activation of every pixel, its frame's padding and the cache's refresh, in one pass over the video: what a causal
// convolution reads. Pixels are C numbers side by side (channels last). Everything is computed in float32.
//
// A group of L lanes of a warp has a pixel, mostly 8 to 24 numbers a lane, which stay in registers between the one read and the
// one write. A block takes as many pixels of a row as it has such groups, and walks over the video in strides of the grid: where
// it stands is the same for all its threads, which spares them registers.
#pragma once

#include <cstdint>

#include "layout.h"

struct CUstream_st;

namespace sf {

enum NormActType { kFloat32, kBFloat16, kFloat16 };
enum NormActPad { kZeros, kReplicate, kReflect };

struct NormActArgs {
  const void *x, *cache;        // (samples, frames, height, width, channels); (samples, cached, ...) in y's type, normed
  const float *weight, *bias;   // (channels,), or null
  void *y;                      // (samples, front + frames, top + height + bottom, left + width + right, channels)
  void *cache_out;              // (samples, kept, height, width, channels): the last frames of the cached and the normed ones
  int samples, frames, height, width, channels;
  int cached, kept, front;      // frames; front is 0, or cached: these stand before the clip's in y
  int left, right, top, bottom, space_pad, x_dtype, y_dtype;
  bool rms, silu;               // without rms, pixels are copied, and there is no weight, bias or silu
  float eps;                    // inside the root

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

const char* wrong(const NormActArgs& args);

// Lanes that share a pixel's channels: of at most 24 numbers each where there are as many lanes, for with more registers fewer
// warps would be there to wait for memory; and two at least where a pixel has more than one vector, so that whole sectors of
// 32 bytes are moved.
constexpr int kMostChannels = 32 * 32;

SF_HOST_DEVICE constexpr int norm_act_lanes(int channels) {
  int lanes = channels > 8 ? 2 : 1;
  while (lanes * 24 < channels && lanes < 32) lanes *= 2;
  return lanes;
}

// Numbers a lane has: 8, 16, 24 or 32, some of which may be past the last channel.
SF_HOST_DEVICE constexpr int norm_act_numbers(int channels) {
  const int lanes = norm_act_lanes(channels);
  return (channels + 8 * lanes - 1) / (8 * lanes) * 8;
}

// Bytes of shared memory: weight and bias of every number that lanes have, four of the one and four of the other in turn.
constexpr int norm_act_shared(int channels) {
  return norm_act_lanes(channels) * norm_act_numbers(channels) * 2 * int(sizeof(float));
}

// ------------------------------------------------------------------------------------------------ what stands where
// What a block takes at a time: a run of pixels of a row of y. Runs change fastest; frames are counted from first_frame.
struct NormActPlace {
  int run, row, frame, sample;
};

struct NormActWalk {
  int lanes, pixels;  // of a pixel; of a run
  int runs, rows, frames, samples;
  int first_frame;    // of the clip's frames, which begin at 0; -cached .. -1 are the cache's
};

SF_HOST_DEVICE constexpr int norm_act_rows(const NormActArgs& a) { return a.top + a.height + a.bottom; }
SF_HOST_DEVICE constexpr int norm_act_columns(const NormActArgs& a) { return a.left + a.width + a.right; }

// Over every frame that y has or that goes from cache to cache_out, in blocks of `threads`.
SF_HOST_DEVICE constexpr NormActWalk norm_act_walk(const NormActArgs& a, int threads) {
  const int lanes = norm_act_lanes(a.channels), pixels = threads / lanes;
  const int before = a.front > a.kept - a.frames ? a.front : a.kept - a.frames;
  const int runs = (norm_act_columns(a) + pixels - 1) / pixels;
  return {lanes, pixels, runs, norm_act_rows(a), before + a.frames, a.samples, -before};
}

SF_HOST_DEVICE constexpr int64_t norm_act_places(const NormActWalk& w) {
  return int64_t(w.samples) * w.frames * w.rows * w.runs;
}

SF_HOST_DEVICE constexpr NormActPlace norm_act_place(const NormActWalk& w, int64_t index) {
  NormActPlace place{};
  place.run = int(index % w.runs);
  index /= w.runs;
  place.row = int(index % w.rows);
  index /= w.rows;
  place.frame = int(index % w.frames);
  place.sample = int(index / w.frames);
  return place;
}

// As many places further as norm_act_place says of `stride`, without its divisions.
SF_HOST_DEVICE constexpr NormActPlace norm_act_next(const NormActWalk& w, NormActPlace place, const NormActPlace& stride) {
  place.run += stride.run;
  place.row += stride.row;
  place.frame += stride.frame;
  place.sample += stride.sample;
  if (place.run >= w.runs) place.run -= w.runs, ++place.row;
  if (place.row >= w.rows) place.row -= w.rows, ++place.frame;
  if (place.frame >= w.frames) place.frame -= w.frames, ++place.sample;
  return place;
}

// Which of an axis's `size` places stands at place `at` of the padded axis, `before` of them in front; -1: zeros.
SF_HOST_DEVICE constexpr int padded_from(int at, int before, int size, int pad) {
  const int from = at - before, last = size - 1;
  if (from >= 0 && from <= last) return from;
  if (pad == kZeros) return -1;
  if (pad == kReplicate) return from < 0 ? 0 : last;
  return from < 0 ? -from : 2 * last - from;
}

// Where a row of y comes from and goes to: its first pixel's number; -1: nowhere.
struct NormActRow {
  int64_t from;  // of the clip or, in frames before it, of the cache; from nowhere come zeros
  int64_t y, cache_out;
};

SF_HOST_DEVICE constexpr NormActRow norm_act_row(const NormActArgs& a, int sample, int frame, int row) {
  NormActRow found{-1, -1, -1};
  const int from = padded_from(row, a.top, a.height, a.space_pad), kept = frame - a.frames + a.kept;
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

// The same of a pixel, within these rows. Columns past the last come from nowhere and go nowhere.
struct NormActColumn {
  int from, y, cache_out;
};

SF_HOST_DEVICE constexpr NormActColumn norm_act_column(const NormActArgs& a, int column) {
  if (column >= norm_act_columns(a)) return {-1, -1, -1};
  const int from = padded_from(column, a.left, a.width, a.space_pad);
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

// Off by 2 in the last place at most; what is too small becomes 0.
__device__ __forceinline__ float quick_exp2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float quick_reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

}  // namespace sf
#endif

namespace sf {

// Two numbers of a 16-bit type in a word of 32 bits, and float32's one, as float32.
template <class T>
struct NormActWord;

template <>
struct NormActWord<float> {
  static constexpr int kNumbers = 1;
  static __device__ __forceinline__ void widen(uint32_t word, float* numbers) { numbers[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t round(const float* numbers) { return __float_as_uint(numbers[0]); }
};

template <>
struct NormActWord<__nv_bfloat16> {
  static constexpr int kNumbers = 2;
  static __device__ __forceinline__ void widen(uint32_t word, float* numbers) {
    numbers[0] = __uint_as_float(word << 16);
    numbers[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t round(const float* numbers) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(numbers[0], numbers[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct NormActWord<__half> {
  static constexpr int kNumbers = 2;
  static __device__ __forceinline__ void widen(uint32_t word, float* numbers) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    numbers[0] = pair.x;
    numbers[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t round(const float* numbers) {
    const __half2 pair = __floats2half2_rn(numbers[0], numbers[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// A vector of `count` numbers is what one access moves: 16 bytes, or 8 of 16-bit numbers made from float32.
template <int words>
struct NormActBytes;
template <>
struct NormActBytes<2> { using type = uint2; };
template <>
struct NormActBytes<4> { using type = uint4; };

template <class T, int count>
struct NormActVector {
  static constexpr int kStep = NormActWord<T>::kNumbers;
  using Bytes = typename NormActBytes<count / kStep>::type;

  static __device__ __forceinline__ void widen(const Bytes& bytes, float* numbers) {
#pragma unroll
    for (int k = 0; k < count; k += kStep)
      NormActWord<T>::widen(reinterpret_cast<const uint32_t*>(&bytes)[k / kStep], numbers + k);
  }
  static __device__ __forceinline__ Bytes round(const float* numbers) {
    Bytes bytes;
#pragma unroll
    for (int k = 0; k < count; k += kStep)
      reinterpret_cast<uint32_t*>(&bytes)[k / kStep] = NormActWord<T>::round(numbers + k);
    return bytes;
  }
};

// exp2 may be infinite, and then this is 0.
__device__ __forceinline__ float norm_act_silu(float z) {
  return z * quick_reciprocal(1.0f + quick_exp2(z * -1.44269504f));
}

// What a lane has of one pixel: every lanes-th vector of it, from `first` on, as far as there are any.
template <class T, int count, int vectors>
struct NormActShare {
  using Bytes = typename NormActVector<T, count>::Bytes;
  Bytes bytes[vectors];

  // `row`, the first pixel's number, and `column` may be -1: then nothing is read, or written.
  __device__ __forceinline__ void load(const void* base, int64_t row, int column, int first, int lanes, int there) {
    const Bytes* const from = static_cast<const Bytes*>(base) + row * there + int64_t(column) * there + first;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      bytes[i] = Bytes{};
      if (row >= 0 && column >= 0 && first + i * lanes < there) bytes[i] = from[i * lanes];
    }
  }
  __device__ __forceinline__ void store(void* base, int64_t row, int column, int first, int lanes, int there) const {
    Bytes* const to = static_cast<Bytes*>(base) + row * there + int64_t(column) * there + first;
#pragma unroll
    for (int i = 0; i < vectors; ++i)
      if (row >= 0 && column >= 0 && first + i * lanes < there) to[i * lanes] = bytes[i];
  }
};

// A lane's share of a pixel, normed; all lanes of a warp come here together.
template <class X, class Y, int count, int vectors>
__device__ __forceinline__ void norm_act(const NormActArgs& args, const NormActShare<X, count, vectors>& x,
                                         const float4* affine, int first, int lanes,
                                         NormActShare<Y, count, vectors>* y) {
  float numbers[vectors][count];
#pragma unroll
  for (int i = 0; i < vectors; ++i) NormActVector<X, count>::widen(x.bytes[i], numbers[i]);
  if (args.rms) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i)
#pragma unroll
      for (int k = 0; k < count; ++k) sum += numbers[i][k] * numbers[i][k];
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    // exact root and divisions: approximate ones would err by all that is allowed, on every number
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, float(args.channels)) + args.eps));
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
#pragma unroll
      for (int k = 0; k < count; k += 4) {
        const float4* const at = affine + ((first + i * lanes) * count + k) / 2;
        const float4 weight = at[0], bias = at[1];
        float* const four = numbers[i] + k;
        four[0] = four[0] * scale * weight.x + bias.x;
        four[1] = four[1] * scale * weight.y + bias.y;
        four[2] = four[2] * scale * weight.z + bias.z;
        four[3] = four[3] * scale * weight.w + bias.w;
      }
      if (args.silu) {
#pragma unroll
        for (int k = 0; k < count; ++k) numbers[i][k] = norm_act_silu(numbers[i][k]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < vectors; ++i) y->bytes[i] = NormActVector<Y, count>::round(numbers[i]);
}

// Threads of a block, and the blocks of them that a multiprocessor has registers for: 64 a thread, 80 of more than 16 numbers,
// 96 of more than 24, and nothing spills. The grid has at most 28 for each, more than run at once, so that all end at about the same time.
constexpr int kNormActThreads = 128, kNormActBlocks = 28;
constexpr int norm_act_resident(int numbers) { return numbers <= 16 ? 8 : numbers <= 24 ? 6 : 5; }

// X, Y: types of x and y. A lane has `vectors` vectors of `count` numbers.
template <class X, class Y, int count, int vectors>
__global__ void __launch_bounds__(kNormActThreads, norm_act_resident(vectors * count))
    norm_act_kernel(const NormActArgs args, const NormActWalk walk, const NormActPlace stride) {
  SF_SHARED(affine);
  const int lanes = walk.lanes, there = args.channels / count;
  for (int i = threadIdx.x; i < lanes * vectors * count; i += blockDim.x) {
    float* const at = reinterpret_cast<float*>(affine + i / 4 * 2) + i % 4;
    at[0] = args.weight == nullptr || i >= args.channels ? 1.0f : args.weight[i];
    at[4] = args.bias == nullptr || i >= args.channels ? 0.0f : args.bias[i];
  }
  __syncthreads();

  const int first = threadIdx.x % lanes, pixel = threadIdx.x / lanes;
  NormActPlace at = norm_act_place(walk, blockIdx.x);
  for (; at.sample < walk.samples; at = norm_act_next(walk, at, stride)) {
    const int frame = at.frame + walk.first_frame;
    const NormActRow row = norm_act_row(args, at.sample, frame, at.row);
    const NormActColumn column = norm_act_column(args, at.run * walk.pixels + pixel);
    NormActShare<Y, count, vectors> y;
    if (frame < 0) {
      y.load(args.cache, row.from, column.from, first, lanes, there);
    } else {
      NormActShare<X, count, vectors> x;
      x.load(args.x, row.from, column.from, first, lanes, there);
      norm_act(args, x, affine, first, lanes, &y);
      if (row.from < 0 || column.from < 0) y = {};  // padding is zeros, not what a norm makes of them
    }
    y.store(args.y, row.y, column.y, first, lanes, there);
    if (row.cache_out >= 0) y.store(args.cache_out, row.cache_out, column.cache_out, first, lanes, there);
  }
}

template <class X, class Y, int count, int vectors>
int norm_act_start(const NormActArgs& args, int threads, int64_t most_blocks, CUstream_st* stream) {
  const NormActWalk walk = norm_act_walk(args, threads);
  const int64_t blocks = norm_act_places(walk) < most_blocks ? norm_act_places(walk) : most_blocks;
  constexpr auto kernel = norm_act_kernel<X, Y, count, vectors>;
  return SF_LAUNCH(kernel, int(blocks), threads, norm_act_shared(args.channels), stream, args, walk,
                   norm_act_place(walk, blocks));
}

// The kernel for as many numbers a lane as the channels need: 8, 16, 24 or 32.
template <class X, class Y>
int norm_act_start(const NormActArgs& args, int threads, int64_t most_blocks, CUstream_st* stream) {
  constexpr int count = sizeof(X) == 4 ? 4 : 8, eight = 8 / count;
  switch (norm_act_numbers(args.channels) / 8) {
    case 1: return norm_act_start<X, Y, count, eight>(args, threads, most_blocks, stream);
    case 2: return norm_act_start<X, Y, count, 2 * eight>(args, threads, most_blocks, stream);
    case 3: return norm_act_start<X, Y, count, 3 * eight>(args, threads, most_blocks, stream);
    default: return norm_act_start<X, Y, count, 4 * eight>(args, threads, most_blocks, stream);
  }
}

inline int norm_act_start(const NormActArgs& args, int threads, int64_t most_blocks, CUstream_st* stream) {
  if (norm_act_places(norm_act_walk(args, threads)) == 0) return 0;
  if (args.x_dtype == kBFloat16) return norm_act_start<__nv_bfloat16, __nv_bfloat16>(args, threads, most_blocks, stream);
  if (args.x_dtype == kFloat16) return norm_act_start<__half, __half>(args, threads, most_blocks, stream);
  if (args.y_dtype == kBFloat16) return norm_act_start<float, __nv_bfloat16>(args, threads, most_blocks, stream);
  if (args.y_dtype == kFloat16) return norm_act_start<float, __half>(args, threads, most_blocks, stream);
  return norm_act_start<float, float>(args, threads, most_blocks, stream);
}

}  // namespace sf
#endif
