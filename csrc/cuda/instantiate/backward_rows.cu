// Backward of every type and head dim, row by row, and the gradients of biases and of the heads' numbers.
#include "../parameters.cuh"

namespace heedful::HEEDFUL_TARGET {

template <class S>
void plan_backward_simple(const Problem& p, cuda::Plan* plan) {
  plan_backward_rows<S>(p, plan);
  plan_parameters<S>(p, plan);
}
template void plan_backward_simple<float>(const Problem&, cuda::Plan*);
template void plan_backward_simple<double>(const Problem&, cuda::Plan*);
template void plan_backward_simple<BFloat16>(const Problem&, cuda::Plan*);
template void plan_backward_simple<Float16>(const Problem&, cuda::Plan*);

}  // namespace heedful::HEEDFUL_TARGET
