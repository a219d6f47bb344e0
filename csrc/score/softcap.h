// Soft capping of scores.
//   value        s = cap * tanh(t / cap)
//   derivative   ds/dt = 1 - tanh(t / cap)^2
#pragma once

#include "target.h"

namespace heedful::HEEDFUL_TARGET {

template <class V>
struct Capped {
  V score, slope;
};

template <class V>
HEEDFUL_FN Capped<V> soft_cap(V t, V cap, V inverse_cap) {
  const V y = tanh(t * inverse_cap);
  return {cap * y, 1 - y * y};
}

}  // namespace heedful::HEEDFUL_TARGET
