// The twin of csrc/cuda/sm90/ptx.h and wgmma.h: the same wrappers, which do on the CPU what each instruction is defined
// to do.
#pragma once

#include "../ptx.h"
#include "sm90.h"

namespace heedful::emulated {

using cuda::advance;
using cuda::Element;
using cuda::kMostDimensions;
using cuda::Major;
using cuda::MatrixDescriptor;
using cuda::Swizzle;
using cuda::TensorLayout;
using TensorMap = cuda::TensorLayout;

inline emulator::Sm90& sm90(const Where& where) { return block().sm90(where); }

// ---- mbarriers ------------------------------------------------------------------------------------------------------

inline void init_mbarrier(uint32_t mbarrier, int count, Where where = Where::current()) {
  sm90(where).mbarriers.init(mbarrier, count, where);
}
inline void fence_mbarrier_init(Where where = Where::current()) {
  sm90(where).clocks.fence(emulator::Clocks::mbarrier_init, thread_index());
}
inline void arrive(uint32_t mbarrier, Where where = Where::current()) {
  sm90(where).mbarriers.arrive(mbarrier, 0, where);
}
inline void arrive_expecting(uint32_t mbarrier, uint32_t bytes, Where where = Where::current()) {
  sm90(where).mbarriers.arrive(mbarrier, bytes, where);
}
// NOTE: not to be looped on, since nobody else would go on here.
inline bool try_wait(uint32_t mbarrier, uint32_t parity, Where where = Where::current()) {
  return sm90(where).mbarriers.test(mbarrier, parity, where);
}
inline void wait_mbarrier(uint32_t mbarrier, uint32_t parity, Where where = Where::current()) {
  sm90(where).mbarriers.wait(mbarrier, parity, where);
}

// ---- the asynchronous proxy -----------------------------------------------------------------------------------------

inline void fence_async_shared(Where where = Where::current()) {
  sm90(where).clocks.fence(emulator::Clocks::async_proxy, thread_index());
}
// Not seen here: blocks follow each other, so that nothing depends on it.
inline void fence_async_global() {}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

inline void prefetch(const TensorMap&) {}

template <int kDimensions>
void load_tile(uint32_t to, const TensorMap& map, uint32_t mbarrier, const int (&at)[kDimensions],
               Where where = Where::current()) {
  sm90(where).bulk_copies.load_tile(to, map, at, kDimensions, mbarrier, where);
}
inline void load_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier,
                      Where where = Where::current()) {
  sm90(where).bulk_copies.load_bulk(to, from, bytes, mbarrier, where);
}
template <int kDimensions>
void store_tile(const TensorMap& map, uint32_t from, const int (&at)[kDimensions], Where where = Where::current()) {
  sm90(where).bulk_copies.store_tile(map, from, at, kDimensions, false, where);
}
template <int kDimensions>
void add_tile(const TensorMap& map, uint32_t from, const int (&at)[kDimensions], Where where = Where::current()) {
  sm90(where).bulk_copies.store_tile(map, from, at, kDimensions, true, where);
}
inline void add_bulk(float* to, uint32_t from, uint32_t bytes, Where where = Where::current()) {
  sm90(where).bulk_copies.add_bulk(to, from, bytes, where);
}
inline void commit_stores(Where where = Where::current()) { sm90(where).bulk_copies.commit(); }
template <int kGroups>
void wait_stores(Where where = Where::current()) {
  sm90(where).bulk_copies.wait(kGroups, false);
}
template <int kGroups>
void wait_stores_read(Where where = Where::current()) {
  sm90(where).bulk_copies.wait(kGroups, true);
}

// ---- some warps of the block ----------------------------------------------------------------------------------------

inline void sync_named(int barrier, int threads, Where where = Where::current()) {
  sm90(where).named_barriers.meet(barrier, threads, true, where);
}
inline void arrive_named(int barrier, int threads, Where where = Where::current()) {
  sm90(where).named_barriers.meet(barrier, threads, false, where);
}
template <int kRegisters>
void lower_registers(Where where = Where::current()) {
  sm90(where).registers.set(kRegisters, false, where);
}
template <int kRegisters>
void raise_registers(Where where = Where::current()) {
  sm90(where).registers.set(kRegisters, true, where);
}

