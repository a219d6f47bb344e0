// q and dO in pairs along the queries, as backward's sums over queries want them: [queries][D] or, for tile registers,
// turned. Turned ones lie in blocks of queries, each [D][queries of the block].
#pragma once

#include "../score/mask.h"
#include "tile_registers.h"

namespace heedful::HEEDFUL_TARGET {

template <int64_t kBlock>
struct PairedQueries {
  using E = BFloat16x2;
  // Queries that are summed up together. Those of packed sequences lie one after the other, in whole units.
  static constexpr int64_t kUnit = kSumStep<E>;
  static_assert(kBlock % kUnit == 0);

  E* data;
  int64_t dim, units_of_head;
  bool packed;  // whether sequences lie so

  PairedQueries() = default;
  // Of so many heads, of one sequence or of all packed ones.
  PairedQueries(Carver& carve, const Problem& p, int64_t dim, int64_t heads, bool packed)
      : dim(dim), units_of_head(packed ? p.q_rows / kUnit + p.B : units(p.Sq)), packed(packed) {
    data = carve.take<E>(heads * units_of_head * unit_size());
  }

  // From query i of sequence b on to the end of its block; `head` counts those that lie here.
  Rows<E> at(const Band& band, int64_t b, int64_t head, int64_t i) const {
    const int64_t block = i / kBlock * kBlock;
    const E* const from = start_of(band, b, head, block);
    return {from + terms<E>(i - block) * (kInTiles<E> ? 1 : width()), stride_of(band, block)};
  }
  // Queries [i0, i1), the first of which is a block's.
  void pack(const Band& band, int64_t b, int64_t head, int64_t i0, int64_t i1, Source<BFloat16> from) const {
    for (int64_t i = i0; i < i1; i += kBlock, from.data += kBlock * from.row_stride) {
      const int64_t queries = least(kBlock, i1 - i), stride = stride_of(band, i);
      E* const to = start_of(band, b, head, i);
      if (kInTiles<E>)
        load_row_pairs(to, stride, {from.data, from.lane_stride, from.row_stride}, dim, queries);
      else
        load_pairs(to, stride, from, queries, dim, stride);
    }
  }

 private:
  E* start_of(const Band& band, int64_t b, int64_t head, int64_t block) const {
    const int64_t first = packed ? band.q_row / kUnit + b : 0;
    return data + (head * units_of_head + first + block / kUnit) * unit_size();
  }
  int64_t stride_of(const Band& band, int64_t block) const {
    return kInTiles<E> ? terms<E>(units(least(kBlock, band.queries - block)) * kUnit) : width();
  }
  static int64_t units(int64_t queries) { return (queries + kUnit - 1) / kUnit; }
  int64_t width() const { return padded<float>(dim); }
  int64_t unit_size() const { return terms<E>(kUnit) * width(); }
};

template <int64_t kBlock>
struct PairsOfQueries {
  PairedQueries<kBlock> q, dout;

  // Whether sequences are packed and so short that units would be much more than their queries.
  static bool are_sparse(const Problem& p) {
    constexpr int64_t kUnit = PairedQueries<kBlock>::kUnit;
    return p.q_offsets && p.q_rows + p.B * kUnit > 2 * p.q_rows;
  }

  PairsOfQueries() = default;
  PairsOfQueries(Carver& carve, const Problem& p, int64_t heads, bool packed)
      : q(carve, p, p.D, heads, packed), dout(carve, p, p.Dv, heads, packed) {}
};

}  // namespace heedful::HEEDFUL_TARGET
