// Tensor maps: what the copy engine (TMA) of Hopper is told about a tensor and the boxes to be copied from it.
//
// They are encoded on the host by the driver, whose function is looked up through the CUDA runtime: nothing links against
// the driver, so that the extension loads on machines without one.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sf {

// A tensor of 16-bit numbers, its innermost dimension first, and the box one copy moves. Rows of a box (its innermost
// dimension) are as wide as the swizzle's span: 64 numbers with 128 bytes, 32 with 64.
struct BoxedTensor {
  static constexpr int kMost = 5;
  const void* base = nullptr;
  int rank = 0;
  uint64_t sizes[kMost] = {};
  uint64_t strides[kMost] = {};  // in bytes; strides[0] is 2
  uint32_t box[kMost] = {};

  bool operator==(const BoxedTensor& other) const;
};

constexpr int row_bytes(const BoxedTensor& tensor) { return int(tensor.box[0]) * 2; }

// The driver's cuTensorMapEncodeTiled, or a stand-in that a test gives.
using Encoder = decltype(&cuTensorMapEncodeTiled);

// Encodes `tensor` with `encoder`; boxes are swizzled by their row's bytes, numbers out of bounds are read as zero.
CUresult encode(Encoder encoder, const BoxedTensor& tensor, CUtensorMap* map);

// The same with the driver's encoder, from a cache of the last maps made: 0, a cudaError_t, or kRefused with said().
int tensor_map(const BoxedTensor& tensor, CUtensorMap* map);

}  // namespace sf