// ---- matrices to shared memory --------------------------------------------------------------------------------------

// ldmatrix backwards: each lane's row is that lane's write.
struct StoredMatrices {
  const uint32_t* r;
  uint32_t address;
  bool transposed;
  const Where* where;
};
inline void store_matrices(uint32_t address, const uint32_t (&r)[4], bool transposed, const Where& where) {
  StoredMatrices mine{r, address, transposed, &where};
  block().meet_warp(transposed ? "stmatrix.trans" : "stmatrix", where, &mine, [](const emulator::Block::Lanes& lanes) {
    std::array<int64_t, 32> addresses;
    for (size_t lane = 0; lane < 32; ++lane) addresses[lane] = static_cast<StoredMatrices*>(lanes[lane])->address;
    emulator::machine().statistics.stores.add(addresses, 16);
    const auto& any = *static_cast<StoredMatrices*>(lanes[0]);
    emulator::Access by = block().access(*any.where);
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      for (size_t lane = 0; lane < 32; ++lane) {
        const size_t i = lane / 4, j = lane % 4 * 2;
        const uint32_t pair = static_cast<StoredMatrices*>(lanes[lane])->r[matrix];
        (any.transposed ? rows[j][i] : rows[i][j]) = uint16_t(pair);
        (any.transposed ? rows[j + 1][i] : rows[i][j + 1]) = uint16_t(pair >> 16);
      }
      for (size_t row = 0; row < 8; ++row) {
        by.thread = block().self().warp() * 32 + int(matrix * 8 + row);
        block().shared.write(uint32_t(addresses[matrix * 8 + row]), rows[row], 16, by);
      }
    }
  });
}
inline void stmatrix(uint32_t address, const uint32_t (&r)[4], Where where = Where::current()) {
  store_matrices(address, r, false, where);
}
inline void stmatrix_transposed(uint32_t address, const uint32_t (&r)[4], Where where = Where::current()) {
  store_matrices(address, r, true, where);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

inline void fence_wgmma(Where where = Where::current()) { sm90(where).wgmma.fence(); }
inline void commit_wgmma(Where where = Where::current()) { sm90(where).wgmma.commit(where); }
template <int kGroups>
void wait_wgmma(Where where = Where::current()) {
  sm90(where).wgmma.wait(kGroups, where);
}
template <int kCount>
void pin(float (&)[kCount]) {}

template <class T, int kCount>
void issue_wgmma(float (&d)[kCount], const uint32_t* registers, uint64_t a, uint64_t b, Major major_a, Major major_b,
                 bool zero, const Where& where) {
  static_assert(kCount % 4 == 0 && kCount <= 128);
  emulator::WgmmaCall mine{
      d, kCount, registers, a, b, major_a, major_b, zero, [](uint16_t bits) { return widen(T{bits}); }, where};
  block().meet_warpgroup("wgmma", where, &mine, emulator::Wgmma::issue);
}
template <class T, Major kMajorA = Major::k, Major kMajorB = Major::k, int kCount>
void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, Where where = Where::current()) {
  issue_wgmma<T>(d, nullptr, a, b, kMajorA, kMajorB, false, where);
}
template <class T, Major kMajorA = Major::k, Major kMajorB = Major::k, int kCount>
void wgmma_zero(float (&d)[kCount], uint64_t a, uint64_t b, Where where = Where::current()) {
  issue_wgmma<T>(d, nullptr, a, b, kMajorA, kMajorB, true, where);
}
template <class T, Major kMajorB = Major::k, int kCount>
void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, Where where = Where::current()) {
  issue_wgmma<T>(d, a, 0, b, Major::k, kMajorB, false, where);
}
template <class T, Major kMajorB = Major::k, int kCount>
void wgmma_zero(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, Where where = Where::current()) {
  issue_wgmma<T>(d, a, 0, b, Major::k, kMajorB, true, where);
}

}  // namespace heedful::emulated
