// x86-64 with AVX-512 F, BW, DQ and VL.
#define HEEDFUL_TARGET cpu::avx512
#define HEEDFUL_VECTOR_BYTES 64
#define HEEDFUL_VECTOR_REGISTERS 32
#include "instruction_set.h"

HEEDFUL_INSTRUCTION_SET(kAvx512, "avx512")
