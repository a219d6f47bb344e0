// The CPU's operators: tensors are checked, a kernel is selected, its plan is run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>

#include "../checks.h"
#include "../select.h"
#include "kernels.h"

namespace heedful::cpu {
namespace {

// Grows to what a thread's largest task needs, a megabyte or so, and is kept: fresh pages would cost more than a small
// call.
char* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<char, decltype(&std::free)> buffer(nullptr, &std::free);
  thread_local size_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = 0;
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!buffer) throw std::bad_alloc();
    size = bytes;
  }
  return buffer.get();
}

// Threads pull tasks in order, heaviest first; which thread runs a task does not change its result.
void run_phase(const Problem& p, const Phase& phase, size_t scratch_bytes) {
  std::atomic<int64_t> next{0};
  const auto pull = [&](int64_t, int64_t) {
    char* scratch = thread_scratch(scratch_bytes);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < phase.tasks;)
      phase.run(p, task, scratch);
  };
  // Waking threads costs about 5 us, the time of this many multiply-adds on one.
  constexpr double kSmall = 2e5;
  const bool small = double(p.B) * p.Hq * p.Sq * p.Sk * (p.D + p.Dv + 1) < kSmall;
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  if (threads == 1 || phase.tasks < 2)
    pull(0, 1);
  else
    torch::stable::parallel_for(0, threads < phase.tasks ? threads : phase.tasks, 1, pull);
}

void run(Problem& p, bool backward, const Tensor& like) {
  const Selection selection = select(p, "cpu", this_machine(), false);
  if (!selection.cpu) raise_unsupported("cpu", selection);
  const int dtype = int(p.dtype);
  Plan plan;
  (backward ? selection.cpu->backward : selection.cpu->forward)[dtype](p, &plan);
  Tensor workspace;
  if (plan.workspace_bytes) {
    const int64_t size = int64_t(plan.workspace_bytes);
    workspace = torch::stable::new_empty(like, {&size, 1}, torch::headeronly::ScalarType::Byte);
    p.workspace = workspace.data_ptr();
  }
  for (int i = 0; i < plan.phase_count; ++i) run_phase(p, plan.phases[i], plan.scratch_bytes);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& q_lengths,
                                             const std::optional<Tensor>& k_lengths,
                                             const std::optional<Tensor>& q_starts, int64_t q_start,
                                             std::optional<int64_t> left, std::optional<int64_t> right,
                                             std::optional<double> scale) {
  Call call = check_forward(q, k, v, {mask, bias, q_lengths, k_lengths, q_starts, q_start, left, right, scale});
  Problem& p = call.problem;
  const Tensor out = empty_like_layout(q, p.Hq, p.Sq, p.Dv);
  const Tensor lse = torch::stable::new_empty(q, std::vector<int64_t>{p.B, p.Hq, p.Sq}, compute_type(p.dtype));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  run(p, false, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> attention_backward(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& q_lengths, const std::optional<Tensor>& k_lengths,
    const std::optional<Tensor>& q_starts, int64_t q_start, std::optional<int64_t> left, std::optional<int64_t> right,
    std::optional<double> scale, bool bias_grad) {
  Call call = check_forward(q, k, v, {mask, bias, q_lengths, k_lengths, q_starts, q_start, left, right, scale});
  check_backward(call, dout, dlse, q, out, lse, bias_grad, bias);
  Problem& p = call.problem;
  const Tensor dq = empty_like_layout(q, p.Hq, p.Sq, p.D), dk = empty_like_layout(k, p.Hk, p.Sk, p.D),
               dv = empty_like_layout(v, p.Hk, p.Sk, p.Dv);
  p.dq = view_of(dq), p.dk = view_of(dk), p.dv = view_of(dv);
  std::optional<Tensor> dbias;
  if (bias_grad) {
    const auto sizes = bias->sizes();
    dbias = torch::stable::new_zeros(*bias, std::vector<int64_t>(sizes.begin(), sizes.end()), compute_type(p.dtype));
    p.dbias = broadcast_view(*dbias);
  }
  run(p, true, q);
  if (dbias && bias->scalar_type() != compute_type(p.dtype)) dbias = torch::stable::to(*dbias, bias->scalar_type());
  return {dq, dk, dv, dbias};
}

}  // namespace
}  // namespace heedful::cpu

STABLE_TORCH_LIBRARY_IMPL(heedful, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&heedful::cpu::attention_forward));
  library.impl("attention_backward", TORCH_BOX(&heedful::cpu::attention_backward));
}
