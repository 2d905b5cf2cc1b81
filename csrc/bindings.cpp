// sora_fast._C: every launcher as a Python function of keyword arguments. Pointers are addresses (Tensor.data_ptr()).
//
// Args list their own field names (`fields`), so that one line binds a launcher and every invalid argument is reported by
// name. Shapes, dtypes, strides and devices of tensors are checked earlier, in sora_fast/ops/<family>.py.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <set>
#include <string>
#include <type_traits>

#include "convolution.cuh"
#include "emulated.h"
#include "host.h"
#include "normalization.cuh"
#include "wgmma_selftest.cuh"
#include "runtime.h"

namespace py = pybind11;

namespace {

std::string text(py::handle value) { return py::str(py::repr(value)).cast<std::string>(); }

// Converts one Python argument: an address for a pointer (None: null), else a number or a bool.
template <class T>
T read(const std::string& op, const std::string& name, const py::handle& value) {
  try {
    if constexpr (std::is_pointer_v<T>) {
      return value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<uintptr_t>());
    } else {
      return value.cast<T>();
    }
  } catch (const py::cast_error&) {
    const char* expected = std::is_pointer_v<T>           ? "an address (an int, or None)"
                           : std::is_same_v<T, bool>      ? "a bool"
                           : std::is_floating_point_v<T> ? "a number"
                                                          : "an int in range";
    throw py::type_error(op + ": expected " + name + " to be " + expected + ", got " + text(value) +
                         "; call it through sora_fast.ops");
  }
}

template <class Args>
Args collect(const std::string& op, const py::kwargs& given) {
  Args args{};
  std::set<std::string> known = {"stream", "device"};
  Args::fields([&](const char* name, auto member) {
    known.insert(name);
    if (!given.contains(name))
      throw py::type_error(op + ": expected the argument " + name + ", got none; call it through sora_fast.ops");
    using T = std::remove_reference_t<decltype(args.*member)>;
    args.*member = read<T>(op, name, given[name]);
  });
  for (const auto& item : given) {
    const auto name = item.first.cast<std::string>();
    if (!known.count(name)) {
      std::string names;
      for (const auto& each : known) names += (names.empty() ? "" : ", ") + each;
      throw py::type_error(op + ": expected arguments among " + names + ", got " + name + "; check the spelling");
    }
  }
  return args;
}

// Sets, and then restores, the current device of this extension's CUDA runtime: linked statically, it has one of its own.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status = sf::runtime().get_device(&before_);
    if (status == cudaSuccess && device != before_) status = sf::runtime().set_device(device);
  }
  ~OnDevice() {
    int now = before_;
    if (sf::runtime().get_device(&now) == cudaSuccess && now != before_) sf::runtime().set_device(before_);
  }
  cudaError_t status;

 private:
  int before_ = 0;
};

template <class Args>
void bind(py::module_& m, const char* op, int (*launch)(const Args&, cudaStream_t), const char* doc) {
  auto call = [op = std::string(op), launch](const py::kwargs& given) {
    const Args args = collect<Args>(op, given);
    const cudaStream_t stream = given.contains("stream") ? read<cudaStream_t>(op, "stream", given["stream"]) : nullptr;
    const int device = given.contains("device") ? read<int>(op, "device", given["device"]) : 0;
    if (const char* reason = why_invalid(args)) throw py::value_error(op + ": " + reason);
    int status;
    {
      py::gil_scoped_release unlocked;
      OnDevice on(device);
      status = on.status == cudaSuccess ? launch(args, stream) : on.status;
    }
    if (status == cudaErrorInsufficientDriver)
      throw std::runtime_error(op + ": expected a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                               std::to_string(CUDART_VERSION % 1000 / 10) + " or newer, got none or an older one; update it, or "
                               "build the extension with an older nvcc");
    if (status == sf::kRefused) throw std::runtime_error(op + ": " + sf::last_message());
    if (status != cudaSuccess)
      throw std::runtime_error(op + ": expected its kernel to start, got " +
                               cudaGetErrorString(static_cast<cudaError_t>(status)) + " (CUDA error " +
                               std::to_string(status) + "); sora-fast info shows the GPU and what the extension was built for");
  };
  m.def(op, call, doc);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of sora_fast on raw addresses; the public functions are in sora_fast.ops.";
  bind<sf::NormActArgs>(m, "norm_act", sf_norm_act, "norm, activation, padding and cache refresh in one pass");
  bind<sf::CausalConv3dArgs>(m, "causal_conv3d", sf_causal_conv3d, "causal 3-D convolution, forward, on sm_90a");
  bind<sf::WgmmaSelftestArgs>(m, "wgmma_selftest", sf_wgmma_selftest, "a small GEMM that tests the sm_90a primitives");
  sf::bind_emulator(m);
}
