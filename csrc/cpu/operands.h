// What a product's operands are made of: numbers of the compute type, or pairs of bfloat16. A pair is two neighbours
// along the sum in one lane; machines with an instruction for it add both of their products to a lane of float32 at
// once.
//
//   sum[lane] += a.first * b[lane].first + a.second * b[lane].second
#pragma once

#include "tiles.h"

namespace heedful::HEEDFUL_TARGET {

struct BFloat16x2 {
  BFloat16 first, second;
};
template <int kBytes>
struct VectorOf<BFloat16x2, kBytes> {
  typedef uint32_t type __attribute__((vector_size(kBytes)));  // `first` in the low half
  typedef uint32_t in_memory __attribute__((vector_size(kBytes), aligned(alignof(BFloat16x2)), may_alias));
};

// Numbers in one element of an operand, and the type that sums have.
template <class E>
constexpr int kDepth = 1;
template <>
inline constexpr int kDepth<BFloat16x2> = 2;
template <class E>
struct SumOf {
  using type = E;
};
template <>
struct SumOf<BFloat16x2> {
  using type = float;
};
template <class E>
using Sum = typename SumOf<E>::type;

HEEDFUL_FN Vec<BFloat16x2> load_as(const BFloat16x2* p, BFloat16x2) { return load(p); }

// Elements that hold so many numbers along the sum.
template <class E>
HEEDFUL_FN int64_t terms(int64_t numbers) {
  return (numbers + kDepth<E> - 1) / kDepth<E>;
}

template <class C>
HEEDFUL_FN Vec<C> broadcast_element(const C* p) {
  return broadcast<C>(*p);
}
HEEDFUL_FN Vec<BFloat16x2> broadcast_element(const BFloat16x2* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return broadcast<uint32_t>(bits);
}

template <class E>
HEEDFUL_FN Vec<Sum<E>> multiply_add(Vec<Sum<E>> sum, Vec<E> a, Vec<E> b) {
  if constexpr (kDepth<E> == 1) {
    return sum + a * b;
  } else {
#if defined(__AVX512BF16__) && HEEDFUL_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Vec<float>)(a & 0xffff0000) * (Vec<float>)(b & 0xffff0000);
    return sum + (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
#endif
  }
}

// 2^(x factor), each to become numbers of an operand.
template <class E, int kCount>
HEEDFUL_FN void exp2_each_as(Vec<Sum<E>> (&x)[kCount], Vec<Sum<E>> factor) {
  if constexpr (kDepth<E> == 1) {
    exp2_each<E>(x, factor);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) x[i] *= factor;
    coarse_exp2_each(x);
  }
}

// b, but zero where its number is not present: present(0), and present(1) of a pair's second.
template <class E, class F>
HEEDFUL_FN Vec<E> where_present(Vec<E> b, F present) {
  if constexpr (kDepth<E> == 1)
    return present(0) ? b : Vec<E>{};
  else
    return b & ((present(0) ? 0x0000ffffu : 0u) | (present(1) ? 0xffff0000u : 0u));
}
// b, but zero where its number's weight is a mark: below 0.
template <class E>
HEEDFUL_FN Vec<E> where_unmarked(Vec<E> b, Vec<E> weight) {
  if constexpr (kDepth<E> == 1)
    return select(weight < Vec<E>{}, Vec<E>{}, b);
  else
    return b & ~(((weight >> 15) & 0x00010001) * 0xffff);
}

// ---- of a product: C[m][n] (+)= sum_k A[m][k] * B[k][n] -------------------------------------------------------------

// Where an element A[m][k] lies: one of the two strides is 1 in every product of attention.
enum class Unit { row, k };
template <class E, Unit unit>
struct Operand {
  const E* data;
  int64_t stride;  // of the other index

  HEEDFUL_FN const E* at(int64_t m, int64_t k) const {
    return unit == Unit::k ? data + m * stride + k : data + m + k * stride;
  }
};

// What the sum is added to: nothing, C, or C times one factor per lane. The sum itself starts at zero: blocks of a long
// sum that are added up lose far less to rounding than one long chain. `nothing_topped` raises one number per lane to
// the largest sum of its column, too.
enum class Onto { nothing, nothing_topped, c, scaled_c };

// ---- from rows of float32, rounded to nearest -----------------------------------------------------------------------

HEEDFUL_FN void store_rounded(BFloat16* to, Vec<float> x) {
#if defined(__AVX512BF16__) && HEEDFUL_VECTOR_BYTES == 64
  const auto rounded = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(to, &rounded, sizeof rounded);
#else
  store_as(to, x);
#endif
}

HEEDFUL_FN Vec<BFloat16x2> join(Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__) && HEEDFUL_VECTOR_BYTES == 64
  typedef VectorOf<uint16_t>::type Halves;
  const auto both = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec<BFloat16x2>)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                                  24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return bfloat16_bits(first) | (bfloat16_bits(second) << 16);
