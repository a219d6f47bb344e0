// Attention forward of few queries over many keys (decoding): the time is that of reading K and V, which happens once
// for all query heads that share them. A task is one chunk of keys of one key/value head; its rows are the queries of
// every head of the group, or of some where there are many. K and V are read row by row, where they lie, with the head
// dim in vector lanes:
//
//   S[row][key]  = sum_d   Q[row][d] * K[key][d]       kPairs at a time, whose lanes are added up together
//   O[row][d]   += sum_key P[row][key] * V[key][d]     rescaled when a row's maximum rises
//
// Many rows go by the microkernel, for which keys are turned into lanes and half types widened once.
//
// The products' operands are numbers of the compute type, or pairs of bfloat16 (operands.h): of D in the first product,
// of keys in the second. Few rows take them from memory as they lie, but for pairs of keys, which are made in
// registers.
//
// Phases: 1. O, maximum and sum of each chunk;  2. the chunks joined, in order, where there are several. Chunks are cut
// at multiples of kChunk, so that they depend on the sequence alone.
#pragma once

#include "ahead.h"
#include "embedding.h"
#include "kernels.h"
#include "microkernel.h"
#include "online_softmax.h"
#include "scores.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E = Compute<S>>
struct Decode {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  static constexpr int64_t kKeys = kMaskTile;  // 64 rows of D = 128 floats are 32 KB: K's, then V's, in the first cache
  static constexpr int64_t kChunk = 2048;      // 1 MB of K at D = 128: the join costs 1/2048 of it for each row
  static constexpr int64_t kManyRows = 16, kMostRows = 64;  // of a task
  // Accumulators of a step, of rows x keys or rows x vectors: they hide the latency of an addition, in half of the
  // registers. What is loaded of K and V serves up to four rows.
  static constexpr int kPairs = HEEDFUL_VECTOR_REGISTERS / 2;

  // Sequences of so many queries decode; with more, queries fill the lanes of the forward kernel better.
  static constexpr int64_t kFewQueries = kVectors * n * 3 / 4;

  // Whether any sequence may; whether this one does.
  static bool may_decode(const Problem& p) {
    return p.normalizer == Normalizer::softmax && (p.Sq <= kFewQueries || p.q_lengths || p.q_offsets);
  }
  static bool decodes(const Problem& p, const Band& band) { return may_decode(p) && band.queries <= kFewQueries; }

  // ---- plan ---------------------------------------------------------------------------------------------------------

  static int64_t chunks(const Problem& p) { return most<int64_t>((p.Sk + kChunk - 1) / kChunk, 1); }
  static int64_t few(const Problem& p) { return least(p.Sq, kFewQueries); }

  // Heads that a task takes of a group, by the sequence's queries; tasks that this makes of a group. Enough rows that
  // arithmetic takes longer than reading keys, so that to read them for each task costs nothing.
  static int64_t heads_per_task(const Problem& p, int64_t queries) {
    const int64_t heads = heads_per_group(p);
    return halves_group(p, queries) ? (heads + 1) / 2 : clamp(kMostRows / most<int64_t>(queries, 1), 1, heads);
  }
  // Where one task would take a group and leave threads idle. Rows come out the same as long as both halves have many.
  static bool halves_group(const Problem& p, int64_t queries) {
    const int64_t heads = heads_per_group(p);
    return p.B * p.Hk * chunks(p) < p.threads && heads * queries <= kMostRows && heads / 2 * queries >= kManyRows;
  }
  static int64_t parts(const Problem& p, int64_t queries) {
    const int64_t heads = heads_per_task(p, queries);
    return (heads_per_group(p) + heads - 1) / heads;
  }
  static int64_t most_rows(const Problem& p) {  // of a task, whatever queries its sequence has
    return least(heads_per_group(p) * few(p), most(kMostRows, few(p)));
  }

  // Of one chunk: [rows] each, a row is (head of the task, query).
  struct Partial {
    C *out, *maximum, *sum;  // out: [rows][padded Dv]; the others: whole vectors

