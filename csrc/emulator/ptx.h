// The twin of csrc/cuda/ptx.h: the same wrappers, which do on the CPU what each instruction is defined to do.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "block.h"
#include "sm90/poison.h"

#define HEEDFUL_TARGET emulated
#define HEEDFUL_DEVICE inline
#define HEEDFUL_KERNEL(threads, blocks)
#define HEEDFUL_PARAMETER const

#include "../score/target.h"

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace heedful::emulated {

using emulator::block;
using emulator::Where;

// ---- threads --------------------------------------------------------------------------------------------------------

inline int thread_index() { return block().self().index; }
inline int block_index() { return int(block().index); }

inline void sync_block(Where where = Where::current()) { block().sync_block(where); }
inline void sync_warp(Where where = Where::current()) { block().sync_warp(where); }

struct Shuffle {
  uint32_t value;
  int other;
};
// Reads the value of lane `other`.
inline uint32_t shuffle(uint32_t value, int other, Where where = Where::current()) {
  Shuffle mine{value, other & 31};
  block().meet_warp("shuffle", where, &mine, [](const emulator::Block::Lanes& lanes) {
    uint32_t values[32];
    for (size_t n = 0; n < 32; ++n) values[n] = static_cast<Shuffle*>(lanes[n])->value;
    for (void* lane : lanes) static_cast<Shuffle*>(lane)->value = values[static_cast<Shuffle*>(lane)->other];
  });
  return mine.value;
}
inline uint32_t shuffle_xor(uint32_t value, int mask, Where where = Where::current()) {
  return shuffle(value, block().self().lane() ^ mask, where);
}
inline float shuffle(float value, int other, Where where = Where::current()) {
  return std::bit_cast<float>(shuffle(std::bit_cast<uint32_t>(value), other, where));
}
inline float shuffle_xor(float value, int mask, Where where = Where::current()) {
  return std::bit_cast<float>(shuffle_xor(std::bit_cast<uint32_t>(value), mask, where));
}
inline double shuffle(double value, int other, Where where = Where::current()) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const uint64_t low = shuffle(uint32_t(bits), other, where), high = shuffle(uint32_t(bits >> 32), other, where);
  return std::bit_cast<double>(low | high << 32);
}
inline double shuffle_xor(double value, int mask, Where where = Where::current()) {
  return shuffle(value, block().self().lane() ^ mask, where);
}
// Whether any lane of the warp says so.
inline bool any_lane(bool mine, Where where = Where::current()) {
  block().meet_warp("any_lane", where, &mine, [](const emulator::Block::Lanes& lanes) {
    bool any = false;
    for (void* lane : lanes) any |= *static_cast<bool*>(lane);
    for (void* lane : lanes) *static_cast<bool*>(lane) = any;
  });
  return mine;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }

// ---- numbers in memory ----------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  static const std::vector<float> all = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < values.size(); ++bits) {
      const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
      const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                              : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                             : std::ldexp(float(mantissa), -24);
      values[bits] = bits >> 15 ? -magnitude : magnitude;
    }
    return values;
  }();
  return all[x.bits];
}

// To the nearest, of two equally near ones to the even one.
template <class T, class C>
T narrow(C x) {
  return T(x);
}
template <>
inline BFloat16 narrow<BFloat16, float>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return emulator::check_poison(x, Where::current()), BFloat16{0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow<Float16, float>(float x) {
  if (x != x) return emulator::check_poison(x, Where::current()), Float16{0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 6.103515625e-5f) return {uint16_t(sign | uint16_t(std::nearbyint(magnitude * 16777216)))};
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude) - (112u << 23);
  return {uint16_t(sign | uint16_t((bits + 0xfff + (bits >> 13 & 1)) >> 13))};
}
// Two numbers; the first one goes to the low half.
template <class T>
uint32_t pack(float low, float high, Where where = Where::current()) {
  emulator::check_poison(low, where), emulator::check_poison(high, where);
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}

// To TensorFloat-32, which has 10 bits of mantissa: to the nearest, of two equally near ones to the one farther from 0.
// A NaN with none but lower bits becomes infinite.
inline uint32_t to_tf32(float x, Where where = Where::current()) {
  emulator::check_poison(x, where);
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (std::isfinite(x) ? bits + 0x1000 : bits) & 0xffffe000;
}

// ---- products -------------------------------------------------------------------------------------------------------

// The numbers of a register of a or b; of TensorFloat-32 the low bits do not count.
template <class T>
float number(uint32_t bits, int n) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(bits & 0xffffe000);
  else
    return widen(T{uint16_t(n ? bits >> 16 : bits)});
}

