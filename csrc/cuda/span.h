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

// Rows of queries or of keys of every sequence, in blocks. Packed sequences have lengths that the host does not know:
// sequence b's blocks begin at block offsets[b] / rows_per_block + b of its head, for which none before it has too
// many, and those past its end have nothing to do.
enum class RowsOf { queries, keys };

template <RowsOf kOf>
struct RowTask : Task {
  HEEDFUL_DEVICE RowTask(const Problem& p, int rows_per_block)
      : Task(rows(p, rows_per_block), heads(p), rows_per_block) {
    const int64_t* offsets = kOf == RowsOf::queries ? p.q_offsets : p.k_offsets;
    if (!offsets) return;
    const int64_t total = kOf == RowsOf::queries ? p.q_rows : p.k_rows;
    const int block = row0 / rows_per_block;
    const auto first = [&](int n) { return int(clamp(offsets[n], 0, total) / rows_per_block) + n; };
    int end = int(p.B);
    for (b = 0; end - b > 1;) {
      const int middle = b + (end - b) / 2;
      (first(middle) <= block ? b : end) = middle;
    }
    row0 = block < first(b) ? int(total) : (block - first(b)) * rows_per_block;
  }

  // All sequences' together, where they are packed.
  HEEDFUL_FN static int64_t rows(const Problem& p, int rows_per_block) {
    if (!p.q_offsets) return kOf == RowsOf::queries ? p.Sq : p.Sk;
    return (kOf == RowsOf::queries ? p.q_rows : p.k_rows) / rows_per_block * rows_per_block + p.B * rows_per_block;
  }
  HEEDFUL_FN static int64_t heads(const Problem& p) { return kOf == RowsOf::queries ? p.Hq : p.Hk; }
  static int64_t count(const Problem& p, int rows_per_block) {
    if (p.B == 0) return 0;
    return task_count(p.q_offsets ? 1 : p.B, rows(p, rows_per_block), heads(p), rows_per_block);
  }
};

}  // namespace heedful::HEEDFUL_TARGET
