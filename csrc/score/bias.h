// Additive bias.
//   value        s = s + bias
//   derivative   d(bias) = ds, summed over the dimensions along which bias broadcasts
#pragma once

#include "target.h"

namespace heedful::HEEDFUL_TARGET {

// A bias of -inf masks its pair, whatever the score was.
template <class V>
HEEDFUL_FN V add_bias(V s, V bias, V minus_infinity) {
  return select(bias == minus_infinity, minus_infinity, s + bias);
}

template <class V>
HEEDFUL_FN V add_bias_gradient(V sum, V ds) {
  return sum + ds;
}

}  // namespace heedful::HEEDFUL_TARGET
