// The one matrix kernel: C[m][n] (+)= sum_k A[m][k] * B[k][n], with n in lanes and A's elements broadcast.
// A block of kRows x kVectors accumulators, or of more rows and fewer vectors, stays in registers for the whole sum.
#pragma once

#include "microkernel_tiles.h"
#include "operands.h"

namespace heedful::HEEDFUL_TARGET {

// Accumulators + one row of B + one element of A fill the register file: 24 + 4 + 1 of 32, or 12 + 2 + 1 of 16. An FMA
// takes 4 cycles and two start in each, so 8 accumulators would hide its latency.
constexpr int kRows = 6;
constexpr int kVectors = HEEDFUL_VECTOR_REGISTERS == 32 ? 4 : 2;

constexpr int64_t kLine = 64;  // bytes of a cache's line

// Elements of a sum after which it pauses, for ranges that do something else meanwhile (ahead.h).
constexpr int64_t kPace = 8;

template <int kM, int kN, Onto onto, class E, Unit unit, class Range>
HEEDFUL_FN void multiply_tile(Operand<E, unit> a, int64_t m, int64_t k0, int64_t k1, const E* b, int64_t b_stride,
                              Sum<E>* c, int64_t c_stride, Sum<E>* per_lane, const Range& range) {
  constexpr int n = kLanes<E>;
  Vec<Sum<E>> sum[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) sum[i][v] = Vec<Sum<E>>{};
  const E *left, *right;
  const auto add_product = [&](auto lo, auto hi) __attribute__((always_inline)) {
    Vec<E> row[kN];
#pragma GCC unroll 4
    for (int v = lo.value; v < hi.value; ++v) row[v] = load(right + v * n);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const Vec<E> x = broadcast_element(unit == Unit::k ? left + i * a.stride : left + i);
#pragma GCC unroll 4
      for (int v = lo.value; v < hi.value; ++v) sum[i][v] = multiply_add<E>(sum[i][v], x, row[v]);
    }
    left += unit == Unit::k ? 1 : a.stride;
    right += b_stride;
  };
  const auto add_products = [&](int64_t count, auto lo, auto hi) __attribute__((always_inline)) {
    constexpr int kUnrolled = 4;  // fewer loops' ends to mispredict: 3 to 5 %
    for (; count >= kUnrolled; count -= kUnrolled)
#pragma GCC unroll 4
      for (int x = 0; x < kUnrolled; ++x) add_product(lo, hi);
    for (; count > 0; --count) add_product(lo, hi);
  };
  const auto add_between = [&](int64_t k0, int64_t k1, auto lo, auto hi) __attribute__((always_inline)) {
    left = unit == Unit::k ? a.data + m * a.stride + k0 : a.data + m + k0 * a.stride;
    right = b + k0 * b_stride;
    if constexpr (requires { range.pause(); })
      for (int64_t k = k0; k < k1; k += kPace) range.pause(), add_products(least(kPace, k1 - k), lo, hi);
    else
      add_products(k1 - k0, lo, hi);
  };
  if constexpr (requires { range.spans; })
    range.spans.for_each_run([&](int64_t from, int64_t to, auto lo, auto hi) __attribute__((always_inline)) {
      add_between(from / kDepth<E>, terms<E>(to), lo, hi);
    });
  else
    add_between(k0, k1, Constant<0>{}, Constant<kN>{});
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) {
      Sum<E>* to = c + (m + i) * c_stride + v * n;
      if constexpr (onto == Onto::c) sum[i][v] += load(to);
      if constexpr (onto == Onto::scaled_c) sum[i][v] += load(to) * load(per_lane + v * n);
      store(to, sum[i][v]);
    }
  if constexpr (onto == Onto::nothing_topped)
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) {
      Vec<Sum<E>> top = load(per_lane + v * n);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) top = maximum(sum[i][v], top);
      store(per_lane + v * n, top);
    }
}