    // The one of index `at`, of `count`.
    static Partial carve(const Problem& p, Carver& carve, int64_t count, int64_t at) {
      const int64_t rows = most_rows(p), lanes = padded<C>(rows), dim = padded<C>(p.Dv);
      C* out = carve.take<C>(count * rows * dim);
      C* maximum = carve.take<C>(count * lanes);
      C* sum = carve.take<C>(count * lanes);
      return {out + at * rows * dim, maximum + at * lanes, sum + at * lanes};
    }
  };
  // Of one sequence, one at least. What a single one gives is joined at once; of several, it waits in the workspace.
  static int64_t own_chunks(const Band& band) { return most<int64_t>((band.keys + kChunk - 1) / kChunk, 1); }
  // Those of all sequences of a key/value head that have several. Packed ones take what their keys need: l of them, of
  // more than kChunk, have at most 2 l / kChunk.
  static int64_t all_chunks(const Problem& p) {
    if (chunks(p) == 1) return 0;
    return p.k_offsets ? 2 * p.k_rows / kChunk : p.B * chunks(p);
  }
  static Partial partial(const Problem& p, const Band& band, int64_t b, int64_t hk, int64_t part, int64_t chunk) {
    const int64_t first = p.k_offsets ? 2 * band.k_row / kChunk : b * chunks(p), each = parts(p, few(p));
    Carver carve{static_cast<char*>(p.workspace)};
    return Partial::carve(p, carve, p.Hk * each * all_chunks(p), (hk * each + part) * all_chunks(p) + first + chunk);
  }

  struct Scratch {
    E *q, *q_lanes, *k, *v, *weights;  // weights: the probabilities, in the scores' place where they are numbers
    C* scores;
    Partial only;  // of a single chunk
    ScoreParts<C> parts;
  };
  static size_t carve(const Problem& p, char* base, Scratch* s) {
    Carver carve{base};
    s->only = Partial::carve(p, carve, 1, 0);
    const int64_t lanes = padded<C>(most_rows(p));
    s->q = carve.take<E>(most_rows(p) * row_terms(p));
    s->q_lanes = most_rows(p) < kManyRows ? nullptr : carve.take<E>(lanes * terms<E>(p.D));
    s->scores = carve.take<C>(lanes * kKeys);
    if constexpr (kBFloat16x2)
      s->weights = carve.take<E>(lanes * kWeights);
    else
      s->weights = s->scores;
    s->k = k_in_place(p, most_rows(p)) ? nullptr : carve.take<E>(kKeys * row_terms(p));
    s->v = in_place(p.v, p.Dv, most_rows(p)) ? nullptr : carve.take<E>(kWeights * padded<C>(p.Dv));
    s->parts = ScoreParts<C>(p, carve, few(p), kKeys, kKeys, false);
    return carve.size;
  }

  // Elements of a row of q, and of k where it is no longer in memory; of a row of weights.
  static int64_t row_terms(const Problem& p) { return padded<C>(terms<E>(embedded_dim(p))); }
  static constexpr int64_t kWeights = kKeys / kDepth<E>;

  // Rows that are made of q and k may cancel: their products are added up in the order of backward, which divides by
  // the sum that was found here.
  static bool turns_keys(const Problem& p, int64_t rows) {
    return rows >= kManyRows || p.similarity != Similarity::dot;
  }
  static bool in_place(const View& view, int64_t dim, int64_t rows) {
    return rows < kManyRows ? view.stride[3] == 1 : sizeof(S) == sizeof(C) && lie_in_vectors<C>(view, dim);
  }
  static bool k_in_place(const Problem& p, int64_t rows) {
    return in_place(p.k, p.D, rows) && !turns_keys(p, rows) && (!kBFloat16x2 || lie_in_pairs(p.k, p.D));
  }
  static bool lanes_read_k_in_place(const Problem& p) {
    return sizeof(S) * kDepth<E> == sizeof(E) && p.k.stride[3] == 1 && (!kBFloat16x2 || lie_in_pairs(p.k, p.D));
  }

  // Many rows that nothing but the band masks lie in lanes, as queries do in the forward kernel: keys are read where
  // they lie, and maxima need no shuffles. It must not depend on the rows of one task.
  static bool lie_in_lanes(const Problem& p, int64_t queries) {
    const int64_t rows = heads_per_group(p) * queries;
    return rows >= kManyRows && rows % n == 0 && p.similarity == Similarity::dot && !scales_products<E>(p) &&
           !p.mask.data && !p.tiles.data && !p.bias.data && !has_distances(p) && p.softcap == 0 && !has_dropout(p);
  }

