// x86-64 with AVX2, FMA and F16C.
#define HEEDFUL_TARGET cpu::avx2
#define HEEDFUL_VECTOR_BYTES 32
#define HEEDFUL_VECTOR_REGISTERS 16
#include "instruction_set.h"

HEEDFUL_INSTRUCTION_SET(kAvx2, "avx2")
