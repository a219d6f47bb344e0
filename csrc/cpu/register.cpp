// The operators on the CPU: a kernel is selected, its plan is run.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../operators.h"
#include "../select.h"
#include "kernels.h"

namespace heedful::cpu {
namespace {

// Grows to what has been asked for, some megabytes at most, and is kept: fresh pages would cost more than a small call.
struct Buffer {
  std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};
  size_t size = 0;

  char* at_least(size_t bytes) {
    if (size < bytes) {
      data.reset();
      size = 0;
      data.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!data) throw std::bad_alloc();
      size = bytes;
    }
    return data.get();
  }
};
// For a thread's tasks, and for the calls it makes.
thread_local Buffer scratch, small_workspace;
constexpr size_t kSmallWorkspace = 1 << 20;

// Threads pull tasks in order, heaviest first; which thread runs a task does not change its result.
void run_phase(const Problem& p, const Phase& phase, size_t scratch_bytes) {
  std::atomic<int64_t> next{0};
  const auto pull = [&](int64_t, int64_t) {
    char* memory = scratch.at_least(scratch_bytes);
    for (int64_t task; (task = next.fetch_add(phase.at_a_time, std::memory_order_relaxed)) < phase.tasks;)
      for (const int64_t end = std::min(task + phase.at_a_time, phase.tasks); task < end; ++task)
        phase.run(p, task, memory);
  };
  if (p.threads == 1 || phase.tasks < 2)
    pull(0, 1);
  else
    torch::stable::parallel_for(0, p.threads < phase.tasks ? p.threads : phase.tasks, 1, pull);
}

int64_t threads_for(const Problem& p) {
  // Waking threads costs about 5 us, the time of this many multiply-adds on one.
  constexpr double kSmall = 2e5;
  const bool small = double(p.B) * p.Hq * p.Sq * p.Sk * (p.D + p.Dv + 1) < kSmall;
  return small ? 1 : torch::stable::get_num_threads();
}

struct Device {
  static constexpr Memory kMemory = Memory::host;

  static void run(Problem& p, bool backward, const Tensor& like) {
    const Selection selection = select(p, "cpu", this_machine(), false);
    if (!selection.cpu) raise_unsupported("cpu", selection);
    const int dtype = int(p.dtype);
    p.threads = threads_for(p);
    Plan plan;
    (backward ? selection.cpu->backward : selection.cpu->forward)[dtype](p, &plan);
    Tensor workspace;
    if (plan.workspace_bytes <= kSmallWorkspace) {
      p.workspace = small_workspace.at_least(plan.workspace_bytes);
    } else {
      const int64_t size = int64_t(plan.workspace_bytes);
      workspace = torch::stable::new_empty(like, {&size, 1}, torch::headeronly::ScalarType::Byte);
      p.workspace = workspace.data_ptr();
    }
    for (int i = 0; i < plan.phase_count; ++i) run_phase(p, plan.phases[i], plan.scratch_bytes);
  }
};

}  // namespace
}  // namespace heedful::cpu

STABLE_TORCH_LIBRARY_IMPL(heedful, CPU, library) { heedful::register_operators<heedful::cpu::Device>(library); }