#endif
}

// to[r][l] = (from[2 r][l], from[2 r + 1][l]). What an odd number of rows lacks is zero.
HEEDFUL_CALLED void join_rows(BFloat16x2* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                              int64_t width) {
  for (int64_t r = 0; r < rows; r += 2, to += to_stride)
    for (int64_t l = 0; l < width; l += kLanes<float>) {
      const float* first = from + r * from_stride + l;
      store(to + l, join(load(first), r + 1 < rows ? load(first + from_stride) : Vec<float>{}));
    }
}

// to[r][l] = (from[r][2 l], from[r][2 l + 1]), zero where there is no lane of `lanes`. Whole vectors are read.
HEEDFUL_CALLED void join_lanes(BFloat16x2* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                               int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r) {
    BFloat16* row = reinterpret_cast<BFloat16*>(to + r * to_stride);
    for (int64_t l = 0; l < lanes; l += kLanes<float>) store_rounded(row + l, load(from + r * from_stride + l));
    if (lanes % 2) row[lanes].bits = 0;
  }
}

// ---- from memory ----------------------------------------------------------------------------------------------------

typedef VectorOf<uint16_t>::type Halves;
HEEDFUL_FN Halves load_halves(const BFloat16* p) {
  Halves v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
constexpr int kInBlock = 16 / sizeof(BFloat16);
// So many numbers from each of as many places as a vector takes.
HEEDFUL_FN Halves load_blocks(const BFloat16* from, int64_t stride) {
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64
  const auto block = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride)); };
  __m512i x = _mm512_castsi128_si512(block(0));
  x = _mm512_inserti32x4(x, block(1), 1);
  x = _mm512_inserti32x4(x, block(2), 2);
  return (Halves)_mm512_inserti32x4(x, block(3), 3);
#else
  Halves x;
  for (int i = 0; i < HEEDFUL_VECTOR_BYTES / 16; ++i)
    __builtin_memcpy(reinterpret_cast<char*>(&x) + 16 * i, from + i * stride, 16);
  return x;
#endif
}
// (a[i], b[i]) for a vector's worth of i from kFirst on.
template <int kFirst, int... kLane>
HEEDFUL_FN Vec<BFloat16x2> pair_up(Halves a, Halves b, LaneList<kLane...>) {
  return (Vec<BFloat16x2>)__builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * int(sizeof...(kLane)))...);
}

// Pairs of two rows, or of one and zeros: whole vectors, or what there is of a single one. Vectors come in order or,
// for less, two by two as put_in_order says.
template <bool kInOrder = true, int kV>
HEEDFUL_FN void load_pairs_of_rows(Vec<BFloat16x2> (&x)[kV], const BFloat16* first, const BFloat16* second,
                                   int64_t present) {
  constexpr int n = kLanes<BFloat16x2>;
  using Lanes = typename LanesUpTo<2 * n>::list;
  if constexpr (kV == 1) {
    const Vec<float> a = load_first<float>(first, present);
    const Vec<float> b = second ? load_first<float>(second, present) : Vec<float>{};
    x[0] = ((Vec<BFloat16x2>)a >> 16) | (Vec<BFloat16x2>)b;
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kV; i += 2) {
      const Halves a = load_halves(first + i * n), b = second ? load_halves(second + i * n) : Halves{};
      x[i] = kInOrder ? pair_up<0>(a, b, Lanes{}) : (Vec<BFloat16x2>)take_halves<uint16_t, true, false>(a, b);
      x[i + 1] = kInOrder ? pair_up<n>(a, b, Lanes{}) : (Vec<BFloat16x2>)take_halves<uint16_t, true, true>(a, b);
    }
  }
}
// Sums of such vectors, in order: a has the first halves of eight numbers each, b the second ones.
constexpr int lane_in_order(int lane) { return lane / 4 % 2 * kLanes<float> + lane / 8 * 4 + lane % 4; }
template <int... kLane>
HEEDFUL_FN void put_in_order(Vec<float>& a, Vec<float>& b, LaneList<kLane...>) {
  const Vec<float> first = __builtin_shufflevector(a, b, lane_in_order(kLane)...);
  b = __builtin_shufflevector(a, b, lane_in_order(kLanes<float> + kLane)...);
  a = first;
}

