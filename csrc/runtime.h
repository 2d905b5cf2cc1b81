// The CUDA runtime as a thread-local table of functions.
//
// Launchers call the runtime through runtime() only, so that the emulator (emulated.cpp, sora_fast/emulator) can replace the
// GPU: all of a launch but the kernel's execution is the same.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_map.h"

namespace sf {

struct Runtime {
  cudaError_t (*get_device)(int* device);
  cudaError_t (*set_device)(int device);
  cudaError_t (*count_sms)(int* count);  // of the current device
  cudaError_t (*allow_shared)(const void* kernel, int bytes);  // dynamic shared memory
  // `name`: kernel_name() of `kernel`; `arguments`: the addresses of the arguments
  cudaError_t (*launch)(const char* name, const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                        cudaStream_t stream);
  int (*find_encoder)(Encoder* encoder);  // cuTensorMapEncodeTiled: 0, a cudaError_t, or kRefused
};

// This thread's table: CUDA's, or the one given to replace_runtime().
const Runtime& runtime();

// Redirects this thread's launches to `other`; null restores CUDA.
void replace_runtime(const Runtime* other);

// "... [with auto Kernel = causal_conv3d_kernel<96, 1>]": without a driver a kernel's host stub has no other name.
template <auto Kernel>
const char* kernel_name() {
  return __PRETTY_FUNCTION__;
}

// Kernel<<<grid, block, shared, stream>>>(arguments...)
template <auto Kernel, class... Parameters>
cudaError_t launch_as(void (*)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                      Parameters... arguments) {
  void* addresses[] = {&arguments...};
  return runtime().launch(kernel_name<Kernel>(), reinterpret_cast<const void*>(Kernel), grid, block, addresses, shared, stream);
}

template <auto Kernel, class... Arguments>
cudaError_t launch_kernel(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  return launch_as<Kernel>(Kernel, grid, block, shared, stream, arguments...);
}

// Opts a kernel in to `shared` bytes of dynamic shared memory, beyond the default of 48 KB.
template <auto Kernel>
cudaError_t allow_shared(int shared) {
  return runtime().allow_shared(reinterpret_cast<const void*>(Kernel), shared);
}

}  // namespace sf
