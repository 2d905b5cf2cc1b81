// The emulator in the place of the CUDA runtime: what sora_fast._C offers to sora_fast/emulator/csrc_launch.py.
#pragma once

#include <pybind11/pybind11.h>

namespace sf {

// Adds `emulate(launch, encode, sms)`: from there on this thread's launches call
//   launch(name, grid, block, arguments, shared): `arguments` is the address of an array of addresses, one per parameter
//   encode(type, address, sizes, strides, box, steps, interleave, swizzle, fill) -> the 128 bytes of a tensor map, or None
//     where the driver would refuse it
// and see `sms` SMs, until `emulate(None, None, 0)`.
void bind_emulator(pybind11::module_& m);

}  // namespace sf