// Rows that a tile of kN vectors takes at a time, up to kRows of them: narrow tiles take two, or they would have too
// few accumulators to hide the latency.
template <int kN>
constexpr int kRowStep = kVectors / kN >= 2 ? 2 : 1;

// Rows [m0, m1) of C, kN vectors wide. Rows are dealt out evenly (tiles of 5 and 6 rather than of 6 and a rest), which
// keeps every tile near the full number of accumulators.
template <int kN, Onto onto, class E, Unit unit, class Range>
HEEDFUL_FN void multiply_panel(Operand<E, unit> a, int64_t m0, int64_t m1, const E* b, int64_t b_stride, Sum<E>* c,
                               int64_t c_stride, Sum<E>* per_lane, const Range& range) {
  constexpr int step = kRowStep<kN>;
  const int64_t steps = (m1 - m0 + step - 1) / step, tiles = (steps + kRows - 1) / kRows;
  if (steps <= 0) return;
  const int64_t each = steps / tiles, longer = tiles - steps % tiles;  // tiles from there on take a step more
  for (int64_t t = 0, m = m0, end; t < tiles; ++t, m = end) {
    end = least(m + step * (each + (t >= longer)), m1);
    const int64_t k0 = range.first(m, end) / kDepth<E>, k1 = terms<E>(range.end(m, end));
    switch ((end - m) / step) {
      case 6:
        multiply_tile<6 * step, kN, onto>(a, m, k0, k1, b, b_stride, c, c_stride, per_lane, range);
        break;
      case 5:
        multiply_tile<5 * step, kN, onto>(a, m, k0, k1, b, b_stride, c, c_stride, per_lane, range);
        break;
      case 4:
        multiply_tile<4 * step, kN, onto>(a, m, k0, k1, b, b_stride, c, c_stride, per_lane, range);
        break;
      case 3:
        multiply_tile<3 * step, kN, onto>(a, m, k0, k1, b, b_stride, c, c_stride, per_lane, range);
        break;
      case 2:
        multiply_tile<2 * step, kN, onto>(a, m, k0, k1, b, b_stride, c, c_stride, per_lane, range);
        break;
      case 1:
        multiply_tile<step, kN, onto>(a, m, k0, k1, b, b_stride, c, c_stride, per_lane, range);
        break;
    }
    if ((end - m) % step) multiply_tile<1, kN, onto>(a, end - 1, k0, k1, b, b_stride, c, c_stride, per_lane, range);
  }
}

// The sum's limits for a tile of rows [m, end), in numbers: all of it, or what a band leaves (spans.h). Some do
// something else at each pause, and some have a span for each vector (ahead.h).
struct WholeSum {
  int64_t count;
  HEEDFUL_FN int64_t first(int64_t, int64_t) const { return 0; }
  HEEDFUL_FN int64_t end(int64_t, int64_t) const { return count; }
};

// f(lane, number of vectors) for panels of `lanes`, a multiple of the vector: as wide as registers hold, but for the
// last ones. Each lies in one word of a mask (masks.h), unless they are `kLevel`: 3 and 2 vectors rather than 4 and 1.
template <class C, bool kLevel = false, class F>
HEEDFUL_FN void for_each_panel(int64_t lanes, F f) {
  constexpr int n = kLanes<C>;
  const auto five_left = [&](int64_t l) { return kLevel && kVectors == 4 && l + 5 * n == lanes; };
  int64_t l = 0;
  for (; l + kVectors * n <= lanes && !five_left(l); l += kVectors * n) f(l, Constant<kVectors>{});
  if constexpr (kVectors > 2) {
    if (l + 3 * n <= lanes) f(l, Constant<3>{}), l += 3 * n;
    if (l + 2 * n <= lanes) f(l, Constant<2>{}), l += 2 * n;
  }
  if (l < lanes) f(l, Constant<1>{});
}

