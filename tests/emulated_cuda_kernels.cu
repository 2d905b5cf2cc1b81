// A user's kernels for tests/test_emulated_cu_file.py: right ones, and one fault each that the emulator has to find.
#include <cuda_pipeline.h>

template <int N>
__global__ void scale(const float* x, float* y, int n, float factor) {
  const int at = blockIdx.x * N + threadIdx.x;
  if (at < n) y[at] = factor * x[at];
}
template __global__ void scale<64>(const float*, float*, int, float);

__global__ void unmasked(const float* x, float* y) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  y[at] = x[at];  // no mask
}

__global__ void reversed(const float* x, float* y, bool together) {
  extern __shared__ float tile[];
  tile[threadIdx.x] = x[threadIdx.x];
  if (together) __syncthreads();
  y[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];  // of another warp
}

__global__ void unwritten(const float* x, float* y, int written) {
  __shared__ float tile[64];
  if (threadIdx.x < written) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];  // of what was written
}

__global__ void copied(const float* x, float* y, bool wait) {
  __shared__ __align__(16) float tile[64];
  if (threadIdx.x < 16) __pipeline_memcpy_async(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];  // of what was copied
}
