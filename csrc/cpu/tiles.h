// Moves tiles between memory, of any strides and storage type, and local rows of the compute type.
#pragma once

#include "lanes.h"

namespace heedful::HEEDFUL_TARGET {

// ---- squares of registers -------------------------------------------------------------------------------------------

// Of two vectors, by the one cheap instruction that processors have: of each block of 128 bits the first or second
// half, whose lanes alternate; or every other block, of a, then of b.
template <class T, bool kWithin, bool kSecond>
constexpr int lane_taken(int lane) {
  constexpr int n = kLanes<T>, kBlock = 16 / sizeof(T);
  const int block = lane / kBlock, at = lane % kBlock;
  if (kWithin) return at % 2 * n + block * kBlock + at / 2 + kSecond * kBlock / 2;
  return (2 * block + kSecond) * kBlock + at;
}
template <class T, bool kWithin, bool kSecond, int... kLane>
HEEDFUL_FN Vec<T> take_halves(Vec<T> a, Vec<T> b, LaneList<kLane...>) {
  return __builtin_shufflevector(a, b, lane_taken<T, kWithin, kSecond>(kLane)...);
}
template <class T, bool kWithin, bool kSecond>
HEEDFUL_FN Vec<T> take_halves(Vec<T> a, Vec<T> b) {
  return take_halves<T, kWithin, kSecond>(a, b, typename LanesUpTo<kLanes<T>>::list{});
}

// Rows whose index differs in one bit trade halves, for each bit of a lane's index: those within a block from the
// highest down, then those of blocks from the lowest up, which leaves every lane in its place.
template <class T>
constexpr int kFirstBit = 8 / sizeof(T);
template <class T>
constexpr int next_bit(int bit) {
  return bit == 1 ? 16 / sizeof(T) : bit <= kFirstBit<T> ? bit / 2 : 2 * bit;
}

template <class T, int kBit, int kCount>
HEEDFUL_FN void trade_halves(Vec<T> (&rows)[kCount]) {
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r)
    if (!(r & kBit)) {
      const Vec<T> first = take_halves<T, kBit <= kFirstBit<T>, false>(rows[r], rows[r | kBit]);
      rows[r | kBit] = take_halves<T, kBit <= kFirstBit<T>, true>(rows[r], rows[r | kBit]);
      rows[r] = first;
    }
}
template <class T, int kBit = kFirstBit<T>>
HEEDFUL_FN void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kBit < kLanes<T>) {
    trade_halves<T, kBit>(rows);
    transpose<T, next_bit<T>(kBit)>(rows);
  }
}
// The square of each block by itself.
template <class T, int kBit = kFirstBit<T>>
HEEDFUL_FN void transpose_blocks(Vec<T> (&rows)[2 * kFirstBit<T>]) {
  trade_halves<T, kBit>(rows);
  if constexpr (kBit > 1) transpose_blocks<T, kBit / 2>(rows);
}

