// Gradients while they are added up: rows of the compute type, of queries or of keys.
#pragma once

#include "scores.h"

namespace heedful::HEEDFUL_TARGET {

template <class C>
struct GradientRows {
  C* data;
  int64_t stride, width;  // whole vectors

  static GradientRows take(Carver& carve, int64_t rows, int64_t dim) {
    const int64_t width = padded<C>(dim);
    return {carve.take<C>(rows * width), width, width};
  }
  C* row(int64_t r) const { return data + r * stride; }
  GradientRows from_row(int64_t r) const { return {row(r), stride, width}; }
  void clear(int64_t r0, int64_t r1) const {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t x = 0; x < width; x += kLanes<C>) store(row(r) + x, Vec<C>{});
  }
  void add(const GradientRows& more, int64_t r0, int64_t r1) const {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t x = 0; x < width; x += kLanes<C>) store(row(r) + x, load(row(r) + x) + load(more.row(r) + x));
  }
};

template <class C>
struct KeyGradients {
  GradientRows<C> dk, dv;

  static KeyGradients take(Carver& carve, const Problem& p, int64_t rows) {
    const GradientRows<C> dk = GradientRows<C>::take(carve, rows, embedded_dim(p));
    return {dk, GradientRows<C>::take(carve, rows, p.Dv)};
  }
  KeyGradients from_row(int64_t r) const { return {dk.from_row(r), dv.from_row(r)}; }
  void clear(int64_t r0, int64_t r1) const { dk.clear(r0, r1), dv.clear(r0, r1); }
  void add(const KeyGradients& more, int64_t rows) const { dk.add(more.dk, 0, rows), dv.add(more.dv, 0, rows); }
};

}  // namespace heedful::HEEDFUL_TARGET
