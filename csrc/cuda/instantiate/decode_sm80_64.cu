// Decoding of float16 and bfloat16 by mma.sync, head dims up to 64.
#include "../sm80/decode.cuh"

template void heedful::HEEDFUL_TARGET::plan_decode_sm80<64>(const Problem&, cuda::Plan*);
