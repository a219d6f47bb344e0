// Problem -> launches. Choosing is here, launching is whoever's who asks.
#pragma once

#include "kernels.h"

namespace heedful {
namespace cuda {
void plan_forward(const Problem& p, Plan* plan);
void plan_backward(const Problem& p, Plan* plan);
}  // namespace cuda
// The same kernels, compiled for the CPU.
namespace emulated {
void plan_forward(const Problem& p, cuda::Plan* plan);
void plan_backward(const Problem& p, cuda::Plan* plan);
}  // namespace emulated
}  // namespace heedful
