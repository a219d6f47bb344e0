// Tile registers (Intel's AMX): eight of 16 rows of 16 elements, and one instruction for three of them:
//
//   c[m][n] += sum_k a[m][k].first * b[k][n].first + a[m][k].second * b[k][n].second
//
// of pairs of bfloat16, and of float32 in c. HEEDFUL_TILE_REGISTERS asks for products in them (microkernel_tiles.h);
// with HEEDFUL_EMULATED_TILES they are memory, so that the kernels can be tested without them.
#pragma once

#include "operands.h"

namespace heedful::HEEDFUL_TARGET {

// Whether products of E's are those of tile registers.
template <class E>
constexpr bool kInTiles = false;
#if defined(HEEDFUL_TILE_REGISTERS)
template <>
inline constexpr bool kInTiles<BFloat16x2> = true;
#endif
constexpr int kTileRows = 16;  // and elements of a row

// Numbers that are added up together, counted from the sum's first: a sum that starts elsewhere among them has other
// bits.
template <class E>
constexpr int kSumStep = kInTiles<E> ? kTileRows * kDepth<E> : kDepth<E>;
template <class E>
HEEDFUL_FN int64_t sum_step_down(int64_t x) {
  return x / kSumStep<E> * kSumStep<E>;
}
template <class E>
HEEDFUL_FN int64_t sum_step_up(int64_t x) {
  return sum_step_down<E>(x + kSumStep<E> - 1);
}

// ---- the instruction's arithmetic -----------------------------------------------------------------------------------

// A sum as products have it, term by term.
template <class E, bool kTiles = kInTiles<E>>
struct SumInOrder {
  Vec<Sum<E>> sum = {};
  HEEDFUL_FN void add(int64_t, Vec<E> a, Vec<E> b) { sum = multiply_add<E>(sum, a, b); }
  HEEDFUL_FN Vec<Sum<E>> total() const { return sum; }
};
// Pairs' firsts and seconds are added up apart, those of a tile; subnormal numbers are zeros.
template <>
struct SumInOrder<BFloat16x2, true> {
  Vec<float> sum = {}, first = {}, second = {};
  int64_t tile = 0;

  // Terms come in order, some of them not at all: they are zero.
  HEEDFUL_FN void add(int64_t term, Vec<BFloat16x2> a, Vec<BFloat16x2> b) {
    if (term / kTileRows != tile) {
      sum = total();
      first = second = Vec<float>{};
      tile = term / kTileRows;
    }
    add(a, b);
  }
  HEEDFUL_FN void add(Vec<BFloat16x2> a, Vec<BFloat16x2> b) {
    first = flushed(first + flushed((Vec<float>)(a << 16)) * flushed((Vec<float>)(b << 16)));
    second = flushed(second + flushed((Vec<float>)(a & 0xffff0000)) * flushed((Vec<float>)(b & 0xffff0000)));
  }
  HEEDFUL_FN Vec<float> total() const { return flushed(flushed(sum) + flushed(first + second)); }

  HEEDFUL_FN static Vec<float> flushed(Vec<float> x) {
    const auto bits = (Vec<BFloat16x2>)x;
    return (Vec<float>)((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
  }
};

// ---- the registers --------------------------------------------------------------------------------------------------

#if defined(HEEDFUL_TILE_REGISTERS)
static_assert(kLanes<float> == kTileRows);

#if !defined(HEEDFUL_EMULATED_TILES)
// For the time of a task: each thread has registers of its own, which have no shape until they are told.
struct TileRegisters {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shapes before;  // which whoever set them may rely on

  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before));
    Shapes shapes;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileRegisters() { asm volatile("ldtilecfg %0" ::"m"(before)); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  template <int kTile, class T>
  HEEDFUL_FN static void load(const T* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * int64_t(sizeof(T))), "i"(kTile) : "memory");
  }
  template <int kTile>
  HEEDFUL_FN static void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * int64_t(sizeof(float))), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  HEEDFUL_FN static void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kC, int kA, int kB>
  HEEDFUL_FN static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};
#else
struct TileRegisters {
  typedef uint32_t Register[kTileRows][kTileRows];
  static inline thread_local Register registers[8];
  TileRegisters() { __builtin_memset(registers, 0, sizeof registers); }
  ~TileRegisters() { __builtin_memset(registers, 0xff, sizeof registers); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  template <int kTile, class T>
  static void load(const T* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) __builtin_memcpy(registers[kTile][r], from + r * stride, kTileRows * sizeof(T));
  }
  template <int kTile>
  static void store(float* to, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r)
      __builtin_memcpy(to + r * stride, registers[kTile][r], kTileRows * sizeof(float));
  }
  template <int kTile>
  static void clear() {
    __builtin_memset(registers[kTile], 0, sizeof(Register));
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    for (int m = 0; m < kTileRows; ++m) {
      SumInOrder<BFloat16x2> sum;
      __builtin_memcpy(&sum.sum, registers[kC][m], sizeof sum.sum);
      for (int k = 0; k < kTileRows; ++k)
        sum.add(broadcast<uint32_t>(registers[kA][m][k]), heedful::HEEDFUL_TARGET::load(registers[kB][k]));
      const Vec<float> total = sum.total();
      __builtin_memcpy(registers[kC][m], &total, sizeof total);
    }
  }
};
#endif
#endif

// Tile registers where a task's products want them.
template <class E>
struct ProductRegisters {
#if defined(HEEDFUL_TILE_REGISTERS)
  TileRegisters tiles;
#else
  ProductRegisters() {}  // so that none is called unused
#endif
};

}  // namespace heedful::HEEDFUL_TARGET
