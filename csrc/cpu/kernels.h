// What a CPU kernel is to the rest: a plan of phases, each a number of independent tasks. Any thread may run any task;
// a task's result depends on the problem alone. Phases follow each other.
#pragma once

#include "../problem.h"

namespace heedful::cpu {

using Task = void (*)(const Problem&, int64_t task, void* scratch);

struct Phase {
  int64_t tasks;
  Task run;
  int64_t at_a_time = 1;  // that a thread takes, one after the other
};

struct Plan {
  Phase phases[5];
  int phase_count;
  size_t scratch_bytes;    // for each thread, 64-byte aligned
  size_t workspace_bytes;  // for the call: Problem::workspace, 64-byte aligned
};

using Planner = void (*)(const Problem&, Plan*);

struct TileSize {
  int64_t queries, keys;
};

// The kernels of one instruction set (isa/*.cpp).
struct InstructionSet {
  const char* name;
  int vector_bytes;
  TileSize forward_tile, backward_tile;
  Planner forward[4], backward[4];  // by DType; null where another instruction set's serve
};

// Defined where the architecture has them.
extern const InstructionSet kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16;

}  // namespace heedful::cpu
