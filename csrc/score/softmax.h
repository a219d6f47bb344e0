// Softmax over scores, one key block at a time.
//   value        p = exp(s - m) with a running maximum m;  lse = m + log(sum p)
//   derivative   p = exp(s - lse);  ds = p * (dp - delta),  delta = sum(dout * out) - dlse
// A score of -inf is a pair that does not exist. A row of only such scores has m = -inf and sums to 0.
#pragma once

#include "target.h"

namespace heedful::HEEDFUL_TARGET {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// What scores are taken relative to: the maximum, or 0 for a row that has met no score yet (-inf - -inf is NaN).
template <class V>
HEEDFUL_FN V softmax_reference(V maximum, V minus_infinity) {
  return select(maximum == minus_infinity, V{}, maximum);
}

template <class V>
HEEDFUL_FN V score_gradient(V p, V dp, V delta) {
  return p * (dp - delta);
}

}  // namespace heedful::HEEDFUL_TARGET