// to[r][l] = (from(2 r, l), from(2 r + 1, l)) for l < width, a multiple of the vector; zero where there is no such row,
// or no such lane of `lanes`.
HEEDFUL_CALLED void load_pairs(BFloat16x2* to, int64_t to_stride, Source<BFloat16> from, int64_t rows, int64_t lanes,
                               int64_t width) {
  constexpr int n = kLanes<BFloat16x2>;
  const int64_t pairs = terms<BFloat16x2>(rows);
  const auto at = [&](int64_t r, int64_t l) {
    return r < rows && l < lanes ? from.data[r * from.row_stride + l * from.lane_stride] : BFloat16{0};
  };
  const auto edge = [&](int64_t r0, int64_t r1, int64_t l0, int64_t l1) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t l = l0; l < l1; ++l) to[r * to_stride + l] = {at(2 * r, l), at(2 * r + 1, l)};
  };
  const int64_t whole = most<int64_t>(lanes, 0) / n * n;
  if (from.lane_stride == 0) {
    for (int64_t r = 0; r < pairs; ++r) {
      const BFloat16x2 pair{at(2 * r, 0), at(2 * r + 1, 0)};
      for (int64_t l = 0; l < whole; l += n) store(to + r * to_stride + l, broadcast_element(&pair));
    }
    edge(0, pairs, whole, width);
  } else if (from.lane_stride == 1) {
    for (int64_t r = 0; r < pairs; ++r) {
      const BFloat16* first = from.data + 2 * r * from.row_stride;
      const BFloat16* second = 2 * r + 1 < rows ? first + from.row_stride : nullptr;
      BFloat16x2* row = to + r * to_stride;
      int64_t l = 0;
      for (; l + 2 * n <= whole; l += 2 * n) {
        Vec<BFloat16x2> x[2];
        load_pairs_of_rows(x, first + l, second ? second + l : nullptr, 2 * n);
        store(row + l, x[0]);
        store(row + l + n, x[1]);
      }
      if (l < whole) {
        Vec<BFloat16x2> x[1];
        load_pairs_of_rows(x, first + l, second ? second + l : nullptr, n);
        store(row + l, x[0]);
      }
    }
    edge(0, pairs, whole, width);
  } else if (from.row_stride == 1) {
    const int64_t whole_rows = rows / 2 / n * n;
    for (int64_t l = 0; l < width; l += n) {
      const int64_t present = clamp(lanes - l, 0, n);
      for (int64_t r = 0; r < whole_rows; r += n) {
        Vec<BFloat16x2> square[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i)
          square[i] = i < present
                          ? load(reinterpret_cast<const BFloat16x2*>(from.data + 2 * r + (l + i) * from.lane_stride))
                          : Vec<BFloat16x2>{};
        transpose<BFloat16x2>(square);
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(to + (r + i) * to_stride + l, square[i]);
      }
    }
    edge(whole_rows, pairs, 0, width);
  } else {
    edge(0, pairs, 0, width);
  }
}

// A tile of rows along the sum, as an operand.
template <class E, class S>
HEEDFUL_FN void load_operand(E* to, int64_t to_stride, Source<S> from, int64_t rows, int64_t lanes, int64_t width,
                             Sum<E> scale = 1) {
  if constexpr (kDepth<E> == 1)
    load_tile<E>(to, to_stride, from, rows, lanes, width, scale);
  else
    load_pairs(to, to_stride, from, rows, lanes, width);  // the scale is 1: pairs are not rounded again
}

