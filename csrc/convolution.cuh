// causal_conv3d, forward, on Hopper: a persistent, warp-specialised implicit GEMM. M: pixels, N: output channels, K: taps x
// input channels.
//
// One CTA per SM loops over output tiles of 256 (or 128) pixels x 96 to 256 output channels. Warpgroup 0 is the producer: a
// K iteration is one tap and 64 input channels (or the 32 of a tail), for which TMA loads a rank-5 box of the input, shifted
// by the tap, and a box of the weight into the next pipeline stage. TMA fills pixels beyond a frame's edges with 0. The
// frame coordinate is computed in convolution_index.h: taps on zero frames are skipped, frames of the cache have their own
// tensor map. Warpgroups 1 and 2 are the consumers: each issues wgmma for half of the pixels. The epilogue adds bias and
// residual in float32 and stores bfloat16.
//
// Channels are not padded: the K tail of 96 or 160 channels is 32 wide, with rows of 64 bytes instead of 128.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convolution_index.h"

struct CUstream_st;

namespace sf {

struct CausalConv3dArgs {
  const void *x, *cache, *weight, *bias, *residual;  // bfloat16, bias float32; cache, bias, residual may be null
  void* y;
  int64_t samples, frames, height, width, in_channels;       // of x (samples, frames, height, width, in_channels)
  int64_t cached;                                            // frames of cache, of x's height and width
  int64_t x_stride, cache_stride;                            // from one sample to the next, in elements
  int64_t out_frames, out_height, out_width, out_channels;   // of y and residual, channels innermost
  int kt, kh, kw;                                            // weight (out_channels, kt, kh, kw, in_channels)
  int stride_t, phase, lookahead, top, left;
  bool replicate;

  template <class F>
  static void fields(F&& f) {
    using A = CausalConv3dArgs;
    f("x", &A::x), f("cache", &A::cache), f("weight", &A::weight), f("bias", &A::bias), f("residual", &A::residual);
    f("y", &A::y), f("samples", &A::samples), f("frames", &A::frames), f("height", &A::height), f("width", &A::width);
    f("in_channels", &A::in_channels), f("cached", &A::cached), f("x_stride", &A::x_stride);
    f("cache_stride", &A::cache_stride);
    f("out_frames", &A::out_frames), f("out_height", &A::out_height), f("out_width", &A::out_width);
    f("out_channels", &A::out_channels), f("kt", &A::kt), f("kh", &A::kh), f("kw", &A::kw);
    f("stride_t", &A::stride_t), f("phase", &A::phase), f("lookahead", &A::lookahead), f("top", &A::top);
    f("left", &A::left), f("replicate", &A::replicate);
  }
};

const char* why_invalid(const CausalConv3dArgs& args);

// Tile shape and shared memory for N output channels per tile: pipeline stages of a box of pixels and a box of weights each.
template <int N>
struct ConvolutionSharedStorage {
  static constexpr int kPixels = N <= 192 ? 256 : 128;       // M of a tile, half of it for each consumer warpgroup
  static constexpr int kMmas = kPixels / 128;                // wgmma of M = 64 per consumer warpgroup
  static constexpr int kInputBytes = kPixels * 128;          // a stage's pixels, 64 channels each
  static constexpr int kStageBytes = kInputBytes + N * 128;
  static constexpr int kStages = (227 * 1024 - 2048) / kStageBytes < 8 ? (227 * 1024 - 2048) / kStageBytes : 8;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStages * 8;  // 1024: for the alignment of boxes
};

}  // namespace sf

int sf_causal_conv3d(const sf::CausalConv3dArgs& args, CUstream_st* stream);

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>

#include "sm90.cuh"

