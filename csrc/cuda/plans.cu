#include "plans.h"
#include "ptx.h"
#include "sm80/decodes.h"

namespace heedful::HEEDFUL_TARGET {

// Each is compiled by a file of its own in instantiate/.
template <class S, int kDim>
void plan_forward_sm80(const Problem& p, cuda::Plan* plan);
template <class S, int kDim>
void plan_decode_sm80(const Problem& p, cuda::Plan* plan);
template <class S, int kDim>
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

// f of that type and of the padded head dim, where tensor cores' kernels run.
static_assert(cuda::most_head_dim(DType::f32) == 128 && cuda::most_head_dim(DType::bf16) == 256);
template <class F>
void by_tile(const Problem& p, F f) {
  const int64_t dim = p.D < p.Dv ? p.Dv : p.D;
  by_storage(p, [&](auto number) {
    using S = decltype(number);
    if constexpr (sizeof(S) <= 4) {
      if (dim <= 64) return f.template operator()<S, 64>();
      if (dim <= 128) return f.template operator()<S, 128>();
    }
    if constexpr (sizeof(S) == 2) f.template operator()<S, 256>();
  });
}

}  // namespace

void plan_forward(const Problem& p, cuda::Plan* plan) {
  if (p.B * p.Hq * p.Sq == 0) return;
  if (cuda::row_by_row(p, false) != cuda::RowByRow::no)
    return by_storage(p, [&](auto number) { plan_forward_rows<decltype(number)>(p, plan); });
  // Sequences of few queries decode, all others take the forward kernel; packed ones may be of both kinds.
  by_tile(p, [&]<class S, int kDim>() {
    if (may_decode(p)) plan_decode_sm80<S, kDim>(p, plan);
    if (!all_decode(p)) plan_forward_sm80<S, kDim>(p, plan);
  });
}

void plan_backward(const Problem& p, cuda::Plan* plan) {
  if (cuda::row_by_row(p, true) != cuda::RowByRow::no)
    by_storage(p, [&](auto number) { plan_backward_rows<decltype(number)>(p, plan); });
  else
    by_tile(p, [&]<class S, int kDim>() { plan_backward_sm80<S, kDim>(p, plan); });
  by_storage(p, [&](auto number) { plan_parameters<decltype(number)>(p, plan); });
}

}  // namespace heedful::HEEDFUL_TARGET
