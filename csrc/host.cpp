#include "host.h"

#include <cstdarg>
#include <cstdio>

namespace sf {

namespace {
thread_local char buffer[512];
}

const char* message(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(buffer, sizeof(buffer), format, list);
  va_end(list);
  return buffer;
}

const char* last_message() { return buffer; }

}  // namespace sf
