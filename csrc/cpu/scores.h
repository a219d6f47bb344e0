// From products q . k to scores, a tile at a time, for the forward kernel (queries in lanes) and the backward one (keys
// in lanes): softcap, biases, masks (masks.h); and dropout's factors. What each feature means stands in score/.
#pragma once

#include "../score/bias.h"
#include "../score/distance.h"
#include "../score/dropout.h"
#include "../score/sink.h"
#include "../score/softcap.h"
#include "../score/softmax.h"
#include "masks.h"
#include "microkernel.h"

namespace heedful::HEEDFUL_TARGET {

// Scores leave the product as q . k, and stay so where only masks follow: what counts is their distance from the row's
// maximum or lse, and that loses least when it is taken before any scale. Whatever is added to scores needs them
// scaled, a scale below 0 turns their order around, and one near 0 or infinity would push lse / scale or its own
// inverse out of range: then it is q that is scaled, on loading, or the products are.
inline bool scales_first(const Problem& p) {
  return p.bias.data || p.scales.data || p.sinks.data || p.softcap != 0 || has_distances(p) ||
         p.similarity != Similarity::dot || p.normalizer == Normalizer::hard || !(p.scale > 1e-20 && p.scale < 1e20);
}
// What one unit of a score is worth then, in natural units.
inline double score_unit(const Problem& p) { return scales_first(p) ? 1.0 : p.scale; }

template <class C>
HEEDFUL_FN C scale_of(const Problem& p, int64_t b, int64_t h) {
  return p.scales.data ? static_cast<const C*>(p.scales.data)[b * p.scales.batch_stride + h] : C(p.scale);
}

// Hard attention scales the products, as equal ones have to stay equal; so do pairs, which would round q.
template <class E>
HEEDFUL_FN bool scales_products(const Problem& p) {
  return scales_first(p) && (kDepth<E> == 2 || p.normalizer == Normalizer::hard);
}
// The factor of q on loading.
template <class E>
HEEDFUL_FN Sum<E> query_scale(const Problem& p, int64_t b, int64_t h) {
  return scales_first(p) && !scales_products<E>(p) ? scale_of<Sum<E>>(p, b, h) : Sum<E>(1);
}

// Whether pairs that masks leave keep the scores that products gave.
template <class E>
HEEDFUL_FN bool keeps_products(const Problem& p) {
  return !p.bias.data && !has_distances(p) && p.softcap == 0 && !scales_products<E>(p);
}
// Whether every pair of the tile does.
template <class E>
HEEDFUL_FN bool is_plain(const Problem& p, const Band& band, const Tile& t) {
  return !t.words && keeps_products<E>(p) && band.covers(t.i0, t.i1, t.j0, t.j1);
}

// A tile's worth of what scores are made of: rows x width. Null where a feature is absent.
template <class C>
struct ScoreParts {
  C *slopes, *keep;  // slopes: the derivatives of capped scores, where they are wanted
  // Of a tile of several such panels, `lanes` in all:
  C* distances;                  // one for each diagonal
  uint64_t (*words)[kMaskTile];  // what masks leave

  ScoreParts(const Problem& p, Carver& carve, int64_t rows, int64_t width, int64_t lanes, bool derivatives) {
    constexpr int n = kLanes<C>;
    slopes = derivatives && p.softcap != 0 ? carve.take<C>(rows * width) : nullptr;
    keep = has_dropout(p) ? carve.take<C>((rows + n) * width) : nullptr;
    distances = has_distances(p) ? carve.take<C>(rows + lanes + n) : nullptr;
    words = p.mask.data || p.tiles.data ? carve.take<uint64_t[kMaskTile]>((most(rows, lanes) + kWord - 1) / kWord)
                                        : nullptr;
  }
  ScoreParts() = default;
};

// The part of a [B, Hq, Sq, Sk] tensor under a tile.
template <InLanes in_lanes, class S>
HEEDFUL_FN Source<S> under(const View& view, const Tile& t) {
  const S* data = static_cast<const S*>(view.data) + t.b * view.stride[0] + t.h * view.stride[1] +
                  t.i0 * view.stride[2] + t.j0 * view.stride[3];
  return in_lanes == InLanes::queries ? Source<S>{data, view.stride[3], view.stride[2]}
                                      : Source<S>{data, view.stride[2], view.stride[3]};
}

// s = scale s + bias of the tile.
template <class C, class S>
HEEDFUL_CALLED void add_bias_tile(C* s, int64_t stride, C scale, Source<S> bias, int64_t rows, int64_t lanes,
                                  int64_t width) {
  const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>), scales = broadcast<C>(scale);
  for_each_vector<C>(bias, rows, lanes, width, [&](int64_t r, int64_t l, Vec<C> x) {
    C* to = s + r * stride + l;
    store(to, add_bias(load(to) * scales, x, minus_infinity));
  });
}