  // Adds its phases, scratch and workspace to a plan.
  static void plan(const Problem& p, Plan* plan) {
    if (p.B * p.Hq * p.Sq == 0) return;
    Scratch s;
    plan->phases[plan->phase_count++] = {p.B * p.Hk * chunks(p) * parts(p, few(p)), &run};
    if (chunks(p) > 1) plan->phases[plan->phase_count++] = {p.B * p.Hq, &join};
    plan->scratch_bytes = most(plan->scratch_bytes, carve(p, nullptr, &s));
    Carver workspace{nullptr};
    Partial::carve(p, workspace, p.Hk * parts(p, few(p)) * all_chunks(p), 0);
    plan->workspace_bytes = most(plan->workspace_bytes, workspace.size);
  }

  // ---- phase 1 ------------------------------------------------------------------------------------------------------

  static void run(const Problem& p, int64_t task, void* scratch) {
    const int64_t each = parts(p, few(p)), part = task % each, chunk = task / each % chunks(p);
    const int64_t head = task / each / chunks(p), b = head / p.Hk, hk = head % p.Hk;
    const Band band(p, b);
    if (!decodes(p, band) || chunk >= own_chunks(band) || part >= parts(p, band.queries)) return;
    const int64_t most_heads = heads_per_task(p, band.queries), g = part * most_heads;
    Scratch s;
    carve(p, static_cast<char*>(scratch), &s);
    const bool only = own_chunks(band) == 1;
    const Decode d{p,
                   band,
                   s,
                   only ? s.only : partial(p, band, b, hk, part, chunk),
                   b,
                   hk,
                   chunk,
                   hk * heads_per_group(p) + g,
                   least(most_heads, heads_per_group(p) - g)};
    d.attend(false);
    // As in the forward kernel: a masked V_j that is not finite shows in the result.
    if (!all_finite<C, C>(d.part.out, padded<C>(p.Dv), 1, d.rows(), p.Dv) ||
        !all_finite<C, C>(d.part.sum, 0, 1, 1, d.rows()))
      d.attend(true);
    if (only)
      for (int64_t x = 0; x < d.heads; ++x) join_head(p, band, b, d.first_head + x, x, [&](int64_t) { return s.only; });
  }

  const Problem& p;
  const Band band;
  const Scratch s;
  const Partial part;
  const int64_t b, hk, chunk, first_head, heads;

  int64_t rows() const { return heads * band.queries; }

  void attend(bool careful) const {
    const int64_t dim = padded<C>(p.Dv);
    for (int64_t x = 0; x < rows() * dim; ++x) part.out[x] = 0;
    for (int64_t r = 0; r < padded<C>(rows()); ++r) {
      part.maximum[r] = -kInfinity<C>;
      part.sum[r] = 0;
    }
    if (band.queries == 0) return;
    const int64_t first = most(band.first_key(0), chunk * kChunk);
    const int64_t end = least(band.end_key(band.queries - 1), (chunk + 1) * kChunk);
    if (first >= end) return;
    load_queries();
    const bool lanes = lie_in_lanes(p, band.queries);
    if (lanes) turn_queries();
    for (int64_t j0 = first / kKeys * kKeys; j0 < end; j0 += kKeys) {
      const int64_t j1 = least(j0 + kKeys, end);
      if (lanes)
        attend_block_in_lanes(j0, j1, careful);
      else
        attend_block(j0, j1, careful);
    }
  }

  void load_queries() const {
    const int64_t dim = row_terms(p), queries = band.queries;
    for (int64_t g = 0; g < heads; ++g) {
      E* to = s.q + g * queries * dim;
      const Source<S> from{row_of<const S>(p.q, band.batch, first_head + g, band.q_row), p.q.stride[2], p.q.stride[3]};
      const C scale = query_scale<E>(p, b, first_head + g);
      load_row_operand(to, dim, from, queries, p.D, p.similarity == Similarity::dot ? scale : C(1));
      embed_rows(p, Role::query, to, dim, queries, scale);
    }
  }

  // Panels of lanes, [d][lane] each.
  void turn_queries() const {
    for_each_panel<C>(padded<C>(rows()), [&](int64_t l, auto vectors) {
      constexpr int width = vectors.value * n;
      const int64_t dim = row_terms(p), present = least<int64_t>(rows() - l, width);
      turn_rows(s.q_lanes + l * terms<E>(p.D), width, {s.q + l * dim, dim}, terms<E>(p.D), present);
    });
  }

