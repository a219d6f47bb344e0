// The keys that queries of one sequence see: score/mask.h's Band in 32 bits, for registers' sake.
#pragma once

#include "numbers.h"
//
#include "../score/mask.h"

namespace heedful::HEEDFUL_TARGET {

struct Span {
  int queries, keys;
  int first_shift, end_shift;  // query i sees [i + first_shift, i + end_shift), cut to the sequence

  HEEDFUL_FN explicit Span(const Band& band) : queries(int(band.queries)), keys(int(band.keys)) {
    // Sequences have at most 2^30 rows: a shift that far sees nothing or everything already.
    constexpr int64_t kFar = int64_t{1} << 30;
    first_shift = band.left == kUnbounded ? -int(kFar) : int(clamp(band.start - band.left, -kFar, kFar));
    end_shift = band.right == kUnbounded ? int(kFar) : int(clamp(band.start + band.right + 1, -kFar, kFar));
  }

  HEEDFUL_FN static int cut(int x, int end) { return x < 0 ? 0 : x > end ? end : x; }
  HEEDFUL_FN int first_key(int i) const { return cut(i + first_shift, keys); }
  HEEDFUL_FN int end_key(int i) const { return cut(i + end_shift, keys); }
  // The queries that see key j.
  HEEDFUL_FN int first_query(int j) const { return cut(j - end_shift + 1, queries); }
  HEEDFUL_FN int end_query(int j) const { return cut(j - first_shift + 1, queries); }
  // Every query of [i0, i1) that exists sees every key of [j0, j1).
  HEEDFUL_FN bool covers(int i0, int i1, int j0, int j1) const {
    return first_key(least(i1, queries) - 1) <= j0 && j1 <= end_key(i0);
  }
};

// Block x of a launch is the block of rows x % blocks, counted from the last one, of head and sequence x / blocks:
// under a causal mask the last rows have the most to do.
struct Task {
  int b, h, row0;
  HEEDFUL_DEVICE Task(int64_t rows, int64_t heads, int rows_per_block) {
    const uint32_t blocks = (uint32_t(rows) + uint32_t(rows_per_block) - 1) / uint32_t(rows_per_block);
    const uint32_t index = uint32_t(block_index()), head = index / blocks;
    row0 = int(blocks - 1 - index % blocks) * rows_per_block;
    b = int(head / uint32_t(heads));
    h = int(head % uint32_t(heads));
  }
};

// How many blocks that makes.
inline int64_t task_count(int64_t sequences, int64_t rows, int64_t heads, int rows_per_block) {
  return sequences * heads * ((rows + rows_per_block - 1) / rows_per_block);
}

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
