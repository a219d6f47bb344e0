// Masks by block: tiles of kMaskTile x kMaskTile pairs that are empty, full, or partial, with one bit for each pair.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

// What the tile of query i and key j holds: kEmptyTile, kFullTile, or kFirstPartialTile and on. Numbers that no one has
// checked may be anything: those of no tile's bits are full.
HEEDFUL_FN int32_t mask_tile(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (!p.tiles.data) return kFullTile;
  const int32_t tile =
      static_cast<const int32_t*>(p.tiles.data)[b * p.tiles.stride[0] + h * p.tiles.stride[1] +
                                                i / kMaskTile * p.tiles.stride[2] + j / kMaskTile * p.tiles.stride[3]];
  return tile == kEmptyTile || (kFirstPartialTile <= tile && tile < p.end_tile) ? tile : kFullTile;
}

// The words of a partial tile, one for each query; null for a full one.
HEEDFUL_FN const int64_t* mask_bits(const Problem& p, int32_t tile) {
  return tile < kFirstPartialTile ? nullptr : p.bits + (tile - kFirstPartialTile) * kMaskTile;
}

}  // namespace heedful::HEEDFUL_TARGET