  // Keys [j0, j1) of one tile of a block mask.
  void attend_block(int64_t j0, int64_t j1, bool careful) const {
    const int64_t keys = j1 - j0, width = padded<C>(keys), queries = band.queries;
    const auto tile_of = [&](int64_t g) { return Tile{b, first_head + g, 0, queries, j0, j1}; };
    // Without masks of their own, all heads see the same.
    const bool masked = s.parts.words;
    bool any = !masked;
    for (int64_t g = 0; !any && g < heads; ++g) {
      Tile tile = tile_of(g);
      any = find_masks(p, InLanes::keys, s.parts.words, &tile);
    }
    if (!any) return;
    score_keys(j0, j1);
    const bool plain = !masked && is_plain<E>(p, band, tile_of(0));
    for (int64_t g = 0; !plain && g < heads; ++g) {
      Tile tile = tile_of(g);
      const bool empty = !find_masks(p, InLanes::keys, s.parts.words, &tile);
      finish_scores(tile, empty, s.scores + g * queries * kKeys, width);
    }
    probabilities(keys, width, careful);
    for (int64_t g = 0; s.parts.keep && g < heads; ++g) {
      load_keep<InLanes::keys>(s.parts.keep, width, p, tile_of(g));
      drop(s.scores + g * queries * kKeys, kKeys, s.parts.keep, width, queries);
    }
    if constexpr (kBFloat16x2) join_lanes(s.weights, kWeights, s.scores, kKeys, rows(), keys);
    const Source<S> v = source(p.v, j0);
    const int64_t dim = padded<C>(p.Dv);
    if (in_place(p.v, p.Dv, rows())) return add_values(Rows<S>{v.data, v.row_stride}, j0, keys, careful);
    load_operand<E>(s.v, dim, v, keys, p.Dv, dim);
    add_values(Rows<E>{s.v, dim}, j0, keys, careful);
  }

  void attend_block_in_lanes(int64_t j0, int64_t j1, bool careful) const {
    const int64_t keys = j1 - j0, lanes = padded<C>(rows()), dim = padded<C>(p.Dv);
    score_lanes(j0, j1, careful);
    const Source<S> v = source(p.v, j0);
    Rows<E> values{s.v, dim};
    if (s.v)
      load_operand<E>(s.v, dim, v, keys, p.Dv, dim);
    else
      values = {reinterpret_cast<const E*>(v.data), v.row_stride};
    for_each_panel<C>(lanes, [&](int64_t l, auto vectors) {
      constexpr int width = vectors.value * n;
      const E* weights = s.weights + l * kWeights;
      C* out = part.out + l * dim;
      const int64_t count = least<int64_t>(rows() - l, width);
      if (careful) return add_values_carefully(values, keys, weights, 1, width, out, count);
      multiply_meanwhile<Onto::c, E, Unit::row>({weights, width}, 0, count, values.data, values.stride, out, dim, dim,
                                                out, keys, l ? RowsAhead{} : block_ahead(p.k, p.D, j0 + keys));
    });
  }

  // Probabilities of the keys [j0, j1), in panels of [key][lane]; meanwhile the keys' values come.
  HEEDFUL_CALLED void score_lanes(int64_t j0, int64_t j1, bool careful) const {
    const int64_t keys = j1 - j0;
    const Source<S> from = source(p.k, j0);
    Rows<E> k{reinterpret_cast<const E*>(from.data), from.row_stride / kDepth<E>};
    if (!lanes_read_k_in_place(p)) {
      load_row_operand(s.k, row_terms(p), from, keys, p.D);
      k = {s.k, row_terms(p)};
    }
    const Vec<C> to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    for_each_panel<C>(padded<C>(rows()), [&](int64_t l, auto vectors) {
      constexpr int kN = vectors.value, width = kN * n;
      alignas(64) C top[width], rescale[width];
      for (int v = 0; v < kN; ++v) store(top + v * n, broadcast<C>(-kInfinity<C>));
      C* scores = s.scores + l * kKeys;
      E* weights = s.weights + l * kWeights;
      multiply_meanwhile<Onto::nothing_topped, E, Unit::k>({k.data, k.stride}, 0, keys, s.q_lanes + l * terms<E>(p.D),
                                                           width, scores, width, width, top, p.D,
                                                           l ? RowsAhead{} : block_ahead(p.v, p.Dv, j0));
      if (!band.covers(0, band.queries, j0, j1)) {
        mask_lanes(j0, j1, l, least<int64_t>(rows() - l, width), scores, width);
        find_tops<kN, C>(scores, keys, top);
      }
      E* joined = kBFloat16x2 ? weights : nullptr;
      if (careful)
        online_softmax<kN, true, E>(scores, joined, keys, to_log2, top, part.maximum + l, part.sum + l, rescale);
      else
        online_softmax<kN, false, E>(scores, joined, keys, to_log2, top, part.maximum + l, part.sum + l, rescale);
      rescale_rows(l, least<int64_t>(rows() - l, width), rescale);
    });
  }

