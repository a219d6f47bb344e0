// What the tests of sm_90a share.
#pragma once

#include <functional>

#include "../block.h"

namespace heedful {

using emulator::machine;

// Every order of threads, with seeds that have asynchronous work done early, late and between.
inline void for_all_seeds(const std::function<void()>& run) {
  for (auto order : {emulator::Order::lowest, emulator::Order::highest, emulator::Order::random})
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      machine().order = order, machine().seed = seed;
      run();
    }
}

void test_sm90();
void test_planted_sm90();

}  // namespace heedful