namespace sf {

// Tensor maps with boxes of 64 channels, and of 32 for the K tail.
struct ConvolutionMaps {
  CUtensorMap x, x_rest, cache, cache_rest, weight, weight_rest;
};

struct ConvolutionTensors {
  const float* bias;
  const __nv_bfloat16* residual;
  __nv_bfloat16* y;
  int out_channels;
};

// Stage index and mbarrier parity, as CUTLASS's PipelineState.
template <int stages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int channels>
using Width = std::integral_constant<int, channels>;

// FULL: slices of 64 channels before the tail of 32 in each tap; -1: no tail, and any number of slices of 64.
template <int N, int FULL>
__global__ void __launch_bounds__(384, 1)
    causal_conv3d_kernel(const __grid_constant__ ConvolutionMaps maps, const __grid_constant__ ConvolutionTensors tensors,
                         const __grid_constant__ ConvolutionShape shape) {
  using namespace sm90;
  using Storage = ConvolutionSharedStorage<N>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const stages = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + Storage::kStages * Storage::kStageBytes);
  uint64_t* const empty = full + Storage::kStages;

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // tells the compiler that it is warp-uniform
  if (threadIdx.x == 0) {
    for (int i = 0; i < Storage::kStages; ++i) {
      mbarrier_init(full + i, 1);    // the producer thread, besides the bytes
      mbarrier_init(empty + i, 8);   // the consumer warps
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int64_t tiles = count_tiles(shape);
  PipelineState<Storage::kStages> pipe;
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 0) {
      for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_at(shape, index);
        const Taps taps = valid_taps(shape, tile.frame);
        const int k_iterations = count_k_iterations(shape, taps);
        KIteration k = first_k_iteration(shape, tile, taps);
        for (int i = 0; i < k_iterations; ++i, next_k_iteration(shape, tile, &k)) {
          const bool rest = FULL >= 0 && k.channel == 64 * FULL;
          const CUtensorMap* x = k.from_cache ? (rest ? &maps.cache_rest : &maps.cache) : (rest ? &maps.x_rest : &maps.x);
          uint8_t* const stage = stages + pipe.stage * Storage::kStageBytes;
          mbarrier_wait(empty + pipe.stage, pipe.parity ^ 1);  // passes at once in the first round
          mbarrier_arrive_expect_tx(full + pipe.stage, rest ? Storage::kStageBytes / 2 : Storage::kStageBytes);
          tma_load(stage, x, full + pipe.stage, k.channel, k.column, k.row, k.frame, tile.sample);
          tma_load(stage + Storage::kInputBytes, rest ? &maps.weight_rest : &maps.weight, full + pipe.stage, k.channel,
                   k.tap, tile.out_tile * N);
          pipe.advance();
        }
      }
    }
  } else {
    warpgroup_reg_alloc<232>();
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int first_pixel = (warpgroup - 1) * Storage::kMmas * 64;
    float acc[Storage::kMmas][N / 2];
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile = tile_at(shape, index);
      const Taps taps = valid_taps(shape, tile.frame);
#pragma unroll
      for (int mma = 0; mma < Storage::kMmas; ++mma)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) acc[mma][i] = 0;

      int previous = -1;  // the stage of the previous K iteration, whose wgmma may be in flight
      // One K iteration: issue its wgmma, then wait for the previous iteration's and release its stage.
      auto mma_stage = [&](auto width) {
        constexpr int kRow = decltype(width)::value * 2;
        const uint32_t stage = shared_address(stages + pipe.stage * Storage::kStageBytes);
        const uint64_t pixels = make_smem_desc(stage + first_pixel * kRow, kRow);
        const uint64_t weights = make_smem_desc(stage + Storage::kInputBytes, kRow);
        mbarrier_wait(full + pipe.stage, pipe.parity);
        warpgroup_arrive();
#pragma unroll
        for (int mma = 0; mma < Storage::kMmas; ++mma)
#pragma unroll
          for (int byte = 0; byte < kRow; byte += 32)
            wgmma<N>(acc[mma], advance_desc(pixels, mma * 64 * kRow + byte), advance_desc(weights, byte));
        warpgroup_commit_batch();
        warpgroup_wait<1>();
        if (previous >= 0 && lane == 0) mbarrier_arrive(empty + previous);
        previous = pipe.stage;
        pipe.advance();
      };
      const int tap_count = (taps.last - taps.first) * shape.kh * shape.kw;
      if constexpr (FULL < 0) {
        for (int i = 0; i < tap_count * shape.slices; ++i) mma_stage(Width<64>{});
      } else {
        for (int tap = 0; tap < tap_count; ++tap) {
#pragma unroll
          for (int i = 0; i < FULL; ++i) mma_stage(Width<64>{});
          mma_stage(Width<32>{});
        }
      }
      warpgroup_wait<0>();
      if (previous >= 0 && lane == 0) mbarrier_arrive(empty + previous);

#pragma unroll
      for (int mma = 0; mma < Storage::kMmas; ++mma) {
        warpgroup_fence_operand(acc[mma]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pixel pixel = pixel_of(shape, tile, first_pixel + mma * 64 + acc_row(thread, 2 * half));
          const int64_t start = pixel.index * tensors.out_channels + tile.out_tile * N + lane % 4 * 8;
#pragma unroll
          for (int column = 0; column < N; column += 32) {  // 8 columns per lane of a quad
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = acc[mma][column / 2 + i / 2 * 4 + half * 2 + i % 2];
            gather_columns(values, lane, [](float value, int bit) { return __shfl_xor_sync(0xffffffff, value, bit); });
            if (!pixel.in_bounds) continue;
            if (tensors.bias != nullptr) {
              const float4* bias = reinterpret_cast<const float4*>(tensors.bias + tile.out_tile * N + column + lane % 4 * 8);
              const float4 low = __ldg(bias), high = __ldg(bias + 1);
              values[0] += low.x, values[1] += low.y, values[2] += low.z, values[3] += low.w;
              values[4] += high.x, values[5] += high.y, values[6] += high.z, values[7] += high.w;
            }
            union {
              uint4 bits;
              __nv_bfloat162 pairs[4];
            } packed;
            if (tensors.residual != nullptr) {
              packed.bits = __ldg(reinterpret_cast<const uint4*>(tensors.residual + start + column));
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float2 pair = __bfloat1622float2(packed.pairs[i]);
                values[2 * i] += pair.x, values[2 * i + 1] += pair.y;
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) packed.pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
            *reinterpret_cast<uint4*>(tensors.y + start + column) = packed.bits;
          }
        }
      }
      __syncwarp();  // wgmma is warp-collective, and lanes out of bounds have diverged
    }
  }
}

}  // namespace sf
#endif
