// Small whole kernels of sm_90a: for the emulator's tests, with faults planted in them, and for nvcc's check.
#pragma once

#include "../../cuda/sm90/ptx.h"

namespace heedful::HEEDFUL_TARGET {

enum class Planted {
  nothing,
  consumer_parity,
  producer_parity,
  released_early,
  never_released,
  one_release_too_many,
  too_few_bytes,
  too_many_bytes,
  no_init_fence,
  no_init_barrier,
  never_initialised,
  no_wait_for_values,
  one_thread_waits_for_values,
  no_wgmma_fence,
  no_wgmma_fence_after_packing,
  touched_after_fence,
  accumulators_read_early,
  accumulators_written_early,
  a_registers_overwritten,
  operand_overwritten,
  never_committed,
  wrong_stride,
  wrong_k_step,
  wrong_major,
  no_proxy_fence,
  proxy_fence_late,
  no_barrier_before_store,
  no_wait_read,
  no_barrier_after_wait_read,
  leaves_before_wait_read,
  no_swizzle_in_staging,
  too_few_at_barrier,
  too_many_at_barrier,
  two_counts,
  registers_beyond_pool,
  registers_in_three_warps,
  registers_not_lowered,
  // of OrderedSums
  sums_wait_for_read_only,
  sums_in_any_order,
};
#ifdef __CUDACC__
HEEDFUL_DEVICE constexpr bool is(Planted) { return false; }
#else
inline Planted planted = Planted::nothing;
inline bool is(Planted fault) { return planted == fault; }
#endif

// out [128][128] = T(a [128][256] b [64][256]^T) values [64][128]: a warpgroup that loads, two that multiply 64 rows
// each. The first product takes both operands from shared memory in two stages, the second one's a stays in registers.
struct ProductConfig {
  static constexpr int kThreads = 384, kTiles = 4, kStages = 2, kRegistersOfProducer = 40, kRegistersOfConsumer = 232;
  static constexpr uint32_t kA = 128 * 128, kB = 64 * 128, kStage = kA + kB, kValues = kStages * kStage,
                            kHalf = 64 * 128,  // of the values, and of a warpgroup's result
      kOut = kValues + 2 * kHalf, kFull = kOut + 2 * kHalf, kEmpty = kFull + 8 * kStages,
                            kValuesFull = kEmpty + 8 * kStages, kShared = kValuesFull + 8;
};

template <class T>
struct Product : ProductConfig {
  const TensorMap &a, &b, &values, &out;
  uint32_t base;  // of shared memory

  HEEDFUL_DEVICE uint32_t full(int stage) const { return base + kFull + 8 * uint32_t(stage); }
  HEEDFUL_DEVICE uint32_t empty(int stage) const { return base + kEmpty + 8 * uint32_t(stage); }

  HEEDFUL_DEVICE void init() const {
    if (thread_index() == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init_mbarrier(full(stage), 1);
        init_mbarrier(empty(stage), 2);
      }
      if (!is(Planted::never_initialised)) init_mbarrier(base + kValuesFull, 1);
      if (!is(Planted::no_init_fence)) fence_mbarrier_init();
    }
    if (!is(Planted::no_init_barrier)) sync_block();
  }

