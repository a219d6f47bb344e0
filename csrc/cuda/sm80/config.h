// The shapes of the sm_80 kernels' tiles, by padded head dim. Four warps; each owns rows of the side that stays.
#pragma once

#include <cstdint>

namespace heedful::cuda {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// Forward: a warp's rows, and the keys of a step. Registers decide: a lane holds rows * (keys + dim) / 32 accumulators,
// of 255 registers. Numbers of 4 bytes take twice the shared memory, so that a head dim of 256 does not fit.
struct ForwardTile {
  int rows, keys;
};
template <int kBytes, int kDim, bool kGeneral>
constexpr ForwardTile kForwardTile = {};
template <>
constexpr ForwardTile kForwardTile<2, 64, false> = {32, 64};  // 128 accumulators, 48 KB
template <>
constexpr ForwardTile kForwardTile<2, 64, true> = {16, 32};  // 48, 24 KB; 64 keys would spill
template <>
constexpr ForwardTile kForwardTile<2, 128, false> = {16, 64};  // 96, 80 KB
template <>
constexpr ForwardTile kForwardTile<2, 128, true> = {16, 32};  // 80, 48 KB
template <>
constexpr ForwardTile kForwardTile<2, 256, false> = {16, 32};  // 144, 96 KB
template <>
constexpr ForwardTile kForwardTile<2, 256, true> = {16, 16};  // 136, 64 KB
template <>
constexpr ForwardTile kForwardTile<4, 64, false> = {32, 32};  // 96, 64 KB
template <>
constexpr ForwardTile kForwardTile<4, 64, true> = {16, 32};  // 48, 48 KB
template <>
constexpr ForwardTile kForwardTile<4, 128, false> = {16, 32};  // 80, 96 KB
template <>
constexpr ForwardTile kForwardTile<4, 128, true> = {16, 16};  // 72, 64 KB

// Plain: softmax of scaled dot products, with a band and lengths as the only masks, and rows that copies of 16 bytes
// can take. General: everything that a Problem can say.
template <class StorageType, int kPaddedDim, bool kWithEverything>
struct ForwardConfig {
  using Storage = StorageType;
  static constexpr bool kGeneral = kWithEverything;
  static constexpr int kDim = kPaddedDim, kBytes = sizeof(Storage);
  static constexpr ForwardTile kTile = kForwardTile<kBytes, kDim, kGeneral>;
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kQueries = kWarps * kRows;
  static constexpr uint32_t kQueryBytes = kQueries * kDim * kBytes, kKeyBytes = kKeys * kDim * kBytes;
  static constexpr uint32_t kSharedBytes = kQueryBytes + 2 * 2 * kKeyBytes;  // two stages of K and V
  static_assert(kSharedBytes <= 99 * 1024);                                  // what sm_86 and sm_89 have
};

// Decoding: a warp has 16 rows, which are heads of a group as well as queries.
template <class StorageType, int kPaddedDim, bool kWithEverything>
struct DecodeConfig {
  using Storage = StorageType;
  static constexpr bool kGeneral = kWithEverything;
  static constexpr int kDim = kPaddedDim, kBytes = sizeof(Storage);
  static constexpr int kRows = 16, kKeys = kForwardTile<kBytes, kDim, kGeneral>.keys, kTileRows = kWarps * kRows;
  static constexpr uint32_t kQueryBytes = kTileRows * kDim * kBytes, kKeyBytes = kKeys * kDim * kBytes;
  static constexpr uint32_t kSharedBytes = kQueryBytes + 2 * 2 * kKeyBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// Backward: whose gradients a block has.
enum class Side { queries, keys, keys_alone, values };  // dQ; dK and dV; dK; dV

// A warp has 16 rows of its side: a lane holds kDim / 2 accumulators, twice as many for dK and dV at once, and what a
// step of the other side's rows takes twice, for S and dP.
template <int kBytes, int kDim, bool kGeneral>
constexpr int kBackwardStep = 16;
template <>
constexpr int kBackwardStep<2, 64, false> = 64;
template <>
constexpr int kBackwardStep<2, 64, true> = 32;
template <>
constexpr int kBackwardStep<2, 128, false> = 32;
template <bool kGeneral>
constexpr int kBackwardStep<4, 64, kGeneral> = 32;

template <class StorageType, int kPaddedDim, bool kWithEverything, Side kOfSide>
struct BackwardConfig {
  using Storage = StorageType;
  static constexpr bool kGeneral = kWithEverything;
  static constexpr Side kSide = kOfSide;
  static constexpr int kDim = kPaddedDim, kBytes = sizeof(Storage);
  static constexpr int kRows = 16, kStep = kBackwardStep<kBytes, kDim, kGeneral>;
  static constexpr uint32_t kOwnBytes = kWarps * kRows * kDim * kBytes, kStepBytes = kStep * kDim * kBytes;
  static constexpr uint32_t kSharedBytes = 2 * kOwnBytes + 2 * 2 * kStepBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

}  // namespace heedful::cuda
