// The instructions of Hopper (sm_90a) that the kernels here are made of, one small function each.
//
// PTX ISA 8.0 and later: sections "mbarrier", "cp.async.bulk.tensor", "wgmma" (asynchronous warpgroup level matrix
// instructions) and "setmaxnreg". A kernel reads as: a producer thread expects bytes on a barrier and has the copy engine
// (TMA) fill a slot of shared memory; warpgroups wait on the barrier and multiply straight from the slot.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "layout.h"

namespace sf::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ------------------------------------------------------------------------------------------------------------ barriers
// A barrier's phase ends when all arrivals and all expected bytes are there; `parity` is that of the phase waited for.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the last barrier_init and before __syncthreads: the copy engine sees the barriers too.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_and_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
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

// ---------------------------------------------------------------------------------------------------------- copy engine
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor to shared memory; its bytes, those out of bounds as zeros, count towards `barrier`.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                         int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// What this thread wrote to shared memory by plain stores, before the copy engine or a product reads it.
__device__ __forceinline__ void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box from shared memory to a tensor; what lies out of bounds is not written.
__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* shared, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1)
               : "memory");
}

// Until every store_box of this thread has read its shared memory, and has written.
__device__ __forceinline__ void finish_stores() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// ------------------------------------------------------------------------------------------------------------- products
// Between plain writes of sums (or the last product's end) and the first product that adds to them.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Those issued since the last call are one group.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` groups are unfinished.
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The compiler may not move reads or writes of sums across this: it cannot see that products in flight change them.
template <int numbers>
__device__ __forceinline__ void pin(float (&sums)[numbers]) {
#pragma unroll
  for (int i = 0; i < numbers; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums += a (64 x 16) * b (N x 16)^T in bfloat16, both in shared memory with K innermost, given by their descriptors
// (layout.h). Of the 64 x N sums a thread holds N / 2; sum_row and sum_column in layout.h say which.
template <int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b);

#define SF_8(i)                                                                                                   \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SF_16(i) SF_8(i), SF_8(i + 8)
#define SF_32(i) SF_16(i), SF_16(i + 16)
#define SF_64(i) SF_32(i), SF_32(i + 32)
#define SF_TEN(a) \
  "%" a "0, %" a "1, %" a "2, %" a "3, %" a "4, %" a "5, %" a "6, %" a "7, %" a "8, %" a "9"
// %0 to %9, %10 to %19, ...: ten names at a time
#define SF_NAMES_0_47                                                                                               \
  SF_TEN("") ", " SF_TEN("1") ", " SF_TEN("2") ", " SF_TEN("3") ", %40, %41, %42, %43, %44, " \
                                                                                    "%45, %46, %47"
#define SF_NAMES_0_63 SF_NAMES_0_47 ", %48, %49, " SF_TEN("5") ", %60, %61, %62, %63"
#define SF_NAMES_0_79 SF_NAMES_0_63 ", %64, %65, %66, %67, %68, %69, " SF_TEN("7")
#define SF_NAMES_0_95 SF_NAMES_0_79 ", " SF_TEN("8") ", %90, %91, %92, %93, %94, %95"
#define SF_NAMES_0_127                                                                                \
  SF_NAMES_0_95 ", %96, %97, %98, %99, " SF_TEN("10") ", " SF_TEN("11") ", %120, %121, %122, %123, %124, " \
                                                                                  "%125, %126, %127"

// A and B: the descriptors' operand numbers, which follow those of the N / 2 sums.
#define SF_MULTIPLY(N, NAMES, A, B, ...)                                                                            \
  template <>                                                                                                       \
  __device__ __forceinline__ void multiply<N>(float (&sums)[N / 2], uint64_t a, uint64_t b) {                       \
    asm volatile(                                                                                                   \
        "{\n"                                                                                                       \
        ".reg .pred add;\n"                                                                                         \
        "setp.eq.u32 add, 0, 0;\n"                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n" \
        "}\n"                                                                                                       \
        : __VA_ARGS__                                                                                               \
        : "l"(a), "l"(b));                                                                                          \
  }

SF_MULTIPLY(96, SF_NAMES_0_47, 48, 49, SF_32(0), SF_16(32))
SF_MULTIPLY(128, SF_NAMES_0_63, 64, 65, SF_64(0))
SF_MULTIPLY(160, SF_NAMES_0_79, 80, 81, SF_64(0), SF_16(64))
SF_MULTIPLY(192, SF_NAMES_0_95, 96, 97, SF_64(0), SF_32(64))
SF_MULTIPLY(256, SF_NAMES_0_127, 128, 129, SF_64(0), SF_64(64))

// ------------------------------------------------------------------------------------------------------------ registers
// Of this warpgroup's threads, from now on; the kernel must be bounded to one block a multiprocessor.
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace sf::sm90