// Whether a row's numbers lie in memory as its pairs do.
HEEDFUL_FN bool lie_in_pairs(const View& rows, int64_t dim) {
  return rows.stride[3] == 1 && dim % 2 == 0 && rows.stride[2] % 2 == 0;
}
// Whether rows lie in memory as an operand does; such rows, where they lie.
template <class E, class S>
HEEDFUL_FN bool lie_as_operand(const View& rows, int64_t dim) {
  return sizeof(S) * kDepth<E> == sizeof(E) && rows.stride[3] == 1 && (kDepth<E> == 1 || lie_in_pairs(rows, dim));
}
// Likewise, if they follow each other closely: strides of many rows have few places in a cache.
template <class E, class S>
HEEDFUL_FN bool lie_close_as_operand(const View& view, int64_t dim) {
  return lie_as_operand<E, S>(view, dim) && view.stride[2] <= 2 * dim;
}
template <class E, class S>
HEEDFUL_FN Rows<E> in_memory(Source<S> rows) {
  return {reinterpret_cast<const E*>(rows.data), rows.row_stride / kDepth<E>};
}

// to[r][d] = (from(r, 2 d), from(r, 2 d + 1)), a pair of an odd number's with zero; zeros up to the stride.
HEEDFUL_CALLED void load_row_pairs(BFloat16x2* to, int64_t to_stride, Source<BFloat16> from, int64_t rows,
                                   int64_t dim) {
  constexpr int n = kLanes<BFloat16x2>;
  if (from.row_stride == 1 && from.lane_stride > 1 && to_stride % n == 0) {
    for (int64_t d = 0; d < to_stride; d += n) {
      int64_t r = 0;
      for (; 2 * (d + n) <= dim && r + kInBlock <= rows; r += kInBlock) {
        Halves blocks[kInBlock];  // [i] has the numbers i, i + kInBlock, ... of the sum's next 2 n
#pragma GCC unroll 8
        for (int i = 0; i < kInBlock; ++i)
          blocks[i] = load_blocks(from.data + r + (2 * d + i) * from.lane_stride, kInBlock * from.lane_stride);
        transpose_blocks<uint16_t>(blocks);
#pragma GCC unroll 8
        for (int i = 0; i < kInBlock; ++i) store(to + (r + i) * to_stride + d, (Vec<BFloat16x2>)blocks[i]);
      }
      for (; r < rows; r += n) {
        Vec<BFloat16x2> square[n] = {};
        for (int i = 0; i < n && 2 * (d + i) < dim; ++i) {
          const BFloat16* first = from.data + r + 2 * (d + i) * from.lane_stride;
          const BFloat16* second = 2 * (d + i) + 1 < dim ? first + from.lane_stride : nullptr;
          load_pairs_of_rows(reinterpret_cast<Vec<BFloat16x2>(&)[1]>(square[i]), first, second, rows - r);
        }
        transpose<BFloat16x2>(square);
        for (int64_t i = 0; i < least<int64_t>(rows - r, n); ++i) store(to + (r + i) * to_stride + d, square[i]);
      }
    }
    return;
  }
  const int64_t whole = from.lane_stride == 1 ? dim / 2 / n * n : 0, end = terms<BFloat16x2>(dim);
  for (int64_t r = 0; r < rows; ++r, to += to_stride) {
    const BFloat16* row = from.data + r * from.row_stride;
    for (int64_t d = 0; d < whole; d += n) store(to + d, load(reinterpret_cast<const BFloat16x2*>(row) + d));
    for (int64_t d = whole; d < end; ++d)
      to[d] = {row[2 * d * from.lane_stride], 2 * d + 1 < dim ? row[(2 * d + 1) * from.lane_stride] : BFloat16{0}};
    for (int64_t d = end; d < to_stride; ++d) to[d] = {};
  }
}

// Rows as an operand whose elements follow each other along them.
template <class E, class S>
HEEDFUL_FN void load_row_operand(E* to, int64_t to_stride, Source<S> from, int64_t rows, int64_t dim,
                                 Sum<E> scale = 1) {
  if constexpr (kDepth<E> == 1)
    load_tile<E>(to, to_stride, from, rows, dim, to_stride, scale);
  else
    load_row_pairs(to, to_stride, from, rows, dim);
}

// to[x][l] = from[l][x] for x < count; lanes from `lanes` to the stride are zero.
template <class E>
HEEDFUL_FN void turn_rows(E* to, int64_t to_stride, Rows<E> from, int64_t count, int64_t lanes) {
  if constexpr (kDepth<E> == 1)
    load_tile<E>(to, to_stride, Source<E>{from.data, 1, from.stride}, count, lanes, to_stride, 1);
  else
    load_pairs(to, to_stride, Source<BFloat16>{reinterpret_cast<const BFloat16*>(from.data), 1, 2 * from.stride},
               2 * count, lanes, to_stride);
}

}  // namespace heedful::HEEDFUL_TARGET