template <InLanes in_lanes, class C>
HEEDFUL_FN void add_bias_to(C* s, int64_t stride, C scale, const Problem& p, const Tile& t, int64_t rows, int64_t lanes,
                            int64_t width) {
  const auto add = [&](auto element) {
    add_bias_tile(s, stride, scale, under<in_lanes, decltype(element)>(p.bias, t), rows, lanes, width);
  };
  if (p.bias_dtype == DType::f32) return add(float());
  if constexpr (sizeof(C) == 8) return add(double());
  if constexpr (sizeof(C) == 4) return p.bias_dtype == DType::bf16 ? add(BFloat16()) : add(Float16());
}

// ---- distances ------------------------------------------------------------------------------------------------------

// The distance of the diagonal `x` of a tile: row r and lane l lie on the diagonal (rows - 1 - r) + l.
template <InLanes in_lanes>
HEEDFUL_FN int64_t diagonal_distance(const Band& band, const Tile& t, int64_t x) {
  return in_lanes == InLanes::keys ? t.j0 - (band.start + t.i1 - 1) + x : t.j1 - 1 - (band.start + t.i0) - x;
}

// to[x] becomes the bias of the diagonal x, for as many as a tile of `lanes` lanes meets.
template <InLanes in_lanes, class C>
HEEDFUL_CALLED void load_distances(C* to, int64_t lanes, const Problem& p, const Band& band, const Tile& t) {
  constexpr int64_t kExact = int64_t{1} << 22;  // as float, and in 32 bits
  const DistanceBias<C> bias(p, t.b, t.h);
  const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0, diagonals = queries + keys - 1;
  const int64_t end = (in_lanes == InLanes::queries ? keys : queries) - 1 + lanes;
  const int64_t first = diagonal_distance<in_lanes>(band, t, 0);
  if (bias.table || first < -kExact || first > kExact) {
    for (int64_t x = 0; x < end; ++x)
      to[x] = x < diagonals ? bias.value(diagonal_distance<in_lanes>(band, t, x)) : C(0);
    return;
  }
  for (int64_t x = 0; x < end; x += kLanes<C>) {
    const Vec<Int<C>> rising = iota<Int<C>>() + Int<C>(x);
    const Vec<Int<C>> distance = Int<C>(first) + (in_lanes == InLanes::keys ? rising : -rising);
    store(to + x, bias.value_of_slope(__builtin_convertvector(distance < 0 ? -distance : distance, Vec<C>)));
  }
}

// Where the diagonals of a panel begin among those of its tile.
template <InLanes in_lanes, class C>
HEEDFUL_FN const C* distances_of(const ScoreParts<C>& parts, const Tile& t, const Tile& panel) {
  if (!parts.distances) return nullptr;
  return parts.distances +
         (in_lanes == InLanes::keys ? (t.i1 - panel.i1) + (panel.j0 - t.j0) : (t.j1 - panel.j1) + (panel.i0 - t.i0));
}

// ---- softcap --------------------------------------------------------------------------------------------------------

// s = cap tanh(scale s / cap).
template <class C>
HEEDFUL_FN void cap_scores(C* s, int64_t stride, C scale, int64_t rows, int64_t width, C cap, C* slopes) {
  const Vec<C> scales = broadcast<C>(scale), caps = broadcast<C>(cap), inverse = broadcast<C>(1 / cap);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < width; l += kLanes<C>) {
      const Vec<C> t = load(s + r * stride + l) * scales;
      store(s + r * stride + l, soft_cap(t, caps, inverse));
      if (slopes) store(slopes + r * width + l, soft_cap_slope(t, inverse));
    }
}

// ---- all of it ------------------------------------------------------------------------------------------------------

// s[row * stride + lane] becomes the pair's score, -inf where it is absent. `width` is the tile's lanes rounded up to
// whole vectors; row r and lane l have distances[(rows - 1 - r) + l].
template <InLanes in_lanes, class E, class C = Sum<E>>
HEEDFUL_CALLED void apply_scores(const Problem& p, const Band& band, const Tile& t, C* s, int64_t stride, int64_t width,
                                 const ScoreParts<C>& parts, const C* distances) {
  constexpr int n = kLanes<C>;
  constexpr bool queries_in_lanes = in_lanes == InLanes::queries;
  const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0;
  const int64_t rows = queries_in_lanes ? keys : queries, lanes = queries_in_lanes ? queries : keys;
  const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
  const auto each = [&](auto change) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < width; l += n) store(s + r * stride + l, change(load(s + r * stride + l), r, l));
  };
  // The first of these scales the products, if they are not scaled yet.
  C scale = scales_products<E>(p) ? scale_of<C>(p, t.b, t.h) : C(1);
  if (p.softcap != 0) cap_scores<C>(s, stride, scale, rows, width, C(p.softcap), parts.slopes), scale = 1;
  if (p.bias.data) add_bias_to<in_lanes>(s, stride, scale, p, t, rows, lanes, width), scale = 1;
  const Vec<C> scales = broadcast<C>(scale);
  if (distances)
    each([&](Vec<C> x, int64_t r, int64_t l) {
      return add_bias(x * scales, load(distances + (rows - 1 - r) + l), minus_infinity);
    });
  else if (scale != 1)
    each([&](Vec<C> x, int64_t, int64_t) { return x * scales; });
  apply_masks<in_lanes>(band, t, s, stride, width);
}

