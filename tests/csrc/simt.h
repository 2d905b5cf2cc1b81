// Blocks of CUDA threads on a CPU, a std::thread each, for one kernel's test under sanitizers. Blocks run one after another.
// Barriers and shuffles are real ones, so that a thread sanitizer sees what only their absence would let race, and shared
// memory is a heap block of just the size that was asked for, so that an address sanitizer sees what goes past its end.
#pragma once

#include <pthread.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  float lanes[32];
};

struct Block {
  Block(int threads, int bytes)
      : barrier(threads), warps(threads / 32), shared(static_cast<float4*>(std::malloc(bytes)), std::free) {}
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<float4, void (*)(void*)> shared;
};

struct Index {
  unsigned x = 0;
};

inline thread_local Block* block = nullptr;

}  // namespace simt

inline thread_local simt::Index threadIdx, blockIdx, blockDim;

inline void __syncthreads() { simt::block->barrier.wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  simt::Warp& warp = simt::block->warps[threadIdx.x / 32];
  warp.lanes[threadIdx.x % 32] = value;
  warp.barrier.wait();
  const float received = warp.lanes[(threadIdx.x % 32) ^ mask];
  warp.barrier.wait();
  return received;
}

inline float __uint_as_float(unsigned bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}
inline unsigned __float_as_uint(float number) {
  unsigned bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

namespace sf {

// More accurate than the GPU's, which are within 2 ulp.
inline float exp2_approx(float x) { return std::exp2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }

}  // namespace sf

#define SF_SHARED(name) float4* const name = simt::block->shared.get()

#define SF_LAUNCH(kernel, blocks, threads, shared, stream, ...)                    \
  [&] {                                                                            \
    for (int number = 0; number < (blocks); ++number) {                            \
      simt::Block one(threads, shared);                                            \
      std::vector<std::thread> running;                                            \
      for (int thread = 0; thread < (threads); ++thread)                           \
        running.emplace_back([&, thread] {                                         \
          simt::block = &one;                                                      \
          threadIdx.x = thread, blockIdx.x = number, blockDim.x = (threads);       \
          kernel(__VA_ARGS__);                                                     \
        });                                                                        \
      for (std::thread& each : running) each.join();                               \
    }                                                                              \
    return 0;                                                                      \
  }()
