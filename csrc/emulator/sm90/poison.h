// What accumulators hold while a wgmma is in flight to them; arithmetic keeps a NaN's bits but for the highest ones.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "../fault.h"

namespace heedful::emulator {

constexpr uint32_t kInFlight = 0x7fa9c3e5;

// Where numbers leave registers.
inline void check_poison(float x, const Where& where) {
  if ((std::bit_cast<uint32_t>(x) | 0x80400000) == (kInFlight | 0x80400000))
    throw Fault("in flight: " + text(where) + ": an accumulator was read before the wait for its wgmma");
}
template <class T>
void check_poison(const T&, const Where&) {}

}  // namespace heedful::emulator
