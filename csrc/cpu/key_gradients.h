// dK and dV of keys while they are added up: rows of the compute type, one after the other.
#pragma once

#include "scores.h"

namespace heedful::HEEDFUL_TARGET {

template <class C>
struct KeyGradients {
  C *dk, *dv;
  int64_t dk_stride, dv_stride;

  static KeyGradients take(Carver& carve, const Problem& p, int64_t rows) {
    const int64_t d = padded<C>(embedded_dim(p)), dv = padded<C>(p.Dv);
    return {carve.take<C>(rows * d), carve.take<C>(rows * dv), d, dv};
  }
  KeyGradients from_row(int64_t row) const {
    return {dk + row * dk_stride, dv + row * dv_stride, dk_stride, dv_stride};
  }
  void clear(int64_t rows) {
    for (int64_t x = 0; x < rows * dk_stride; ++x) dk[x] = 0;
    for (int64_t x = 0; x < rows * dv_stride; ++x) dv[x] = 0;
  }
  void add(const KeyGradients& more, int64_t rows) {
    for (int64_t x = 0; x < rows * dk_stride; ++x) dk[x] += more.dk[x];
    for (int64_t x = 0; x < rows * dv_stride; ++x) dv[x] += more.dv[x];
  }
};

}  // namespace heedful::HEEDFUL_TARGET
