#include "select.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "cuda/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace heedful {
namespace {

#if defined(__x86_64__)
// Whether the machine has tile registers with products of bfloat16, and Linux lets this process use them, for which it
// wants to be asked: they make a thread's state 8 KB larger, and it refuses where a thread's stack for signals is
// smaller. Its first answer counts for all threads.
bool ask_for_tile_registers() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1 << 22, kAmxTile = 1 << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16) && (edx & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool may_use_tile_registers() {
  static const bool may = ask_for_tile_registers();
  return may;
}
#endif

bool machine_has([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx2")  // and F16C, which every machine with AVX2 has
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512")
    return machine_has("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx512_bf16") return machine_has("avx512") && __builtin_cpu_supports("avx512bf16");
  if (isa == "amx_bf16") return machine_has("avx512_bf16") && may_use_tile_registers();
#endif
  return isa == "baseline";
}

std::string needs(const std::string& isa) {
  if (isa == "avx2") return "AVX2, FMA and F16C";
  if (isa == "avx512") return "AVX-512 F, BW, DQ and VL";
  if (isa == "avx512_bf16") return "AVX-512 F, BW, DQ, VL and BF16";
  if (isa == "amx_bf16") return "AMX TILE and BF16, with Linux's permission, and AVX-512 F, BW, DQ, VL and BF16";
  return "";
}

// Whether an instruction set has kernels for pairs of bfloat16 alone.
bool of_pairs(const cpu::InstructionSet& isa) { return !isa.forward[int(DType::f32)]; }

// Whether the kernels of an instruction set take a problem. Every call asks, so words are left for those who want them.
enum class Refusal { none, device, machine, forced, problem };

Refusal refusal_of(const Problem& p, const cpu::InstructionSet& isa, const std::string& device,
                   const Machine& machine) {
  if (device != "cpu") return Refusal::device;
  const auto has = [&](std::string_view name) {
    return std::find(machine.cpu.begin(), machine.cpu.end(), name) != machine.cpu.end();
  };
  if (!has(isa.name)) return Refusal::machine;
  // What the kernels for pairs leave is done by those of the same machine, whichever of them is forced.
  const bool left = isa.name == std::string_view("avx512") && has(machine.forced) &&
                    (machine.forced == "avx512_bf16" || machine.forced == "amx_bf16");
  if (!machine.forced.empty() && machine.forced != isa.name && !left) return Refusal::forced;
  return of_pairs(isa) && why_not_bf16(p) ? Refusal::problem : Refusal::none;
}

std::string in_words(Refusal refusal, const Problem& p, const cpu::InstructionSet& isa, const Machine& machine,
                     const std::string& what_runs) {
  switch (refusal) {
    case Refusal::device:
      return "runs on the device cpu only";
    case Refusal::machine:
      return "this machine lacks " + needs(isa.name);
    case Refusal::forced:
      return "HEEDFUL_CPU_ISA=" + machine.forced;
    case Refusal::problem:
      return why_not_bf16(p);
    case Refusal::none:
      break;
  }
  return what_runs + " runs";
}

// Why none of CUDA's kernels runs here; empty where one does.
std::string why_no_cuda(const Problem& p, const Machine& machine) {
  if (!machine.no_cuda.empty()) return machine.no_cuda;
  if (const int has = machine.cuda_capability; has < 80)
    return "needs a GPU of compute capability 8.0, this one has " + std::to_string(has / 10) + "." +
           std::to_string(has % 10);
  constexpr int64_t kMostRowsOfBlock = 128;  // packed sequences' last blocks count as whole ones
  const int64_t queries = p.q_offsets ? p.q_rows + p.B * kMostRowsOfBlock : p.Sq,
                keys = p.k_offsets ? p.k_rows + p.B * kMostRowsOfBlock : p.Sk;
  if (queries > cuda::kMostRows || keys > cuda::kMostRows) return "takes sequences of up to 2^30 rows";
  return "";
}

// Why the kernels of tensor cores leave this problem to those that go row by row; empty where they do not.
std::string why_row_by_row(const Problem& p, bool backward) {
  switch (cuda::row_by_row(p, backward)) {
    case cuda::RowByRow::of_dtype:
      return "takes no float64";
    case cuda::RowByRow::of_exact_float32:
      return "takes float32 as TensorFloat-32 only, which torch.backends.cuda.matmul.fp32_precision does not allow";
    case cuda::RowByRow::of_head_dim:
      return "takes head dims of up to " + std::to_string(cuda::most_head_dim(p.dtype)) +
             (p.dtype == DType::f32 ? " in float32" : "") + ", got " + std::to_string(std::max(p.D, p.Dv));
    case cuda::RowByRow::of_hard:
      return p.dtype == DType::f32 ? "leaves hard attention of float32 to cuda/rows"
                                   : "leaves hard attention's backward to cuda/rows";
    case cuda::RowByRow::no:
      break;
  }
  return "";
}

// CUDA's kernels, the fastest first: the first one that takes a problem runs it. Those of one architecture (sm90/) come
// before the ones that they surpass.
struct CudaKernels {
  const char* name;
  std::string (*why_not)(const Problem& p, bool backward);
};
constexpr CudaKernels kCudaKernels[] = {{"cuda/sm80", &why_row_by_row},
                                        {"cuda/rows", [](const Problem&, bool) { return std::string(); }}};

void select_cuda(const Problem& p, const Machine& machine, bool explain, Selection& selection) {
  const std::string never = why_no_cuda(p, machine);
  for (const CudaKernels& kernels : kCudaKernels) {
    const std::string forward = never.empty() ? kernels.why_not(p, false) : never,
                      backward = never.empty() ? kernels.why_not(p, true) : never;
    if (forward.empty() && selection.kernel.empty()) selection.kernel = kernels.name;
    const bool first = backward.empty() && selection.backward.empty();
    if (first) selection.backward = kernels.name;
    if (first || (!explain && never.empty())) continue;
    std::string runs = selection.backward + " runs";
    if (p.dtype == DType::f32) runs += ", as torch.backends.cuda.matmul.fp32_precision allows TensorFloat-32";
    selection.rejected.emplace_back(kernels.name, backward.empty() ? runs : backward);
  }
}

}  // namespace

// Pairs cannot hold what is computed from q and k, nor a scale that varies; and hard attention's scores are those of
// exact products.
const char* why_not_bf16(const Problem& p) {
  if (p.dtype != DType::bf16) return "takes bfloat16 alone";
  if (p.similarity != Similarity::dot) return "takes dot products alone";
  if (p.normalizer == Normalizer::hard) return "leaves hard attention to other kernels";
  if (p.scales.data) return "takes one scale for all heads";
  return nullptr;
}

const std::vector<const cpu::InstructionSet*>& instruction_sets() {
  static const std::vector<const cpu::InstructionSet*> all = {
#ifdef HEEDFUL_HAVE_AVX512
      &cpu::kAmxBf16, &cpu::kAvx512Bf16, &cpu::kAvx512,
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

Selection select(const Problem& p, const std::string& device, const Machine& machine, bool explain) {
  Selection selection;
  if (device == "cuda") {
    select_cuda(p, machine, explain, selection);
    if (!explain && !selection.kernel.empty()) return selection;
  }
  for (const auto* isa : instruction_sets())
    if (!selection.cpu && refusal_of(p, *isa, device, machine) == Refusal::none) selection.cpu = isa;
  if (selection.cpu) selection.kernel = selection.backward = std::string("cpu/") + selection.cpu->name;
  if (selection.cpu && !explain) return selection;
  for (const auto* isa : instruction_sets())
    if (isa != selection.cpu)
      selection.rejected.emplace_back(std::string("cpu/") + isa->name, in_words(refusal_of(p, *isa, device, machine), p,
                                                                                *isa, machine, selection.kernel));
  return selection;
}

void raise_unsupported(const std::string& device, const Selection& selection) {
  std::string message = "heedful.attention: no kernel runs this call on " + device + ":";
  for (const auto& [kernel, reason] : selection.rejected) message += "\n  " + kernel + ": " + reason;
  throw std::runtime_error(message + "\nheedful.reference.attention runs on any device, slowly.");
}

}  // namespace heedful
