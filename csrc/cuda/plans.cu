#include "plans.h"
#include "ptx.h"

namespace heedful::HEEDFUL_TARGET {

// Each is compiled by a file of its own in instantiate/.
template <int kDim>
void plan_forward_sm80(const Problem& p, cuda::Plan* plan);
template <class S>
void plan_forward_rows(const Problem& p, cuda::Plan* plan);
template <class S>
void plan_backward_simple(const Problem& p, cuda::Plan* plan);

void plan_forward(const Problem& p, cuda::Plan* plan) {
  const int64_t dim = p.D < p.Dv ? p.Dv : p.D;
  if (p.dtype == DType::f64) return plan_forward_rows<double>(p, plan);
  if (p.dtype == DType::f32) return plan_forward_rows<float>(p, plan);
  if (dim <= 64) return plan_forward_sm80<64>(p, plan);
  if (dim <= 128) return plan_forward_sm80<128>(p, plan);
  if (dim <= 256) return plan_forward_sm80<256>(p, plan);
  return (p.dtype == DType::bf16 ? plan_forward_rows<BFloat16> : plan_forward_rows<Float16>)(p, plan);
}

void plan_backward(const Problem& p, cuda::Plan* plan) {
  if (p.dtype == DType::f64) return plan_backward_simple<double>(p, plan);
  if (p.dtype == DType::f32) return plan_backward_simple<float>(p, plan);
  return (p.dtype == DType::bf16 ? plan_backward_simple<BFloat16> : plan_backward_simple<Float16>)(p, plan);
}

}  // namespace heedful::HEEDFUL_TARGET
