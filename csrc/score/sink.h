// A sink: one more score for each head that takes part in the softmax and has no value to give.
//   value        lse = log(sum_j exp(s_j) + exp(sink)): the running sum starts with exp(sink - m), m = sink
//   derivative   d(sink) = -sum_i exp(sink - lse_i) * delta_i: a score whose dp is 0
#pragma once

#include "../problem.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

// -inf, which is no sink, where there is none.
template <class C>
HEEDFUL_FN C sink_of(const Problem& p, int64_t b, int64_t h, C minus_infinity) {
  return p.sinks.data ? static_cast<const C*>(p.sinks.data)[b * p.sinks.batch_stride + h] : minus_infinity;
}

HEEDFUL_FN double sink_gradient(double probability, double delta) { return -probability * delta; }

}  // namespace heedful::HEEDFUL_TARGET
