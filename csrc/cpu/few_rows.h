// The two products of decoding with few rows, of q and of probabilities. K and V are read where they lie, row by row,
// with the head dim in vector lanes:
//
//   S[row][key]  = sum_d   Q[row][d] * K[key][d]       kPairs at a time, whose lanes are added up together
//   O[row][d]   += sum_key P[row][key] * V[key][d]
//
// Pairs of bfloat16 (operands.h) are of D in the first product; those of keys, in the second, are made in registers.
#pragma once

#include "ahead.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E>
struct FewRows {
  using C = Sum<E>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  // Accumulators of a step, of rows x keys or rows x vectors: they hide the latency of an addition, in half of the
  // registers. What is loaded of K and V serves up to four rows.
  static constexpr int kPairs = HEEDFUL_VECTOR_REGISTERS / 2;

  int64_t rows;
  bool in_order;

  // Whether rows in place are read from the first byte to the last, with little to do for each: then the processor
  // fetches what follows, a quarter faster than it could be asked to.
  static constexpr int kInOrder = 2;
  static bool reads_in_order(const Problem& p, int64_t rows) {
    return rows > 0 && rows <= kInOrder && p.k.stride[2] == p.D && p.v.stride[2] == p.Dv && p.Dv % n == 0 &&
           passes_of(int(rows), p.Dv) == 1;
  }

  // ---- scores

