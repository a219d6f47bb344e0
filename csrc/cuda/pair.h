// The score of one query and one key, from their similarity on: score/'s features in order. All kernels build on it.
#pragma once

#include "span.h"
//
#include "../score/bias.h"
#include "../score/blocks.h"
#include "../score/distance.h"
#include "../score/dropout.h"
#include "../score/similarity.h"
#include "../score/sink.h"
#include "../score/softcap.h"
#include "../score/softmax.h"

namespace heedful::HEEDFUL_TARGET {

// Everything that makes scores, of one head of one sequence. C: compute type; S: how q, k and v lie in memory.
template <class S>
struct HeadScores {
  using C = Compute<S>;
  const Problem& p;
  const int b, h;
  const int64_t start;  // query 0's position

  HEEDFUL_DEVICE HeadScores(const Problem& problem, const Band& band, int of_b, int of_h)
      : p(problem), b(of_b), h(of_h), start(band.start) {}

  // Of similarities.
  HEEDFUL_DEVICE C factor() const {
    return p.scales.data ? load_global(static_cast<const C*>(p.scales.data) + b * p.scales.batch_stride + h)
                         : C(p.scale);
  }
  HEEDFUL_DEVICE DistanceBias<C> distances() const { return DistanceBias<C>(p, b, h); }
  HEEDFUL_DEVICE C sink() const { return sink_of<C>(p, b, h, -kInfinity<C>); }

  // ---- masks, but for the band

  HEEDFUL_DEVICE bool mask(int i, int j) const {
    return load_global(static_cast<const uint8_t*>(p.mask.data) + b * p.mask.stride[0] + h * p.mask.stride[1] +
                       i * p.mask.stride[2] + j * p.mask.stride[3]) != 0;
  }
  HEEDFUL_DEVICE bool tile_bit(int32_t tile, int i, int j) const {
    if (tile < kFirstPartialTile) return tile == kFullTile;
    return load_global(mask_bits(p, tile) + i % kMaskTile) >> (j % kMaskTile) & 1;
  }
  HEEDFUL_DEVICE bool allows(int i, int j) const {
    return (!p.mask.data || mask(i, j)) && (!p.tiles.data || tile_bit(mask_tile(p, b, h, i, j), i, j));
  }

  // ---- scores

  HEEDFUL_DEVICE int64_t bias_index(int i, int j) const {
    return b * p.bias.stride[0] + h * p.bias.stride[1] + i * p.bias.stride[2] + j * p.bias.stride[3];
  }
  HEEDFUL_DEVICE C bias(int i, int j) const {
    if (p.bias_dtype == DType::f32) return load_global(static_cast<const float*>(p.bias.data) + bias_index(i, j));
    return C(widen(load_global(static_cast<const S*>(p.bias.data) + bias_index(i, j))));
  }
  HEEDFUL_DEVICE int64_t distance(int i, int j) const { return j - start - i; }

  // The score of a pair that no mask forbids; -inf where a bias does. slope: the softcap's derivative.
  HEEDFUL_DEVICE C score(int i, int j, C similarity, C* slope = nullptr) const {
    C s = similarity * factor();
    if (slope) *slope = p.softcap != 0 ? soft_cap_slope(s, C(1 / C(p.softcap))) : C(1);
    if (p.softcap != 0) s = soft_cap(s, C(p.softcap), C(1 / C(p.softcap)));
    if (p.bias.data) s = add_bias(s, bias(i, j), -kInfinity<C>);
    if (has_distances(p)) s = add_bias(s, distances().value(distance(i, j)), -kInfinity<C>);
    return s;
  }

  // ---- dropout

  struct MultiplyLow {
    HEEDFUL_DEVICE uint64_t operator()(uint64_t x, uint32_t y) const { return uint64_t(uint32_t(x)) * y; }
  };
  // The random words of the eight keys from 8 * eighth on.
  HEEDFUL_DEVICE void random_words(int i, int eighth, uint32_t (&words)[4]) const {
    const Counter<uint64_t> random =
        philox(Counter<uint64_t>{{uint64_t(eighth), uint64_t(i), uint64_t(h), uint64_t(b % p.dropout_batch)}},
               seed_of(p, b), MultiplyLow());
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = uint32_t(random.word[n]);
  }
  // The factor of a pair's weight.
  HEEDFUL_DEVICE C keep(int i, int j) const {
    if (!has_dropout(p)) return C(1);
    uint32_t words[4];
    random_words(i, j / kPairsPerCounter, words);
    const int n = j % kPairsPerCounter / 2;
    const uint32_t word = n == 0 ? words[0] : n == 1 ? words[1] : n == 2 ? words[2] : words[3];
    return (word >> (16 * (j % 2)) & 0xffff) < p.keep ? C(kept_weight(p)) : C(0);
  }
};

}  // namespace heedful::HEEDFUL_TARGET
