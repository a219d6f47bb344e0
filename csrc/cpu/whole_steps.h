// Where operands lie that were made of heads' rows for sums over the rows: in whole steps of the sum, head after head;
// packed sequences one after the other in each head, from steps of their own on.
#pragma once

#include "../score/mask.h"
#include "tile_registers.h"

namespace heedful::HEEDFUL_TARGET {

template <class E>
struct WholeSteps {
  static constexpr int64_t kRows = kSumStep<E>;

  int64_t heads, per_batch, per_head;  // heads that lie here, as many of each batch; steps
  bool packed;

  static int64_t of(int64_t rows) { return (rows + kRows - 1) / kRows; }
  // All heads of a call: of all sequences, if they are packed, else of sequences of at most so many rows.
  static WholeSteps of_call(const Problem& p, int64_t heads, const int64_t* offsets, int64_t packed_rows,
                            int64_t rows) {
    if (offsets) return {heads, heads, packed_rows / kRows + p.B, true};
    return {p.B * heads, heads, of(rows), false};
  }

  int64_t count() const { return heads * per_head; }
  // The step of a row of sequence b, which starts at `first` of the packed ones.
  int64_t at(int64_t b, int64_t h, int64_t first, int64_t row) const {
    return (b * per_batch + h) % heads * per_head + (packed ? first / kRows + b : 0) + row / kRows;
  }
};

}  // namespace heedful::HEEDFUL_TARGET
