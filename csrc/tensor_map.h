// TMA tensor maps (CUtensorMap).
//
// The driver encodes them on the host. Its function is looked up through the CUDA runtime, so the extension does not link
// against the driver and loads on machines without one.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sf {

// A tensor of 16-bit elements, innermost dimension first, and the box that one TMA instruction copies. The innermost
// dimension of a box is as wide as the swizzle: 64 elements for 128 bytes, 32 for 64; other widths have no swizzle.
struct BoxedTensor {
  static constexpr int kMaxRank = 5;
  const void* base = nullptr;
  int rank = 0;
  uint64_t sizes[kMaxRank] = {};
  uint64_t strides[kMaxRank] = {};  // in bytes; strides[0] is 2
  uint32_t box[kMaxRank] = {};

  bool operator==(const BoxedTensor& other) const;
};

constexpr int row_bytes(const BoxedTensor& tensor) { return int(tensor.box[0]) * 2; }

// The driver's cuTensorMapEncodeTiled, or a test's fake.
using Encoder = decltype(&cuTensorMapEncodeTiled);

// Encodes `tensor` with `encoder`, with the swizzle of its row bytes; out-of-bounds elements are filled with 0.
CUresult encode(Encoder encoder, const BoxedTensor& tensor, CUtensorMap* map);

// The same with the driver's encoder and an LRU cache: 0, a cudaError_t, or kRefused with last_message().
int tensor_map(const BoxedTensor& tensor, CUtensorMap* map);

}  // namespace sf
