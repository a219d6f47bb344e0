// What a band leaves of products where its edge crosses a block: rows that each vector of lanes sees, where queries
// meet keys, and terms of the sums over queries and keys.
#pragma once

#include "masks.h"

namespace heedful::HEEDFUL_TARGET {

// Rows of a block that each of kN vectors takes part in: those that any of its lanes sees, or more. Both limits rise
// from one vector to the next. All lanes see the rows [first_whole, end_whole), where there are others.
template <int kN>
struct Spans {
  int64_t first[kN], end[kN];
  int64_t first_whole, end_whole;

  static Spans all(int64_t rows) {
    Spans spans;
    for (int v = 0; v < kN; ++v) spans.first[v] = 0, spans.end[v] = rows;
    spans.first_whole = 0, spans.end_whole = rows;
    return spans;
  }

  // Of so many lanes, of which lane x sees the rows [first_row(x), end_row(x)); in steps of kStep rows, but for the
  // last one. Where the lanes have no row in common, all of them; masks leave out what is too much.
  template <int kStep, int n, class First, class End>
  HEEDFUL_FN static Spans of(int64_t lanes, int64_t rows, First first_row, End end_row) {
    const auto down = [](int64_t row) { return row / kStep * kStep; };
    const auto up = [](int64_t row) { return (row + kStep - 1) / kStep * kStep; };
    const auto in_block = [&](int64_t row) { return clamp(row, 0, rows); };
    const int64_t first_whole = up(first_row(lanes - 1)), end_seen = end_row(0),
                  end_whole = end_seen < rows ? down(end_seen) : end_seen;
    if (first_whole > end_whole) return all(rows);
    Spans spans;
    for (int v = 0; v < kN; ++v) {
      const int64_t l = v * n, last = least(l + n, lanes) - 1;
      spans.first[v] = in_block(l < lanes ? down(first_row(l)) : first_whole);
      spans.end[v] = in_block(up(end_row(last)));
    }
    spans.first_whole = in_block(first_whole), spans.end_whole = in_block(end_whole);
    return spans;
  }
  // Whether vectors take part in the same rows; whether there are no others than whole ones.
  HEEDFUL_FN bool same() const { return first[kN - 1] == first[0] && end[kN - 1] == end[0]; }
  HEEDFUL_FN bool whole() const { return first_whole == first[0] && end_whole == end[kN - 1]; }
  HEEDFUL_FN int64_t count() const { return end[kN - 1] - first[0]; }
  // What there is of them between two rows, counted from the first of these.
  HEEDFUL_FN Spans between(int64_t from, int64_t to) const {
    const auto part = [&](int64_t row) { return clamp(row, from, to) - from; };
    Spans spans;
    for (int v = 0; v < kN; ++v) spans.first[v] = part(first[v]), spans.end[v] = part(end[v]);
    spans.first_whole = part(first_whole), spans.end_whole = part(end_whole);
    return spans;
  }

  // f(from, to, lo, hi) for each run that the vectors [lo, hi) share: those that see it.
  template <class F>
  HEEDFUL_FN void for_each_run(F f) const {
    rise<1>(f);
    f(first[kN - 1], end[0], Constant<0>{}, Constant<kN>{});
    fall<1>(f);
  }
  // Likewise, of one vector in part, which f is told, or -1.
  template <class F>
  HEEDFUL_FN void for_each_part(F f) const {
    for (int v = 0; v < kN; ++v) {
      const int64_t to = v + 1 < kN ? first[v + 1] : first_whole;
      if (first[v] < to) f(first[v], to, 0, v + 1, v);
    }
    if (first_whole < end_whole) f(first_whole, end_whole, 0, kN, -1);
    for (int v = 0; v < kN; ++v) {
      const int64_t from = v > 0 ? end[v - 1] : end_whole;
      if (from < end[v]) f(from, end[v], v, kN, v);
    }
  }

 private:
  template <int kHi, class F>
  HEEDFUL_FN void rise(F f) const {
    if constexpr (kHi < kN) {
      if (first[kHi - 1] < first[kHi]) f(first[kHi - 1], first[kHi], Constant<0>{}, Constant<kHi>{});
      rise<kHi + 1>(f);
    }
  }
  template <int kLo, class F>
  HEEDFUL_FN void fall(F f) const {
    if constexpr (kLo < kN) {
      if (end[kLo - 1] < end[kLo]) f(end[kLo - 1], end[kLo], Constant<kLo>{}, Constant<kN>{});
      fall<kLo + 1>(f);
    }
  }
};

// Limits of a sum over queries, for rows of keys, or lanes: the queries that see any of these, counted from the tile's
// first.
template <bool kOfKeysInLanes>
struct QueriesThatSee {
  static constexpr bool kOfLanes = kOfKeysInLanes;
  const Band& band;
  const Tile& tile;
  HEEDFUL_FN int64_t first(int64_t key, int64_t) const {
    return most(band.first_query(tile.j0 + key), tile.i0) - tile.i0;
  }
  HEEDFUL_FN int64_t end(int64_t, int64_t key_end) const {
    return least(band.end_query(least(tile.j0 + key_end, tile.j1) - 1), tile.i1) - tile.i0;
  }
};
// Limits of a sum over keys, for rows of queries.
struct KeysSeen {
  const Band& band;
  const Tile& tile;
  HEEDFUL_FN int64_t first(int64_t query, int64_t) const {
    return most(band.first_key(tile.i0 + query), tile.j0) - tile.j0;
  }
  HEEDFUL_FN int64_t end(int64_t, int64_t query_end) const {
    return least(band.end_key(tile.i0 + query_end - 1), tile.j1) - tile.j0;
  }
};

}  // namespace heedful::HEEDFUL_TARGET
