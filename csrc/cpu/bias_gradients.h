// Gradients of what is added to scores, from a tile of dS with keys in lanes: rows of `stride`.
#pragma once

#include "microkernel.h"
#include "scores.h"

namespace heedful::HEEDFUL_TARGET {

// d(bias) += dS over the tile, or = dS; a stride of 0 sums along that dimension.
template <class C, bool write>
HEEDFUL_FN void add_to_bias(const Problem& p, const Tile& t, const C* grad, int64_t stride) {
  constexpr int n = kLanes<C>;
  const int64_t keys = t.j1 - t.j0, whole = keys / n * n;
  for (int64_t i = t.i0; i < t.i1; ++i, grad += stride) {
    C* to = row_of<C>(p.dbias, t.b, t.h, i) + t.j0 * p.dbias.stride[3];
    if (p.dbias.stride[3] == 0) {
      Vec<C> sum = {};
      for (int64_t j = 0; j < whole; j += n) sum = add_bias_gradient(sum, load(grad + j));
      C rest = 0;
      for (int64_t j = whole; j < keys; ++j) rest = add_bias_gradient(rest, grad[j]);
      rest += sum_lanes<C>(sum);
      *to = write ? rest : *to + rest;
    } else {
      for (int64_t j = 0; j < whole; j += n)
        store(to + j, add_bias_gradient(write ? Vec<C>{} : load(to + j), load(grad + j)));
      for (int64_t j = whole; j < keys; ++j) to[j] = add_bias_gradient(write ? C(0) : to[j], grad[j]);
    }
  }
}
template <class C>
HEEDFUL_CALLED void add_to_bias(const Problem& p, const Tile& t, const C* grad, int64_t stride) {
  p.writes_dbias ? add_to_bias<C, true>(p, t, grad, stride) : add_to_bias<C, false>(p, t, grad, stride);
}

// A tile whose pairs take no part. Where each has an element of its own, these are contiguous.
template <class C>
HEEDFUL_CALLED void skip_bias(const Problem& p, const Tile& t) {
  if (!p.writes_dbias) return;
  for (int64_t i = t.i0; i < t.i1; ++i) {
    C* to = row_of<C>(p.dbias, t.b, t.h, i);
    for (int64_t j = t.j0; j < t.j1; ++j) to[j] = 0;
  }
}

// sums: of the slope, then of each row of the table. The tile's diagonals are added up first, a vector of them at a
// time; each has one distance.
template <class C>
HEEDFUL_CALLED void add_to_distances(const Problem& p, const Band& band, const Tile& t, const C* grad, int64_t stride,
                                     double* sums) {
  constexpr int n = kLanes<C>;
  const int64_t rows = t.i1 - t.i0, keys = t.j1 - t.j0, diagonals = rows + keys - 1;
  const DistanceBias<C> bias(p, t.b, t.h);
  double slope = 0;
  for (int64_t x = 0; x < diagonals; x += n) {
    Vec<C> sum = {};
    const int64_t at_first_key = rows - 1 - x;  // the row in which diagonal x meets it
    for (int64_t r = most<int64_t>(at_first_key - n + 1, 0); r < least(rows, at_first_key + keys); ++r) {
      const int64_t key = r - at_first_key;
      Vec<C> ds = load(grad + r * stride + key);  // what lies beside the tile is scratch too
      if (key < 0 || key + n > keys) {
        const Vec<Int<C>> each = iota<Int<C>>() + Int<C>(key);
        ds = select((each >= 0) & (each < Int<C>(keys)), ds, Vec<C>{});
      }
      sum += ds;
    }
    for (int64_t l = 0; l < least<int64_t>(n, diagonals - x); ++l)
      bias.add_gradient(diagonal_distance<InLanes::keys>(band, t, x + l), sum[l], &slope, sums + 1);
  }
  sums[0] += slope;
}

}  // namespace heedful::HEEDFUL_TARGET
