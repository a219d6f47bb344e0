// Forward of float32 by mma.sync in TensorFloat-32, head dims up to 64.
#include "../sm80/forward.cuh"

namespace heedful::HEEDFUL_TARGET {
template void plan_forward_sm80<float, 64>(const Problem&, cuda::Plan*);
}  // namespace heedful::HEEDFUL_TARGET
