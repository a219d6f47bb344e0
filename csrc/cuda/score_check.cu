// The score headers are shared with GPU kernels: this instantiates each of them for CUDA, so that they keep compiling.
#define HEEDFUL_TARGET cuda

#include <cstdint>

namespace heedful::cuda {
template <class V>
__host__ __device__ __forceinline__ V select(bool condition, V a, V b) {
  return condition ? a : b;
}
}  // namespace heedful::cuda

#include "../score/bias.h"
#include "../score/mask.h"
#include "../score/softmax.h"

namespace heedful::cuda {

__global__ void score_check(Problem p, const float* score, const float* bias, float* result) {
  const Band band(p, blockIdx.x);
  const int64_t i = blockIdx.y, j = threadIdx.x;
  const float infinity = __int_as_float(0x7f800000);
  float s = add_bias(score[j], bias[j], -infinity);
  s = select(in_band(true, j, band.first_key(i), band.end_key(i)), s, -infinity);
  const float prob = exp2f((s - softmax_reference(s, -infinity)) * float(kLog2e));
  result[j] = add_bias_gradient(result[j], score_gradient(prob, score[j], float(band.first_query(j))));
}

}  // namespace heedful::cuda
