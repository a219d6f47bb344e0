// The kernels of isa/amx_bf16.cpp, but for any x86-64 machine: vectors are made of what it has, tile registers are
// memory.
#define HEEDFUL_TARGET cpu::emulated_tiles
#define HEEDFUL_VECTOR_BYTES 64
#define HEEDFUL_VECTOR_REGISTERS 32
#define HEEDFUL_TILE_REGISTERS
#define HEEDFUL_EMULATED_TILES
#include "isa/instruction_set.h"

namespace heedful::cpu {
extern const InstructionSet kEmulatedTiles;
}
HEEDFUL_BF16_INSTRUCTION_SET(kEmulatedTiles, "emulated tiles")