  // Leaves out what the band does.
  void mask_lanes(int64_t j0, int64_t j1, int64_t l, int64_t count, C* scores, int64_t width) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = (l + r) % band.queries, first = band.first_key(i), end = band.end_key(i);
      for (int64_t j = j0; j < j1; ++j)
        if (j < first || j >= end) scores[(j - j0) * width + r] = -kInfinity<C>;
    }
  }

  Source<S> source(const View& view, int64_t j) const {
    return {row_of<const S>(view, band.batch, hk, band.k_row + j), view.stride[2], view.stride[3]};
  }

  // Whether memory is read from its first byte to its last, with little to do for each: then the processor fetches what
  // follows, a quarter faster than it could be asked to.
  static constexpr int kInOrder = 2;
  bool reads_in_order() const {
    return rows() <= kInOrder && p.k.stride[2] == p.D && p.v.stride[2] == p.Dv && p.Dv % n == 0 &&
           in_one_step(p.Dv / n, rows());
  }

  // Else rows that are needed soon, of the block from key j0 on, come meanwhile.
  RowsAhead block_ahead(const View& view, int64_t dim, int64_t j0) const {
    if (j0 >= band.keys || reads_in_order()) return {};
    return ahead_of<S>(view, band.batch, hk, band.k_row + j0, least(band.keys - j0, kKeys), dim);
  }

  // ---- scores

  // Meanwhile the keys' values come.
  void score_keys(int64_t j0, int64_t j1) const {
    const int64_t dim = row_terms(p), keys = j1 - j0, width = padded<C>(keys);
    const Source<S> k = source(p.k, j0);
    const RowsAhead values = block_ahead(p.v, p.Dv, j0);
    if (turns_keys(p, rows())) {
      load_operand<E>(s.k, width, Source<S>{k.data, k.lane_stride, k.row_stride}, p.D, keys, width);
      embed_lanes(p, Role::key, s.k, width, C(1));
      return multiply_meanwhile<Onto::nothing, E, Unit::k>({s.q, dim}, 0, rows(), s.k, width, s.scores, kKeys, width,
                                                           s.scores, embedded_dim(p), values);
    }
    if (k_in_place(p, rows())) {
      if constexpr (kBFloat16x2)
        return score_rows(Rows<E>{reinterpret_cast<const E*>(k.data), k.row_stride / 2}, keys, values);
      else
        return score_rows(Rows<S>{k.data, k.row_stride}, keys, values);
    }
    load_row_operand(s.k, dim, k, keys, p.D);
    score_rows(Rows<E>{s.k, dim}, keys, values);
  }

  template <class T>
  HEEDFUL_CALLED void score_rows(const Rows<T>& k, int64_t keys, const RowsAhead& values_ahead) const {
    const bool in_order = reads_in_order();
    const int64_t together = rows() >= 4 ? kPairs / 4 : kPairs / rows();
    Ahead values(values_ahead, {}, (keys + together - 1) / together * (row_terms(p) / n));
    for (int64_t j = 0; j < keys; j += kPairs) {
      const int64_t end = least<int64_t>(j + kPairs, keys);
      int64_t r = 0;
      for (; r + 4 <= rows(); r += 4) score_step<4>(k, r, j, end, in_order, values);
      if (r + 2 <= rows()) score_step<2>(k, r, j, end, in_order, values), r += 2;
      if (r < rows()) score_step<1>(k, r, j, end, in_order, values);
    }
  }

  // Rows [r, r + kR) with the block's keys [j, end); scores of keys past the end are taken out later.
  template <int kR, class T>
  HEEDFUL_FN void score_step(const Rows<T>& k, int64_t r, int64_t j, int64_t end, bool in_order, Ahead& values) const {
    constexpr int kJ = kPairs / kR;
    const int64_t dim = row_terms(p), present = terms<E>(p.D);
    for (; j < end; j += kJ) {
      const T* key[kJ];
#pragma GCC unroll 16
      for (int i = 0; i < kJ; ++i) key[i] = k.data + least(j + i, end - 1) * k.stride;
      const E* q = s.q + r * dim;
      Vec<C> sum[kPairs];
#pragma GCC unroll 16
      for (int x = 0; x < kPairs; ++x) sum[x] = Vec<C>{};
      const auto add_product = [&](int i, int64_t d, Vec<E> x) {
#pragma GCC unroll 4
        for (int row = 0; row < kR; ++row)
          sum[row * kJ + i] = multiply_add<E>(sum[row * kJ + i], x, load(q + row * dim + d));
      };
      if (kR <= kInOrder && in_order) {
#pragma GCC unroll 16
        for (int i = 0; i < kJ; ++i)
          for (int64_t d = 0; d < dim; d += n) add_product(i, d, load_first<E>(key[i] + d, present - d));
      } else {
        for (int64_t d = 0; d < dim; d += n) {
          Vec<E> x[kJ];
#pragma GCC unroll 16
          for (int i = 0; i < kJ; ++i) x[i] = load_first<E>(key[i] + d, present - d);
#pragma GCC unroll 16
          for (int i = 0; i < kJ; ++i) add_product(i, d, x[i]);
          if (r == 0) values.step();  // after the step's own loads, which would wait behind it
        }
      }
      C scores[kPairs];
#pragma GCC unroll 8
      for (int x = 0; x < kPairs; x += n) store(scores + x, sum_each<C>(sum + x));
#pragma GCC unroll 4
      for (int row = 0; row < kR; ++row)
        __builtin_memcpy(s.scores + (r + row) * kKeys + j, scores + row * kJ, kJ * sizeof(C));
    }
  }

  // Products of one head's rows become scores.
  void finish_scores(const Tile& t, bool empty, C* scores, int64_t width) const {
    if (empty) {
      for (int64_t x = 0; x < band.queries * kKeys; ++x) scores[x] = -kInfinity<C>;
    } else if (!is_plain<E>(p, band, t)) {
      if (s.parts.distances) load_distances<InLanes::keys>(s.parts.distances, width, p, band, t);
      apply_scores<InLanes::keys, E>(p, band, t, scores, kKeys, width, s.parts, s.parts.distances);
    }
  }

  // Scores become probabilities relative to the new maxima, and O's rows follow. What is done once for each row is done
  // for a vector of rows: one by one they would wait for their own results.
  HEEDFUL_CALLED void probabilities(int64_t keys, int64_t width, bool careful) const {
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>), to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    for (int64_t r = 0; r < rows(); r += n) {
      const int64_t count = least<int64_t>(rows() - r, n);
      Vec<C> each[n];
      alignas(64) C reference[n], rescale[n];
      for (int64_t i = 0; i < n; ++i) each[i] = minus_infinity;
      for (int64_t i = 0; i < count; ++i) {
        C* x = s.scores + (r + i) * kKeys;
        for (int64_t j = keys; j < width; ++j) x[j] = -kInfinity<C>;
        Vec<C> top = minus_infinity;
        for (int64_t j = 0; j < width; j += n) top = maximum(load(x + j), top);
        each[i] = top;
      }
      const Vec<C> before = load(part.maximum + r), highest = maximum(highest_each<C>(each), before);
      const Vec<C> references = softmax_reference(highest, minus_infinity);
      const Vec<C> factors = exp2<C>(before - references, to_log2);
      store(part.maximum + r, highest);
      store(reference, references);
      store(rescale, factors);
      if (any(highest != before)) rescale_rows(r, count, rescale);
      for (int64_t i = 0; i < n; ++i) each[i] = Vec<C>{};
      for (int64_t i = 0; i < count; ++i) {
        C* x = s.scores + (r + i) * kKeys;
        const Vec<C> from = broadcast<C>(reference[i]);
        Vec<C> sum = {};
        for (int64_t j = 0; j < width; j += n) {
          const Vec<C> score = load(x + j);
          const Vec<C> y = exp2<C>(score - from, to_log2);
          sum += y;
          store(x + j, careful ? select(score == minus_infinity, broadcast<C>(C(-1)), y) : y);
        }
        each[i] = sum;
      }
      store(part.sum + r, load(part.sum + r) * factors + sum_each<C>(each));
    }
  }

  void rescale_rows(int64_t r, int64_t count, const C* factor) const {
    const int64_t dim = padded<C>(p.Dv);
    for (int64_t i = 0; i < count; ++i)
      if (factor[i] != 1)
        for (C *out = part.out + (r + i) * dim, *end = out + dim; out < end; out += n)
          store(out, load(out) * broadcast<C>(factor[i]));
  }

  // ---- values

  // Meanwhile the next block's keys come.
  template <class T>
  HEEDFUL_CALLED void add_values(const Rows<T>& v, int64_t j0, int64_t keys, bool careful) const {
    if (careful) return add_values_carefully(v, keys, s.weights, kWeights, 1, part.out, rows());
    const RowsAhead keys_ahead = block_ahead(p.k, p.D, j0 + keys);
    const int64_t dim = padded<C>(p.Dv);
    if constexpr (sizeof(T) == sizeof(E))
      if (rows() >= kManyRows)
        return multiply_meanwhile<Onto::c, E, Unit::k>({s.weights, kWeights}, 0, rows(), v.data, v.stride, part.out,
                                                       dim, dim, part.out, keys, keys_ahead);
    // Memory is read ahead in order: whole rows of v rather than halves of them, for two rows at a time. Where they are
    // widened they serve four.
    constexpr int kTogether = sizeof(T) == sizeof(E) || kBFloat16x2 ? 2 : 4;
    const int64_t together = least<int64_t>(kTogether, rows()), vectors = kPairs / together;
    const int64_t passes = (rows() + together - 1) / together * ((dim / n + vectors - 1) / vectors);
    Ahead next(keys_ahead, {}, passes * terms<E>(keys));
    int64_t r = 0;
    for (; r + 4 <= rows(); r += kTogether) add_values_to<kTogether>(v, keys, r, 0, next);
    if (r + 2 <= rows()) add_values_to<2>(v, keys, r, 0, next), r += 2;
    if (r < rows()) add_values_to<1>(v, keys, r, 0, next);
  }

  // Rows [r, r + kR), as many vectors at a time as there are accumulators for, then the next smaller step's.
  template <int kR, int kV = kPairs / kR, class T>
  HEEDFUL_FN void add_values_to(const Rows<T>& v, int64_t keys, int64_t r, int64_t d, Ahead& next) const {
    for (; d + kV * n <= p.Dv; d += kV * n) add_values_step<kR, kV>(v, keys, r, d, next);
    if (d == p.Dv) return;
    if constexpr (kV > 1)
      add_values_to<kR, smaller_step(kR, kV)>(v, keys, r, d, next);
    else
      add_values_step<kR, 1>(v, keys, r, d, next);
  }
  // Up to 128 floats at D = 80, 96 and so on are one step of those that are read in order; pairs come two by two.
  static constexpr int smaller_step(int rows, int vectors) {
    return rows > kInOrder || vectors > 8 || vectors <= 2 ? vectors / 2 : vectors - (kBFloat16x2 ? 2 : 1);
  }
  static bool in_one_step(int64_t vectors, int64_t rows) {
    int step = int(kPairs / rows);
    while (step > vectors) step = smaller_step(int(rows), step);
    return step == vectors;
  }

  template <int kR, int kV, class T>
  HEEDFUL_FN void add_values_step(const Rows<T>& v, int64_t keys, int64_t r, int64_t d, Ahead& next) const {
    const int64_t dim = padded<C>(p.Dv);
    Vec<C> sum[kR][kV];
#pragma GCC unroll 4
    for (int row = 0; row < kR; ++row)
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) sum[row][i] = Vec<C>{};
    const E* weight = s.weights + r * kWeights;
    Ahead meanwhile = next;  // in registers
    for (int64_t j = 0; j < terms<E>(keys); ++j) {
      Vec<E> x[kV];
      load_values(x, v, j, keys, d);
#pragma GCC unroll 4
      for (int row = 0; row < kR; ++row) {
        const Vec<E> y = broadcast_element(weight + row * kWeights + j);
#pragma GCC unroll 16
        for (int i = 0; i < kV; ++i) sum[row][i] = multiply_add<E>(sum[row][i], y, x[i]);
      }
      meanwhile.step();
    }
