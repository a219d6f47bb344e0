// Backward of float16 and bfloat16 by mma.sync, head dims up to 256.
#include "../sm80/backward.cuh"

template void heedful::HEEDFUL_TARGET::plan_backward_sm80<256>(const Problem&, cuda::Plan*);
