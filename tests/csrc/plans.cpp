// Dynamic shared memory of every instantiation: g++ -std=c++17 -I csrc; prints "kernel bytes".
#include <algorithm>
#include <cstdio>
#include <initializer_list>

#include "convolution.cuh"
#include "normalization.cuh"
#include "wgmma_selftest.cuh"

template <int N>
void plans() {
  for (const int full : {-1, 1, 2})
    std::printf("causal_conv3d_kernel<%d, %d> %d\n", N, full, sf::ConvolutionSharedStorage<N>::kSharedBytes);
  std::printf("wgmma_selftest_kernel<%d, 64> %d\n", N, sf::WgmmaSelftestSharedStorage<N, 64>::kSharedBytes);
  std::printf("wgmma_selftest_kernel<%d, 32> %d\n", N, sf::WgmmaSelftestSharedStorage<N, 32>::kSharedBytes);
}

// The most that channels which need so many elements per lane ask for.
void norm_act_plan(int elements) {
  int most = 0;
  for (int channels = 1; channels <= sf::kMaxChannels; ++channels)
    if (sf::norm_act_elements(channels) == elements) most = std::max(most, sf::norm_act_shared(channels));
  for (const char* y : {"float", "__nv_bfloat16", "__half"})
    std::printf("norm_act_kernel<float, %s, 4, %d> %d\n", y, elements / 4, most);
  for (const char* x : {"__nv_bfloat16", "__half"}) std::printf("norm_act_kernel<%s, %s, 8, %d> %d\n", x, x, elements / 8, most);
}

int main() {
  for (const int elements : {8, 16, 24, 32}) norm_act_plan(elements);
  plans<96>(), plans<128>(), plans<160>(), plans<192>(), plans<256>();
  return 0;
}
