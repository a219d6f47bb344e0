#include "global_memory.h"

namespace heedful::emulator {

void GlobalMemory::add(const std::string& name, const void* data, size_t bytes, Use use) {
  if (!bytes) return;
  for (auto*& array : recent_) array = nullptr;
  arrays_[reinterpret_cast<uintptr_t>(data)] = {name, bytes, use, {}};
}

void GlobalMemory::clear() {
  arrays_.clear();
  for (auto*& array : recent_) array = nullptr;
}

std::pair<const uintptr_t, GlobalMemory::Array>& GlobalMemory::find(const void* data, size_t bytes, const char* access,
                                                                    const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  for (auto* array : recent_)
    if (array && address >= array->first && address + bytes <= array->first + array->second.bytes &&
        address % bytes == 0)
      return *array;
  const std::string what = std::string("global ") + access + " of " + std::to_string(bytes) + " bytes, " + text(where);
  auto above = arrays_.upper_bound(address);
  if (above == arrays_.begin()) throw Fault("out of bounds: " + what + ": below every array");
  auto& array = *--above;
  if (address + bytes > array.first + array.second.bytes)
    throw Fault("out of bounds: " + what + ": " + std::to_string(address - array.first) + " bytes into " +
                array.second.name + ", which has " + std::to_string(array.second.bytes));
  if (address % bytes) throw Fault("misaligned: " + what + ": in " + array.second.name);
  recent_[next_recent_++ % 4] = &array;
  return array;
}

void GlobalMemory::check_read(const void* data, size_t bytes, const Where& where) {
  if (arrays_.empty() || !bytes) return;
  // A copy may take the first bytes of its 16.
  const size_t aligned = bytes & (bytes - 1) ? 1 : bytes;
  const auto& [base, array] = find(data, aligned, "read", where);
  if (reinterpret_cast<uintptr_t>(data) + bytes > base + array.bytes)
    throw Fault("out of bounds: global read, " + text(where) + ": past the end of " + array.name);
  if (array.use == Use::write_once) throw Fault("a result is read: " + array.name + ", " + text(where));
}

void GlobalMemory::check_write(const void* data, size_t bytes, const Where& where) {
  if (arrays_.empty()) return;
  auto& [base, array] = find(data, bytes, "write", where);
  if (array.use == Use::read) throw Fault("an input is written: " + array.name + ", " + text(where));
  if (array.use != Use::write_once) return;
  array.written.resize(array.bytes);
  const size_t offset = reinterpret_cast<uintptr_t>(data) - base;
  for (size_t n = offset; n < offset + bytes; ++n) {
    if (array.written[n])
      throw Fault("written twice: byte " + std::to_string(n) + " of " + array.name + ", " + text(where));
    array.written[n] = true;
  }
}

}  // namespace heedful::emulator
