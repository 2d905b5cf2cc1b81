// The swizzles, matrix descriptors, accumulator layout and tensor maps of csrc/layout.h and csrc/tensor_map.cpp, compared with
// what CuTe (in NVIDIA's CUTLASS) computes for the same layouts. Runs without a GPU; prints lines "what TAB ours TAB CuTe".
//
// Compiled by g++ as if it were nvcc's host pass, which halves the time; tests/test_cuda_encodings.py says how.

#include <cstdio>
#include <cstdlib>
#include <cute/tensor.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <map>
#include <sstream>
#include <string>

#include "layout.h"
#include "runtime.h"
#include "tensor_map.h"

using namespace cute;
using Number = cute::bfloat16_t;

static std::string recorded;  // what the last call of the encoder asked for

// In the place of the driver's: CuTe links against this one, and ours is given it.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  std::map<cuuint64_t, std::string> dimensions;  // by stride: which coordinate is which is the caller's choice
  for (cuuint32_t i = 0; i < rank; ++i) {
    std::ostringstream text;
    text << " | size " << sizes[i] << " stride " << (i ? strides[i - 1] : 2) << " box " << box[i] << " step " << steps[i];
    dimensions[i ? strides[i - 1] : 2] = text.str();
  }
  std::ostringstream text;
  text << "type " << type << " base " << base << " interleave " << interleave << " swizzle " << swizzle << " fill " << fill;
  for (const auto& each : dimensions) text << each.second;
  recorded = text.str();
  return CUDA_SUCCESS;
}

// tensor_map() is not called here, and encode() needs no CUDA runtime.
const sf::Runtime& sf::runtime() { std::abort(); }

static void line(const std::string& what, const std::string& ours, const std::string& cutes) {
  std::printf("%s\t%s\t%s\n", what.c_str(), ours.c_str(), cutes.c_str());
}
static void line(const std::string& what, uint64_t ours, uint64_t cutes) {
  line(what, std::to_string(ours), std::to_string(cutes));
}

template <int channels>
using Atom = std::conditional_t<channels == 64, GMMA::Layout_K_SW128_Atom<Number>, GMMA::Layout_K_SW64_Atom<Number>>;

// Byte offset of every element of a box of `rows` x `channels`.
template <int rows, int channels>
void swizzles() {
  const auto layout = as_position_independent_swizzle_layout(tile_to_shape(Atom<channels>{}, Shape<Int<rows>, Int<channels>>{}));
  const std::string box = "swizzle of " + std::to_string(rows) + " x " + std::to_string(channels) + ", ";
  for (int row = 0; row < rows; ++row)
    for (int channel = 0; channel < channels; ++channel)
      line(box + std::to_string(row) + " " + std::to_string(channel), sf::swizzled(row, channel * 2, channels * 2),
           layout(row, channel) * 2);
}

// Descriptors of both operands of a 64 x N wgmma, at every 16 elements of K and every 64 rows.
template <int N, int channels, class Instruction>
void descriptors() {
  const std::string name = "N " + std::to_string(N) + ", " + std::to_string(channels) + " channels";
  alignas(1024) static Number memory[256 * 64];
  const auto mma = make_tiled_mma(Instruction{}).get_slice(0);
  const auto a = make_tensor(make_smem_ptr(memory), tile_to_shape(Atom<channels>{}, Shape<_128, Int<channels>>{}));
  const auto b = make_tensor(make_smem_ptr(memory), tile_to_shape(Atom<channels>{}, Shape<Int<N>, Int<channels>>{}));
  const auto descs_a = mma.make_fragment_A(mma.partition_A(a));  // (one, blocks of 64 rows, steps of 16)
  const auto descs_b = mma.make_fragment_B(mma.partition_B(b));
  // CuTe takes no address on the host and begins at 0
  const uint64_t first = sf::make_smem_desc(0, channels * 2);
  for (int k = 0; k < channels / 16; ++k) {
    for (int block = 0; block < 2; ++block)
      line("first factor, " + name + ", block " + std::to_string(block) + " step " + std::to_string(k),
           sf::advance_desc(first, block * 64 * channels * 2 + 32 * k), uint64_t(descs_a(0, block, k)));
    line("second factor, " + name + ", step " + std::to_string(k), sf::advance_desc(first, 32 * k), uint64_t(descs_b(0, 0, k)));
  }
  // the accumulator layout: (thread, i) -> row + 64 * column
  const typename MMA_Traits<Instruction>::CLayout sums{};
  if (channels == 64)
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < N / 2; ++i)
        line("sum, N " + std::to_string(N) + ", thread " + std::to_string(thread) + " number " + std::to_string(i),
             sf::acc_row(thread, i) + 64 * sf::acc_col(thread, i), int(sums(thread, i)));
}

