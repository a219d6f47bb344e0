// One thin wrapper for each instruction of sm_90a, beside those of ../ptx.h. On the CPU csrc/emulator/sm90/ptx.h stands
// in this header's place.
#pragma once

#include "../ptx.h"
#include "descriptor.h"
#include "tensor_map.h"

#ifndef __CUDACC__
#include "../../emulator/sm90/ptx.h"
#else

#include <type_traits>

#include "wgmma.h"

namespace heedful::cuda {

// ---- mbarriers ------------------------------------------------------------------------------------------------------

// NOTE: all of an mbarrier's 8 bytes of shared memory belong to it. A phase ends when `count` threads have arrived and
// as many bytes have landed as were expected; its parity is 0 for the first one, then 1, 0, ...

HEEDFUL_DEVICE void init_mbarrier(uint32_t mbarrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
}
// By the thread that has initialised, before the barrier of the block that others learn of it by.
HEEDFUL_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
HEEDFUL_DEVICE void arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
HEEDFUL_DEVICE void arrive_expecting(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// Whether that phase has ended. NOTE: not to be looped on, which the emulator cannot run.
HEEDFUL_DEVICE bool try_wait(uint32_t mbarrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(mbarrier), "r"(parity)
      : "memory");
  return done;
}
// Until the phase of that parity has ended.
HEEDFUL_DEVICE void wait_mbarrier(uint32_t mbarrier, uint32_t parity) {
  while (!try_wait(mbarrier, parity)) {
  }
}

// ---- the asynchronous proxy -----------------------------------------------------------------------------------------

// By every thread that has written shared memory, before the barrier that precedes wgmma's or the copy engine's read.
HEEDFUL_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Between bulk stores and ordinary accesses of the same global memory.
HEEDFUL_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- bulk copies ----------------------------------------------------------------------------------------------------

// NOTE: one thread issues these. Coordinates are of the box's first element, the contiguous dimension first. What lies
// out of the tensor is zero when loaded, counts as bytes all the same, and is not stored.

HEEDFUL_DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

template <int kDimensions>
HEEDFUL_DEVICE void load_tile(uint32_t to, const TensorMap& map, uint32_t mbarrier, const int (&at)[kDimensions]) {
  static_assert(kDimensions >= 2 && kDimensions <= kMostDimensions);
  if constexpr (kDimensions == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(mbarrier), "r"(at[0]), "r"(at[1])
        : "memory");
  else if constexpr (kDimensions == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(mbarrier), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(to),
        "l"(&map), "r"(mbarrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
}
// 16-byte aligned, a multiple of 16 bytes.
HEEDFUL_DEVICE void load_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(mbarrier)
               : "memory");
}

template <int kDimensions>
HEEDFUL_DEVICE void store_tile(const TensorMap& map, uint32_t from, const int (&at)[kDimensions]) {
  static_assert(kDimensions >= 2 && kDimensions <= kMostDimensions);
  if constexpr (kDimensions == 2)
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                 "r"(from), "r"(at[0]), "r"(at[1])
                 : "memory");
  else if constexpr (kDimensions == 3)
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2])
                 : "memory");
  else
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
}
// Adds in place of storing.
template <int kDimensions>
HEEDFUL_DEVICE void add_tile(const TensorMap& map, uint32_t from, const int (&at)[kDimensions]) {
  static_assert(kDimensions >= 2 && kDimensions <= kMostDimensions);
  if constexpr (kDimensions == 2)
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(from), "r"(at[0]), "r"(at[1])
        : "memory");
  else if constexpr (kDimensions == 3)
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            &map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
}
HEEDFUL_DEVICE void add_bulk(float* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

HEEDFUL_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until no more than the calling thread's last kGroups groups are under way.
template <int kGroups>
HEEDFUL_DEVICE void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}
// Likewise, until they have read shared memory.
template <int kGroups>
HEEDFUL_DEVICE void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// ---- some warps of the block ----------------------------------------------------------------------------------------

// Barriers 1 to 15; `threads`, a multiple of 32, counts those that wait and those that only arrive.
HEEDFUL_DEVICE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
HEEDFUL_DEVICE void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of each thread of the warpgroup, from now on; all its warps say so.
template <int kRegisters>
HEEDFUL_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
HEEDFUL_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- matrices to shared memory --------------------------------------------------------------------------------------

// ldmatrix backwards.
HEEDFUL_DEVICE void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
HEEDFUL_DEVICE void stmatrix_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace heedful::cuda

#endif
