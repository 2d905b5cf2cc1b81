#include "host.h"

#include <cstdarg>
#include <cstdio>

namespace sf {

namespace {
thread_local char sentence[512];
}

const char* say(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(sentence, sizeof(sentence), format, list);
  va_end(list);
  return sentence;
}

const char* said() { return sentence; }

}  // namespace sf
