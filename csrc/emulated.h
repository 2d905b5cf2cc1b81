// The emulator as a replacement for the CUDA runtime: the interface of sora_fast._C to sora_fast/emulator/csrc_launch.py.
#pragma once

#include <pybind11/pybind11.h>

namespace sf {

// Adds `emulate(launch, encode, sms)`. From that call until `emulate(None, None, 0)`, this thread's launches call
//   launch(name, grid, block, arguments, shared): `arguments` is the address of an array of addresses, one per parameter
//   encode(type, address, sizes, strides, box, steps, interleave, swizzle, fill) -> the 128 bytes of a tensor map, or None
//     where the driver would reject it
// and see `sms` SMs.
void bind_emulator(pybind11::module_& m);

}  // namespace sf
