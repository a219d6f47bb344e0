// Forward of float16 and bfloat16 by mma.sync, head dims up to 256.
#include "../sm80/forward.cuh"

template void heedful::HEEDFUL_TARGET::plan_forward_sm80<256>(const Problem&, cuda::Plan*);
