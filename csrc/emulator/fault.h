// What the emulator raises: the fault by name, and where.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>

namespace heedful::emulator {

using Where = std::source_location;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string text(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

}  // namespace heedful::emulator
