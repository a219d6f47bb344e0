// Problem -> launches. Choosing is here, launching is whoever's who asks.
#pragma once

#include "kernels.h"

namespace heedful {
namespace cuda {
void plan_forward(const Problem& p, Plan* plan);
}
// The same kernels, compiled for the CPU.
namespace emulated {
void plan_forward(const Problem& p, cuda::Plan* plan);
}
}  // namespace heedful