  // scores[row * stride + key] of the rows of q; `numbers` is D, and a row of q has `dim` elements. Meanwhile other
  // rows come, one for each key. Each row is written up to a multiple of kPairs, which `stride` has to be.
  template <class T>
  HEEDFUL_CALLED void score(C* scores, int64_t stride, const E* q, int64_t dim, int64_t numbers, const Rows<T>& k,
                            int64_t keys, const RowsAhead& meanwhile, const RowsAhead& then) const {
    RowByRow ahead(meanwhile, then);
    for (int64_t j = 0; j < keys; j += kPairs) {
      const int64_t end = least<int64_t>(j + kPairs, keys);
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) score_step<4>(scores, stride, q, dim, numbers, k, r, j, end, ahead);
      if (r + 2 <= rows) score_step<2>(scores, stride, q, dim, numbers, k, r, j, end, ahead), r += 2;
      if (r < rows) score_step<1>(scores, stride, q, dim, numbers, k, r, j, end, ahead);
    }
    ahead.expect_end();
  }

  // Rows [r, r + kR) with the block's keys [j, end).
  template <int kR, class T>
  HEEDFUL_FN void score_step(C* scores, int64_t stride, const E* q_rows, int64_t dim, int64_t numbers, const Rows<T>& k,
                             int64_t r, int64_t j, int64_t end, RowByRow& ahead) const {
    constexpr int kJ = kPairs / kR;
    const int64_t present = terms<E>(numbers);
    for (; j < end; j += kJ) {
      const T* key[kJ];
#pragma GCC unroll 16
      for (int i = 0; i < kJ; ++i) key[i] = k.data + least(j + i, end - 1) * k.stride;
      const E* q = q_rows + r * dim;
      Vec<C> sum[kPairs];
#pragma GCC unroll 16
      for (int x = 0; x < kPairs; ++x) sum[x] = Vec<C>{};
      const auto add_product = [&](int i, int64_t d, Vec<E> x) {
#pragma GCC unroll 4
        for (int row = 0; row < kR; ++row)
          sum[row * kJ + i] = multiply_add<E>(sum[row * kJ + i], x, load(q + row * dim + d));
      };
      const int64_t whole = present / n * n;
      if (kR <= kInOrder && in_order) {
#pragma GCC unroll 16
        for (int i = 0; i < kJ; ++i) {
          fetch_later_page(key[i], present * int64_t(sizeof(T)));
          for (int64_t d = 0; d < whole; d += n) add_product(i, d, load_as(key[i] + d, E()));
          if (whole < dim) add_product(i, whole, load_first<E>(key[i] + whole, present - whole));
        }
      } else {
        const auto add_products = [&](int64_t d, auto load_key) {
          Vec<E> x[kJ];
#pragma GCC unroll 16
          for (int i = 0; i < kJ; ++i) x[i] = load_key(key[i] + d);
#pragma GCC unroll 16
          for (int i = 0; i < kJ; ++i) add_product(i, d, x[i]);
        };
        for (int64_t d = 0; d < whole; d += n) add_products(d, [](const T* x) { return load_as(x, E()); });
        if (whole < dim) add_products(whole, [&](const T* x) { return load_first<E>(x, present - whole); });
      }
      // Whole rows, now that nothing is loaded: lines that are asked for one by one, between loads, come later.
      if (r == 0) ahead.fetch_rows(kJ);
      C sums[kPairs];
#pragma GCC unroll 8
      for (int x = 0; x < kPairs; x += n) store(sums + x, sum_each<C>(sum + x));
#pragma GCC unroll 4
      for (int row = 0; row < kR; ++row)
        __builtin_memcpy(scores + (r + row) * stride + j, sums + row * kJ, kJ * sizeof(C));
    }
  }

  // ---- values

  // out[row][d] += sum of the keys; a row of `out` has padded Dv numbers. Meanwhile other rows come, up to as many.
  template <class T>
  HEEDFUL_CALLED void add_values(C* out, int64_t numbers, const Rows<E>& weights, const Rows<T>& v, int64_t keys,
                                 const RowsAhead& meanwhile) const {
    // Memory is read ahead in order: whole rows of v rather than halves of them, for two rows at a time. Where they are
    // widened or joined they serve four.
    constexpr int kTogether = sizeof(T) == sizeof(E) && !kBFloat16x2 ? 2 : 4;
    int64_t passes = 0;
    for_each_step_of_rows<kTogether>([&](int64_t, auto count) { passes += passes_of(count.value, numbers); });
    RowByRow ahead(meanwhile);
    for_each_step_of_rows<kTogether>(
        [&](int64_t r, auto count) { add_steps<count.value>(out, numbers, weights, v, keys, r, 0, passes, ahead); });
    ahead.expect_end();
  }

  // f(row, how many): kTogether where there are four or more, then two, then one.
  template <int kTogether, class F>
  HEEDFUL_FN void for_each_step_of_rows(F f) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += kTogether) f(r, Constant<kTogether>{});
    if (r + 2 <= rows) f(r, Constant<2>{}), r += 2;
    if (r < rows) f(r, Constant<1>{});
  }

  // How often add_steps goes over the keys.
  static int64_t passes_of(int rows, int64_t numbers) {
    int64_t count = 0, step = kPairs / rows;
    for (int64_t d = 0; d < numbers;)
      if (d + step * n <= numbers || step == 1)
        d += step * n, ++count;
      else
        step = smaller_step(rows, int(step));
    return count;
  }

  // Rows [r, r + kR), as many vectors at a time as there are accumulators for, then the next smaller step's.
  template <int kR, int kV = kPairs / kR, class T>
  HEEDFUL_FN void add_steps(C* out, int64_t numbers, const Rows<E>& weights, const Rows<T>& v, int64_t keys, int64_t r,
                            int64_t d, int64_t passes, RowByRow& ahead) const {
    for (; d + kV * n <= numbers; d += kV * n) add_step<kR, kV>(out, numbers, weights, v, keys, r, d, passes, ahead);
    if (d == numbers) return;
    if constexpr (kV > 1)
      add_steps<kR, smaller_step(kR, kV)>(out, numbers, weights, v, keys, r, d, passes, ahead);
    else
      add_step<kR, 1>(out, numbers, weights, v, keys, r, d, passes, ahead);
  }
  // Up to 128 floats at D = 80, 96 and so on are one step of those that are read in order; pairs come two by two.
  static constexpr int smaller_step(int rows, int vectors) {
    return rows > kInOrder || vectors > 8 || vectors <= 2 ? vectors / 2 : vectors - (kBFloat16x2 ? 2 : 1);
  }

  template <int kR, int kV, class T>
  HEEDFUL_FN void add_step(C* out, int64_t numbers, const Rows<E>& weights, const Rows<T>& v, int64_t keys, int64_t r,
                           int64_t d, int64_t passes, RowByRow& ahead) const {
    Vec<C> sum[kR][kV];
#pragma GCC unroll 4
    for (int row = 0; row < kR; ++row)
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) sum[row][i] = Vec<C>{};
    const E* weight = weights.data + r * weights.stride;
    // Each of the passes asks for its share of the rows: for one, or two, every `passes` elements.
    const int64_t end = terms<E>(keys), between = ahead.any() ? passes : end;
    for (int64_t j = 0; j < end;) {
      ahead.fetch_rows(kDepth<E>);
      for (const int64_t until = least(j + between, end); j < until; ++j) {
        if (kR <= kInOrder && in_order)
          fetch_later_page(v.data + j * kDepth<E> * v.stride, kDepth<E> * numbers * int64_t(sizeof(T)));
        Vec<E> x[kV];
        load_values(x, v, j, keys, d, numbers);
#pragma GCC unroll 4
        for (int row = 0; row < kR; ++row) {
          const Vec<E> y = broadcast_element(weight + row * weights.stride + j);
#pragma GCC unroll 16
          for (int i = 0; i < kV; ++i) sum[row][i] = multiply_add<E>(sum[row][i], y, x[i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kR; ++row) {
      C* to = out + (r + row) * padded<C>(numbers) + d;
      if constexpr (kJoinsPairs<T> && kV > 1)
#pragma GCC unroll 8
        for (int i = 0; i < kV; i += 2) put_in_order(sum[row][i], sum[row][i + 1], typename LanesUpTo<n>::list{});
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) store(to + i * n, load(to + i * n) + sum[row][i]);
    }
  }

  // Whether pairs are made of two rows in memory.
  template <class T>
  static constexpr bool kJoinsPairs = kBFloat16x2 && sizeof(T) < sizeof(E);

  // Element j along the keys, of numbers d and on: whole vectors, or what there is of a single one.
  template <int kV, class T>
  HEEDFUL_FN static void load_values(Vec<E> (&x)[kV], const Rows<T>& v, int64_t j, int64_t keys, int64_t d,
                                     int64_t numbers) {
    if constexpr (kJoinsPairs<T>) {
      const T *first = v.data + 2 * j * v.stride + d, *second = 2 * j + 1 < keys ? first + v.stride : nullptr;
      load_pairs_of_rows<false>(x, first, second, numbers - d);
    } else {
      const T* row = v.data + j * v.stride + d;
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) x[i] = kV > 1 ? load_as(row + i * n, E()) : load_first<E>(row, numbers - d);
    }
  }
};

}  // namespace heedful::HEEDFUL_TARGET