// What a lane holds of a [16][16], b [16][8] and c [16][8] (PTX manual, "Matrix Fragments for mma.m16n8k16"); of
// float32, with one number in a register instead of two, a [16][8] and b [8][8] ("for mma.m16n8k8").
struct Fragments {
  float* c;
  const uint32_t *a, *b;
};
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = Where::current()) {
  const uint32_t b[2] = {b0, b1};
  Fragments mine{c, a, b};
  block().meet_warp("mma", where, &mine, [](const emulator::Block::Lanes& lanes) {
    constexpr int kNumbers = 4 / sizeof(T), kDepth = 8 * kNumbers;
    float a[16][kDepth], b[kDepth][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<Fragments*>(lanes[size_t(lane)]);
      const int group = lane / 4, in_group = lane % 4, at = in_group * kNumbers;
      for (int n = 0; n < kNumbers; ++n) {
        for (int r = 0; r < 4; ++r) a[group + 8 * (r & 1)][at + kDepth / 2 * (r >> 1) + n] = number<T>(f.a[r], n);
        for (int r = 0; r < 2; ++r) b[at + kDepth / 2 * r + n][group] = number<T>(f.b[r], n);
      }
      for (int n = 0; n < 4; ++n) c[group + 8 * (n >> 1)][in_group * 2 + (n & 1)] = f.c[n];
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < kDepth; ++k)
        for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<Fragments*>(lanes[size_t(lane)]);
      for (int n = 0; n < 4; ++n) f.c[n] = c[lane / 4 + 8 * (n >> 1)][lane % 4 * 2 + (n & 1)];
    }
  });
}

// ---- shared memory --------------------------------------------------------------------------------------------------

inline uint32_t shared_base() { return 0; }

template <class T>
T load_shared(uint32_t address, Where where = Where::current()) {
  T x;
  block().note_traffic(where, address, sizeof(T), false);
  block().shared.read(address, &x, sizeof(T), block().access(where));
  return x;
}
template <class T>
void store_shared(uint32_t address, T x, Where where = Where::current()) {
  emulator::check_poison(x, where);
  block().note_traffic(where, address, sizeof(T), true);
  block().shared.write(address, &x, sizeof(T), block().access(where));
}

// Four 8 x 8 matrices of 16-bit numbers: lane n brings the address of row n % 8 of matrix n / 8, and takes of each
// matrix two neighbours of row n / 4 (of column n / 4 where it is transposed).
struct LoadedMatrices {
  uint32_t* r;
  uint32_t address;
  bool transposed;
  const Where* where;
};
inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, const Where& where) {
  LoadedMatrices mine{r, address, transposed, &where};
  block().meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", where, &mine, [](const emulator::Block::Lanes& lanes) {
    std::array<int64_t, 32> addresses;
    for (int lane = 0; lane < 32; ++lane)
      addresses[size_t(lane)] = static_cast<LoadedMatrices*>(lanes[size_t(lane)])->address;
    emulator::machine().statistics.loads.add(addresses, 16);
    const auto& any = *static_cast<LoadedMatrices*>(lanes[0]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      for (int row = 0; row < 8; ++row)
        block().shared.read(uint32_t(addresses[size_t(matrix * 8 + row)]), rows[row], 16,
                            block().access(*any.where, true));
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = any.transposed ? rows[j][i] : rows[i][j];
        const uint32_t high = any.transposed ? rows[j + 1][i] : rows[i][j + 1];
        static_cast<LoadedMatrices*>(lanes[size_t(lane)])->r[matrix] = low | high << 16;
      }
    }
  });
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t address, Where where = Where::current()) {
  load_matrices(r, address, false, where);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address, Where where = Where::current()) {
  load_matrices(r, address, true, where);
}

// ---- global memory --------------------------------------------------------------------------------------------------

template <class T>
T load_global(const T* from, Where where = Where::current()) {
  emulator::machine().memory.check_read(from, sizeof(T), where);
  return *from;
}
template <class T>
void store_global(T* to, T x, Where where = Where::current()) {
  emulator::check_poison(x, where);
  emulator::machine().memory.check_write(to, sizeof(T), where);
  *to = x;
}

// Copies the first `bytes` of 16 to shared memory and fills the rest with zeros, asynchronously: they may land now, or
// when they are waited for.
inline void copy_async(uint32_t to, const void* from, int bytes, Where where = Where::current()) {
  if (bytes < 0 || bytes > 16) throw emulator::Fault("copy_async of " + std::to_string(bytes) + " bytes");
  if (bytes && reinterpret_cast<uintptr_t>(from) % 16)
    throw emulator::Fault("misaligned: copy_async, " + emulator::text(where));
  if (bytes) emulator::machine().memory.check_read(from, size_t(bytes), where);
  emulator::Copy copy{to, {}, block().coin()};
  if (bytes) std::memcpy(copy.bytes.data(), from, size_t(bytes));
  block().note_traffic(where, to, 16, true);
  block().shared.begin_copy(to, 16, block().access(where));
  if (copy.landed) block().shared.land(to, copy.bytes.data(), 16);
  block().self().open_group.push_back(copy);
}
inline void commit_copies() {
  emulator::Thread& self = block().self();
  self.groups.push_back(std::move(self.open_group));
  self.open_group.clear();
}
// Until no more than the last kGroups groups are under way.
template <int kGroups>
void wait_copies(Where where = Where::current()) {
  auto& groups = block().self().groups;
  while (groups.size() > size_t(kGroups)) {
    for (const emulator::Copy& copy : groups.front()) {
      if (!copy.landed) block().shared.land(copy.to, copy.bytes.data(), 16);
      block().shared.end_copy(copy.to, 16, block().access(where));
    }
    groups.erase(groups.begin());
  }
}

}  // namespace heedful::emulated
