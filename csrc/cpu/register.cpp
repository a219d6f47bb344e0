// The CPU's operators: tensors are checked, a kernel is selected, its plan is run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <tuple>

#include "../checks.h"
#include "../select.h"
#include "kernels.h"

namespace heedful::cpu {
namespace {

// Grows to what has been asked for, a megabyte or so, and is kept: fresh pages would cost more than a small call.
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
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < phase.tasks;) phase.run(p, task, memory);
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
  if (plan.workspace_bytes <= kSmallWorkspace) {
    p.workspace = small_workspace.at_least(plan.workspace_bytes);
  } else {
    const int64_t size = int64_t(plan.workspace_bytes);
    workspace = torch::stable::new_empty(like, {&size, 1}, torch::headeronly::ScalarType::Byte);
    p.workspace = workspace.data_ptr();
  }
  for (int i = 0; i < plan.phase_count; ++i) run_phase(p, plan.phases[i], plan.scratch_bytes);
}

// Rows of a packed tensor that belong to no sequence are no task's: they are filled beforehand.
void fill_between_sequences(const Problem& p, Tensor tensor, const int64_t* offsets, int64_t rows, double value) {
  if (offsets && (offsets[0] != 0 || offsets[p.B] != rows)) torch::stable::fill_(tensor, value);
}

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias, const OptionalTensor& scales,
    const OptionalTensor& sinks, const OptionalTensor& slopes, const OptionalTensor& table,
    const OptionalTensor& buckets, const OptionalTensor& mask, const OptionalTensor& tiles, const OptionalTensor& bits,
    const OptionalTensor& q_lengths, const OptionalTensor& k_lengths, const OptionalTensor& q_starts,
    const OptionalTensor& q_offsets, const OptionalTensor& k_offsets, const OptionalTensor& seed, int64_t q_start,
    std::optional<int64_t> left, std::optional<int64_t> right, std::optional<double> scale,
    std::optional<double> softcap, const std::string& similarity, const std::string& normalizer, double dropout_p,
    int64_t dropout_batch) {
  Call call =
      check_forward(q, k, v, {bias, scales,    sinks,     slopes,   table,      buckets,    mask,      tiles,
                              bits, q_lengths, k_lengths, q_starts, q_offsets,  k_offsets,  seed,      q_start,
                              left, right,     scale,     softcap,  similarity, normalizer, dropout_p, dropout_batch});
  Problem& p = call.problem;
  const Tensor out = empty_like_layout(q, p.Hq, p.q_rows, p.Dv);
  const Tensor lse =
      torch::stable::new_empty(q, std::vector<int64_t>{q.size(0), p.Hq, p.q_rows}, compute_type(p.dtype));
  fill_between_sequences(p, out, p.q_offsets, p.q_rows, 0);
  fill_between_sequences(p, lse, p.q_offsets, p.q_rows, -INFINITY);
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  run(p, false, q);
  return {out, lse};
}

// A parameter's gradient, where it is wanted: zeros in float64, that the kernel adds to.
OptionalTensor zeros_for(Parameter& parameter, bool wanted, const OptionalTensor& like) {
  if (!wanted) return std::nullopt;
  const auto sizes = like->sizes();
  const Tensor zeros = torch::stable::new_zeros(*like, std::vector<int64_t>(sizes.begin(), sizes.end()),
                                                torch::headeronly::ScalarType::Double);
  parameter.gradient = static_cast<double*>(zeros.data_ptr());
  return zeros;
}

OptionalTensor in_dtype_of(const OptionalTensor& like, const OptionalTensor& gradient) {
  if (!gradient || gradient->scalar_type() == like->scalar_type()) return gradient;
  return torch::stable::to(*gradient, like->scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>
attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const OptionalTensor& bias, const OptionalTensor& scales,
                   const OptionalTensor& sinks, const OptionalTensor& slopes, const OptionalTensor& table,
                   const OptionalTensor& buckets, const OptionalTensor& mask, const OptionalTensor& tiles,
                   const OptionalTensor& bits, const OptionalTensor& q_lengths, const OptionalTensor& k_lengths,
                   const OptionalTensor& q_starts, const OptionalTensor& q_offsets, const OptionalTensor& k_offsets,
                   const OptionalTensor& seed, int64_t q_start, std::optional<int64_t> left,
                   std::optional<int64_t> right, std::optional<double> scale, std::optional<double> softcap,
                   const std::string& similarity, const std::string& normalizer, double dropout_p,
                   int64_t dropout_batch, bool bias_grad, bool scales_grad, bool sinks_grad, bool slopes_grad,
                   bool table_grad) {
  Call call =
      check_forward(q, k, v, {bias, scales,    sinks,     slopes,   table,      buckets,    mask,      tiles,
                              bits, q_lengths, k_lengths, q_starts, q_offsets,  k_offsets,  seed,      q_start,
                              left, right,     scale,     softcap,  similarity, normalizer, dropout_p, dropout_batch});
  check_backward(call, dout, dlse, q, out, lse);
  check_wanted("bias_grad", bias_grad, bias);
  check_wanted("scales_grad", scales_grad, scales);
  check_wanted("sinks_grad", sinks_grad, sinks);
  check_wanted("slopes_grad", slopes_grad, slopes);
  check_wanted("table_grad", table_grad, table);
  Problem& p = call.problem;
  const Tensor dq = empty_like_layout(q, p.Hq, p.q_rows, p.D), dk = empty_like_layout(k, p.Hk, p.k_rows, p.D),
               dv = empty_like_layout(v, p.Hk, p.k_rows, p.Dv);
  fill_between_sequences(p, dq, p.q_offsets, p.q_rows, 0);
  fill_between_sequences(p, dk, p.k_offsets, p.k_rows, 0);
  fill_between_sequences(p, dv, p.k_offsets, p.k_rows, 0);
  p.dq = view_of(dq), p.dk = view_of(dk), p.dv = view_of(dv);
  OptionalTensor dbias;
  if (bias_grad) {
    const auto sizes = bias->sizes();
    dbias = torch::stable::new_zeros(*bias, std::vector<int64_t>(sizes.begin(), sizes.end()), compute_type(p.dtype));
    p.dbias = broadcast_view(*dbias);
  }
  const OptionalTensor dscales = zeros_for(p.scales, scales_grad, scales),
                       dsinks = zeros_for(p.sinks, sinks_grad, sinks),
                       dslopes = zeros_for(p.slopes, slopes_grad, slopes),
                       dtable = zeros_for(p.table, table_grad, table);
  run(p, true, q);
  return {dq,
          dk,
          dv,
          in_dtype_of(bias, dbias),
          in_dtype_of(scales, dscales),
          in_dtype_of(sinks, dsinks),
          in_dtype_of(slopes, dslopes),
          in_dtype_of(table, dtable)};
}

}  // namespace
}  // namespace heedful::cpu

STABLE_TORCH_LIBRARY_IMPL(heedful, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&heedful::cpu::attention_forward));
  library.impl("attention_backward", TORCH_BOX(&heedful::cpu::attention_backward));
}
