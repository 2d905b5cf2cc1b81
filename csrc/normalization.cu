#include "normalization.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "host.h"

namespace sf {

const char* why_invalid(const NormActArgs& a) {
  struct Number {
    const char* name;
    int64_t value, least, most;
  };
  const int64_t most = 1 << 29;  // so that padded sums of two fit into an int
  for (const Number& each : {Number{"samples", a.samples, 0, 2 * most}, Number{"frames", a.frames, 0, most},
                             Number{"height", a.height, 0, most}, Number{"width", a.width, 0, most},
                             Number{"channels", a.channels, 1, kMaxChannels}, Number{"cached", a.cached, 0, most},
                             Number{"kept", a.kept, 0, int64_t(a.cached) + a.frames}, Number{"left", a.left, 0, most / 4},
                             Number{"right", a.right, 0, most / 4}, Number{"top", a.top, 0, most / 4},
                             Number{"bottom", a.bottom, 0, most / 4}, Number{"space_pad", a.space_pad, kZeros, kReflect},
                             Number{"x_dtype", a.x_dtype, kFloat32, kFloat16},
                             Number{"y_dtype", a.y_dtype, kFloat32, kFloat16}})
    if (each.value < each.least || each.value > each.most)
      return message("expected %s in %lld .. %lld, got %lld; call it through sora_fast.ops", each.name,
                     (long long)each.least, (long long)each.most, (long long)each.value);
  if (a.y_dtype != a.x_dtype && a.x_dtype != kFloat32)
    return message("expected y_dtype to be x_dtype's %d of a 16-bit x, got %d; convert x to float32", a.x_dtype, a.y_dtype);
  const int vector = a.x_dtype == kFloat32 ? 4 : 8;
  if (a.channels % vector != 0)
    return message("expected channels to be a multiple of %d in this dtype, got %d; take another backend", vector,
                   a.channels);
  if (a.front != 0 && a.front != a.cached)
    return message("expected front to be 0 or the %d cached frames, got %d; pass one of them", a.cached, a.front);
  if (!a.rms && (a.weight != nullptr || a.bias != nullptr || a.silu))
    return message("expected no weight, bias or silu of a copy, got one; set rms, or leave them out");
  const bool pads_width = a.left + a.right > 0, pads_height = a.top + a.bottom > 0;
  if (a.space_pad != kZeros && ((pads_width && a.width == 0) || (pads_height && a.height == 0)))
    return message("expected pixels to pad with, got frames of %d x %d; pad with zeros", a.height, a.width);
  if (a.space_pad == kReflect && (std::max(a.left, a.right) > std::max(a.width - 1, 0) ||
                                  std::max(a.top, a.bottom) > std::max(a.height - 1, 0)))
    return message("expected reflections smaller than frames of %d x %d, got left %d, right %d, top %d, bottom %d; pad less",
               a.height, a.width, a.left, a.right, a.top, a.bottom);

  const int64_t frame = int64_t(a.samples) * a.height * a.width;
  const bool any_y = int64_t(a.samples) * (a.front + a.frames) * norm_act_rows(a) * norm_act_columns(a) > 0;
  struct Named {
    const char* name;
    const void* pointer;
    bool needed;
    int bytes;
  };
  for (const Named& each : {Named{"x", a.x, frame * a.frames > 0, 16}, Named{"cache", a.cache, frame * a.cached > 0, 16},
                            Named{"weight", a.weight, false, 4}, Named{"bias", a.bias, false, 4},
                            Named{"y", a.y, any_y, 16}, Named{"cache_out", a.cache_out, frame * a.kept > 0, 16}}) {
    if (each.pointer == nullptr && each.needed)
      return message("expected an address for %s, got none; pass a tensor's data_ptr()", each.name);
    if (!aligned(each.pointer, each.bytes))
      return message("expected %s to begin at a multiple of %d bytes, got %p; copy it", each.name, each.bytes, each.pointer);
  }
  return nullptr;
}

}  // namespace sf

int sf_norm_act(const sf::NormActArgs& args, cudaStream_t stream) {
  int sms = 0;
  if (const auto error = sf::runtime().count_sms(&sms)) return error;
  return sf::norm_act_launch(args, sf::kNormActThreads, int64_t(sms) * sf::kNormActBlocks, stream);
}