// ---- dropout --------------------------------------------------------------------------------------------------------

// z of the keys [j, j + 8) for the queries of the lanes, i and on.
template <class C>
HEEDFUL_FN void keep_eight_keys(const Problem& p, const Tile& t, int64_t i, int64_t j, C kept, Vec<C> (&z)[8]) {
  typedef Vec<uint64_t> Word;
  constexpr int n = kLanes<C>, kWords = kLanes<uint64_t>, kParts = n / kWords;
  Vec<Int<C>> random[4];  // of which 32 bits count
  Counter<Word> parts[kParts];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part)
    parts[part] =
        philox(Counter<Word>{{broadcast<uint64_t>(uint64_t(j) / kPairsPerCounter),
                              iota<uint64_t>() + uint64_t(i + part * kWords), broadcast<uint64_t>(uint64_t(t.h)),
                              broadcast<uint64_t>(uint64_t(t.b % p.dropout_batch))}},
               seed_of(p, t.b), [](Word a, uint32_t b) { return multiply_low(a, b); });
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) random[w] = low_halves<C>(parts[0].word[w], parts[kParts - 1].word[w]);
  const Vec<Int<C>> keep = broadcast<Int<C>>(Int<C>(p.keep));
#pragma GCC unroll 8
  for (int key = 0; key < 8; ++key) {
    const Vec<Int<C>> bits = (random[key / 2] >> (16 * (key % 2))) & 0xffff;
    z[key] = select(bits < keep, broadcast<C>(kept), Vec<C>{});
  }
}

// z of one pair.
template <class C>
HEEDFUL_CALLED C keep_pair(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  Vec<C> z[8];
  keep_eight_keys<C>(p, Tile{b, h, i, i + 1, j, j + 1}, i, j / 8 * 8, C(kept_weight(p)), z);
  return z[j % 8][0];
}

// keep[row * width + lane] = z of the tile's pairs. Rows up to the next multiple of the vector are written.
template <InLanes in_lanes, class C>
HEEDFUL_CALLED void load_keep(C* keep, int64_t width, const Problem& p, const Tile& t) {
  constexpr int n = kLanes<C>;
  const C kept = C(kept_weight(p));
  if constexpr (in_lanes == InLanes::queries) {
    for (int64_t l = 0; l < width; l += n)
      for (int64_t j = t.j0 / 8 * 8; j < t.j1; j += 8) {
        Vec<C> z[8];
        keep_eight_keys<C>(p, t, t.i0 + l, j, kept, z);
        for (int key = 0; key < 8; ++key)
          if (j + key >= t.j0 && j + key < t.j1) store(keep + (j + key - t.j0) * width + l, z[key]);
      }
  } else {
    // Keys come eight or a vector at a time, whichever is more, and are transposed.
    constexpr int m = n > 8 ? n : 8;
    for (int64_t i = t.i0; i < t.i1; i += n)
      for (int64_t j = t.j0 / 8 * 8; j < t.j0 + width; j += m) {
        Vec<C> z[m];
        for (int key = 0; key < m; key += 8)
          keep_eight_keys<C>(p, t, i, j + key, kept, reinterpret_cast<Vec<C>(&)[8]>(z[key]));
        for (int part = 0; part < m; part += n) {
          if (j + part < t.j0 || j + part >= t.j0 + width) continue;
          Vec<C>(&square)[n] = reinterpret_cast<Vec<C>(&)[n]>(z[part]);
          transpose<C>(square);
          for (int row = 0; row < n; ++row) store(keep + (i - t.i0 + row) * width + (j + part - t.j0), square[row]);
        }
      }
  }
}

// p = p * z, but for marks of absent pairs, which are below 0.
template <class C>
HEEDFUL_CALLED void drop(C* prob, int64_t stride, const C* keep, int64_t width, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < width; l += kLanes<C>) {
      const Vec<C> x = load(prob + r * stride + l);
      store(prob + r * stride + l, select(x < Vec<C>{}, x, x * load(keep + r * width + l)));
    }
}

// Factors of pairs, likewise. Zeros stay zeros: they may be absent pairs, whose factor may be NaN.
template <class C>
HEEDFUL_CALLED void scale_pairs(C* x, int64_t stride, const C* factor, int64_t width, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < width; l += kLanes<C>) {
      const Vec<C> y = load(x + r * stride + l);
      store(x + r * stride + l, select(y == Vec<C>{}, Vec<C>{}, y * load(factor + r * width + l)));
    }
}

}  // namespace heedful::HEEDFUL_TARGET
