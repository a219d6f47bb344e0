// Phases of small tasks. To take one, a thread waits until all that it wrote is in its cache: it takes several at a
// time, as long as every thread has many times to take some.
#pragma once

#include "../score/target.h"
#include "kernels.h"

namespace heedful::HEEDFUL_TARGET {

// For tasks of about so many multiply-adds.
HEEDFUL_FN Phase phase_of(const Problem& p, int64_t tasks, Task run, double each) {
  constexpr double kSmall = 1 << 17;
  constexpr int64_t kTimes = 32;
  return {tasks, run, clamp(int64_t(kSmall / (each + 1)), 1, most<int64_t>(tasks / (kTimes * p.threads), 1))};
}

}  // namespace heedful::HEEDFUL_TARGET