#pragma GCC unroll 4
    for (int row = 0; row < kR; ++row) {
      C* to = part.out + (r + row) * dim + d;
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) store(to + i * n, load(to + i * n) + sum[row][i]);
    }
    next = meanwhile;
  }

  // Element j along the keys, of numbers d and on: whole vectors, or what there is of a single one.
  template <int kV, class T>
  HEEDFUL_FN void load_values(Vec<E> (&x)[kV], const Rows<T>& v, int64_t j, int64_t keys, int64_t d) const {
    if constexpr (kBFloat16x2 && sizeof(T) < sizeof(E)) {
      const T *first = v.data + 2 * j * v.stride + d, *second = 2 * j + 1 < keys ? first + v.stride : nullptr;
      load_pairs_of_rows(x, first, second, p.Dv - d);
    } else {
      const T* row = v.data + j * v.stride + d;
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) x[i] = kV > 1 ? load_as(row + i * n, E()) : load_first<E>(row, p.Dv - d);
    }
  }

  // Absent pairs, marked by -1, are left out one by one; the rest is added up in the same order.
  template <class T>
  HEEDFUL_FN void add_values_carefully(const Rows<T>& v, int64_t keys, const E* weights, int64_t row_stride,
                                       int64_t key_stride, C* out, int64_t count) const {
    const int64_t dim = padded<C>(p.Dv);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < dim; d += n) {
        Vec<C> sum = {};
        for (int64_t j = 0; j < terms<E>(keys); ++j) {
          Vec<E> x[1];
          load_values(x, v, j, keys, d);
          const Vec<E> weight = broadcast_element(weights + r * row_stride + j * key_stride);
          sum = multiply_add<E>(sum, where_unmarked<E>(x[0], weight), weight);
        }
        store(out + r * dim + d, load(out + r * dim + d) + sum);
      }
  }

  // ---- phase 2 ------------------------------------------------------------------------------------------------------

  // out = sum of the chunks' O, each relative to the maximum of all, over the sum of their sums; a sink is one more
  // sum. O is added up in the first chunk's.
  static void join(const Problem& p, int64_t task, void*) {
    const int64_t b = task / p.Hq, h = task % p.Hq;
    const Band band(p, b);
    if (!decodes(p, band) || own_chunks(band) == 1) return;
    const int64_t hk = h / heads_per_group(p), g = h % heads_per_group(p), most_heads = heads_per_task(p, band.queries);
    join_head(p, band, b, h, g % most_heads,
              [&](int64_t chunk) { return partial(p, band, b, hk, g / most_heads, chunk); });
  }

  // `x`: which head of its task it is. partial_of: the task's, by chunk.
  template <class F>
  static void join_head(const Problem& p, const Band& band, int64_t b, int64_t h, int64_t x, F partial_of) {
    const int64_t dim = padded<C>(p.Dv), count = own_chunks(band);
    const C sink = sink_of<C>(p, b, h, -kInfinity<C>);
    const double unit = score_unit(p);
    C* lse = static_cast<C*>(p.lse) + query_index(p, band, h);
    for (int64_t i = 0; i < band.q_rows; ++i) {
      S* out = row_of<S>(p.out, band.batch, h, band.q_row + i);
      if (i >= band.queries) {
        lse[i] = -kInfinity<C>;
        for (int64_t d = 0; d < p.Dv; ++d) from_compute(C(0), out + d);
        continue;
      }
      const int64_t row = x * band.queries + i;
      C top = sink;
      for (int64_t c = 0; c < count; ++c) top = most(top, partial_of(c).maximum[row]);
      const C reference = top == -kInfinity<C> ? C(0) : top;
      const auto weight = [&](C maximum) {
        return exp2<C>(broadcast<C>(maximum - reference), broadcast<C>(C(unit * kLog2e)))[0];
      };
      C sum = sink == -kInfinity<C> ? C(0) : weight(sink), *total = partial_of(0).out + row * dim;
      for (int64_t c = 0; c < count; ++c) {
        const Partial part = partial_of(c);
        const C w = weight(part.maximum[row]);
        sum += part.sum[row] * w;
        for (int64_t d = 0; d < dim; d += n) {
          const Vec<C> o = part.sum[row] == 0 ? Vec<C>{} : load(part.out + row * dim + d) * w;
          store(total + d, c ? load(total + d) + o : o);
        }
      }
      // A NaN among the scores shows in the sum alone.
      const bool dead = top == -kInfinity<C> && sum == sum;
      lse[i] = dead ? -kInfinity<C> : C(reference * unit + log2<C>(broadcast<C>(sum))[0] * kLn2);
      for (int64_t d = 0; d < p.Dv; ++d) from_compute(dead ? C(0) : total[d] / sum, out + d);
    }
  }
};

}  // namespace heedful::HEEDFUL_TARGET
