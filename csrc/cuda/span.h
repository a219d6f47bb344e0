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

}  // namespace heedful::HEEDFUL_TARGET
