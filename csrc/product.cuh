// A small matrix product on Hopper, one block a tile: the proof of what sm90.cuh and layout.h say, before a kernel that
// depends on all of it at once is trusted. y = a b^T; a (rows, inner), b (columns, inner), y (rows, columns), bfloat16.
//
// It goes through every instruction and layout that the convolution uses: boxes of 128- and of 64-byte rows, barriers with
// expected bytes in both phases, products of every width, the place of every sum; and a box on its way back.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace sf {

struct ProductArgs {
  const void *a, *b;
  void* y;
  int64_t rows, columns, inner;
  int tile_columns;  // 96, 128, 160, 192 or 256, which need not divide the columns
  int slice;         // of the inner dimension at a time: 64 or 32 numbers

  template <class F>
  static void fields(F&& f) {
    using A = ProductArgs;
    f("a", &A::a), f("b", &A::b), f("y", &A::y), f("rows", &A::rows), f("columns", &A::columns), f("inner", &A::inner);
    f("tile_columns", &A::tile_columns), f("slice", &A::slice);
  }
};

const char* wrong(const ProductArgs& args);

// Shared memory of a block, of tiles of 64 x N and slices of K numbers: two slots, the sums on their way out, barriers.
template <int N, int K>
struct ProductPlan {
  static constexpr int kA = 64 * K * 2, kSlot = kA + N * K * 2, kSlots = 2;
  static constexpr int kSums = 64 * 64;  // bytes of 64 rows x 32 columns, a box on its way out
  static constexpr int kShared = 1024 + kSlots * kSlot + N / 32 * kSums + kSlots * 8;
};

}  // namespace sf

int sf_product(const sf::ProductArgs& args, CUstream_st* stream);

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>

#include "sm90.cuh"

namespace sf {

struct ProductMaps {
  CUtensorMap a, b, y;
};

template <int N, int K>
__global__ void __launch_bounds__(128, 1) product_kernel(const __grid_constant__ ProductMaps maps, const int inner) {
  using namespace sm90;
  using Plan = ProductPlan<N, K>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const slots = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint8_t* const out = slots + Plan::kSlots * Plan::kSlot;
  uint64_t* const full = reinterpret_cast<uint64_t*>(out + N / 32 * Plan::kSums);
  const int row = blockIdx.y * 64, column = blockIdx.x * N;

  if (threadIdx.x == 0) {
    for (int i = 0; i < Plan::kSlots; ++i) barrier_init(full + i, 1);
    fence_barrier_init();
    prefetch_map(&maps.a);
    prefetch_map(&maps.b);
  }
  __syncthreads();

  const int steps = (inner + K - 1) / K;
  const auto load = [&](int step) {
    uint8_t* const slot = slots + step % Plan::kSlots * Plan::kSlot;
    uint64_t* const barrier = full + step % Plan::kSlots;
    barrier_arrive_and_expect(barrier, Plan::kSlot);
    load_box(slot, &maps.a, barrier, step * K, row);
    load_box(slot + Plan::kA, &maps.b, barrier, step * K, column);
  };
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sums[i] = 0;
  if (threadIdx.x == 0) load(0);
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0 && step + 1 < steps) load(step + 1);
    const uint32_t slot = shared_address(slots + step % Plan::kSlots * Plan::kSlot);
    barrier_wait(full + step % Plan::kSlots, step / Plan::kSlots % 2);
    products_begin();
#pragma unroll
    for (int byte = 0; byte < 2 * K; byte += 32)
      multiply<N>(sums, advanced(factor(slot, 2 * K), byte), advanced(factor(slot + Plan::kA, 2 * K), byte));
    products_commit();
    products_wait<0>();
    __syncthreads();  // all have read the slot before it is filled again
  }
  pin(sums);

#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int at = sum_column(threadIdx.x, i);
    uint8_t* const box = out + at / 32 * Plan::kSums;
    *reinterpret_cast<__nv_bfloat162*>(box + swizzled(sum_row(threadIdx.x, i), at % 32 * 2, 64)) =
        __floats2bfloat162_rn(sums[i], sums[i + 1]);
  }
  fence_shared_for_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < N / 32; ++i) store_box(&maps.y, out + i * Plan::kSums, column + i * 32, row);
    finish_stores();
  }
}

}  // namespace sf
#endif
