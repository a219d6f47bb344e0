// Decoding of float16 and bfloat16 by mma.sync, head dims up to 64.
#include "../sm80/decode.cuh"

namespace heedful::HEEDFUL_TARGET {
template void plan_decode_sm80<BFloat16, 64>(const Problem&, cuda::Plan*);
template void plan_decode_sm80<Float16, 64>(const Problem&, cuda::Plan*);
}  // namespace heedful::HEEDFUL_TARGET
