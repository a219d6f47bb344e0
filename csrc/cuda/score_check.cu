// The score headers are shared with GPU kernels: this instantiates each of them for CUDA, so that they keep compiling.
#define HEEDFUL_TARGET cuda

#include <cstdint>

// What the headers expect of a target, on single numbers.
namespace heedful::cuda {

template <class V>
__host__ __device__ __forceinline__ V select(bool condition, V a, V b) {
  return condition ? a : b;
}
__host__ __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
__host__ __device__ __forceinline__ float tanh_slope(float x) {
  const float y = expf(-2 * fabsf(x)), root = 2 / (1 + y);
  return y * root * root;
}

}  // namespace heedful::cuda

#pragma nv_diag_suppress 1675  // "unrecognized GCC pragma": those are for CPUs

#include "../score/bias.h"
#include "../score/blocks.h"
#include "../score/distance.h"
#include "../score/dropout.h"
#include "../score/mask.h"
#include "../score/similarity.h"
#include "../score/sink.h"
#include "../score/softcap.h"
#include "../score/softmax.h"

namespace heedful::cuda {

struct MultiplyLow {
  __host__ __device__ uint64_t operator()(uint64_t a, uint32_t b) const { return uint64_t(uint32_t(a)) * b; }
};

// A kernel in form alone: every function takes part in a result, so that none is dropped.
__global__ void score_check(Problem p, const float* score, const float* bias, float* result, double* gradient) {
  const int64_t b = blockIdx.x, h = blockIdx.y, i = blockIdx.z, j = threadIdx.x;
  const float infinity = __int_as_float(0x7f800000);
  const Band band(p, b);

  const float factor = inverse_norm(score[embedded_dim(p)]);
  const CosineGradient<float> cosine(factor, score[norm_column(p, Role::query) + one_column(p, Role::key)]);
  const float inverse_cap = 1 / float(p.softcap), slope = soft_cap_slope(score[j] * factor, inverse_cap);
  float s = add_bias(soft_cap(score[j] * factor, float(p.softcap), inverse_cap), bias[j], -infinity);

  const DistanceBias<float> distances(p, b, h);
  if (has_distances(p)) s += distances.value(j - band.start - i);

  bool allowed = in_band(true, j, band.first_key(i), band.end_key(i));
  if (const int64_t* bits = mask_bits(p, mask_tile(p, b, h, i, j)))
    allowed &= bit_is_set<64>(bits[i % kMaskTile], j % kMaskTile) != 0;
  s = select(allowed, s, -infinity);

  const float sink = sink_of(p, b, h, -infinity), reference = softmax_reference(s > sink ? s : sink, -infinity);
  float prob = exp2f((s - reference) * float(kLog2e));
  if (has_dropout(p)) {
    const Counter<uint64_t> counter{{uint64_t(j) / kPairsPerCounter, uint64_t(i), uint64_t(h), uint64_t(b)}};
    const Counter<uint64_t> random = philox(counter, seed_of(p, b), MultiplyLow());
    prob *= (random.word[0] & 0xffff) < p.keep ? float(kept_weight(p)) : 0;
  }

  const float ds = score_gradient(prob, score[j], float(band.first_query(j) + band.end_query(j)));
  result[j] = add_bias_gradient(result[j], ds * slope * (cosine.g + cosine.x));
  distances.add_gradient(j - band.start - i, ds, gradient, gradient + 1);
  gradient[0] += sink_gradient(exp2f((sink - reference) * float(kLog2e)), ds);
}

}  // namespace heedful::cuda