// Rows [m0, m1) of C, `lanes` wide, a multiple of the vector.
template <Onto onto, class E, Unit unit, class Range>
HEEDFUL_CALLED void multiply(Operand<E, unit> a, int64_t m0, int64_t m1, const E* b, int64_t b_stride, Sum<E>* c,
                             int64_t c_stride, int64_t lanes, Sum<E>* per_lane, const Range& range) {
  if constexpr (kInTiles<E>)
    multiply_in_tiles<onto>(a, m0, m1, b, b_stride, c, c_stride, lanes, per_lane, range);
  else
    for_each_panel<E, true>(lanes, [&](int64_t l, auto vectors) {
      multiply_panel<vectors.value, onto>(a, m0, m1, b + l, b_stride, c + l, c_stride, per_lane + l, range);
    });
}

// c += row m of the product over `count` numbers, of which B's take part where present(k) says so; added up as
// `multiply` does, so that the bits do not depend on the way.
template <class E, Unit unit, class F>
HEEDFUL_FN void add_row_carefully(Sum<E>* c, int64_t lanes, Operand<E, unit> a, int64_t m, int64_t count, Rows<E> b,
                                  F present) {
  for (int64_t l = 0; l < lanes; l += kLanes<Sum<E>>) {
    SumInOrder<E> sum;
    for (int64_t k = 0; k < terms<E>(count); ++k) {
      const auto part = [&](int half) { return present(k * kDepth<E> + half); };
      sum.add(k, broadcast_element(a.at(m, k)), where_present<E>(load(b.data + k * b.stride + l), part));
    }
    store(c + l, load(c + l) + sum.total());
  }
}

// A vector of lanes of row m of the product over the elements [k0, k1), less what B's marks leave out: an element of A
// counts as zero where B's, or the `marks` in its place, is below 0. Added up as `multiply` does.
template <class E, Unit unit>
HEEDFUL_FN Vec<Sum<E>> sum_unmarked(Operand<E, unit> a, int64_t m, int64_t k0, int64_t k1, const E* b, const E* marks,
                                    int64_t b_stride) {
  SumInOrder<E> sum;
  for (int64_t k = k0; k < k1; ++k)
    sum.add(k, where_unmarked<E>(broadcast_element(a.at(m, k)), load(marks + k * b_stride)), load(b + k * b_stride));
  return sum.total();
}

// Pauses of a product of so many rows and lanes, at least.
template <class E>
HEEDFUL_FN int64_t pauses(int64_t rows, int64_t lanes, int64_t numbers) {
  if constexpr (kInTiles<E>) return pauses_in_tiles(rows, lanes);
  int64_t tiles = 0;
  for_each_panel<E, true>(lanes, [&](int64_t, auto vectors) {
    constexpr int kTile = kRows * kRowStep<vectors.value>;
    tiles += (rows + kTile - 1) / kTile;
  });
  return tiles * ((terms<E>(numbers) + kPace - 1) / kPace);
}

// x rounded up to whole vectors.
template <class C>
HEEDFUL_FN int64_t padded(int64_t x) {
  constexpr int n = kLanes<C>;
  return (x + n - 1) / n * n;
}

// A stride, of so many numbers or a few more, at which the rows of a narrow panel find places in the first cache: it
// takes a line of each, and every eighth line has the same places as others.
template <class C>
HEEDFUL_FN int64_t spread(int64_t stride) {
  constexpr int64_t size = sizeof(C);
  return kVectors == 2 && stride * size % (8 * kLine) == 0 ? stride + kLine / size : stride;
}
// Whether rows do where they lie, or queries are too few for a copy to pay.
template <class S>
HEEDFUL_FN bool lie_spread(const View& rows, int64_t queries) {
  constexpr int64_t kFew = 256;
  return queries < kFew || spread<S>(rows.stride[2]) == rows.stride[2];
}

}  // namespace heedful::HEEDFUL_TARGET
