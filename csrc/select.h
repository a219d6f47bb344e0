// Which kernel runs a problem on a device, and for each one that cannot, why not. No torch, no global state: what the
// machine has comes in as an argument.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "problem.h"

namespace heedful {

struct Machine {
  std::vector<std::string> cpu;  // instruction sets that this machine runs
  std::string forced;            // by HEEDFUL_CPU_ISA; empty: the best one
  std::string no_cuda;           // why CUDA's kernels are not there; empty where they are
  int cuda_capability = 0;       // of the GPU in question: 10 * major + minor
};

// This machine, and HEEDFUL_CPU_ISA as it stands now.
HEEDFUL_EXPORT const Machine& this_machine();

struct Selection {
  std::string kernel, backward;                               // forward's and backward's; empty where nothing runs
  const cpu::InstructionSet* cpu = nullptr;                   // of a kernel for the CPU
  std::vector<std::pair<std::string, std::string>> rejected;  // kernel, reason
};

// `device` is torch's name of the device type. `explain` wants every reason; else rejected kernels are listed only
// where no kernel runs.
HEEDFUL_EXPORT Selection select(const Problem& problem, const std::string& device, const Machine& machine,
                                bool explain);

// Every instruction set compiled, the best first.
HEEDFUL_EXPORT const std::vector<const cpu::InstructionSet*>& instruction_sets();

// Why the kernels for pairs of bfloat16 leave a problem to those for numbers; null where they take it.
const char* why_not_bf16(const Problem& problem);

// Raises with every reason why no kernel runs.
[[noreturn]] HEEDFUL_EXPORT void raise_unsupported(const std::string& device, const Selection& selection);

}  // namespace heedful
