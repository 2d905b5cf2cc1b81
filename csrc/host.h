// What all launchers share on the host: error messages and status codes.
//
// A launcher is `int sf_<op>(const <Op>Args&, cudaStream_t)`. It returns 0, a cudaError_t, or kRefused after refuse().
// It allocates nothing and never synchronises, so that it can be captured in a CUDA graph. Beside it
// `const char* why_invalid(const <Op>Args&)` validates the arguments without a GPU: null, or a message.
#pragma once

#include <cstdint>

namespace sf {

constexpr int kRefused = -1;

// Formats an error message like printf and returns it; valid until this thread's next call.
[[gnu::format(printf, 1, 2)]] const char* message(const char* format, ...);

// This thread's last error message.
const char* last_message();

// The status of a launch that fails for a reason other than a cudaError_t; last_message() says which.
inline int refuse(const char*) { return kRefused; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int bytes = 16) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace sf
