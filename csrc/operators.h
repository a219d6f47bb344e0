// The operators, all of them but the kernels' run: arguments are checked, results allocated, gradients converted. Each
// device's register.cpp says how it runs a problem:
//
//   struct Device {
//     static constexpr Memory kMemory;
//     static void run(Problem& p, bool backward, const Tensor& like);  // `like`: a tensor to make a workspace of
//   };
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <string>
#include <tuple>

#include "checks.h"

namespace heedful {

using OptionalTensor = std::optional<Tensor>;

// Rows of a packed tensor that belong to no sequence are no task's: they are filled beforehand.
inline void fill_between_sequences(const Call& call, Tensor tensor, const int64_t* offsets, int64_t rows,
                                   double value) {
  if (!offsets) return;
  if (call.memory == Memory::host && offsets[0] == 0 && offsets[call.problem.B] == rows) return;
  torch::stable::fill_(tensor, value);
}

// A parameter's gradient, where it is wanted: zeros in float64, that kernels add to or write.
inline OptionalTensor zeros_for(Parameter& parameter, bool wanted, const OptionalTensor& like) {
  if (!wanted) return std::nullopt;
  const auto sizes = like->sizes();
  const Tensor zeros = torch::stable::new_zeros(*like, std::vector<int64_t>(sizes.begin(), sizes.end()),
                                                torch::headeronly::ScalarType::Double);
  parameter.gradient = static_cast<double*>(zeros.data_ptr());
  return zeros;
}

inline OptionalTensor in_dtype_of(const OptionalTensor& like, const OptionalTensor& gradient) {
  if (!gradient || gradient->scalar_type() == like->scalar_type()) return gradient;
  return torch::stable::to(*gradient, like->scalar_type());
}

using Results = std::tuple<Tensor, Tensor>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// Parameters whose gradients are wanted.
struct Wanted {
  bool bias = false, scales = false, sinks = false, slopes = false, table = false;
};

template <class Device>
Results forward(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& arguments) {
  Call call = check_forward(q, k, v, arguments, Device::kMemory);
  Problem& p = call.problem;
  const Tensor out = empty_like_layout(q, p.Hq, p.q_rows, p.Dv);
  const Tensor lse = empty_lse(q, p.Hq, p.q_rows, p.dtype);
  fill_between_sequences(call, out, p.q_offsets, p.q_rows, 0);
  fill_between_sequences(call, lse, p.q_offsets, p.q_rows, -INFINITY);
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  Device::run(p, false, q);
  return {out, lse};
}

template <class Device>
Gradients backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const Arguments& a, const Wanted& wanted) {
  Call call = check_forward(q, k, v, a, Device::kMemory);
  check_backward(call, dout, dlse, q, out, lse);
  check_wanted("bias_grad", wanted.bias, a.bias);
  check_wanted("scales_grad", wanted.scales, a.scales);
  check_wanted("sinks_grad", wanted.sinks, a.sinks);
  check_wanted("slopes_grad", wanted.slopes, a.slopes);
  check_wanted("table_grad", wanted.table, a.table);
  Problem& p = call.problem;
  const Tensor dq = empty_like_layout(q, p.Hq, p.q_rows, p.D), dk = empty_like_layout(k, p.Hk, p.k_rows, p.D),
               dv = empty_like_layout(v, p.Hk, p.k_rows, p.Dv);
  fill_between_sequences(call, dq, p.q_offsets, p.q_rows, 0);
  fill_between_sequences(call, dk, p.k_offsets, p.k_rows, 0);
  fill_between_sequences(call, dv, p.k_offsets, p.k_rows, 0);
  p.dq = view_of(dq), p.dk = view_of(dk), p.dv = view_of(dv);
  OptionalTensor dbias;
  if (wanted.bias) {
    const std::vector<int64_t> sizes(a.bias->sizes().begin(), a.bias->sizes().end());
    p.writes_dbias = p.normalizer == Normalizer::softmax && a.bias->numel() == p.B * p.Hq * p.Sq * p.Sk;
    dbias = p.writes_dbias ? torch::stable::new_empty(*a.bias, sizes, compute_type(p.dtype))
                           : torch::stable::new_zeros(*a.bias, sizes, compute_type(p.dtype));
    p.dbias = broadcast_view(*dbias);
  }
  const OptionalTensor dscales = zeros_for(p.scales, wanted.scales, a.scales),
                       dsinks = zeros_for(p.sinks, wanted.sinks, a.sinks),
                       dslopes = zeros_for(p.slopes, wanted.slopes, a.slopes),
                       dtable = zeros_for(p.table, wanted.table, a.table);
  Device::run(p, true, q);
  return {dq,
          dk,
          dv,
          in_dtype_of(a.bias, dbias),
          in_dtype_of(a.scales, dscales),
          in_dtype_of(a.sinks, dsinks),
          in_dtype_of(a.slopes, dslopes),
          in_dtype_of(a.table, dtable)};
}

