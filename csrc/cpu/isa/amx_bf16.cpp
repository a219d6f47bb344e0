// x86-64 with AMX BF16, and the AVX-512 that machines with it have: the kernels of bfloat16 whose products are those of
// tile registers. Everything else is left to avx512.cpp.
#define HEEDFUL_TARGET cpu::amx_bf16
#define HEEDFUL_VECTOR_BYTES 64
#define HEEDFUL_VECTOR_REGISTERS 32
#define HEEDFUL_TILE_REGISTERS
#include "instruction_set.h"

HEEDFUL_BF16_INSTRUCTION_SET(kAmxBf16, "amx_bf16")
