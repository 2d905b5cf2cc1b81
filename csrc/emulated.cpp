#include "emulated.h"

#include <cstring>
#include <memory>
#include <string>

#include "runtime.h"

namespace py = pybind11;

namespace sf {

namespace {

constexpr int kMaxShared = 227 * 1024, kDefaultShared = 48 * 1024;  // bytes per CTA: the limit of sm_90, and the default

struct Emulator {
  py::function launch, encode;
  int sms;
  const void* allowed = nullptr;  // the last kernel that opted in to more shared memory, and how much
  int shared = 0;
};
thread_local std::unique_ptr<Emulator> here;

cudaError_t get_device(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t set_device(int) { return cudaSuccess; }

cudaError_t count_sms(int* count) {
  *count = here->sms;
  return cudaSuccess;
}

cudaError_t allow(const void* kernel, int bytes) {
  here->allowed = kernel, here->shared = bytes;
  return bytes > kMaxShared ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t launch(const char* name, const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t) {
  if (shared > size_t(kernel == here->allowed ? here->shared : kDefaultShared)) return cudaErrorInvalidValue;
  const py::gil_scoped_acquire locked;
  here->launch(name, py::make_tuple(grid.x, grid.y, grid.z), py::make_tuple(block.x, block.y, block.z),
               reinterpret_cast<uintptr_t>(arguments), shared);
  return cudaSuccess;
}

template <class T>
py::tuple to_tuple(const T* first, cuuint32_t count) {
  py::tuple made(count);
  for (cuuint32_t i = 0; i < count; ++i) made[i] = first[i];
  return made;
}

CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                    CUtensorMapFloatOOBfill fill) {
  const py::gil_scoped_acquire locked;
  const py::object made =
      here->encode(int(type), reinterpret_cast<uintptr_t>(base), to_tuple(sizes, rank), to_tuple(strides, rank - 1),
                   to_tuple(box, rank), to_tuple(steps, rank), int(interleave), int(swizzle), int(fill));
  if (made.is_none()) return CUDA_ERROR_INVALID_VALUE;
  const std::string bytes = made.cast<py::bytes>();
  if (bytes.size() != sizeof(*map)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, bytes.data(), sizeof(*map));
  return CUDA_SUCCESS;
}

int find_encoder(Encoder* encoder) {
  *encoder = encode_map;
  return cudaSuccess;
}

constexpr Runtime kEmulated = {get_device, set_device, count_sms, allow, launch, find_encoder};

void emulate(const py::object& launch, const py::object& encode, int sms) {
  replace_runtime(launch.is_none() ? nullptr : &kEmulated);
  here.reset(launch.is_none() ? nullptr : new Emulator{launch, encode, sms});
}

}  // namespace

void bind_emulator(py::module_& m) {
  m.def("emulate", emulate, py::arg("launch").none(true), py::arg("encode").none(true), py::arg("sms"),
        "redirect this thread's launches to the emulator, or with None back to CUDA");
}

}  // namespace sf
