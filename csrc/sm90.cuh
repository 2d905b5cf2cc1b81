// Wrappers of the sm_90a PTX instructions that the kernels use, named as in CUTLASS.
//
// PTX ISA 8.0 and later, sections "mbarrier", "cp.async.bulk.tensor", "wgmma" and "setmaxnreg". A producer thread arms an
// mbarrier with the expected bytes and has TMA fill a pipeline stage in shared memory; consumer warpgroups wait on the
// mbarrier and issue wgmma on the stage.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "layout.h"

namespace sf::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ----------------------------------------------------------------------------------------------------------- mbarriers
// A phase completes once all arrivals and all expected bytes have come; `parity` is that of the phase to wait for.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the last mbarrier_init, before __syncthreads: makes the initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// ------------------------------------------------------------------------------------------------------------------ TMA
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Load a box of a tensor to shared memory. Out-of-bounds elements are filled with 0 and count towards `barrier`'s bytes.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                         int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Makes this thread's generic-proxy stores to shared memory visible to the async proxy (TMA, wgmma).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Store a box from shared memory to a tensor; out-of-bounds elements are not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* shared, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1)
               : "memory");
}

// Commit this thread's TMA stores and wait until they have completed.
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------------------- wgmma
// Orders register accesses of the accumulators before the first wgmma that uses them.
__device__ __forceinline__ void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// All wgmma issued since the last call form one wgmma-group.
__device__ __forceinline__ void warpgroup_commit_batch() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `pending` wgmma-groups are in flight.
template <int pending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Compiler fence: accumulator accesses do not move across it. The compiler cannot see that wgmma in flight writes them.
template <int elements>
__device__ __forceinline__ void warpgroup_fence_operand(float (&acc)[elements]) {
#pragma unroll
  for (int i = 0; i < elements; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// acc += A (64 x 16) * B (N x 16)^T, bfloat16, both K-major in shared memory, given by their matrix descriptors (layout.h).
// A thread holds N / 2 of the 64 x N accumulators: those at acc_row and acc_col (layout.h).
template <int N>
__device__ __forceinline__ void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b);

#define SF_8(i)                                                                                                   \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define SF_16(i) SF_8(i), SF_8(i + 8)
#define SF_32(i) SF_16(i), SF_16(i + 16)
#define SF_64(i) SF_32(i), SF_32(i + 32)
#define SF_TEN(a) \
  "%" a "0, %" a "1, %" a "2, %" a "3, %" a "4, %" a "5, %" a "6, %" a "7, %" a "8, %" a "9"
// asm operands %0 to %9, %10 to %19, ..., ten at a time
#define SF_NAMES_0_47                                                                                               \
  SF_TEN("") ", " SF_TEN("1") ", " SF_TEN("2") ", " SF_TEN("3") ", %40, %41, %42, %43, %44, " \
                                                                                    "%45, %46, %47"
#define SF_NAMES_0_63 SF_NAMES_0_47 ", %48, %49, " SF_TEN("5") ", %60, %61, %62, %63"
#define SF_NAMES_0_79 SF_NAMES_0_63 ", %64, %65, %66, %67, %68, %69, " SF_TEN("7")
#define SF_NAMES_0_95 SF_NAMES_0_79 ", " SF_TEN("8") ", %90, %91, %92, %93, %94, %95"
#define SF_NAMES_0_127                                                                                \
  SF_NAMES_0_95 ", %96, %97, %98, %99, " SF_TEN("10") ", " SF_TEN("11") ", %120, %121, %122, %123, %124, " \
                                                                                  "%125, %126, %127"

// A and B: asm operand numbers of the descriptors, which follow the N / 2 accumulators.
#define SF_WGMMA(N, NAMES, A, B, ...)                                                                            \
  template <>                                                                                                       \
  __device__ __forceinline__ void wgmma<N>(float (&acc)[N / 2], uint64_t a, uint64_t b) {                       \
    asm volatile(                                                                                                   \
        "{\n"                                                                                                       \
        ".reg .pred add;\n"                                                                                         \
        "setp.eq.u32 add, 0, 0;\n"                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n" \
        "}\n"                                                                                                       \
        : __VA_ARGS__                                                                                               \
        : "l"(a), "l"(b));                                                                                          \
  }

SF_WGMMA(96, SF_NAMES_0_47, 48, 49, SF_32(0), SF_16(32))
SF_WGMMA(128, SF_NAMES_0_63, 64, 65, SF_64(0))
SF_WGMMA(160, SF_NAMES_0_79, 80, 81, SF_64(0), SF_16(64))
SF_WGMMA(192, SF_NAMES_0_95, 96, 97, SF_64(0), SF_32(64))
SF_WGMMA(256, SF_NAMES_0_127, 128, 129, SF_64(0), SF_64(64))

// ----------------------------------------------------------------------------------------------------------- setmaxnreg
// Registers per thread of this warpgroup from here on; __launch_bounds__ must limit the kernel to one CTA per SM.
template <int registers>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace sf::sm90
