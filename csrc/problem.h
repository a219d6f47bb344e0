// One attention call as every kernel sees it: pointers with their shapes, strides in elements, options. No torch here,
// and no inline functions: this header is compiled for several instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#define HEEDFUL_EXPORT __attribute__((visibility("default")))

namespace heedful {

enum class DType : int32_t { f32, f64, bf16, f16 };

// `left` or `right` of a band without a bound on that side.
constexpr int64_t kUnbounded = INT64_MAX;

// A tensor of four dimensions; a stride of 0 reads one element along a broadcast dimension.
struct View {
  void* data;
  int64_t stride[4];
};

struct Problem {
  DType dtype;  // of q, k, v, out and their gradients; they accumulate in float32 (float64 for float64): "compute type"
  int64_t B, Hq, Hk, Sq, Sk, D, Dv;
  double scale;

  View q;     // [B, Hq, Sq, D]
  View k;     // [B, Hk, Sk, D]
  View v;     // [B, Hk, Sk, Dv]
  View out;   // [B, Hq, Sq, Dv], last stride 1
  void* lse;  // [B, Hq, Sq], contiguous, compute type

  // Score features; data is null where one is absent.
  View mask;                 // bool [B, Hq, Sq, Sk]
  View bias;                 // [B, Hq, Sq, Sk]
  DType bias_dtype;          // dtype or f32
  const int64_t* q_lengths;  // [B]
  const int64_t* k_lengths;  // [B]
  const int64_t* q_starts;   // [B], the position of each sequence's first query; else q_start
  int64_t q_start;           //
  int64_t left, right;       // keys from position - left to position + right

  // Backward only.
  View dout;  // [B, Hq, Sq, Dv]
  View dlse;  // [B, Hq, Sq], compute type; data is null where there is none
  View dq;    // [B, Hq, Sq, D], last stride 1
  View dk;    // [B, Hk, Sk, D], last stride 1
  View dv;    // [B, Hk, Sk, Dv], last stride 1
  View
      dbias;  // compute type, zeroed, bias's shape with strides of 0 where bias broadcasts; data is null where unwanted
  void* workspace;  // what the plan asked for
};

}  // namespace heedful
