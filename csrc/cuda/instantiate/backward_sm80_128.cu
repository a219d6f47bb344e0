// Backward of float16 and bfloat16 by mma.sync, head dims up to 128.
#include "../sm80/backward.cuh"

namespace heedful::HEEDFUL_TARGET {
template void plan_backward_sm80<BFloat16, 128>(const Problem&, cuda::Plan*);
template void plan_backward_sm80<Float16, 128>(const Problem&, cuda::Plan*);
}  // namespace heedful::HEEDFUL_TARGET