// The map of a video, and of a weight, with their boxes.
template <int channels, int columns, int rows>
void maps() {
  const uint64_t C = 160, W = 37, H = 21, T = 5, B = 3;
  auto* const base = reinterpret_cast<Number*>(0x7f0000000000);
  const auto video = make_tensor(make_gmem_ptr(base), make_shape(C, W, H, T, B),
                                 make_stride(_1{}, C, C * W, C * W * H, C * W * H * (T + 2)));
  // shared memory: channels innermost, pixels in rows of the swizzle's atom
  const auto flat = tile_to_shape(Atom<channels>{}, Shape<Int<columns * rows>, Int<channels>>{});
  const auto shared = composition(
      flat, make_layout(make_shape(Int<channels>{}, Int<columns>{}, Int<rows>{}, _1{}, _1{}),
                        make_stride(Int<columns * rows>{}, _1{}, Int<columns>{}, _0{}, _0{})));
  CUtensorMap map;
  sf::BoxedTensor mine{base, 5, {C, W, H, T, B}, {2, 2 * C, 2 * C * W, 2 * C * W * H, 2 * C * W * H * (T + 2)},
                       {channels, columns, rows, 1, 1}};
  sf::encode(&cuTensorMapEncodeTiled, mine, &map);
  const std::string ours = recorded;
  recorded = "";
  (void)make_tma_copy(SM90_TMA_LOAD{}, video, shared);
  line("map of a video, " + std::to_string(channels) + " x " + std::to_string(columns) + " x " + std::to_string(rows), ours,
       recorded);
}

template <int N, int channels>
void weight_map() {
  const uint64_t C = 160, taps = 27, O = 320;
  auto* const base = reinterpret_cast<Number*>(0x7f0000000000);
  const auto weight = make_tensor(make_gmem_ptr(base), make_shape(C, taps, O), make_stride(_1{}, C, C * taps));
  const auto flat = tile_to_shape(Atom<channels>{}, Shape<Int<N>, Int<channels>>{});
  const auto shared = composition(flat, make_layout(make_shape(Int<channels>{}, _1{}, Int<N>{}),
                                                    make_stride(Int<N>{}, _0{}, _1{})));
  CUtensorMap map;
  sf::encode(&cuTensorMapEncodeTiled, {base, 3, {C, taps, O}, {2, 2 * C, 2 * C * taps}, {channels, 1, N}}, &map);
  const std::string ours = recorded;
  recorded = "";
  (void)make_tma_copy(SM90_TMA_LOAD{}, weight, shared);
  line("map of a weight, N " + std::to_string(N) + ", " + std::to_string(channels) + " channels", ours, recorded);
}

int main() {
  swizzles<256, 64>();
  swizzles<256, 32>();
#define SF_WIDTH(N)                                                                                                       \
  descriptors<N, 64, SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>>();             \
  descriptors<N, 32, SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>>();
  SF_WIDTH(96)
  SF_WIDTH(128)
  SF_WIDTH(160)
  SF_WIDTH(192)
  SF_WIDTH(256)
  weight_map<96, 64>();
  weight_map<256, 32>();
  maps<64, 16, 16>();
  maps<32, 64, 4>();
  maps<64, 8, 16>();
  return 0;
}
