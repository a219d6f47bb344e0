// Where a sequence lies, and masks by position: causal, sliding windows and lengths. Query i of a sequence sits at
// start + i and sees the keys [position - left, position + right], cut to the sequence's lengths.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

// The band of one sequence. Both ends of a query's keys rise with the query, so a block's keys follow from its ends.
// Offsets that no one has checked may be anything: rows stay inside of memory, and within the length that Sq and Sk
// say.
struct Band {
  int64_t batch, q_row, k_row;  // the first query is row q_row of that batch entry in memory, the first key row k_row
  int64_t q_rows, k_rows;       // the rows there that are this sequence's own
  int64_t queries, keys;        // those of them that exist
  int64_t start, left, right;

  HEEDFUL_FN Band(const Problem& p, int64_t b) {
    // Positions this far out see nothing or everything already; the clamp keeps sums inside 64 bits.
    constexpr int64_t kFar = int64_t{1} << 60;
    start = clamp(p.q_starts ? p.q_starts[b] : p.q_start, -kFar, kFar);
    left = p.left == kUnbounded ? kUnbounded : clamp(p.left, -kFar, kFar);
    right = p.right == kUnbounded ? kUnbounded : clamp(p.right, -kFar, kFar);
    batch = p.q_offsets ? 0 : b;
    q_row = p.q_offsets ? clamp(p.q_offsets[b], 0, p.q_rows) : 0;
    k_row = p.k_offsets ? clamp(p.k_offsets[b], 0, p.k_rows) : 0;
    q_rows = p.q_offsets ? clamp(clamp(p.q_offsets[b + 1], 0, p.q_rows) - q_row, 0, p.Sq) : p.Sq;
    k_rows = p.k_offsets ? clamp(clamp(p.k_offsets[b + 1], 0, p.k_rows) - k_row, 0, p.Sk) : p.Sk;
    queries = p.q_lengths ? clamp(p.q_lengths[b], 0, q_rows) : q_rows;
    keys = p.k_lengths ? clamp(p.k_lengths[b], 0, k_rows) : k_rows;
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

// Query heads that share a key/value head.
HEEDFUL_FN int64_t heads_per_group(const Problem& p) { return p.Hk ? p.Hq / p.Hk : 0; }

// Whether sequences have lengths of their own: one may then be nearly all the work.
HEEDFUL_FN bool has_unlike_sequences(const Problem& p) { return p.q_offsets || p.q_lengths || p.k_lengths; }

// The first element of a row of q, k, v and the like.
template <class T>
HEEDFUL_FN T* row_of(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
}

// The place of a sequence's first query among all of them: [B, Hq, Sq], or [1, Hq, q_rows] when packed; of its first
// key.
HEEDFUL_FN int64_t query_index(const Problem& p, const Band& band, int64_t h) {
  return (band.batch * p.Hq + h) * p.q_rows + band.q_row;
}
HEEDFUL_FN int64_t key_index(const Problem& p, const Band& band, int64_t hk) {
  return (band.batch * p.Hk + hk) * p.k_rows + band.k_row;
}
HEEDFUL_FN int64_t query_count(const Problem& p) { return (p.q_offsets ? 1 : p.B) * p.Hq * p.q_rows; }
HEEDFUL_FN int64_t key_count(const Problem& p) { return (p.k_offsets ? 1 : p.B) * p.Hk * p.k_rows; }

}  // namespace heedful::HEEDFUL_TARGET
