// Softmax over scores in units of log2(e), one key block at a time.
//   value        p = exp2(s - m) with a running maximum m;  lse = ln2 * (m + log2(sum p))
//   derivative   p = exp2(s - lse / ln2);  ds = p * (dp - delta),  delta = sum(dout * out) - dlse
// A score of -inf is a pair that does not exist. A row of only such scores has m = -inf and sums to 0.
#pragma once

#include "bias.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

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
