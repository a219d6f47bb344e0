// Masks by position: causal, sliding windows and lengths. Query i of a sequence sits at start + i and sees the keys
// [position - left, position + right], cut to the sequence's lengths.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

HEEDFUL_FN int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The band of one sequence. Both ends of a query's keys rise with the query, so a block's keys follow from its ends.
struct Band {
  int64_t start, left, right;
  int64_t queries, keys;  // the lengths of this sequence

  HEEDFUL_FN Band(const Problem& p, int64_t b) {
    // Positions this far out see nothing or everything already; the clamp keeps sums inside 64 bits.
    constexpr int64_t kFar = int64_t{1} << 60;
    start = clamp(p.q_starts ? p.q_starts[b] : p.q_start, -kFar, kFar);
    left = p.left == kUnbounded ? kUnbounded : clamp(p.left, -kFar, kFar);
    right = p.right == kUnbounded ? kUnbounded : clamp(p.right, -kFar, kFar);
    queries = p.q_lengths ? clamp(p.q_lengths[b], 0, p.Sq) : p.Sq;
    keys = p.k_lengths ? clamp(p.k_lengths[b], 0, p.Sk) : p.Sk;
  }

  // The keys that query i sees: [first_key(i), end_key(i)); empty where the first is not below the second.
  HEEDFUL_FN int64_t first_key(int64_t i) const { return left == kUnbounded ? 0 : clamp(start + i - left, 0, keys); }
  HEEDFUL_FN int64_t end_key(int64_t i) const {
    return right == kUnbounded ? keys : clamp(start + i + right + 1, 0, keys);
  }
  // The queries that see key j: [first_query(j), end_query(j)).
  HEEDFUL_FN int64_t first_query(int64_t j) const {
    return right == kUnbounded ? 0 : clamp(j - right - start, 0, queries);
  }
  HEEDFUL_FN int64_t end_query(int64_t j) const {
    return left == kUnbounded ? queries : clamp(j + left - start + 1, 0, queries);
  }
  // Every query of [i0, i1) sees every key of [j0, j1).
  HEEDFUL_FN bool covers(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return i1 <= queries && first_key(i1 - 1) <= j0 && j1 <= end_key(i0);
  }
};

// allowed & (first <= x < end), lane by lane: x is a key and the bounds are those of the lanes' queries, or x runs over
// the lanes' keys and the bounds are one query's.
template <class Mask, class X, class Bound>
HEEDFUL_FN Mask in_band(Mask allowed, X x, Bound first, Bound end) {
  return allowed & (x >= first) & (x < end);
}

}  // namespace heedful::HEEDFUL_TARGET
