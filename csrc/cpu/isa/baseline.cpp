// Any architecture: 128-bit vectors (SSE2, NEON).
#define HEEDFUL_TARGET cpu::baseline
#define HEEDFUL_VECTOR_BYTES 16
#if defined(__aarch64__)
#define HEEDFUL_VECTOR_REGISTERS 32
#else
#define HEEDFUL_VECTOR_REGISTERS 16
#endif
#include "instruction_set.h"

HEEDFUL_INSTRUCTION_SET(kBaseline, "baseline")
