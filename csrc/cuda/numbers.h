// What the score headers expect of a target, on single numbers, and the functions that kernels take of them.
#pragma once

#include <cmath>

#include "ptx.h"

namespace heedful::HEEDFUL_TARGET {

template <class V>
HEEDFUL_FN V select(bool condition, V a, V b) {
  return condition ? a : b;
}

HEEDFUL_DEVICE float exp2_of(float x) { return exp2_fast(x); }
HEEDFUL_DEVICE double exp2_of(double x) { return ::exp2(x); }
HEEDFUL_DEVICE float log2_of(float x) { return ::log2f(x); }
HEEDFUL_DEVICE double log2_of(double x) { return ::log2(x); }

// The larger one; a NaN only where both are.
HEEDFUL_DEVICE float maximum(float a, float b) { return ::fmaxf(a, b); }
HEEDFUL_DEVICE double maximum(double a, double b) { return ::fmax(a, b); }

// tanh(x) = x P(x^2) / Q(x^2), a rational fit that is 2.1e-8 off at most for |x| <= 9.02, where it has come to 1.
HEEDFUL_DEVICE float tanh(float x) {
  constexpr float kEnd = 9.02f;
  constexpr float kP[] = {1.0f, 0.133797377f, 0.00349405780f, 2.05838387e-05f, 1.33195162e-08f};
  constexpr float kQ[] = {1.0f, 0.467130542f, 0.0258711632f, 0.000328312977f, 7.76221157e-07f};
  x = x > kEnd ? kEnd : x < -kEnd ? -kEnd : x;
  const float x2 = x * x;
  float p = kP[4], q = kQ[4];
#pragma unroll
  for (int k = 3; k >= 0; --k) {
    p = p * x2 + kP[k];
    q = q * x2 + kQ[k];
  }
  return x * p * reciprocal(q);
}
HEEDFUL_DEVICE double tanh(double x) { return ::tanh(x); }

// 1 - tanh(x)^2 = 4 y / (1 + y)^2, y = exp(-2 |x|), exact to rounding however small it is.
template <class C>
HEEDFUL_DEVICE C tanh_slope(C x) {
  const C y = exp2_of((x < 0 ? x : -x) * C(2.8853900817779268)), root = C(2) / (C(1) + y);
  return y * root * root;
}

}  // namespace heedful::HEEDFUL_TARGET
