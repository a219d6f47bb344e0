// The shapes of the sm_80 kernels' tiles, by padded head dim. Four warps; each owns rows of the side that stays.
#pragma once

#include <cstdint>

namespace heedful::cuda {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// Forward: a warp's rows, keys of a step, blocks on a multiprocessor. Registers decide: a lane holds kRows * (kKeys + kDim) / 32
// accumulators, of 255 registers.
template <int kDim>
struct ForwardTile;
template <>
struct ForwardTile<64> {
  static constexpr int kRows = 32, kKeys = 64, kBlocks = 2;  // 64 + 64 accumulators, 48 KB
};
template <>
struct ForwardTile<128> {
  static constexpr int kRows = 16, kKeys = 64, kBlocks = 2;  // 32 + 64, 80 KB
};
template <>
struct ForwardTile<256> {
  static constexpr int kRows = 16, kKeys = 32, kBlocks = 2;  // 16 + 128, 96 KB
};

template <class StorageType, int kPaddedDim, bool kWithEverything>
struct ForwardConfig : ForwardTile<kPaddedDim> {
  using Storage = StorageType;
  using Tile = ForwardTile<kPaddedDim>;
  // Plain: softmax of scaled dot products, with a band and lengths as the only masks, and rows that copies of 16 bytes can
  // take. General: everything that a Problem can say.
  static constexpr bool kGeneral = kWithEverything;
  static constexpr int kDim = kPaddedDim;
  static constexpr int kQueries = kWarps * Tile::kRows;
  static constexpr int kStages = 2;
  static constexpr uint32_t kQueryBytes = kQueries * kDim * 2, kKeyBytes = Tile::kKeys * kDim * 2;
  static constexpr uint32_t kSharedBytes = kQueryBytes + kStages * 2 * kKeyBytes;
  static_assert(kSharedBytes <= 99 * 1024);  // what sm_86 and sm_89 have
};

}  // namespace heedful::cuda
