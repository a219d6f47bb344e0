// Similarities as dot products of rows x' that are made of q's and k's rows x on loading ("embedded").
//   dot        q . k                 x' = x
//   cosine     q . k / (|q| |k|)     x' = x / |x|, with |x| no less than eps
//   gaussian   -|q - k|^2 / 2        q' = (q, -|q|^2 / 2, 1), k' = (k, 1, -|k|^2 / 2)
// derivative of a row, given g = d(x'):
//   cosine     dx = (g - (g . x') x') / |x|, or g / eps where |x| is below eps
//   gaussian   dx = g - g[of -|x|^2 / 2] x
#pragma once

#include <cstdint>

#include "../problem.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

enum class Role { query, key };

constexpr double kSmallestNorm = 1e-8;

HEEDFUL_FN int64_t embedded_dim(const Problem& p) { return p.D + (p.similarity == Similarity::gaussian ? 2 : 0); }

// Where an embedded row holds -|x|^2 / 2, and where 1.
HEEDFUL_FN int64_t norm_column(const Problem& p, Role role) { return role == Role::query ? p.D : p.D + 1; }
HEEDFUL_FN int64_t one_column(const Problem& p, Role role) { return role == Role::query ? p.D + 1 : p.D; }

template <class C>
HEEDFUL_FN C inverse_norm(C squared) {
  const C norm = C(__builtin_sqrt(double(squared)));
  return C(1) / (norm < C(kSmallestNorm) ? C(kSmallestNorm) : norm);
}

// The factors of g and of x in dx, cosine; squared = |x|^2, product = g . x.
template <class C>
struct CosineGradient {
  C g, x;
  HEEDFUL_FN CosineGradient(C squared, C product)
      : g(inverse_norm(squared)), x(squared > C(kSmallestNorm * kSmallestNorm) ? -product * g * g * g : C(0)) {}
};

}  // namespace heedful::HEEDFUL_TARGET