// ---- the operators of schemas.h

template <class Device>
Results attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
                          const OptionalTensor& scales, const OptionalTensor& sinks, const OptionalTensor& slopes,
                          const OptionalTensor& table, const OptionalTensor& buckets, const OptionalTensor& mask,
                          const OptionalTensor& tiles, const OptionalTensor& bits, const OptionalTensor& q_lengths,
                          const OptionalTensor& k_lengths, const OptionalTensor& q_starts,
                          const OptionalTensor& q_offsets, const OptionalTensor& k_offsets, const OptionalTensor& seed,
                          int64_t q_start, std::optional<int64_t> left, std::optional<int64_t> right,
                          std::optional<double> scale, std::optional<double> softcap, const std::string& similarity,
                          const std::string& normalizer, double dropout_p, int64_t dropout_batch, bool allow_tf32) {
  return forward<Device>(
      q, k, v, {bias,      scales,    sinks,      slopes,     table,     buckets,       mask,      tiles, bits,
                q_lengths, k_lengths, q_starts,   q_offsets,  k_offsets, seed,          q_start,   left,  right,
                scale,     softcap,   similarity, normalizer, dropout_p, dropout_batch, allow_tf32});
}

template <class Device>
Gradients attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& bias,
                             const OptionalTensor& scales, const OptionalTensor& sinks, const OptionalTensor& slopes,
                             const OptionalTensor& table, const OptionalTensor& buckets, const OptionalTensor& mask,
                             const OptionalTensor& tiles, const OptionalTensor& bits, const OptionalTensor& q_lengths,
                             const OptionalTensor& k_lengths, const OptionalTensor& q_starts,
                             const OptionalTensor& q_offsets, const OptionalTensor& k_offsets,
                             const OptionalTensor& seed, int64_t q_start, std::optional<int64_t> left,
                             std::optional<int64_t> right, std::optional<double> scale, std::optional<double> softcap,
                             const std::string& similarity, const std::string& normalizer, double dropout_p,
                             int64_t dropout_batch, bool allow_tf32, bool bias_grad, bool scales_grad, bool sinks_grad,
                             bool slopes_grad, bool table_grad) {
  return backward<Device>(
      dout, dlse, q, k, v, out, lse,
      {bias,      scales,    sinks,      slopes,     table,     buckets,       mask,      tiles, bits,
       q_lengths, k_lengths, q_starts,   q_offsets,  k_offsets, seed,          q_start,   left,  right,
       scale,     softcap,   similarity, normalizer, dropout_p, dropout_batch, allow_tf32},
      {bias_grad, scales_grad, sinks_grad, slopes_grad, table_grad});
}

inline Arguments plain_arguments(int64_t q_start, std::optional<int64_t> left, std::optional<int64_t> right,
                                 std::optional<double> scale) {
  static const OptionalTensor none;
  static const std::string dot = "dot", softmax = "softmax";
  return {none, none, none,    none, none,  none,  none,         none, none,    none, none, none, none,
          none, none, q_start, left, right, scale, std::nullopt, dot,  softmax, 0,    0,    false};
}

template <class Device>
Results plain_forward(const Tensor& q, const Tensor& k, const Tensor& v, int64_t q_start, std::optional<int64_t> left,
                      std::optional<int64_t> right, std::optional<double> scale) {
  return forward<Device>(q, k, v, plain_arguments(q_start, left, right, scale));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& out, const Tensor& lse, int64_t q_start,
                                                  std::optional<int64_t> left, std::optional<int64_t> right,
                                                  std::optional<double> scale) {
  const Gradients all =
      backward<Device>(dout, std::nullopt, q, k, v, out, lse, plain_arguments(q_start, left, right, scale), {});
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all)};
}

// Registers them for the device whose key the library is of.
template <class Device, class Library>
void register_operators(Library& library) {
  library.impl("attention_forward", TORCH_BOX(&attention_forward<Device>));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<Device>));
  library.impl("plain_forward", TORCH_BOX(&plain_forward<Device>));
  library.impl("plain_backward", TORCH_BOX(&plain_backward<Device>));
}

}  // namespace heedful
