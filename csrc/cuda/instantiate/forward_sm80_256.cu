// Forward of float16 and bfloat16 by mma.sync, head dims up to 256.
#include "../sm80/forward.cuh"

namespace heedful::HEEDFUL_TARGET {
template void plan_forward_sm80<BFloat16, 256>(const Problem&, cuda::Plan*);
template void plan_forward_sm80<Float16, 256>(const Problem&, cuda::Plan*);
}  // namespace heedful::HEEDFUL_TARGET
