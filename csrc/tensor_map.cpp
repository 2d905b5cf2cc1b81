#include "tensor_map.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <mutex>

#include "host.h"
#include "runtime.h"

namespace sf {

bool BoxedTensor::operator==(const BoxedTensor& other) const {
  return base == other.base && rank == other.rank && std::equal(sizes, sizes + rank, other.sizes) &&
         std::equal(strides, strides + rank, other.strides) && std::equal(box, box + rank, other.box);
}

CUresult encode(Encoder encoder, const BoxedTensor& tensor, CUtensorMap* map) {
  const CUtensorMapSwizzle swizzle = row_bytes(tensor) == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : row_bytes(tensor) == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                               : CU_TENSOR_MAP_SWIZZLE_NONE;
  const cuuint32_t steps[BoxedTensor::kMaxRank] = {1, 1, 1, 1, 1};  // element strides: no element is skipped
  // float16 is copied as bfloat16: the type matters only for the out-of-bounds fill, which is 0
  return encoder(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, tensor.rank, const_cast<void*>(tensor.base), tensor.sizes,
                 tensor.strides + 1, tensor.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

namespace {

struct Entry {
  Encoder encoder;
  BoxedTensor tensor;
  CUtensorMap map;
};

constexpr size_t kKept = 256;  // of the cache; a caching allocator gives a model's layers the same addresses in each step

}  // namespace

int tensor_map(const BoxedTensor& tensor, CUtensorMap* map) {
  static std::mutex lock;
  static std::list<Entry> entries;  // most recently used first
  Encoder encoder = nullptr;
  if (const int status = runtime().find_encoder(&encoder)) return status;
  const std::lock_guard<std::mutex> locked(lock);
  const auto same = std::find_if(entries.begin(), entries.end(),
                                 [&](const Entry& e) { return e.encoder == encoder && e.tensor == tensor; });
  if (same != entries.end()) {
    entries.splice(entries.begin(), entries, same);
    *map = same->map;
    return cudaSuccess;
  }
  Entry made{encoder, tensor, {}};
  if (const CUresult status = encode(encoder, tensor, &made.map); status != CUDA_SUCCESS)
    return refuse(message("expected a tensor that TMA supports, got CUresult %d from cuTensorMapEncodeTiled; "
                      "strides must be multiples of 16 bytes and boxes of 256 at most", int(status)));
  if (entries.size() == kKept) entries.pop_back();
  entries.push_front(made);
  *map = made.map;
  return cudaSuccess;
}

}  // namespace sf
