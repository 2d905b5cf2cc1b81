// Shared memory of every instantiation, as its plan says: g++ -std=c++17 -I csrc; prints "kernel bytes".
#include <cstdio>
#include <initializer_list>

#include "convolution.cuh"
#include "product.cuh"

template <int N>
void plans() {
  for (const int full : {-1, 1, 2}) std::printf("causal_conv3d_kernel<%d, %d> %d\n", N, full, sf::ConvolutionPlan<N>::kShared);
  std::printf("product_kernel<%d, 64> %d\n", N, sf::ProductPlan<N, 64>::kShared);
  std::printf("product_kernel<%d, 32> %d\n", N, sf::ProductPlan<N, 32>::kShared);
}

int main() {
  plans<96>(), plans<128>(), plans<160>(), plans<192>(), plans<256>();
  return 0;
}
