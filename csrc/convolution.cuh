// causal_conv3d, forward, on Hopper: an implicit product of pixels (rows) and output channels (columns), summed over taps
// and input channels.
//
// One block stays on each multiprocessor and walks over tiles of 256 (or 128) pixels x 96 to 256 output channels. Its
// first warpgroup only copies: for every tap and 64 input channels (or the 32 that are left) a rank-5 box of the input,
// shifted by the tap, and the weight's box, into the next slot of a ring. What lies beyond a frame's edges the copy engine
// reads as zeros; the time coordinate is chosen here (convolution_index.h): frames of zeros are left out, frames of the
// cache come from the cache's own map. The two other warpgroups multiply half of the pixels each, sums in registers, then
// add bias and residual and write bfloat16.
//
// No channel is padded: the last slice of 96 or 160 channels is 32 wide, with rows of 64 bytes instead of 128.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convolution_index.h"

struct CUstream_st;

namespace sf {

struct CausalConv3dArgs {
  const void *x, *cache, *weight, *bias, *residual;  // bfloat16 but for the bias, float32; cache, bias, residual may be null
  void* y;
  int64_t samples, frames, height, width, in_channels;       // of x (samples, frames, height, width, in_channels)
  int64_t cached;                                            // frames of cache, of x's height and width
  int64_t x_stride, cache_stride;                            // from one sample to the next, in numbers
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

const char* wrong(const CausalConv3dArgs& args);

// Shared memory of a block, for N output channels at a time: a ring of slots, each a box of pixels and one of weights.
template <int N>
struct ConvolutionPlan {
  static constexpr int kPixels = N <= 192 ? 256 : 128;       // of a tile; each consuming warpgroup has half of them
  static constexpr int kBlocks = kPixels / 128;              // of 64 pixels, to a consuming warpgroup
  static constexpr int kInput = kPixels * 128;               // bytes of a slot's pixels, 64 channels each
  static constexpr int kSlot = kInput + N * 128;
  static constexpr int kSlots = (227 * 1024 - 2048) / kSlot < 8 ? (227 * 1024 - 2048) / kSlot : 8;
  static constexpr int kShared = 1024 + kSlots * kSlot + 2 * kSlots * 8;  // 1024: boxes begin at its multiples
};

}  // namespace sf

int sf_causal_conv3d(const sf::CausalConv3dArgs& args, CUstream_st* stream);

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>

#include "sm90.cuh"

namespace sf {

// What the kernel is told. Maps of rows of 64 channels, and of the 32 that may be left.
struct ConvolutionMaps {
  CUtensorMap x, x_rest, cache, cache_rest, weight, weight_rest;
};

struct ConvolutionTensors {
  const float* bias;
  const __nv_bfloat16* residual;
  __nv_bfloat16* y;
  int out_channels;
};

// Slots are used in turn; a slot's barriers are in their odd phase every other round.
template <int slots>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <int channels>
using Width = std::integral_constant<int, channels>;

// FULL: slices of 64 channels before the last one of 32 of each tap; -1: there is none of 32, and any number of 64.
template <int N, int FULL>
__global__ void __launch_bounds__(384, 1)
    causal_conv3d_kernel(const __grid_constant__ ConvolutionMaps maps, const __grid_constant__ ConvolutionTensors tensors,
                         const __grid_constant__ ConvolutionShape shape) {
  using namespace sm90;
  using Plan = ConvolutionPlan<N>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const slots = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint64_t* const full = reinterpret_cast<uint64_t*>(slots + Plan::kSlots * Plan::kSlot);
  uint64_t* const empty = full + Plan::kSlots;

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // the compiler sees that a warp agrees on it
  if (threadIdx.x == 0) {
    for (int i = 0; i < Plan::kSlots; ++i) {
      barrier_init(full + i, 1);    // the copying thread; the copied bytes count besides
      barrier_init(empty + i, 8);   // the warps that multiply
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int64_t tiles = count_tiles(shape);
  Turn<Plan::kSlots> turn;
  if (warpgroup == 0) {
    leave_registers<40>();
    if (threadIdx.x == 0) {
      for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_at(shape, index);
        const Taps taps = taps_seeing(shape, tile.frame);
        const int steps = steps_of(shape, taps);
        Step step = first_step(shape, tile, taps);
        for (int i = 0; i < steps; ++i, next_step(shape, tile, &step)) {
          const bool rest = FULL >= 0 && step.channel == 64 * FULL;
          const CUtensorMap* x = step.from_cache ? (rest ? &maps.cache_rest : &maps.cache) : (rest ? &maps.x_rest : &maps.x);
          uint8_t* const slot = slots + turn.slot * Plan::kSlot;
          barrier_wait(empty + turn.slot, turn.parity ^ 1);  // at the start all are empty: the phase before the first
          barrier_arrive_and_expect(full + turn.slot, rest ? Plan::kSlot / 2 : Plan::kSlot);
          load_box(slot, x, full + turn.slot, step.channel, step.column, step.row, step.frame, tile.sample);
          load_box(slot + Plan::kInput, rest ? &maps.weight_rest : &maps.weight, full + turn.slot, step.channel, step.tap,
                   tile.out_tile * N);
          turn.next();
        }
      }
    }
  } else {
    take_registers<232>();
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int first_pixel = (warpgroup - 1) * Plan::kBlocks * 64;
    float sums[Plan::kBlocks][N / 2];
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile = tile_at(shape, index);
      const Taps taps = taps_seeing(shape, tile.frame);
#pragma unroll
      for (int block = 0; block < Plan::kBlocks; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[block][i] = 0;

      int before = -1;  // the slot of the step before, whose products may still run
      // One step: WIDTH channels of one tap. Its products start, then those of the step before are waited for.
      auto multiply_slot = [&](auto width) {
        constexpr int kRow = decltype(width)::value * 2;
        const uint32_t slot = shared_address(slots + turn.slot * Plan::kSlot);
        const uint64_t pixels = factor(slot + first_pixel * kRow, kRow);
        const uint64_t weights = factor(slot + Plan::kInput, kRow);
        barrier_wait(full + turn.slot, turn.parity);
        products_begin();
#pragma unroll
        for (int block = 0; block < Plan::kBlocks; ++block)
#pragma unroll
          for (int byte = 0; byte < kRow; byte += 32)
            multiply<N>(sums[block], advanced(pixels, block * 64 * kRow + byte), advanced(weights, byte));
        products_commit();
        products_wait<1>();
        if (before >= 0 && lane == 0) barrier_arrive(empty + before);
        before = turn.slot;
        turn.next();
      };
      const int taps_in_all = (taps.last - taps.first) * shape.kh * shape.kw;
      if constexpr (FULL < 0) {
        for (int i = 0; i < taps_in_all * shape.slices; ++i) multiply_slot(Width<64>{});
      } else {
        for (int tap = 0; tap < taps_in_all; ++tap) {
#pragma unroll
          for (int i = 0; i < FULL; ++i) multiply_slot(Width<64>{});
          multiply_slot(Width<32>{});
        }
      }
      products_wait<0>();
      if (before >= 0 && lane == 0) barrier_arrive(empty + before);

#pragma unroll
      for (int block = 0; block < Plan::kBlocks; ++block) {
        pin(sums[block]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pixel pixel = pixel_of(shape, tile, first_pixel + block * 64 + sum_row(thread, 2 * half));
          const int64_t start = pixel.at * tensors.out_channels + tile.out_tile * N + lane % 4 * 8;
#pragma unroll
          for (int column = 0; column < N; column += 32) {  // 8 columns to each of four lanes
            float eight[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) eight[i] = sums[block][column / 2 + i / 2 * 4 + half * 2 + i % 2];
            gather_columns(eight, lane, [](float number, int bit) { return __shfl_xor_sync(0xffffffff, number, bit); });
            if (!pixel.inside) continue;
            if (tensors.bias != nullptr) {
              const float4* bias = reinterpret_cast<const float4*>(tensors.bias + tile.out_tile * N + column + lane % 4 * 8);
              const float4 low = __ldg(bias), high = __ldg(bias + 1);
              eight[0] += low.x, eight[1] += low.y, eight[2] += low.z, eight[3] += low.w;
              eight[4] += high.x, eight[5] += high.y, eight[6] += high.z, eight[7] += high.w;
            }
            union {
              uint4 bits;
              __nv_bfloat162 pairs[4];
            } numbers;
            if (tensors.residual != nullptr) {
              numbers.bits = __ldg(reinterpret_cast<const uint4*>(tensors.residual + start + column));
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float2 pair = __bfloat1622float2(numbers.pairs[i]);
                eight[2 * i] += pair.x, eight[2 * i + 1] += pair.y;
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) numbers.pairs[i] = __floats2bfloat162_rn(eight[2 * i], eight[2 * i + 1]);
            *reinterpret_cast<uint4*>(tensors.y + start + column) = numbers.bits;
          }
        }
      }
      __syncwarp();  // products are for whole warps, and lanes of pixels outside went another way
    }
  }
}

}  // namespace sf
#endif
