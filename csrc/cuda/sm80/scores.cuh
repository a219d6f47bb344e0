// From products to scores, on a warp's tile as mma leaves it: element (m, n, e) of a lane is row 16 m + 8 (e / 2) and
// column 8 n + e % 2 from the lane's first row and column on. Rows are queries and columns keys, or the other way
// round. With two elements instead of four, e < 2: one row of the lane alone.
#pragma once

#include "../norms.cuh"
#include "../pair.h"

namespace heedful::HEEDFUL_TARGET {

// The query and the key of a lane's first element.
struct Corner {
  int query, key;
};
HEEDFUL_DEVICE int fragment_row(int lane) { return lane / 4; }
HEEDFUL_DEVICE int fragment_column(int lane) { return lane % 4 * 2; }

// f(element, query, key) for each element of a lane.
template <bool kTransposed, int kM, int kN, int kE, class F>
HEEDFUL_DEVICE void for_each_pair(float (&s)[kM][kN][kE], const Corner& corner, F f) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        const int row = 16 * m + 8 * (e / 2), column = 8 * n + e % 2;
        f(s[m][n][e], corner.query + (kTransposed ? column : row), corner.key + (kTransposed ? row : column));
      }
}

// Pairs outside of the band become absent.
template <bool kTransposed, int kM, int kN, int kE>
HEEDFUL_DEVICE void mask_band(const Span& span, float (&s)[kM][kN][kE], const Corner& corner) {
  for_each_pair<kTransposed>(s, corner, [&](float& x, int i, int j) {
    x = (j >= span.first_key(i)) & (j < span.end_key(i)) ? x : -kInfinity<float>;
  });
}

// Products become scores, but for the band. `tile` is what the block mask has for all of these pairs. Pairs outside of
// the sequence read the numbers of its last query or key: nobody counts them. `scaled`: what the softcap found.
template <bool kTransposed, class S, int kM, int kN, int kE>
HEEDFUL_DEVICE void apply_scores(const HeadScores<S>& head, const Band& band, const Span& span, int32_t tile,
                                 float (&s)[kM][kN][kE], const Corner& corner, float (*scaled)[kM][kN][kE] = nullptr) {
  const Problem& p = head.p;
  const auto each = [&](auto f) {
    for_each_pair<kTransposed>(
        s, corner, [&](float& x, int i, int j) { x = f(x, least(i, span.queries - 1), least(j, span.keys - 1)); });
  };
  constexpr float kAbsent = -kInfinity<float>;
  if (p.similarity != Similarity::dot) {
    const float* of_q = Norms(p).q + query_index(p, band, head.h);
    const float* of_k = Norms(p).k + key_index(p, band, head.h / int(p.Hq / p.Hk));
    if (p.similarity == Similarity::cosine)
      each([&](float x, int i, int j) { return x * load_global(of_q + i) * load_global(of_k + j); });
    else
      each([&](float x, int i, int j) { return x + load_global(of_q + i) + load_global(of_k + j); });
  }
  const float factor = head.factor();
  each([&](float x, int, int) { return x * factor; });
  if (scaled) {
#pragma unroll
    for (int n = 0; n < kM * kN * kE; ++n)
      (*scaled)[n / kE / kN][n / kE % kN][n % kE] = s[n / kE / kN][n / kE % kN][n % kE];
  }
  if (p.softcap != 0) {
    const float cap = float(p.softcap), inverse = 1 / cap;
    each([&](float x, int, int) { return soft_cap(x, cap, inverse); });
  }
  if (p.bias.data) each([&](float x, int i, int j) { return add_bias(x, head.bias(i, j), kAbsent); });
  if (has_distances(p)) {
    const DistanceBias<float> distances = head.distances();
    each([&](float x, int i, int j) { return add_bias(x, distances.value(head.distance(i, j)), kAbsent); });
  }
  if (p.mask.data) each([&](float x, int i, int j) { return head.mask(i, j) ? x : kAbsent; });
  if (tile != kFullTile) each([&](float x, int i, int j) { return head.tile_bit(tile, i, j) ? x : kAbsent; });
}

// Scores of half r of 16 rows become weights relative to the new maximum, and earlier results are taken to it. to_log2:
// what one unit of a score is worth in powers of two; sum: this lane's part.
template <int kN, int kColumns>
HEEDFUL_DEVICE void to_weights(float (&s)[kN][4], float (&result)[kColumns][4], int r, float to_log2, float& top,
                               float& sum) {
  float new_top = top;
#pragma unroll
  for (int n = 0; n < kN; ++n) new_top = maximum(new_top, maximum(s[n][2 * r], s[n][2 * r + 1]));
  new_top = maximum(new_top, shuffle_xor(new_top, 1));
  new_top = maximum(new_top, shuffle_xor(new_top, 2));
  const float reference = softmax_reference(new_top, -kInfinity<float>);
  const float factor = exp2_fast((top - reference) * to_log2);
  top = new_top;
  float part = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 2 * r; e < 2 * r + 2; ++e) {
      s[n][e] = exp2_fast((s[n][e] - reference) * to_log2);
      part += s[n][e];
    }
  sum = sum * factor + part;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) result[n][2 * r] *= factor, result[n][2 * r + 1] *= factor;
}

// One of four numbers; an index of an array would send it to memory.
HEEDFUL_DEVICE uint32_t pick(const uint32_t (&x)[4], int n) {
  const uint32_t low = n & 1 ? x[1] : x[0], high = n & 1 ? x[3] : x[2];
  return n & 2 ? high : low;
}

// Weights that dropout drops become 0; columns are keys, and the first one of the tile a multiple of 8. The eight keys
// of 8 columns share one block of random words, of which each of the four lanes of a row needs another: where there are
// four such columns, each lane makes the words of one, and they exchange.
template <class S, int kM, int kN, int kE>
HEEDFUL_DEVICE void drop(const HeadScores<S>& head, float (&s)[kM][kN][kE], int query, int first_key) {
  constexpr int kTogether = kN % 4 ? 1 : 4;
  const int lane = thread_index() % 4;
  const auto keep = [&](uint32_t random, float& weight) { weight = (random & 0xffff) < head.p.keep ? weight : 0; };
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int r = 0; r < kE / 2; ++r)
#pragma unroll
      for (int n = 0; n < kN; n += kTogether) {
        const int eighth = first_key / kPairsPerCounter + n;
        uint32_t made[4], got[4];
        head.random_words(query + 16 * m + 8 * r, kTogether == 4 ? eighth + lane : eighth, made);
#pragma unroll
        for (int x = 0; x < kTogether; ++x) got[x] = kTogether == 4 ? shuffle_xor(pick(made, lane ^ x), x) : 0;
#pragma unroll
        for (int x = 0; x < kTogether; ++x) {
          const uint32_t word = kTogether == 4 ? pick(got, lane ^ x) : pick(made, lane);
          keep(word, s[m][n + x][2 * r]);
          keep(word >> 16, s[m][n + x][2 * r + 1]);
        }
      }
}

// z: dropout's factors.
template <bool kTransposed, class S, int kM, int kN>
HEEDFUL_DEVICE void keep(const HeadScores<S>& head, float (&z)[kM][kN][4], const Corner& corner, int first_key) {
  if constexpr (kTransposed) {
    for_each_pair<true>(z, corner, [&](float& x, int i, int j) { x = head.keep(i, j); });
  } else {
    const float kept = float(kept_weight(head.p));
    for_each_pair<false>(z, corner, [&](float& x, int, int) { x = kept; });
    drop(head, z, corner.query, first_key);
  }
}

}  // namespace heedful::HEEDFUL_TARGET
