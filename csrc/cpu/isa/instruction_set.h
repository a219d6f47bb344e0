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

// Of kernels for pairs of bfloat16 alone.
#define HEEDFUL_BF16_INSTRUCTION_SET(variable, name)                                                                  \
  namespace heedful::cpu {                                                                                            \
  using namespace heedful::HEEDFUL_TARGET;                                                                            \
  const InstructionSet variable = {name,                                                                              \
                                   HEEDFUL_VECTOR_BYTES,                                                              \
                                   {Forward<BFloat16, BFloat16x2>::kQueries, Forward<BFloat16, BFloat16x2>::kKeys},   \
                                   {Backward<BFloat16, BFloat16x2>::kQueries, Backward<BFloat16, BFloat16x2>::kKeys}, \
                                   {nullptr, nullptr, &Forward<BFloat16, BFloat16x2>::plan, nullptr},                 \
                                   {nullptr, nullptr, &Backward<BFloat16, BFloat16x2>::plan, nullptr}};               \
  }
