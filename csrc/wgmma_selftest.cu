#include "wgmma_selftest.cuh"

#include <cuda_runtime_api.h>

#include "host.h"
#include "runtime.h"
#include "tensor_map.h"

namespace sf {

namespace {

BoxedTensor boxed_matrix(const void* base, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  return {base,
          2,
          {uint64_t(columns), uint64_t(rows)},
          {2, uint64_t(2 * columns)},
          {uint32_t(box_columns), uint32_t(box_rows)}};
}

template <int N, int K>
int launch(const WgmmaSelftestArgs& args, cudaStream_t stream) {
  using Storage = WgmmaSelftestSharedStorage<N, K>;
  WgmmaSelftestMaps maps{};
  int status = tensor_map(boxed_matrix(args.a, args.rows, args.inner, 64, K), &maps.a);
  if (status == cudaSuccess) status = tensor_map(boxed_matrix(args.b, args.columns, args.inner, N, K), &maps.b);
  if (status == cudaSuccess) status = tensor_map(boxed_matrix(args.y, args.rows, args.columns, 64, 32), &maps.y);
  if (status != cudaSuccess) return status;
  constexpr auto kernel = wgmma_selftest_kernel<N, K>;
  if (const auto error = allow_shared<kernel>(Storage::kSharedBytes)) return error;
  const dim3 grid(ceil_div(args.columns, N), ceil_div(args.rows, 64));
  return launch_kernel<kernel>(grid, 128, Storage::kSharedBytes, stream, maps, int(args.inner));
}

template <int N>
int launch(const WgmmaSelftestArgs& args, cudaStream_t stream) {
  return args.slice == 64 ? launch<N, 64>(args, stream) : launch<N, 32>(args, stream);
}

}  // namespace

const char* why_invalid(const WgmmaSelftestArgs& args) {
  struct Named {
    const char* name;
    const void* pointer;
  };
  for (const Named& each : {Named{"a", args.a}, Named{"b", args.b}, Named{"y", args.y}}) {
    if (each.pointer == nullptr)
      return message("expected an address for %s, got none; pass a tensor's data_ptr()", each.name);
    if (!aligned(each.pointer))
      return message("expected %s to begin at a multiple of 16 bytes, got %p; copy it", each.name, each.pointer);
  }
  if (args.rows < 1 || args.rows > 64 * 65535 || args.columns < 8 || args.columns % 8 != 0 || args.inner < 8 ||
      args.inner % 8 != 0 || args.columns > (1 << 30) || args.inner > (1 << 30))
    return message("expected rows in 1 .. 4,194,240 and columns and inner to be multiples of 8 up to 2^30, got %lld, %lld, "
                   "%lld; pad the matrices", (long long)args.rows, (long long)args.columns, (long long)args.inner);
  const int n = args.tile_columns;
  if (n != 96 && n != 128 && n != 160 && n != 192 && n != 256)
    return message("expected tile_columns among 96, 128, 160, 192, 256, got %d; choose one", n);
  if (args.slice != 64 && args.slice != 32) return message("expected slice to be 64 or 32, got %d; choose one", args.slice);
  return nullptr;
}

}  // namespace sf

int sf_wgmma_selftest(const sf::WgmmaSelftestArgs& args, cudaStream_t stream) {
  switch (args.tile_columns) {
    case 96: return sf::launch<96>(args, stream);
    case 128: return sf::launch<128>(args, stream);
    case 160: return sf::launch<160>(args, stream);
    case 192: return sf::launch<192>(args, stream);
    default: return sf::launch<256>(args, stream);
  }
}