  // One thread.
  HEEDFUL_DEVICE void produce() const {
    arrive_expecting(base + kValuesFull, 2 * kHalf);
    load_tile(base + kValues, values, base + kValuesFull, {0, 0});
    load_tile(base + kValues + kHalf, values, base + kValuesFull, {64, 0});
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages;
      const uint32_t to = base + uint32_t(stage) * kStage, turn = uint32_t(tile / kStages);
      wait_mbarrier(empty(stage), (turn & 1) ^ (is(Planted::producer_parity) ? 0 : 1));
      const uint32_t wrong = is(Planted::too_few_bytes) ? kB : is(Planted::too_many_bytes) ? -16u : 0;
      arrive_expecting(full(stage), kStage - wrong);
      load_tile(to, a, full(stage), {64 * tile, 0});
      load_tile(to + kA, b, full(stage), {64 * tile, 0});
    }
  }

  HEEDFUL_DEVICE void release(int tile) const {
    if (is(Planted::never_released)) return;
    if (thread_index() % 128 != 0) return;
    arrive(empty(tile % kStages));
    if (is(Planted::one_release_too_many)) arrive(empty(tile % kStages));
  }

  HEEDFUL_DEVICE void consume() const {
    const int warpgroup = thread_index() / 128 - 1;
    // s [64][64] = a b^T; the tile before the last one is released when its products are done.
    float s[32];
#pragma unroll
    for (int n = 0; n < 32; ++n) s[n] = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages;
      const uint32_t from = base + uint32_t(stage) * kStage;
      wait_mbarrier(full(stage), uint32_t(tile / kStages & 1) ^ (is(Planted::consumer_parity) ? 1 : 0));
      const uint32_t stride = is(Planted::wrong_stride) ? 512 : 1024;
      const uint64_t of_a = MatrixDescriptor{from + uint32_t(warpgroup) * kHalf, 16, stride, Swizzle::bytes128}.bits();
      const uint64_t of_b = MatrixDescriptor{from + kA, 16, 1024, Swizzle::bytes128}.bits();
      if (!is(Planted::no_wgmma_fence)) fence_wgmma();
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k)
        wgmma<T>(s, advance(of_a, 32 * k), advance(of_b, (is(Planted::wrong_k_step) ? 16 : 32) * k));
      if (!is(Planted::never_committed)) commit_wgmma();
      if (is(Planted::operand_overwritten))
        if (tile == 1 && thread_index() == 200) store_shared(from + kA + 64, 1.0f);
      if (is(Planted::released_early)) {
        release(tile);
      } else {
        wait_wgmma<1>();
        if (tile > 0) release(tile - 1);
      }
    }
    if (is(Planted::accumulators_written_early)) s[3] *= 2;
    if (!is(Planted::accumulators_read_early)) wait_wgmma<0>();
    pin(s);

    // The result's halves of 64 columns, one after the other, by the same 8 KB of shared memory.
    uint32_t p[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) p[k][r] = pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
    const bool waits =
        is(Planted::one_thread_waits_for_values) ? thread_index() % 128 == 0 : !is(Planted::no_wait_for_values);
    if (waits) wait_mbarrier(base + kValuesFull, 0);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint64_t of_values = MatrixDescriptor{base + kValues + half * kHalf, kHalf, 1024, Swizzle::bytes128}.bits();
      float o[32];
      if (!is(Planted::no_wgmma_fence_after_packing)) fence_wgmma();
      if (is(Planted::touched_after_fence) && half == 1) p[1][2] ^= 1;
      if (is(Planted::wrong_major)) {
        wgmma_zero<T, Major::k>(o, p[0], of_values);
      } else {
        wgmma_zero<T, Major::mn>(o, p[0], of_values);
#pragma unroll
        for (uint32_t k = 1; k < 4; ++k) wgmma<T, Major::mn>(o, p[k], advance(of_values, k * 2048));
      }
      commit_wgmma();
      if (is(Planted::a_registers_overwritten)) p[2][1] = 0;
      wait_wgmma<0>();
      pin(o);
      store(o, half, warpgroup);
    }
    if (!is(Planted::leaves_before_wait_read))
      if (thread_index() % 128 == 0) wait_stores_read<0>();
  }

  HEEDFUL_DEVICE void store(const float (&o)[32], uint32_t half, int warpgroup) const {
    const uint32_t staging = base + kOut + uint32_t(warpgroup) * kHalf;
    const int barrier = 1 + warpgroup, lane = thread_index() % 32, row = thread_index() / 32 % 4 * 16 + lane % 16;
    const int wrong = is(Planted::too_few_at_barrier) ? -32 : is(Planted::too_many_at_barrier) ? 32 : 0;
    // Wait until the engine has read what the first half left here.
    if (!is(Planted::no_wait_read))
      if (thread_index() % 128 == 0) wait_stores_read<0>();
    if (!is(Planted::no_barrier_after_wait_read)) sync_named(barrier, 128 + wrong);
#pragma unroll
    for (uint32_t n = 0; n < 4; ++n) {
      uint32_t r[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) r[i] = pack<T>(o[8 * n + 2 * i], o[8 * n + 2 * i + 1]);
      const uint32_t address = staging + uint32_t(row) * 128 + (2 * n + uint32_t(lane) / 16) * 16;
      stmatrix(is(Planted::no_swizzle_in_staging) ? address : cuda::swizzled(address, Swizzle::bytes128), r);
    }
    if (!is(Planted::no_proxy_fence) && !is(Planted::proxy_fence_late)) fence_async_shared();
    if (is(Planted::two_counts)) {
      sync_named(3, warpgroup ? 256 : 128);
    } else if (!is(Planted::no_barrier_before_store)) {
      sync_named(barrier, 128 + wrong);
    }
    if (thread_index() % 128 != 0) return;
    if (is(Planted::proxy_fence_late)) fence_async_shared();
    store_tile(out, staging, {int(half) * 64, warpgroup * 64});
    commit_stores();
  }

  HEEDFUL_DEVICE void run() const {
    init();
    if (thread_index() < 128) {
      if (is(Planted::registers_in_three_warps)) {
        if (thread_index() < 96) lower_registers<kRegistersOfProducer>();
      } else if (!is(Planted::registers_not_lowered)) {
        lower_registers<kRegistersOfProducer>();
      }
      if (thread_index() == 0) produce();
    } else {
      if (is(Planted::registers_beyond_pool))
        raise_registers<240>();
      else
        raise_registers<kRegistersOfConsumer>();
      consume();
    }
  }
};

template <class T>
HEEDFUL_KERNEL(384, 1)
void product(HEEDFUL_PARAMETER TensorMap a, HEEDFUL_PARAMETER TensorMap b, HEEDFUL_PARAMETER TensorMap values,
             HEEDFUL_PARAMETER TensorMap out) {
  Product<T>{{}, a, b, values, out, shared_base()}.run();
}

// Warps add their 32 x 32 numbers to the same ones, in their order: the sum has the same bits each time. By tiles
// to `sums` and by stretches of memory to `more`.
template <int kWarps>
HEEDFUL_KERNEL(32 * kWarps, 1)
void ordered_sums(HEEDFUL_PARAMETER TensorMap sums, float* more, const float* from) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const uint32_t own = shared_base() + uint32_t(warp) * 4096;
  for (int row = 0; row < 32; ++row)
    store_shared(cuda::swizzled(own + uint32_t(row * 128 + lane * 4), Swizzle::bytes128),
                 load_global(from + (warp * 32 + row) * 32 + lane));
  fence_async_shared();
  sync_warp();
  if (!is(Planted::sums_in_any_order) && warp > 0) sync_named(warp, 64);
  if (lane == 0) {
    add_tile(sums, own, {0, 0});
    add_bulk(more, own, 4096);
    commit_stores();
    if (is(Planted::sums_wait_for_read_only))
      wait_stores_read<0>();
    else
      wait_stores<0>();
    fence_async_global();
  }
  sync_warp();
  if (!is(Planted::sums_in_any_order) && warp < kWarps - 1) arrive_named(warp + 1, 64);
}

}  // namespace heedful::HEEDFUL_TARGET
