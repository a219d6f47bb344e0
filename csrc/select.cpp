#include "select.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace heedful {
namespace {

bool machine_has([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx2")  // and F16C, which every machine with AVX2 has
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512")
    return machine_has("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == "baseline";
}

std::string needs(const std::string& isa) {
  if (isa == "avx2") return "AVX2, FMA and F16C";
  if (isa == "avx512") return "AVX-512 F, BW, DQ and VL";
  return "";
}

// Why this instruction set's kernels do not run here; empty where they do.
std::string why_not(const cpu::InstructionSet& isa, const std::string& device, const Machine& machine) {
  if (device != "cpu") return "runs on the device cpu only";
  if (std::find(machine.cpu.begin(), machine.cpu.end(), isa.name) == machine.cpu.end())
    return "this machine lacks " + needs(isa.name);
  if (!machine.forced.empty() && machine.forced != isa.name) return "HEEDFUL_CPU_ISA=" + machine.forced;
  return "";
}

}  // namespace

const std::vector<const cpu::InstructionSet*>& instruction_sets() {
  static const std::vector<const cpu::InstructionSet*> all = {
#ifdef HEEDFUL_HAVE_AVX512
      &cpu::kAvx512,
#endif
#ifdef HEEDFUL_HAVE_AVX2
      &cpu::kAvx2,
#endif
      &cpu::kBaseline};
  return all;
}

const Machine& this_machine() {
  thread_local Machine machine = [] {
    Machine m;
    for (const auto* isa : instruction_sets())
      if (machine_has(isa->name)) m.cpu.push_back(isa->name);
    return m;
  }();
  const char* forced = std::getenv("HEEDFUL_CPU_ISA");
  if (machine.forced != (forced ? forced : "")) machine.forced = forced ? forced : "";
  return machine;
}

Selection select(const Problem&, const std::string& device, const Machine& machine, bool explain) {
  Selection selection;
  for (const auto* isa : instruction_sets()) {
    std::string reason = why_not(*isa, device, machine);
    if (reason.empty() && !selection.cpu) {
      selection.cpu = isa;
      if (!explain) {
        selection.rejected.clear();
        break;
      }
    } else {
      selection.rejected.emplace_back(std::string("cpu/") + isa->name,
                                      reason.empty() ? "a wider instruction set runs" : std::move(reason));
    }
  }
  if (device == "cuda") selection.rejected.emplace_back("cuda", "this build has no CUDA kernels");
  return selection;
}

void raise_unsupported(const std::string& device, const Selection& selection) {
  std::string message = "heedful.attention: no kernel runs this call on " + device + ":";
  for (const auto& [kernel, reason] : selection.rejected) message += "\n  " + kernel + ": " + reason;
  throw std::runtime_error(message + "\nheedful.reference.attention runs on any device, slowly.");
}

}  // namespace heedful
