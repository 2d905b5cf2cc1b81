#include "convolution.cuh"

#include <cuda_runtime_api.h>

#include "host.h"
#include "runtime.h"
#include "tensor_map.h"

namespace sf {

namespace {

// N of a tile: the largest supported divisor of the output channels (384 is two tiles of 192). 0: there is none.
int tile_channels(int64_t out_channels) {
  for (const int n : {256, 192, 160, 128, 96})
    if (out_channels % n == 0) return n;
  return 0;
}

// The kernel's FULL: K slices of 64 before the tail of 32, or -1 without a tail; -2: unsupported channels.
int full_slices(int64_t in_channels) {
  if (in_channels % 64 == 0) return -1;
  return in_channels == 96 ? 1 : in_channels == 160 ? 2 : -2;
}

// Boxes of `channels` x `columns` x `rows`.
BoxedTensor boxed_video(const void* base, const CausalConv3dArgs& a, int64_t frames, int64_t stride, int channels,
                        int columns, int rows) {
  const uint64_t pixel = 2 * a.in_channels, line = pixel * a.width, frame = line * a.height;
  return {base,
          5,
          {uint64_t(a.in_channels), uint64_t(a.width), uint64_t(a.height), uint64_t(frames), uint64_t(a.samples)},
          {2, pixel, line, frame, uint64_t(2 * stride)},
          {uint32_t(channels), uint32_t(columns), uint32_t(rows), 1, 1}};
}

BoxedTensor boxed_weight(const CausalConv3dArgs& a, int channels, int out_channels) {
  const uint64_t taps = a.kt * a.kh * a.kw, tap = 2 * a.in_channels;
  return {a.weight,
          3,
          {uint64_t(a.in_channels), taps, uint64_t(a.out_channels)},
          {2, tap, tap * taps},
          {uint32_t(channels), 1, uint32_t(out_channels)}};
}

template <int N, int FULL>
int launch(const CausalConv3dArgs& a, cudaStream_t stream) {
  using Storage = ConvolutionSharedStorage<N>;
  const int columns = best_columns(a.out_height, a.out_width, Storage::kPixels), rows = Storage::kPixels / columns;
  const ConvolutionShape shape{int(a.frames),     int(a.cached),    int(a.out_frames), int(a.out_height), int(a.out_width),
                               int(a.samples),    a.kt,             a.kh,              a.kw,              a.stride_t,
                               a.phase,           a.lookahead,      a.top,             a.left,            a.replicate,
                               int((a.in_channels + 63) / 64), int(a.out_channels / N), rows, columns};
  ConvolutionMaps maps{};
  const auto make = [&](CUtensorMap* wide, CUtensorMap* rest, auto boxed) {
    int status = tensor_map(boxed(64), wide);
    if (status == cudaSuccess && FULL >= 0) status = tensor_map(boxed(32), rest);
    return status;
  };
  int status = make(&maps.x, &maps.x_rest,
                    [&](int channels) { return boxed_video(a.x, a, a.frames, a.x_stride, channels, columns, rows); });
  if (status == cudaSuccess && a.cached > 0)
    status = make(&maps.cache, &maps.cache_rest, [&](int channels) {
      return boxed_video(a.cache, a, a.cached, a.cache_stride, channels, columns, rows);
    });
  if (status == cudaSuccess)
    status = make(&maps.weight, &maps.weight_rest, [&](int channels) { return boxed_weight(a, channels, N); });
  if (status != cudaSuccess) return status;

  int sms = 0;
  constexpr auto kernel = causal_conv3d_kernel<N, FULL>;
  cudaError_t error = runtime().count_sms(&sms);
  if (error == cudaSuccess) error = allow_shared<kernel>(Storage::kSharedBytes);
  if (error != cudaSuccess) return error;
  const ConvolutionTensors tensors{static_cast<const float*>(a.bias), static_cast<const __nv_bfloat16*>(a.residual),
                                   static_cast<__nv_bfloat16*>(a.y), int(a.out_channels)};
  const int64_t tiles = count_tiles(shape);
  const auto grid = unsigned(tiles < sms ? tiles : sms);
  return launch_kernel<kernel>(grid, 384, Storage::kSharedBytes, stream, maps, tensors, shape);
}

template <int N>
int launch(const CausalConv3dArgs& a, cudaStream_t stream) {
  switch (full_slices(a.in_channels)) {
    case 1: return launch<N, 1>(a, stream);
    case 2: return launch<N, 2>(a, stream);
    default: return launch<N, -1>(a, stream);
  }
}

}  // namespace

const char* why_invalid(const CausalConv3dArgs& a) {
  struct Named {
    const char* name;
    const void* pointer;
    bool needed;
  };
  for (const Named& each : {Named{"x", a.x, true}, Named{"weight", a.weight, true}, Named{"y", a.y, true},
                            Named{"cache", a.cache, a.cached > 0}, Named{"bias", a.bias, false},
                            Named{"residual", a.residual, false}}) {
    if (each.needed && each.pointer == nullptr)
      return message("expected an address for %s, got none; pass a tensor's data_ptr()", each.name);
    if (!aligned(each.pointer))
      return message("expected %s to begin at a multiple of 16 bytes, got %p; copy it", each.name, each.pointer);
  }
  struct Size {
    const char* name;
    int64_t size, least;
  };
  for (const Size& each :
       {Size{"samples", a.samples, 1}, Size{"frames", a.frames, 1}, Size{"height", a.height, 1}, Size{"width", a.width, 1},
        Size{"cached", a.cached, 0}, Size{"out_frames", a.out_frames, 1}, Size{"out_height", a.out_height, 1},
        Size{"out_width", a.out_width, 1}, Size{"kt", a.kt, 1}, Size{"kh", a.kh, 1}, Size{"kw", a.kw, 1},
        Size{"stride_t", a.stride_t, 1}, Size{"phase", a.phase, 0}, Size{"lookahead", a.lookahead, 0}, Size{"top", a.top, 0},
        Size{"left", a.left, 0}}) {
    if (each.size < each.least || each.size > (1 << 30))
      return message("expected %s in %lld .. 2^30, got %lld; nothing is launched for an empty output", each.name,
                 (long long)each.least, (long long)each.size);
  }
  if (a.lookahead >= a.kt)
    return message("expected lookahead below kt = %d, got %d; it counts taps after the frame", a.kt, a.lookahead);
  if (full_slices(a.in_channels) == -2 || a.in_channels < 64)
    return message("expected in_channels to be 96, 160 or a multiple of 64, got %lld; use another backend",
                   (long long)a.in_channels);
  if (a.out_channels < 96 || a.out_channels > (1 << 30) || tile_channels(a.out_channels) == 0)
    return message("expected out_channels to be a multiple of 96, 128, 160, 192 or 256, got %lld; use another backend",
               (long long)a.out_channels);
  for (const Size& each : {Size{"x_stride", a.x_stride, 0}, Size{"cache_stride", a.cached > 0 ? a.cache_stride : 0, 0}})
    if (each.size < 0 || each.size % 8 != 0)
      return message("expected %s to be a multiple of 8 elements, got %lld; copy the tensor", each.name,
                     (long long)each.size);
  return nullptr;
}

}  // namespace sf

int sf_causal_conv3d(const sf::CausalConv3dArgs& args, cudaStream_t stream) {
  switch (sf::tile_channels(args.out_channels)) {
    case 96: return sf::launch<96>(args, stream);
    case 128: return sf::launch<128>(args, stream);
    case 160: return sf::launch<160>(args, stream);
    case 192: return sf::launch<192>(args, stream);
    default: return sf::launch<256>(args, stream);
  }
}
