// The softmax of queries in vector lanes, over one block of keys after the other: scores become probabilities relative
// to the largest so far. Those of kN vectors of queries lie [key][kN * n].
#pragma once

#include "../score/softmax.h"
#include "operands.h"
#include "spans.h"

namespace heedful::HEEDFUL_TARGET {

template <int kN, class C>
HEEDFUL_FN void clear_tops(C* tops) {
  for (int v = 0; v < kN; ++v) store(tops + v * kLanes<C>, broadcast<C>(-kInfinity<C>));
}
// Raises each query's top to its largest score; NaNs are passed over.
template <int kN, class C>
HEEDFUL_FN void find_tops(const C* scores, const Spans<kN>& keys, C* tops) {
  constexpr int n = kLanes<C>;
  for (int v = 0; v < kN; ++v) {
    Vec<C> top[4];  // of every fourth key: one would wait for itself
#pragma GCC unroll 4
    for (Vec<C>& each : top) each = broadcast<C>(-kInfinity<C>);
    for_each_step<4>(keys.first[v], keys.end[v], [&](int64_t j, auto rows) {
#pragma GCC unroll 4
      for (int i = 0; i < rows.value; ++i) top[i] = maximum(load(scores + ((j + i) * kN + v) * n), top[i]);
    });
    for (const Vec<C>& each : top) store(tops + v * n, maximum(each, load(tops + v * n)));
  }
}

// Scores become 2^((x - reference) to_log2), in this order: huge ones would be left with the rounding of a product.
template <class E, int kCount, class C = Sum<E>>
HEEDFUL_FN void to_probabilities(Vec<C> (&x)[kCount], Vec<C> reference, Vec<C> to_log2) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] -= reference;
  exp2_each_as<E>(x, to_log2);
}

template <int kN, bool mark, class E, class C = Sum<E>>
HEEDFUL_FN void softmax_block(C* const scores, E* const joined, const Spans<kN>& keys, Vec<C> to_log2, const C* tops,
                              C* maxima, C* sums, C* rescale) {
  constexpr int n = kLanes<C>;
  constexpr bool kBFloat16x2 = kDepth<E> == 2;
  const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
  for (int v = 0; v < kN; ++v) {  // one after the other, which leaves more registers
    const Vec<C> before = load(maxima + v * n), top = maximum(load(tops + v * n), before);
    const Vec<C> reference = softmax_reference(top, minus_infinity);
    const Vec<C> factor = exp2<C>(before - reference, to_log2);
    store(maxima + v * n, top);
    store(rescale + v * n, factor);
    Vec<C> sum = {};
    for_each_step<kInStep>(keys.first[v], keys.end[v], [&](int64_t j, auto rows) {
      constexpr int kCount = rows.value;
      C* const score = scores + (j * kN + v) * n;
      Vec<C> x[kCount], y[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) x[i] = y[i] = load(score + i * kN * n);
      to_probabilities<E>(y, reference, to_log2);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        sum += y[i];
        if constexpr (mark) y[i] = select(x[i] == minus_infinity, broadcast<C>(C(-1)), y[i]);
      }
      if constexpr (kBFloat16x2)
        if (joined) {
#pragma GCC unroll 8
          for (int i = 0; i < kCount; i += 2)
            store(joined + ((j + i) / 2 * kN + v) * n, join(y[i], i + 1 < kCount ? y[i + 1] : Vec<C>{}));
          return;
        }
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) store(score + i * kN * n, y[i]);
    });
    store(sums + v * n, load(sums + v * n) * factor + sum);
  }
}

// Scores become probabilities relative to the new maximum, of earlier ones and `tops`; `rescale` takes earlier ones to
// it, and the queries' sums follow. Distances between scores times `to_log2` are powers of two. With `mark`, absent
// pairs get -1 instead of 0. Pairs of bfloat16 are joined at once, if `joined` is not null.
template <int kN, class E, class C = Sum<E>>
HEEDFUL_FN void online_softmax(C* scores, E* joined, const Spans<kN>& keys, Vec<C> to_log2, const C* tops, C* maxima,
                               C* sums, C* rescale, bool mark) {
  if (mark)
    softmax_block<kN, true>(scores, joined, keys, to_log2, tops, maxima, sums, rescale);
  else
    softmax_block<kN, false>(scores, joined, keys, to_log2, tops, maxima, sums, rescale);
}

}  // namespace heedful::HEEDFUL_TARGET
