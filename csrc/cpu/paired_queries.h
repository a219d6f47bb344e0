// q and dO in pairs along the queries, as backward's sums over queries want them: [queries][D] or, for tile registers,
// turned. Turned ones lie in blocks of queries, each [D][queries of the block].
#pragma once

#include "../score/mask.h"
#include "tile_registers.h"

namespace heedful::HEEDFUL_TARGET {

// Whose queries they are: all of a call; a sequence's, of some heads; a tile's.
enum class PairsOf { call, sequence, tile };

template <int64_t kBlock>
struct PairedQueries {
  using E = BFloat16x2;
  // Queries that are summed up together. Those of packed sequences lie one after the other, in whole units.
  static constexpr int64_t kUnit = kSumStep<E>;
  static_assert(kBlock % kUnit == 0);

  E* data;
  int64_t dim, units_of_head;
  PairsOf of;
  bool packed;  // whether sequences lie so

  // Units of a head, of all sequences if they are packed.
  static int64_t units_of_call(const Problem& p) { return p.q_offsets ? p.q_rows / kUnit + p.B : units(p.Sq); }

  PairedQueries() = default;
  PairedQueries(Carver& carve, const Problem& p, int64_t dim, int64_t heads, PairsOf of)
      : dim(dim), units_of_head(units(p.Sq)), of(of), packed(of == PairsOf::call && p.q_offsets) {
    if (of == PairsOf::call) units_of_head = units_of_call(p);
    if (of == PairsOf::tile) units_of_head = units(least(kBlock, p.Sq));
    data = carve.take<E>(heads * units_of_head * unit_size());
  }

  // From query i of sequence b on to the end of its block; `head` counts those that lie here.
  Rows<E> at(const Band& band, int64_t b, int64_t head, int64_t i) const {
    const int64_t block = of == PairsOf::tile ? i : i / kBlock * kBlock;
    const E* const from = start_of(band, b, head, block);
    return {from + terms<E>(i - block) * (kInTiles<E> ? 1 : width()), stride_of(band, block)};
  }
  // Queries [i0, i1), the first of which is a block's, or the tile's.
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
    const int64_t first = packed ? band.q_row / kUnit + b : 0, unit = of == PairsOf::tile ? 0 : block / kUnit;
    return data + (head * units_of_head + first + unit) * unit_size();
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

  // Whether sequences are so short that units would be much more than their queries.
  static bool are_sparse(const Problem& p) {
    using Paired = PairedQueries<kBlock>;
    return Paired::units_of_call(p) * Paired::kUnit > 2 * (p.q_offsets ? p.q_rows : p.Sq);
  }

  PairsOfQueries() = default;
  PairsOfQueries(Carver& carve, const Problem& p, int64_t heads, PairsOf of)
      : q(carve, p, p.D, heads, of), dout(carve, p, p.Dv, heads, of) {}
};

}  // namespace heedful::HEEDFUL_TARGET
