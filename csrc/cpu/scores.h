// Applies bias and masks to a tile of scores, for the forward kernel (queries in lanes) and the backward one (keys in
// lanes).
#pragma once

#include "../score/bias.h"
#include "../score/mask.h"
#include "../score/softmax.h"
#include "tiles.h"

namespace heedful::HEEDFUL_TARGET {

template <class C>
constexpr C kInfinity = C(__builtin_inf());

// Queries [i0, i1) x keys [j0, j1) of one head.
struct Tile {
  int64_t b, h, i0, i1, j0, j1;
};

enum class InLanes { queries, keys };

// Scores leave the product as q . k, and stay so where only masks follow: what counts is their distance from the row's
// maximum or lse, and that loses least when it is taken before any scale. A bias needs scaled scores, a scale below 0
// turns their order around, and one near 0 would push lse / scale out of range: then apply_scores scales first.
inline bool scales_first(const Problem& p) { return p.bias.data || !(p.scale > 1e-20); }
// What one unit of a score is worth then, in natural units.
inline double score_unit(const Problem& p) { return scales_first(p) ? 1.0 : p.scale; }

// Whether every pair of the tile keeps the score that the product gave.
inline bool is_plain(const Problem& p, const Band& band, const Tile& t) {
  return !p.mask.data && !scales_first(p) && band.covers(t.i0, t.i1, t.j0, t.j1);
}

// The part of a [B, Hq, Sq, Sk] tensor under a tile.
template <InLanes in_lanes, class S>
HEEDFUL_FN Source<S> under(const View& view, const Tile& t) {
  const S* data = static_cast<const S*>(view.data) + t.b * view.stride[0] + t.h * view.stride[1] +
                  t.i0 * view.stride[2] + t.j0 * view.stride[3];
  return in_lanes == InLanes::queries ? Source<S>{data, view.stride[3], view.stride[2]}
                                      : Source<S>{data, view.stride[2], view.stride[3]};
}

template <InLanes in_lanes, class C>
HEEDFUL_FN void load_bias(C* to, int64_t width, const Problem& p, const Tile& t, int64_t rows, int64_t lanes) {
  const auto load = [&](auto element) {
    load_tile<C>(to, width, under<in_lanes, decltype(element)>(p.bias, t), rows, lanes, width, C(1));
  };
  if (p.bias_dtype == DType::f32) return load(float());
  if constexpr (sizeof(C) == 8) return load(double());
  if constexpr (sizeof(C) == 4) return p.bias_dtype == DType::bf16 ? load(BFloat16()) : load(Float16());
}

// s[row * stride + lane] gets its bias; -inf where the pair is masked. `width` is the
// tile's lanes rounded up to whole vectors; `bias` and `mask` are scratch of rows x width.
template <InLanes in_lanes, class C>
HEEDFUL_CALLED void apply_scores(const Problem& p, const Band& band, const Tile& t, C* s, int64_t stride, int64_t width,
                                 C* bias, C* mask) {
  constexpr int n = kLanes<C>;
  constexpr bool queries_in_lanes = in_lanes == InLanes::queries;
  using I = Int<C>;
  const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0;
  const int64_t rows = queries_in_lanes ? keys : queries, lanes = queries_in_lanes ? queries : keys;
  const bool biased = p.bias.data, masked = p.mask.data;
  if (biased) load_bias<in_lanes, C>(bias, width, p, t, rows, lanes);
  if (masked) load_tile<C>(mask, width, under<in_lanes, bool>(p.mask, t), rows, lanes, width, C(1));

  // The keys that each query sees, counted from j0.
  const bool banded = !band.covers(t.i0, t.i1, t.j0, t.j1);
  const auto first_key = [&](int64_t i) { return I(clamp(band.first_key(i) - t.j0, 0, keys)); };
  const auto end_key = [&](int64_t i) { return i < band.queries ? I(clamp(band.end_key(i) - t.j0, 0, keys)) : I(0); };
  const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
  const Vec<C> scale = broadcast<C>(scales_first(p) ? C(p.scale) : C(1));
  for (int64_t l = 0; l < width; l += n) {
    Vec<I> first, end;
    const Vec<I> lane_index = iota<I>() + I(l);
    if (queries_in_lanes && banded)
      for (int i = 0; i < n; ++i) {
        first[i] = l + i < queries ? first_key(t.i0 + l + i) : I(0);
        end[i] = l + i < queries ? end_key(t.i0 + l + i) : I(0);
      }
    for (int64_t r = 0; r < rows; ++r) {
      Vec<C> x = load(s + r * stride + l) * scale;
      Vec<I> allowed = ~Vec<I>{};
      if (banded) {
        if constexpr (queries_in_lanes)
          allowed = in_band(allowed, broadcast<I>(I(r)), first, end);
        else
          allowed = in_band(allowed, lane_index, broadcast<I>(first_key(t.i0 + r)), broadcast<I>(end_key(t.i0 + r)));
      }
      if (masked) allowed &= load(mask + r * width + l) != Vec<C>{};
      if (biased) x = add_bias(x, load(bias + r * width + l), minus_infinity);
      store(s + r * stride + l, select(allowed, x, minus_infinity));
    }
  }
}

}  // namespace heedful::HEEDFUL_TARGET
