// The matrix kernel in tile registers: C[m][n] (+)= sum_k A[m][k] * B[k][n], with n in lanes. Two by two tiles of C
// stay in registers for the whole sum, with two of A and two of B; A's rows are those of registers, so its elements
// follow each other along the sum.
#pragma once

#include "tile_registers.h"

namespace heedful::HEEDFUL_TARGET {

constexpr int kTilesOfRows = 2, kTilesOfLanes = 2;

#if defined(HEEDFUL_TILE_REGISTERS)

// `rows` rows and `depth` elements, or a register's; the rest is zero.
template <int kTile, class E>
HEEDFUL_FN void load_register(const E* from, int64_t stride, int64_t rows, int64_t depth) {
  if (rows >= kTileRows && depth >= kTileRows) return TileRegisters::load<kTile>(from, stride);
  alignas(64) E some[kTileRows * kTileRows];
  for (int r = 0; r < kTileRows; ++r)
    store(some + r * kTileRows, r < rows ? load_first<E>(from + r * stride, depth) : Vec<E>{});
  TileRegisters::load<kTile>(some, int64_t{kTileRows});
}

// The registers of C are the first, row by row; then those of A, and of B.
template <int kM, int kN, Onto onto, class E>
HEEDFUL_FN void multiply_registers(const E* a, int64_t a_stride, int64_t rows, int64_t k0, int64_t k1, const E* b,
                                   int64_t b_stride, float* c, int64_t c_stride, float* per_lane) {
  constexpr int n = kTileRows, kA = kTilesOfRows * kTilesOfLanes, kB = kA + kTilesOfRows;
  TileRegisters::clear<0>();
  if constexpr (kN > 1) TileRegisters::clear<1>();
  if constexpr (kM > 1) TileRegisters::clear<2>();
  if constexpr (kM > 1 && kN > 1) TileRegisters::clear<3>();
  for (int64_t k = k0; k < k1; k += n) {
    const int64_t depth = k1 - k;
    load_register<kA>(a + k, a_stride, rows, depth);
    load_register<kB>(b + k * b_stride, b_stride, depth, n);
    TileRegisters::multiply<0, kA, kB>();
    if constexpr (kN > 1) {
      load_register<kB + 1>(b + k * b_stride + n, b_stride, depth, n);
      TileRegisters::multiply<1, kA, kB + 1>();
    }
    if constexpr (kM > 1) {
      load_register<kA + 1>(a + n * a_stride + k, a_stride, rows - n, depth);
      TileRegisters::multiply<2, kA + 1, kB>();
      if constexpr (kN > 1) TileRegisters::multiply<3, kA + 1, kB + 1>();
    }
  }
  const auto store_sums = [](float* to, int64_t stride) {
    TileRegisters::store<0>(to, stride);
    if constexpr (kN > 1) TileRegisters::store<1>(to + n, stride);
    if constexpr (kM > 1) TileRegisters::store<2>(to + n * stride, stride);
    if constexpr (kM > 1 && kN > 1) TileRegisters::store<3>(to + n * stride + n, stride);
  };
  alignas(64) float sums[kM * n * kN * n];
  const bool in_place = (onto == Onto::nothing || onto == Onto::nothing_topped) && rows == kM * n;
  const float* sum = in_place ? c : sums;
  const int64_t stride = in_place ? c_stride : kN * n;
  store_sums(in_place ? c : sums, stride);
  if (in_place && onto == Onto::nothing) return;
#pragma GCC unroll 2
  for (int v = 0; v < kN; ++v) {
    Vec<float> extra = {};  // the factors, or the tops
    if constexpr (onto == Onto::scaled_c || onto == Onto::nothing_topped) extra = load(per_lane + v * n);
    for (int64_t i = 0; i < rows; ++i) {
      float* to = c + i * c_stride + v * n;
      Vec<float> x = load(sum + i * stride + v * n);
      if constexpr (onto == Onto::c) x += load(to);
      if constexpr (onto == Onto::scaled_c) x += load(to) * extra;
      if constexpr (onto == Onto::nothing_topped) extra = maximum(x, extra);
      if (!in_place) store(to, x);
    }
    if constexpr (onto == Onto::nothing_topped) store(per_lane + v * n, extra);
  }
}

// Rows [m0, m1) of C, `lanes` wide, a multiple of the vector.
template <Onto onto, class E, class Range>
HEEDFUL_FN void multiply_in_tiles(Operand<E, Unit::k> a, int64_t m0, int64_t m1, const E* b, int64_t b_stride, float* c,
                                  int64_t c_stride, int64_t lanes, float* per_lane, const Range& range) {
  constexpr int n = kTileRows;
  constexpr bool kLimitsOfLanes = requires { requires Range::kOfLanes; };
  for (int64_t m = m0, end; m < m1; m = end) {
    end = least<int64_t>(m + kTilesOfRows * n, m1);
    for (int64_t l = 0; l < lanes; l += kTilesOfLanes * n) {
      const int64_t x0 = kLimitsOfLanes ? l : m, x1 = kLimitsOfLanes ? l + kTilesOfLanes * n : end;
      const int64_t k0 = sum_step_down<E>(range.first(x0, x1)) / kDepth<E>, k1 = terms<E>(range.end(x0, x1));
      const auto multiply = [&](auto tiles_of_rows, auto tiles_of_lanes) __attribute__((always_inline)) {
        multiply_registers<tiles_of_rows.value, tiles_of_lanes.value, onto>(
            a.data + m * a.stride, a.stride, end - m, k0, k1, b + l, b_stride, c + m * c_stride + l, c_stride,
            per_lane + l);
      };
      if (end - m > n)
        l + n < lanes ? multiply(Constant<2>{}, Constant<2>{}) : multiply(Constant<2>{}, Constant<1>{});
      else
        l + n < lanes ? multiply(Constant<1>{}, Constant<2>{}) : multiply(Constant<1>{}, Constant<1>{});
      if constexpr (requires { range.pause(); }) range.pause();
    }
  }
}

#endif

// Pauses of a product of so many rows and lanes.
HEEDFUL_FN int64_t pauses_in_tiles(int64_t rows, int64_t lanes) {
  constexpr int kRows = kTilesOfRows * kTileRows, kLanes = kTilesOfLanes * kTileRows;
  return (rows + kRows - 1) / kRows * ((lanes + kLanes - 1) / kLanes);
}

}  // namespace heedful::HEEDFUL_TARGET
