// What every launcher shares on the host: how it refuses arguments, and what its numbers mean.
//
// A launcher is `int sf_<op>(const <Op>Args&, cudaStream_t)`. It returns 0, a cudaError_t, or kRefused after refuse().
// It allocates nothing and never synchronises, so that it can be captured in a CUDA graph. Beside it stands
// `const char* wrong(const <Op>Args&)`: null, or a sentence on the argument that cannot be; it needs no GPU.
#pragma once

#include <cstdint>

namespace sf {

constexpr int kRefused = -1;

// Keeps one sentence, in printf's form, until this thread's next one, and returns it.
[[gnu::format(printf, 1, 2)]] const char* say(const char* format, ...);

// The sentence that say() kept last in this thread.
const char* said();

// A launch that cannot be made for a reason that is no cudaError_t; the sentence is said().
inline int refuse(const char*) { return kRefused; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int bytes = 16) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace sf
