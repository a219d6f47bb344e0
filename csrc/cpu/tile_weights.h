// P and dS of a tile of backward, keys in lanes: numbers while they are made, a panel of keys at a time, then operands
// of three products. Numbers of pairs are those of a part of a panel, as a rule few enough to stay in the first cache
// until they are joined.
#pragma once

#include "microkernel.h"

namespace heedful::HEEDFUL_TARGET {

template <class E>
struct TileWeights {
  using C = Sum<E>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;

  C *p, *ds;                   // [queries][lanes]; of pairs [queries of a part][width of the panel]
  E *weights, *grads;          // P and dS along the queries, [terms(queries)][lanes]
  E* grad_rows;                // dS along the keys, [queries][terms(lanes)]
  int64_t lanes, grad_stride;  // strides

  TileWeights() = default;
  // For so many queries and keys, parts of so many queries and panels of so many keys.
  TileWeights(Carver& carve, int64_t queries, int64_t keys, int64_t part, int64_t width)
      : lanes(spread<C>(keys)), grad_stride(terms<E>(lanes)) {
    p = carve.take<C>(kBFloat16x2 ? part * width : queries * lanes);
    ds = carve.take<C>(kBFloat16x2 ? part * width : queries * lanes);
    if constexpr (kBFloat16x2) {
      weights = carve.take<E>(terms<E>(queries) * lanes);
      grads = carve.take<E>(terms<E>(queries) * lanes);
      grad_rows = carve.take<E>(queries * terms<E>(lanes));
    } else {
      weights = p, grads = grad_rows = ds;
    }
  }

  // Where numbers of a part lie, whose first query is the row r, of the panel from lane l on.
  struct Numbers {
    C *p, *ds;
    int64_t stride;
  };
  Numbers numbers(int64_t r, int64_t l, int64_t width) const {
    if constexpr (kBFloat16x2) return {p, ds, width};
    return {p + r * lanes + l, ds + r * lanes + l, lanes};
  }

  // Rows [r0, r1) of a panel become `absent`, and zero. Pairs begin with even rows.
  void clear(int64_t r0, int64_t r1, int64_t l, int64_t width, Vec<C> absent) const {
    if constexpr (kBFloat16x2) {
      const Vec<E> mark = join(absent, absent);
      for (int64_t r = r0; r < r1; r += 2)
        for (int64_t x = l; x < l + width; x += n)
          store(weights + r / 2 * lanes + x, mark), store(grads + r / 2 * lanes + x, Vec<E>{});
      for (int64_t r = r0; r < r1; ++r) __builtin_memset(grad_rows + r * grad_stride + l / 2, 0, width / 2 * sizeof(E));
    } else {
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t x = l; x < l + width; x += n)
          store(p + r * lanes + x, absent), store(ds + r * lanes + x, Vec<C>{});
    }
  }

  // Rows from r on, of kN vectors each from lane l on, joined. The number of rows is even, but for the tile's last
  // ones.
  template <int kN, int kCount>
  HEEDFUL_FN void store_pairs(int64_t r, int64_t l, const Vec<C> (&x)[kCount], const Vec<C> (&y)[kCount]) const {
    constexpr int kRows = kCount / kN;
#pragma GCC unroll 8
    for (int row = 0; row < kRows; row += 2) {
      E* const pairs = weights + (r + row) / 2 * lanes + l;
      E* const grad_pairs = grads + (r + row) / 2 * lanes + l;
      BFloat16* const of_row = reinterpret_cast<BFloat16*>(grad_rows + (r + row) * grad_stride) + l;
#pragma GCC unroll 8
      for (int v = 0; v < kN; ++v) {
        const int first = row * kN + v, second = row + 1 < kRows ? first + kN : first;
        const bool alone = second == first;
        store(pairs + v * n, join(x[first], alone ? Vec<C>{} : x[second]));
        store(grad_pairs + v * n, join(y[first], alone ? Vec<C>{} : y[second]));
        store_rounded(of_row + v * n, y[first]);
        if (!alone) store_rounded(of_row + 2 * grad_stride + v * n, y[second]);
      }
    }
  }
  // Likewise, a part's numbers.
  void join_numbers(int64_t r, int64_t rows, int64_t l, int64_t width) const {
    join_rows(weights + r / 2 * lanes + l, lanes, p, width, rows, width);
    join_rows(grads + r / 2 * lanes + l, lanes, ds, width, rows, width);
    join_lanes(grad_rows + r * grad_stride + l / 2, grad_stride, ds, width, rows, width);
  }
  // The key that an odd number of keys lacks.
  void clear_key(int64_t key, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) reinterpret_cast<BFloat16*>(grad_rows + r * grad_stride)[key].bits = 0;
  }

  // By the mark. A NaN may seem to be one: it makes NaN of whatever it is multiplied by.
  bool is_absent(int64_t r, int64_t key) const {
    if constexpr (kBFloat16x2)
      return reinterpret_cast<const BFloat16*>(weights + r / 2 * lanes + key)[r % 2].bits >> 15;
    else
      return p[r * lanes + key] < 0;
  }
};

}  // namespace heedful::HEEDFUL_TARGET
