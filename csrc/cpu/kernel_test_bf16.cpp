// The kernels for pairs of bfloat16 as isa/avx512_bf16.cpp has them, but for any machine: the compiler splits the
// vectors, and two products stand for the one instruction.
#define HEEDFUL_TARGET cpu::split_bf16
#define HEEDFUL_VECTOR_BYTES 64
#define HEEDFUL_VECTOR_REGISTERS 32
#include "isa/instruction_set.h"

namespace heedful::cpu {
extern const InstructionSet kSplitBf16;
}
HEEDFUL_BF16_INSTRUCTION_SET(kSplitBf16, "split bf16")
