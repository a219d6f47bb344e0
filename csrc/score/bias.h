// Additive bias. Scores are kept in units of log2(e), so that exp2 gives the probabilities.
//   value        s = s + log2(e) * bias
//   derivative   d(bias) = ds, summed over the dimensions along which bias broadcasts
#pragma once

#include "target.h"

namespace heedful::HEEDFUL_TARGET {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// A bias of -inf masks its pair, whatever the score was.
template <class V>
HEEDFUL_FN V add_bias(V s, V bias, V log2e, V minus_infinity) {
  return select(bias == minus_infinity, minus_infinity, s + bias * log2e);
}

template <class V>
HEEDFUL_FN V add_bias_gradient(V sum, V ds) {
  return sum + ds;
}

}  // namespace heedful::HEEDFUL_TARGET
