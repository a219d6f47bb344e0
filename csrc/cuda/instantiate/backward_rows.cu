// Backward of every type and head dim, row by row, and the gradients of biases and of the heads' numbers.
#include "../parameters.cuh"

namespace heedful::HEEDFUL_TARGET {

#define HEEDFUL_PLANS(S)                                            \
  template void plan_backward_rows<S>(const Problem&, cuda::Plan*); \
  template void plan_parameters<S>(const Problem&, cuda::Plan*)
HEEDFUL_PLANS(float);
HEEDFUL_PLANS(double);
HEEDFUL_PLANS(BFloat16);
HEEDFUL_PLANS(Float16);

}  // namespace heedful::HEEDFUL_TARGET
