// Soft capping of scores.
//   value        s = cap * tanh(t / cap)
//   derivative   ds/dt = 1 - tanh(t / cap)^2, which near the cap is far below the rounding of tanh itself
#pragma once

#include "target.h"

namespace heedful::HEEDFUL_TARGET {

template <class V>
HEEDFUL_FN V soft_cap(V t, V cap, V inverse_cap) {
  return cap * tanh(t * inverse_cap);
}

template <class V>
HEEDFUL_FN V soft_cap_slope(V t, V inverse_cap) {
  return tanh_slope(t * inverse_cap);
}

}  // namespace heedful::HEEDFUL_TARGET
