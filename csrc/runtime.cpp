#include "runtime.h"

#include <atomic>

#include "host.h"

namespace sf {

namespace {

cudaError_t count_sms(int* count) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

cudaError_t allow(const void* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

cudaError_t launch(const char*, const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

int find_encoder(Encoder* encoder) {
  static std::atomic<Encoder> found = nullptr;  // a look-up takes microseconds, and every launch needs it
  if ((*encoder = found)) return cudaSuccess;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess) return status;
  if (result != cudaDriverEntryPointSuccess)
    return refuse(message("expected a driver with tensor maps (CUDA 12), got one without; update the driver"));
  found = *encoder = reinterpret_cast<Encoder>(entry);
  return cudaSuccess;
}

constexpr Runtime kCuda = {cudaGetDevice, cudaSetDevice, count_sms, allow, launch, find_encoder};
thread_local const Runtime* replaced = nullptr;

}  // namespace

const Runtime& runtime() { return replaced == nullptr ? kCuda : *replaced; }

void replace_runtime(const Runtime* other) { replaced = other; }

}  // namespace sf
