// A self-test of sm90.cuh and layout.h on Hopper: a small GEMM, one tile per CTA, that isolates the primitives of the
// convolution. y = a b^T; a (rows, inner), b (columns, inner), y (rows, columns), bfloat16.
//
// It covers every instruction and layout of the convolution: TMA boxes with 128- and 64-byte rows, mbarriers with
// transaction counts in both phases, wgmma of every N that it uses, and the accumulator layout. It also covers TMA stores.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace sf {

struct WgmmaSelftestArgs {
  const void *a, *b;
  void* y;
  int64_t rows, columns, inner;
  int tile_columns;  // 96, 128, 160, 192 or 256, which need not divide the columns
  int slice;         // K of a pipeline stage: 64 or 32 elements

  template <class F>
  static void fields(F&& f) {
    using A = WgmmaSelftestArgs;
    f("a", &A::a), f("b", &A::b), f("y", &A::y), f("rows", &A::rows), f("columns", &A::columns), f("inner", &A::inner);
    f("tile_columns", &A::tile_columns), f("slice", &A::slice);
  }
};

const char* why_invalid(const WgmmaSelftestArgs& args);

// Shared memory for a 64 x N tile and K elements per stage: 1024 bytes to align, two stages, the output tile, mbarriers.
template <int N, int K>
struct WgmmaSelftestSharedStorage {
  static constexpr int kA = 64 * K * 2, kStageBytes = kA + N * K * 2, kStages = 2;
  static constexpr int kOutBytes = 64 * 64;  // bytes of an output box of 64 rows x 32 columns
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + N / 32 * kOutBytes + kStages * 8;
};

}  // namespace sf

int sf_wgmma_selftest(const sf::WgmmaSelftestArgs& args, CUstream_st* stream);

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>

#include "sm90.cuh"

namespace sf {

struct WgmmaSelftestMaps {
  CUtensorMap a, b, y;
};

template <int N, int K>
__global__ void __launch_bounds__(128, 1)
    wgmma_selftest_kernel(const __grid_constant__ WgmmaSelftestMaps maps, const int inner) {
  using namespace sm90;
  using Storage = WgmmaSelftestSharedStorage<N, K>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const stages = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint8_t* const out = stages + Storage::kStages * Storage::kStageBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(out + N / 32 * Storage::kOutBytes);
  const int row = blockIdx.y * 64, column = blockIdx.x * N;

  if (threadIdx.x == 0) {
    for (int i = 0; i < Storage::kStages; ++i) mbarrier_init(full + i, 1);
    fence_barrier_init();
    prefetch_tensor_map(&maps.a);
    prefetch_tensor_map(&maps.b);
  }
  __syncthreads();

  const int k_iterations = (inner + K - 1) / K;
  const auto load = [&](int k) {
    uint8_t* const stage = stages + k % Storage::kStages * Storage::kStageBytes;
    uint64_t* const barrier = full + k % Storage::kStages;
    mbarrier_arrive_expect_tx(barrier, Storage::kStageBytes);
    tma_load(stage, &maps.a, barrier, k * K, row);
    tma_load(stage + Storage::kA, &maps.b, barrier, k * K, column);
  };
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0;
  if (threadIdx.x == 0) load(0);
  for (int k = 0; k < k_iterations; ++k) {
    if (threadIdx.x == 0 && k + 1 < k_iterations) load(k + 1);
    const uint32_t stage = shared_address(stages + k % Storage::kStages * Storage::kStageBytes);
    mbarrier_wait(full + k % Storage::kStages, k / Storage::kStages % 2);
    warpgroup_arrive();
#pragma unroll
    for (int byte = 0; byte < 2 * K; byte += 32)
      wgmma<N>(acc, advance_desc(make_smem_desc(stage, 2 * K), byte),
               advance_desc(make_smem_desc(stage + Storage::kA, 2 * K), byte));
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    __syncthreads();  // all warps have read the stage before it is refilled
  }
  warpgroup_fence_operand(acc);

#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int col = acc_col(threadIdx.x, i);
    uint8_t* const box = out + col / 32 * Storage::kOutBytes;
    *reinterpret_cast<__nv_bfloat162*>(box + swizzled(acc_row(threadIdx.x, i), col % 32 * 2, 64)) =
        __floats2bfloat162_rn(acc[i], acc[i + 1]);
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < N / 32; ++i) tma_store(&maps.y, out + i * Storage::kOutBytes, column + i * 32, row);
    tma_store_wait();
  }
}

}  // namespace sf
#endif
