// The CUDA runtime as launchers see it: one table of functions, of which each thread can have its own.
//
// A launcher calls nothing of the runtime but through runtime(), so that the emulator (emulated.cpp, sora_fast/emulator) takes
// the place of the GPU and everything of a launch but the kernel is what a GPU gets.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_map.h"

namespace sf {

struct Runtime {
  cudaError_t (*get_device)(int* device);
  cudaError_t (*set_device)(int device);
  cudaError_t (*count_sms)(int* count);  // of the current device
  cudaError_t (*allow_shared)(const void* kernel, int bytes);  // of dynamic shared memory
  // `name`: of `kernel`, as kernel_name() has it; `arguments`: the address of each
  cudaError_t (*launch)(const char* name, const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                        cudaStream_t stream);
  int (*find_encoder)(Encoder* encoder);  // cuTensorMapEncodeTiled: 0, a cudaError_t, or kRefused
};

// This thread's table: CUDA's own, or the one that replace_runtime() put in its place.
const Runtime& runtime();

// From here on this thread's launches go to `other`; null: to CUDA again.
void replace_runtime(const Runtime* other);

// "... [with auto Kernel = causal_conv3d_kernel<96, 1>]": a stub on the host has no other name without a driver.
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

// Lets a kernel have `shared` bytes of dynamic shared memory, more than the 48 KB that it may have unasked.
template <auto Kernel>
cudaError_t allow_shared(int shared) {
  return runtime().allow_shared(reinterpret_cast<const void*>(Kernel), shared);
}

}  // namespace sf
