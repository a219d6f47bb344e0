// The arrays that kernels may touch, by name: an access outside of them is a fault, and so is a second write to a byte
// of a result.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "fault.h"

namespace heedful::emulator {

enum class Use {
  read,        // inputs
  write_once,  // results: each byte at most once, and never read
  any          // workspaces
};

class GlobalMemory {
 public:
  void add(const std::string& name, const void* data, size_t bytes, Use use);
  void clear();

  void check_read(const void* data, size_t bytes, const Where& where);
  void check_write(const void* data, size_t bytes, const Where& where);

 private:
  struct Array {
    std::string name;
    size_t bytes;
    Use use;
    std::vector<bool> written;
  };
  std::pair<const uintptr_t, Array>& find(const void* data, size_t bytes, const char* access, const Where& where);
  std::map<uintptr_t, Array> arrays_;                  // by address
  std::pair<const uintptr_t, Array>* recent_[4] = {};  // found lately
  int next_recent_ = 0;
};

}  // namespace heedful::emulator
