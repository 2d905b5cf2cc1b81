// What CuTe says of shared memory, matrix descriptors and fragments, for sora_fast.emulator to be compared with. Prints
//   layout NAME ROWS K: byte of every element, rows outermost
//   descriptor NAME OPERAND ROWS BLOCK STEP: the 64-bit matrix descriptor of 64 (or N) rows and 16 of K
//   fragment NAME OPERAND THREADS VALUES: row + rows * column of every value of every thread
// Compiled by g++ as if it were nvcc's host pass, as encodings.cpp is; tests/test_emulator_layouts.py reads it.

#include <cstdio>
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

using namespace cute;
using Element = cute::bfloat16_t;

template <class Atom, int rows, int k>
void layout(const char* name) {
  const auto tile = as_position_independent_swizzle_layout(tile_to_shape(Atom{}, Shape<Int<rows>, Int<k>>{}));
  std::printf("layout %s %d %d", name, rows, k);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < k; ++c) std::printf(" %d", int(tile(r, c)) * 2);
  std::printf("\n");
}

template <class Atom, GMMA::Major major, int k>
void descriptors(const char* name) {
  alignas(1024) static Element memory[256 * 64];
  constexpr int rows = 128;
  layout<Atom, rows, k>(name);
  const auto mma = make_tiled_mma(SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<major, major>{}).get_slice(0);
  const auto tile = make_tensor(make_smem_ptr(memory), tile_to_shape(Atom{}, Shape<Int<rows>, Int<k>>{}));
  const auto a = mma.make_fragment_A(mma.partition_A(tile));  // (one, blocks of 64 rows, steps of 16)
  const auto b = mma.make_fragment_B(mma.partition_B(tile));
  for (int step = 0; step < k / 16; ++step) {
    for (int block = 0; block < rows / 64; ++block)
      std::printf("descriptor %s A 64 %d %d %llu\n", name, block, step, (unsigned long long)uint64_t(a(0, block, step)));
    std::printf("descriptor %s B %d 0 %d %llu\n", name, rows, step, (unsigned long long)uint64_t(b(0, 0, step)));
  }
}

template <class Layout>
void fragment(const char* name, const char* operand, Layout const& where) {
  std::printf("fragment %s %s %d %d", name, operand, int(size<0>(where)), int(size<1>(where)));
  for (int thread = 0; thread < size<0>(where); ++thread)
    for (int value = 0; value < size<1>(where); ++value) std::printf(" %d", int(where(thread, value)));
  std::printf("\n");
}

template <class Instruction>
void fragments(const char* name) {
  using Traits = MMA_Traits<Instruction>;
  fragment(name, "A", typename Traits::ALayout{});
  fragment(name, "B", typename Traits::BLayout{});
  fragment(name, "C", typename Traits::CLayout{});
}

int main() {
  constexpr auto K = GMMA::Major::K, MN = GMMA::Major::MN;
  descriptors<GMMA::Layout_K_SW128_Atom<Element>, K, 64>("K_SW128");
  descriptors<GMMA::Layout_K_SW64_Atom<Element>, K, 32>("K_SW64");
  descriptors<GMMA::Layout_K_SW32_Atom<Element>, K, 16>("K_SW32");
  descriptors<GMMA::Layout_K_INTER_Atom<Element>, K, 32>("K_INTER");
  descriptors<GMMA::Layout_MN_SW128_Atom<Element>, MN, 64>("MN_SW128");
  descriptors<GMMA::Layout_MN_SW64_Atom<Element>, MN, 64>("MN_SW64");
  descriptors<GMMA::Layout_MN_SW32_Atom<Element>, MN, 64>("MN_SW32");
  descriptors<GMMA::Layout_MN_INTER_Atom<Element>, MN, 64>("MN_INTER");
  fragments<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16");
  fragments<SM80_16x8x8_F32TF32TF32F32_TN>("m16n8k8_tf32");
  fragments<SM80_16x8x8_F32BF16BF16F32_TN>("m16n8k8");
  using Wgmma = MMA_Traits<SM90::GMMA::MMA_64x96x16_F32BF16BF16_RS<K, K>>;
  fragment("m64n96k16", "A", typename Wgmma::ALayout{});
  fragment("m64n96k16", "C", typename Wgmma::CLayout{});
  return 0;
}
