// q and dO in pairs along the queries, as backward's sums over queries want them: [queries][D] or, for tile registers,
// turned. Turned ones lie in blocks of queries, each [D][queries of the block].
#pragma once

#include "operands.h"
#include "whole_steps.h"

namespace heedful::HEEDFUL_TARGET {

// Whose queries lie together: all of a call; a sequence's, of the heads that a task has; a tile's.
enum class PairsOf { call, sequence, tile };

template <int64_t kBlock>
struct PairedQueries {
  using E = BFloat16x2;
  using Steps = WholeSteps<E>;
  static_assert(kBlock % Steps::kRows == 0);

  E* data;
  int64_t dim;
  PairsOf of;
  Steps steps;

  PairedQueries() = default;
  PairedQueries(Carver& carve, const Problem& p, int64_t dim, PairsOf of, int64_t heads_of_task)
      : dim(dim), of(of), steps(steps_of(p, of, heads_of_task)) {
    data = carve.take<E>(steps.count() * step_size());
  }
  static Steps steps_of(const Problem& p, PairsOf of, int64_t heads_of_task) {
    if (of == PairsOf::call) return Steps::of_call(p, p.Hq, p.q_offsets, p.q_rows, p.Sq);
    if (of == PairsOf::sequence) return {heads_of_task, p.Hq, Steps::of(p.Sq), false};
    return {1, p.Hq, Steps::of(least(kBlock, p.Sq)), false};
  }

  // From query i of sequence b on to the end of its block.
  Rows<E> at(const Band& band, int64_t b, int64_t h, int64_t i) const {
    const int64_t block = of == PairsOf::tile ? i : i / kBlock * kBlock;
    const E* const from = start_of(band, b, h, block);
    return {from + terms<E>(i - block) * (kInTiles<E> ? 1 : width()), stride_of(band, block)};
  }
  // Queries [i0, i1), the first of which is a block's, or the tile's.
  void pack(const Band& band, int64_t b, int64_t h, int64_t i0, int64_t i1, Source<BFloat16> from) const {
    for (int64_t i = i0; i < i1; i += kBlock, from.data += kBlock * from.row_stride) {
      const int64_t queries = least(kBlock, i1 - i), stride = stride_of(band, i);
      E* const to = start_of(band, b, h, i);
      if (kInTiles<E>)
        load_row_pairs(to, stride, {from.data, from.lane_stride, from.row_stride}, dim, queries);
      else
        load_pairs(to, stride, from, queries, dim, stride);
    }
  }

 private:
  E* start_of(const Band& band, int64_t b, int64_t h, int64_t block) const {
    return data + steps.at(b, h, band.q_row, of == PairsOf::tile ? 0 : block) * step_size();
  }
  int64_t stride_of(const Band& band, int64_t block) const {
    return kInTiles<E> ? terms<E>(Steps::of(least(kBlock, band.queries - block)) * Steps::kRows) : width();
  }
  int64_t width() const { return padded<float>(dim); }
  int64_t step_size() const { return terms<E>(Steps::kRows) * width(); }
};

template <int64_t kBlock>
struct PairsOfQueries {
  PairedQueries<kBlock> q, dout;

  // Whether sequences are so short that whole steps would be much more than their queries.
  static bool are_sparse(const Problem& p) {
    using Paired = PairedQueries<kBlock>;
    const int64_t steps = Paired::steps_of(p, PairsOf::call, p.Hq).per_head;
    return steps * Paired::Steps::kRows > 2 * (p.q_offsets ? p.q_rows : p.Sq);
  }

  PairsOfQueries() = default;
  PairsOfQueries(Carver& carve, const Problem& p, PairsOf of, int64_t heads_of_task)
      : q(carve, p, p.D, of, heads_of_task), dout(carve, p, p.Dv, of, heads_of_task) {}
};

}  // namespace heedful::HEEDFUL_TARGET
