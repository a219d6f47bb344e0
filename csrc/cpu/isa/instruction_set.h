// The table of one instruction set's kernels; included once by each isa/*.cpp, after its namespace and vector width.
#pragma once

#include "../backward.h"
#include "../forward.h"

#define HEEDFUL_INSTRUCTION_SET(variable, name)                                                                \
  namespace heedful::cpu {                                                                                     \
  using namespace heedful::HEEDFUL_TARGET;                                                                     \
  const InstructionSet variable = {                                                                            \
      name,                                                                                                    \
      HEEDFUL_VECTOR_BYTES,                                                                                    \
      {Forward<float>::kQueries, Forward<float>::kKeys},                                                       \
      {Backward<float>::kQueries, Backward<float>::kKeys},                                                     \
      {&Forward<float>::plan, &Forward<double>::plan, &Forward<BFloat16>::plan, &Forward<Float16>::plan},      \
      {&Backward<float>::plan, &Backward<double>::plan, &Backward<BFloat16>::plan, &Backward<Float16>::plan}}; \
  }
