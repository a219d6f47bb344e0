// Which sequences decode.cuh computes instead of forward.cuh: those of few queries, which would leave most of a tile's
// rows empty and, with one head a block, read keys and values once for each head. It follows from the sequence alone,
// so that a sequence gets the same bits in any batch.
#pragma once

#include "../numbers.h"

namespace heedful::HEEDFUL_TARGET {

constexpr int kFewQueries = 16;

// A sequence of so many queries in memory.
HEEDFUL_FN bool decodes(const Problem& p, int64_t queries) {
  return p.normalizer == Normalizer::softmax && queries <= kFewQueries;
}
// Any sequence may; all do.
inline bool may_decode(const Problem& p) { return decodes(p, p.q_offsets ? 0 : p.Sq); }
inline bool all_decode(const Problem& p) { return decodes(p, p.Sq); }

}  // namespace heedful::HEEDFUL_TARGET
