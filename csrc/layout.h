// Layouts: the swizzle of shared memory, matrix descriptors of wgmma, and the accumulator fragment of a thread. Integer
// functions for device and host, where the tests call them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SF_HOST_DEVICE inline
#endif

namespace sf {

// The offset of byte `byte` of row `row` in a swizzled box in shared memory. Rows have 128 or 64 bytes, boxes are aligned
// to 1024. The swizzle permutes the 16-byte chunks of a row, so that the same chunk of eight rows is in different banks.
SF_HOST_DEVICE constexpr int swizzled(int row, int byte, int row_bytes) {
  const int linear = row * row_bytes + byte;
  return row_bytes == 128 ? linear ^ ((linear >> 3) & 0x70) : linear ^ ((linear >> 3) & 0x30);
}

// The matrix descriptor of a K-major wgmma operand in shared memory, in swizzled rows of 128 or 64 bytes. PTX ISA, "matrix
// descriptor": bits 0-13 address / 16, 16-29 leading dimension byte offset / 16 (ignored when swizzled, 1), 32-45 stride
// byte offset / 16 (from 8 rows to the next 8), 62-63 swizzle (1: 128 bytes, 2: 64 bytes).
SF_HOST_DEVICE constexpr uint64_t make_smem_desc(uint32_t address, int row_bytes) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(8 * row_bytes >> 4) << 32 |
         uint64_t(row_bytes == 128 ? 1 : 2) << 62;
}

// The descriptor `bytes` further on: 32 for the next 16 elements of K, multiples of 8 rows for other rows.
SF_HOST_DEVICE constexpr uint64_t advance_desc(uint64_t desc, int bytes) { return desc + (bytes >> 4); }

// Row and column of accumulator i of thread `thread` in a warpgroup's 64 x N tile.
SF_HOST_DEVICE constexpr int acc_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
SF_HOST_DEVICE constexpr int acc_col(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// A transpose among the four lanes that share an accumulator row. Each lane holds 2 columns of 4 blocks of 8 in `acc`;
// afterwards lane q holds the 8 columns of block q, for one 16-byte store. exchange(value, bit) is __shfl_xor_sync.
template <class Exchange>
SF_HOST_DEVICE void gather_columns(float (&acc)[8], int lane, Exchange exchange) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &here = acc[2 * low + i], &there = acc[2 * (low | bit) + i];
        const float received = exchange(upper ? here : there, bit);
        (upper ? here : there) = received;
      }
    }
  }
}

}  // namespace sf
