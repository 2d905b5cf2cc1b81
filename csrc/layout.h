// Where numbers lie: swizzled rows in shared memory, the descriptors that products take, and the sums a thread holds.
// Plain functions of numbers, for the device and for the tests on the host.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SF_HOST_DEVICE inline
#endif

namespace sf {

// The byte of a box in shared memory that holds byte `byte` of row `row`; rows are of 128 or 64 bytes, boxes begin at
// multiples of 1024. The copy engine exchanges 16-byte pieces within a row, so that eight rows' same pieces lie in
// different banks.
SF_HOST_DEVICE constexpr int swizzled(int row, int byte, int row_bytes) {
  const int linear = row * row_bytes + byte;
  return row_bytes == 128 ? linear ^ ((linear >> 3) & 0x70) : linear ^ ((linear >> 3) & 0x30);
}

// What a product is told about one factor in shared memory, K innermost, in rows of 128 or 64 swizzled bytes: where it
// begins, how far 8 rows are from the next 8, and the swizzle. PTX ISA, "matrix descriptor": bits 0-13 address / 16,
// 16-29 leading offset / 16 (of no meaning here, 1), 32-45 stride / 16, 62-63 swizzle (1: 128 bytes, 2: 64 bytes).
SF_HOST_DEVICE constexpr uint64_t factor(uint32_t address, int row_bytes) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(8 * row_bytes >> 4) << 32 |
         uint64_t(row_bytes == 128 ? 1 : 2) << 62;
}

// The same factor from `bytes` on: 32 for the next 16 numbers of K, whole rows times 8 for other rows.
SF_HOST_DEVICE constexpr uint64_t advanced(uint64_t factor, int bytes) { return factor + (bytes >> 4); }

// Of the 64 x N sums of a product, thread `thread` of its warpgroup holds number i at this row and column.
SF_HOST_DEVICE constexpr int sum_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
SF_HOST_DEVICE constexpr int sum_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Of the four lanes that share a row of sums, each has 2 columns of 4 blocks of 8: `sums` block by block. Afterwards lane q
// has the 8 columns of block q, to be written at once. exchange(number, bit) gives what the lane that differs in `bit` gave.
template <class Exchange>
SF_HOST_DEVICE void gather_columns(float (&sums)[8], int lane, Exchange exchange) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &here = sums[2 * low + i], &there = sums[2 * (low | bit) + i];
        const float received = exchange(upper ? here : there, bit);
        (upper ? here : there) = received;
      }
    }
  }
}

}  // namespace sf
