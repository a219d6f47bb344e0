// The kernels for pairs of bfloat16 of isa/avx512_bf16.cpp, but for any machine: vectors of 128 bits, and two products
// in place of the one instruction.
#define HEEDFUL_TARGET cpu::split_bf16
#define HEEDFUL_VECTOR_BYTES 16
#define HEEDFUL_VECTOR_REGISTERS 32  // its panels of four vectors, whether they fit or not
#include "isa/instruction_set.h"

namespace heedful::cpu {
extern const InstructionSet kSplitBf16;
}
HEEDFUL_BF16_INSTRUCTION_SET(kSplitBf16, "split bf16")