// Each of n vectors' lanes joined to one, in the vector's own lane of the result.
template <class T, int kBit = kFirstBit<T>, int kDone = 0, class F>
HEEDFUL_FN Vec<T> join_each(Vec<T>* rows, F join) {
  if constexpr (kBit < kLanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; ++r)
      if (!(r & (kDone | kBit)))
        rows[r] = join(take_halves<T, kBit <= kFirstBit<T>, false>(rows[r], rows[r | kBit]),
                       take_halves<T, kBit <= kFirstBit<T>, true>(rows[r], rows[r | kBit]));
    return join_each<T, next_bit<T>(kBit), kDone | kBit>(rows, join);
  }
  return rows[0];
}
template <class T>
HEEDFUL_FN Vec<T> sum_each(Vec<T>* vectors) {
  return join_each<T>(vectors, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <class T>
HEEDFUL_FN Vec<T> highest_each(Vec<T>* vectors) {
  return join_each<T>(vectors, [](Vec<T> a, Vec<T> b) { return maximum(a, b); });
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Rows and lanes of a tile where it lies in memory.
template <class S>
struct Source {
  const S* data;
  int64_t row_stride, lane_stride;
};

// `count` elements or a vector's, then zeros.
template <class C, class S>
HEEDFUL_FN Vec<C> load_some(const S* data, int64_t stride, int64_t count) {
  constexpr int n = kLanes<C>;
  if (stride == 1) return load_first<C>(data, most<int64_t>(count, 0));
  if (count >= n && stride == 0) return broadcast<C>(C(to_compute(*data)));
  alignas(HEEDFUL_VECTOR_BYTES) C x[n] = {};
  for (int i = 0; i < n && i < count; ++i) x[i] = C(to_compute(data[i * stride]));
  return load(x);
}

// f(r, l, x) for every vector x of a tile, of row r and the lanes l and on; lanes from `lanes` to `width`, a multiple
// of the vector, are zero.
template <class C, class S, class F>
HEEDFUL_FN void for_each_vector(Source<S> from, int64_t rows, int64_t lanes, int64_t width, F f) {
  constexpr int n = kLanes<C>;
  int64_t r = 0;
  if (from.row_stride == 1 && from.lane_stride > 1) {
    for (; r + n <= rows; r += n)
      for (int64_t l = 0; l < width; l += n) {
        const int64_t present = clamp(lanes - l, 0, n);
        Vec<C> square[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i)
          square[i] = i < present ? load_as(from.data + r + (l + i) * from.lane_stride, C()) : Vec<C>{};
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) f(r + i, l, square[i]);
      }
    for (int64_t l = 0; r < rows && l < width; l += n) {
      const int64_t present = clamp(lanes - l, 0, n);
      Vec<C> square[n] = {};
      for (int64_t i = 0; i < present; ++i)
        square[i] = load_first<C>(from.data + r + (l + i) * from.lane_stride, rows - r);
      transpose<C>(square);
      for (int64_t i = 0; i < rows - r; ++i) f(r + i, l, square[i]);
    }
    return;
  }
  for (; r < rows; ++r)
    for (int64_t l = 0; l < width; l += n)
      f(r, l, load_some<C>(from.data + r * from.row_stride + l * from.lane_stride, from.lane_stride, lanes - l));
}

// to[r * to_stride + l] = scale * from(r, l), as above.
template <class C, class S>
HEEDFUL_CALLED void load_tile(C* to, int64_t to_stride, Source<S> from, int64_t rows, int64_t lanes, int64_t width,
                              C scale) {
  const Vec<C> scales = broadcast<C>(scale);
  for_each_vector<C>(from, rows, lanes, width,
                     [&](int64_t r, int64_t l, Vec<C> x) { store(to + r * to_stride + l, scales * x); });
}

// Rows whose lanes are contiguous.
template <class S>
struct Rows {
  const S* data;
  int64_t stride;
};

// Whether rows are whole vectors where they lie, however far apart.
template <class C>
HEEDFUL_FN bool lie_in_vectors(const View& rows, int64_t dim) {
  return rows.stride[3] == 1 && dim % kLanes<C> == 0;
}

// Where they lie, if `packed` is null: then S is C, and the scale 1. Else loaded there, `width` wide.
template <class C, class S>
HEEDFUL_FN Rows<C> load_rows(C* packed, Source<S> from, int64_t rows, int64_t lanes, int64_t width, C scale = 1) {
  if constexpr (sizeof(S) == sizeof(C))
    if (!packed) return {from.data, from.row_stride};
  load_tile<C>(packed, width, from, rows, lanes, width, scale);
  return {packed, width};
}

// to[r * to_stride + l] = scale * from[r * from_stride + l] for l < lanes.
template <class C, class S>
HEEDFUL_CALLED void store_rows(S* to, int64_t to_stride, const C* from, int64_t from_stride, int64_t rows,
                               int64_t lanes, C scale) {
  constexpr int n = kLanes<C>;
  const Vec<C> scales = broadcast<C>(scale);
  const int64_t whole = lanes / n * n;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < whole; l += n) store_as(to + r * to_stride + l, scales * load(from + r * from_stride + l));
    if (whole < lanes)
      store_first(to + r * to_stride + whole, scales * load(from + r * from_stride + whole), lanes - whole);
  }
}

// to[l * to_stride + r] = scale * from[r * from_stride + l] for l < lanes: its rows become contiguous in memory.
template <class C, class S>
HEEDFUL_CALLED void store_transposed(S* to, int64_t to_stride, const C* from, int64_t from_stride, int64_t rows,
                                     int64_t lanes, C scale = 1) {
  constexpr int n = kLanes<C>;
  const Vec<C> scales = broadcast<C>(scale);
  const int64_t whole_rows = rows / n * n;
  for (int64_t l = 0; l < lanes; l += n) {
    const int64_t present = least<int64_t>(lanes - l, n);
    for (int64_t r = 0; r < whole_rows; r += n) {
      Vec<C> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = scales * load(from + (r + i) * from_stride + l);
      transpose<C>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
        if (i < present) store_as(to + (l + i) * to_stride + r, square[i]);
    }
    if (whole_rows == rows) continue;
    Vec<C> square[n] = {};
    for (int64_t r = whole_rows; r < rows; ++r) square[r - whole_rows] = scales * load(from + r * from_stride + l);
    transpose<C>(square);
    for (int64_t i = 0; i < present; ++i)
      store_first(to + (l + i) * to_stride + whole_rows, square[i], rows - whole_rows);
  }
}

// Whether rows x lanes elements, lanes contiguous or not, are all finite.
template <class C, class S>
HEEDFUL_CALLED bool all_finite(const S* data, int64_t row_stride, int64_t lane_stride, int64_t rows, int64_t lanes) {
  constexpr int n = kLanes<C>, kChains = 4;  // an addition takes as many cycles
  Vec<C> zeros[kChains] = {};                // until a number times zero is NaN
  C edge = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const S* row = data + r * row_stride;
    const int64_t whole = lane_stride == 1 ? lanes / n * n : 0;
    int64_t l = 0;
    for (; l + kChains * n <= whole; l += kChains * n)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) zeros[i] += load_as(row + l + i * n, C()) * C(0);
    for (; l < whole; l += n) zeros[0] += load_as(row + l, C()) * C(0);
    for (; l < lanes; ++l) edge += C(to_compute(row[l * lane_stride])) * C(0);
  }
  return sum_lanes<C>(zeros[0] + zeros[1] + zeros[2] + zeros[3]) + edge == 0;
}

}  // namespace heedful::HEEDFUL_TARGET
