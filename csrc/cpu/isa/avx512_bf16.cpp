// x86-64 with AVX-512 BF16: the kernels of bfloat16 whose products take pairs. Everything else is left to avx512.cpp.
#define HEEDFUL_TARGET cpu::avx512_bf16
#define HEEDFUL_VECTOR_BYTES 64
#define HEEDFUL_VECTOR_REGISTERS 32
#include "instruction_set.h"

HEEDFUL_BF16_INSTRUCTION_SET(kAvx512Bf16, "avx512_bf16")
