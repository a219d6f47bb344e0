// Embeds tiles of q and k rows (score/similarity.h), and takes gradients of embedded rows back. Rows of dot products
// are as they are loaded; pairs of bfloat16, which would round embedded ones, have dot products alone.
#pragma once

#include "../score/similarity.h"
#include "operands.h"

namespace heedful::HEEDFUL_TARGET {

// x [D][width], a row of x in each lane; grows to [embedded dim][width], times `scale`.
template <class C>
HEEDFUL_CALLED void embed_lanes(const Problem& p, Role role, C* x, int64_t width, C scale) {
  constexpr int n = kLanes<C>;
  if (p.similarity == Similarity::dot) return;
  for (int64_t l = 0; l < width; l += n) {
    // Added up in the order of inner_product and sum_lanes, so that a row comes out the same from both.
    Vec<C> parts[n] = {};
    const int64_t whole = p.D / n * n;
    for (int64_t d = 0; d < whole; ++d) parts[d % n] += load(x + d * width + l) * load(x + d * width + l);
    for (int step = n / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
    Vec<C> squared = parts[0];
    for (int64_t d = whole; d < p.D; ++d) squared += load(x + d * width + l) * load(x + d * width + l);
    Vec<C> factor = broadcast<C>(scale);
    if (p.similarity == Similarity::gaussian) {
      store(x + norm_column(p, role) * width + l, squared * C(-0.5) * scale);
      store(x + one_column(p, role) * width + l, broadcast<C>(scale));
    } else {
      for (int i = 0; i < n; ++i) factor[i] *= inverse_norm<C>(squared[i]);
    }
    for (int64_t d = 0; d < p.D; ++d) store(x + d * width + l, load(x + d * width + l) * factor);
  }
}

HEEDFUL_FN void embed_lanes(const Problem&, Role, BFloat16x2*, int64_t, float) {}

// The sum of a row's products, in the order of memory.
template <class C>
HEEDFUL_FN C inner_product(const C* x, const C* y, int64_t dim) {
  constexpr int n = kLanes<C>;
  Vec<C> lanes = {};
  const int64_t whole = dim / n * n;
  for (int64_t d = 0; d < whole; d += n) lanes += load(x + d) * load(y + d);
  C sum = sum_lanes<C>(lanes);
  for (int64_t d = whole; d < dim; ++d) sum += x[d] * y[d];
  return sum;
}

// x[row * stride + d]: rows of D numbers, with room for the embedded dim; likewise.
template <class C>
HEEDFUL_CALLED void embed_rows(const Problem& p, Role role, C* x, int64_t stride, int64_t rows, C scale) {
  if (p.similarity == Similarity::dot) return;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    const C squared = inner_product(x, x, p.D);
    C factor = scale;
    if (p.similarity == Similarity::gaussian) {
      x[norm_column(p, role)] = squared * C(-0.5) * scale;
      x[one_column(p, role)] = scale;
    } else {
      factor *= inverse_norm<C>(squared);
    }
    for (int64_t d = 0; d < p.D; ++d) x[d] *= factor;
  }
}

HEEDFUL_FN void embed_rows(const Problem&, Role, BFloat16x2*, int64_t, int64_t, float) {}

// g: the gradient of an embedded row; its first D numbers become that of the row x it was made from. A row that took
// part in nothing has no gradient, whatever its own numbers are.
template <class C>
HEEDFUL_CALLED void pull_back(const Problem& p, Role role, C* g, const C* x) {
  if (p.similarity == Similarity::dot) return;
  if (p.similarity == Similarity::gaussian) {
    const C norm = g[norm_column(p, role)];
    if (norm != 0)
      for (int64_t d = 0; d < p.D; ++d) g[d] -= norm * x[d];
    return;
  }
  bool idle = true;
  for (int64_t d = 0; d < p.D; ++d) idle &= g[d] == 0;
  if (idle) return;
  const CosineGradient<C> factor(inner_product(x, x, p.D), inner_product(g, x, p.D));
  for (int64_t d = 0; d < p.D; ++d) g[d] = factor.g * g[d] + factor.x * x[d];
}

}  // namespace heedful::HEEDFUL_TARGET
