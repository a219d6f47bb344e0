#include "plans.h"
#include "ptx.h"
#include "sm80/decodes.h"

namespace heedful::HEEDFUL_TARGET {

// Each is compiled by a file of its own in instantiate/.
template <int kDim>
void plan_forward_sm80(const Problem& p, cuda::Plan* plan);
template <int kDim>
void plan_decode_sm80(const Problem& p, cuda::Plan* plan);
template <int kDim>
void plan_backward_sm80(const Problem& p, cuda::Plan* plan);
template <class S>
void plan_forward_rows(const Problem& p, cuda::Plan* plan);
template <class S>
void plan_backward_rows(const Problem& p, cuda::Plan* plan);
template <class S>
void plan_parameters(const Problem& p, cuda::Plan* plan);

namespace {

// f with a number of the type that q, k and v are of.
template <class F>
void by_storage(const Problem& p, F f) {
  if (p.dtype == DType::f64) return f(double());
  if (p.dtype == DType::f32) return f(float());
  return p.dtype == DType::bf16 ? f(BFloat16()) : f(Float16());
}

// Sequences of few queries decode, all others take the forward kernel; packed ones may be of both kinds.
template <int kDim>
void plan_half(const Problem& p, cuda::Plan* plan) {
  if (may_decode(p)) plan_decode_sm80<kDim>(p, plan);
  if (!all_decode(p)) plan_forward_sm80<kDim>(p, plan);
}

}  // namespace

void plan_forward(const Problem& p, cuda::Plan* plan) {
  const int64_t dim = p.D < p.Dv ? p.Dv : p.D;
  if (p.B * p.Hq * p.Sq == 0) return;
  if (cuda::row_by_row(p, false) != cuda::RowByRow::no)
    by_storage(p, [&](auto number) { plan_forward_rows<decltype(number)>(p, plan); });
  else if (dim <= 64)
    plan_half<64>(p, plan);
  else if (dim <= 128)
    plan_half<128>(p, plan);
  else
    plan_half<256>(p, plan);
}

void plan_backward(const Problem& p, cuda::Plan* plan) {
  const int64_t dim = p.D < p.Dv ? p.Dv : p.D;
  if (cuda::row_by_row(p, true) != cuda::RowByRow::no)
    by_storage(p, [&](auto number) { plan_backward_rows<decltype(number)>(p, plan); });
  else if (dim <= 64)
    plan_backward_sm80<64>(p, plan);
  else if (dim <= 128)
    plan_backward_sm80<128>(p, plan);
  else
    plan_backward_sm80<256>(p, plan);
  by_storage(p, [&](auto number) { plan_parameters<decltype(number)>(p, plan); });
}

}  // namespace heedful::HEEDFUL_TARGET
