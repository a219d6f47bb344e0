// Attention forward of few queries over many keys (decoding): the time is that of reading K and V, which happens once
// for all query heads that share them. A task is one chunk of keys of one key/value head; its rows are the queries of
// every head of the group, or of some where there are many. O is rescaled when a row's maximum rises.
//
// Few rows have the head dim in vector lanes (few_rows.h). Many go by the microkernel, for which half types are widened
// once: they lie in lanes themselves, as in the forward kernel, where nothing but the band changes their scores; else
// keys do, as they do where rows are made of q and k (embedding.h).
//
// The products' operands are numbers of the compute type, or pairs of bfloat16 (operands.h): of D in the first product,
// of keys in the second.
//
// Phases: 1. O, maximum and sum of each chunk;  2. the chunks joined, in order, where there are several. Chunks are cut
// at multiples of kChunk, so that they depend on the sequence alone.
#pragma once

#include "ahead.h"
#include "embedding.h"
#include "few_rows.h"
#include "microkernel.h"
#include "online_softmax.h"
#include "phases.h"
#include "scores.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E = Compute<S>>
struct Decode {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  static constexpr int64_t kKeys = kMaskTile;  // 64 rows of D = 128 floats are 32 KB: K's, then V's, in the first cache
  static constexpr int64_t kChunk = 2048;      // 1 MB of K at D = 128: the join costs 1/2048 of it for each row
  static constexpr int64_t kSpan = 1024;       // keys, see attend_span
  static constexpr int64_t kManyRows = kInTiles<E> ? 8 : 16, kMostRows = 64;  // of a task
  using Few = FewRows<S, E>;

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
    E* weight_rows;                    // of rows in lanes: turned for tile registers
    C* scores;
    Partial only;  // of a single chunk
    ScoreParts<C> parts;
  };
  static size_t carve(const Problem& p, char* base, Scratch* s) {
    Carver carve{base};
    s->only = Partial::carve(p, carve, 1, 0);
    const int64_t lanes = padded<C>(most_rows(p));
    s->q = carve.take<E>(most_rows(p) * row_terms(p));
    const bool in_lanes = most_rows(p) >= kManyRows && may_lie_in_lanes(p);
    s->q_lanes = in_lanes ? carve.take<E>(lanes * terms<E>(p.D)) : nullptr;
    s->scores = carve.take<C>(most(lanes * kKeys, least(kManyRows - 1, most_rows(p)) * kSpan));
    if constexpr (kBFloat16x2)
      s->weights = carve.take<E>(lanes * kWeights);
    else
      s->weights = s->scores;
    s->k = k_in_place(p, most_rows(p)) ? nullptr : carve.take<E>(kKeys * row_terms(p));
    s->weight_rows = kInTiles<E> && in_lanes ? carve.take<E>(lanes * kWeights) : nullptr;
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

  // Many rows lie in lanes, as queries do in the forward kernel, where nothing but the band changes their scores and
  // the group's fill whole vectors, if not tile registers: keys are read where they lie, and maxima need no shuffles.
  // It must not depend on the rows of one task.
  static bool lie_in_lanes(const Problem& p, int64_t queries) {
    const int64_t rows = heads_per_group(p) * queries;
    return rows >= kManyRows && (kInTiles<E> || rows % n == 0) && may_lie_in_lanes(p);
  }
  static bool may_lie_in_lanes(const Problem& p) {
    return p.similarity == Similarity::dot && keeps_products<E>(p) && !p.mask.data && !p.tiles.data && !has_dropout(p);
  }

  // Adds its phases, scratch and workspace to a plan.
  static void plan(const Problem& p, Plan* plan) {
    if (p.B * p.Hq * p.Sq == 0) return;
    Scratch s;
    const int64_t tasks = p.B * p.Hk * chunks(p) * parts(p, few(p));
    const double pairs = double(heads_per_task(p, few(p))) * few(p) * least(p.Sk, kChunk);
    plan->phases[plan->phase_count++] = phase_of(p, tasks, &run, pairs * (p.D + p.Dv));
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
    const int64_t heads = least(most_heads, heads_per_group(p) - g), rows = heads * band.queries;
    const bool in_lanes = lie_in_lanes(p, band.queries);
    const bool as_it_lies = !in_lanes && k_in_place(p, rows) && in_place(p.v, p.Dv, rows);
    const Decode d{p,
                   band,
                   s,
                   only ? s.only : partial(p, band, b, hk, part, chunk),
                   Few{rows, as_it_lies && Few::reads_in_order(p, rows)},
                   in_lanes,
                   as_it_lies && !s.parts.words,
                   b,
                   hk,
                   chunk,
                   hk * heads_per_group(p) + g,
                   heads};
    const ProductRegisters<E> registers;
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
  const Few few_rows;
  const bool in_lanes, in_spans;
  const int64_t b, hk, chunk, first_head, heads;

  int64_t rows() const { return few_rows.rows; }

  void attend(bool careful) const {
    const int64_t dim = padded<C>(p.Dv);
    for (int64_t r = 0; r < padded<C>(rows()); ++r) {
      part.maximum[r] = -kInfinity<C>;
      part.sum[r] = 0;
    }
    const int64_t first = band.queries > 0 ? most(band.first_key(0), chunk * kChunk) : 0;
    const int64_t end = band.queries > 0 ? least(band.end_key(band.queries - 1), (chunk + 1) * kChunk) : 0;
    bool writes = in_lanes && !careful && first < end;  // the first block O, to which others add
    for (int64_t x = 0; x < rows() * dim && !writes; ++x) part.out[x] = 0;
    if (first >= end) return;
    load_queries();
    if (in_lanes) turn_queries();
    const int64_t step = in_spans ? kSpan : kKeys;
    for (int64_t j0 = first / kKeys * kKeys; j0 < end; j0 += step) {
      const int64_t j1 = least(j0 + step, end);
      if (in_lanes)
        attend_block_in_lanes(j0, j1, writes, careful);
      else if (in_spans)
        attend_span(j0, j1, careful);
      else
        attend_block(j0, j1, careful);
      writes = false;
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

  // f(row, count, vectors) for panels of rows in lanes.
  template <class F>
  HEEDFUL_FN void for_each_panel_of_rows(F f) const {
    for_each_panel<C>(padded<C>(rows()),
                      [&](int64_t r, auto vectors) { f(r, least<int64_t>(rows() - r, vectors.value * n), vectors); });
  }

  // [d][row] each.
  void turn_queries() const {
    for_each_panel_of_rows([&](int64_t r, int64_t count, auto vectors) {
      const int64_t dim = row_terms(p), numbers = terms<E>(p.D);
      turn_rows(s.q_lanes + r * numbers, vectors.value * n, {s.q + r * dim, dim}, numbers, count);
    });
  }

  // Keys that are scored one after the other: a row of their scores has `stride` numbers.
  struct Span {
    int64_t j0, j1, stride;
  };

  // Keys [j0, j1) of several blocks, all of them scored before their values are added up, whose results are the same as
  // one by one: with few rows the time is memory's, which is read faster the longer it is read in one place.
  void attend_span(int64_t j0, int64_t j1, bool careful) const {
    const Span span{j0, j1, kSpan};
    score_keys(span);
    for (int64_t j = j0; j < j1; j += kKeys) finish_block(j, least(j + kKeys, j1), span, careful);
  }

  // Those of one tile of a block mask.
  void attend_block(int64_t j0, int64_t j1, bool careful) const {
    // Without masks of their own, all heads see the same.
    bool any = !s.parts.words;
    for (int64_t g = 0; !any && g < heads; ++g) {
      Tile tile = tile_of(g, j0, j1);
      any = find_masks(p, InLanes::keys, s.parts.words, &tile);
    }
    if (!any) return;
    const Span span{j0, j1, kKeys};
    score_keys(span);
    finish_block(j0, j1, span, careful);
  }
  Tile tile_of(int64_t g, int64_t j0, int64_t j1) const { return {b, first_head + g, 0, band.queries, j0, j1}; }

  // From a block's products to O.
  void finish_block(int64_t j0, int64_t j1, const Span& span, bool careful) const {
    const int64_t keys = j1 - j0, width = padded<C>(keys), queries = band.queries, stride = span.stride;
    C* const scores = s.scores + (j0 - span.j0);
    const bool plain = !s.parts.words && is_plain<E>(p, band, tile_of(0, j0, j1));
    for (int64_t g = 0; !plain && g < heads; ++g) {
      Tile tile = tile_of(g, j0, j1);
      const bool empty = !find_masks(p, InLanes::keys, s.parts.words, &tile);
      finish_scores(tile, empty, scores + g * queries * stride, stride, width);
    }
    probabilities(scores, stride, keys, width, careful);
    for (int64_t g = 0; s.parts.keep && g < heads; ++g) {
      load_keep<InLanes::keys>(s.parts.keep, width, p, tile_of(g, j0, j1));
      drop(scores + g * queries * stride, stride, s.parts.keep, width, queries);
    }
    Rows<E> weights{s.weights, kWeights};
    if constexpr (kBFloat16x2)
      join_lanes(s.weights, kWeights, scores, stride, rows(), keys);
    else
      weights = {scores, stride};
    const Source<S> v = source(p.v, j0);
    const int64_t dim = padded<C>(p.Dv);
    const RowsAhead next = j1 < span.j1 ? block_ahead(p.v, p.Dv, j1) : block_ahead(p.k, p.D, j1);
    if (in_place(p.v, p.Dv, rows())) return add_values(weights, Rows<S>{v.data, v.row_stride}, keys, next, careful);
    load_operand<E>(s.v, dim, v, keys, p.Dv, dim);
    add_values(weights, Rows<E>{s.v, dim}, keys, next, careful);
  }

  void attend_block_in_lanes(int64_t j0, int64_t j1, bool writes, bool careful) const {
    const int64_t keys = j1 - j0, dim = padded<C>(p.Dv);
    score_lanes(j0, j1, writes, careful);
    const Source<S> v = source(p.v, j0);
    if (s.v) load_operand<E>(s.v, dim, v, keys, p.Dv, dim);
    const Rows<E> values = s.v ? Rows<E>{s.v, dim} : in_memory<E>(v);
    for_each_panel_of_rows([&](int64_t r, int64_t count, auto vectors) {
      constexpr int width = vectors.value * n;
      const E* weights = s.weights + r * kWeights;
      C* out = part.out + r * dim;
      const RowsAhead next = r ? RowsAhead{} : block_ahead(p.k, p.D, j1);
      if (careful) return add_values_carefully(values, keys, Operand<E, Unit::row>{weights, width}, out, count);
      Operand<E, kInTiles<E> ? Unit::k : Unit::row> left{weights, width};
      if constexpr (kInTiles<E>) {
        turn_rows(s.weight_rows, kWeights, {weights, width}, width, terms<E>(keys));
        left = {s.weight_rows, kWeights};
      }
      const auto add_values = [&](auto onto) {
        multiply_meanwhile<onto.value>(left, 0, count, values.data, values.stride, out, dim, dim, out, keys, next);
      };
      writes ? add_values(std::integral_constant<Onto, Onto::nothing>{})
             : add_values(std::integral_constant<Onto, Onto::c>{});
    });
  }

  // Probabilities of the keys [j0, j1), in panels of [key][row]; meanwhile the keys' values come.
  HEEDFUL_CALLED void score_lanes(int64_t j0, int64_t j1, bool first, bool careful) const {
    const int64_t keys = j1 - j0;
    const Source<S> from = source(p.k, j0);
    const bool lie = lie_as_operand<E, S>(p.k, p.D);
    if (!lie) load_row_operand(s.k, row_terms(p), from, keys, p.D);
    const Rows<E> k = lie ? in_memory<E>(from) : Rows<E>{s.k, row_terms(p)};
    const Vec<C> to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    for_each_panel_of_rows([&](int64_t r, int64_t count, auto vectors) {
      constexpr int kN = vectors.value, width = kN * n;
      const auto all = Spans<kN>::all(keys);
      alignas(64) C top[width], rescale[width];
      clear_tops<kN>(top);
      C* scores = s.scores + r * kKeys;
      E* joined = kBFloat16x2 ? s.weights + r * kWeights : nullptr;
      multiply_meanwhile<Onto::nothing_topped, E, Unit::k>({k.data, k.stride}, 0, keys, s.q_lanes + r * terms<E>(p.D),
                                                           width, scores, width, width, top, p.D,
                                                           r ? RowsAhead{} : block_ahead(p.v, p.Dv, j0));
      if (!band.covers(0, band.queries, j0, j1)) {
        mask_lanes(j0, j1, r, count, scores, width);
        clear_tops<kN>(top);
        find_tops<kN, C>(scores, all, top);
      }
      online_softmax<kN, E>(scores, joined, all, to_log2, top, part.maximum + r, part.sum + r, rescale, careful);
      if (!first) rescale_rows(r, count, rescale);
    });
  }

  // Leaves out what the band does. Lanes are queries of several heads, unlike those of apply_masks.
  void mask_lanes(int64_t j0, int64_t j1, int64_t r, int64_t count, C* scores, int64_t width) const {
    for (int64_t x = 0; x < count; ++x) {
      const int64_t i = (r + x) % band.queries, first = band.first_key(i), end = band.end_key(i);
      for (int64_t j = j0; j < j1; ++j)
        if (j < first || j >= end) scores[(j - j0) * width + x] = -kInfinity<C>;
    }
  }

  Source<S> source(const View& view, int64_t j) const {
    return {row_of<const S>(view, band.batch, hk, band.k_row + j), view.stride[2], view.stride[3]};
  }

  // Rows [j0, j1) that are wanted soon, of those that the band has; what is read in order comes by itself.
  RowsAhead keys_ahead(const View& view, int64_t dim, int64_t j0, int64_t j1) const {
    j1 = least(j1, band.end_key(band.queries - 1));
    if (j0 >= j1 || few_rows.in_order) return {};
    return ahead_of<S>(view, band.batch, hk, band.k_row + j0, j1 - j0, dim);
  }
  RowsAhead block_ahead(const View& view, int64_t dim, int64_t j0) const {
    return keys_ahead(view, dim, j0, j0 + kKeys);
  }

  // ---- scores

  // Meanwhile the next blocks of the span come, then the first one's values.
  void score_keys(const Span& span) const {
    const int64_t dim = row_terms(p), keys = span.j1 - span.j0, width = padded<C>(keys), stride = span.stride;
    const Source<S> k = source(p.k, span.j0);
    const RowsAhead more = keys_ahead(p.k, p.D, span.j0 + kKeys, span.j1), values = block_ahead(p.v, p.Dv, span.j0);
    if (turns_keys(p, rows())) {
      load_operand<E>(s.k, width, Source<S>{k.data, k.lane_stride, k.row_stride}, p.D, keys, width);
      embed_lanes(p, Role::key, s.k, width, C(1));
      return multiply_meanwhile<Onto::nothing, E, Unit::k>({s.q, dim}, 0, rows(), s.k, width, s.scores, stride, width,
                                                           s.scores, embedded_dim(p), values);
    }
    const auto score = [&](const auto& k_rows) {
      few_rows.score(s.scores, stride, s.q, dim, p.D, k_rows, keys, more, values);
    };
    if (!k_in_place(p, rows())) {
      load_row_operand(s.k, dim, k, keys, p.D);
      score(Rows<E>{s.k, dim});
    } else if constexpr (kBFloat16x2) {
      score(in_memory<E>(k));
    } else {
      score(Rows<S>{k.data, k.row_stride});
    }
  }

  // Products of one head's rows become scores.
  void finish_scores(const Tile& t, bool empty, C* scores, int64_t stride, int64_t width) const {
    if (empty) {
      for (int64_t i = 0; i < band.queries; ++i)
        for (int64_t j = 0; j < width; ++j) scores[i * stride + j] = -kInfinity<C>;
    } else if (!is_plain<E>(p, band, t)) {
      if (s.parts.distances) load_distances<InLanes::keys>(s.parts.distances, width, p, band, t);
      apply_scores<InLanes::keys, E>(p, band, t, scores, stride, width, s.parts, s.parts.distances);
    }
  }

  // Scores become probabilities relative to the new maxima, and O's rows follow. What is done once for each row is done
  // for a vector of rows: one by one they would wait for their own results.
  HEEDFUL_CALLED void probabilities(C* scores, int64_t stride, int64_t keys, int64_t width, bool careful) const {
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>), to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    for (int64_t r = 0; r < rows(); r += n) {
      const int64_t count = least<int64_t>(rows() - r, n);
      Vec<C> each[n];
      alignas(64) C reference[n], rescale[n];
      for (int64_t i = 0; i < n; ++i) each[i] = minus_infinity;
      for (int64_t i = 0; i < count; ++i) {
        C* x = scores + (r + i) * stride;
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
        C* x = scores + (r + i) * stride;
        const Vec<C> from = broadcast<C>(reference[i]);
        Vec<C> sum = {};
        for_each_step<4>(0, width / n, [&](int64_t at, auto vectors) {
          constexpr int kCount = vectors.value;
          Vec<C> score[kCount], y[kCount];
#pragma GCC unroll 4
          for (int v = 0; v < kCount; ++v) score[v] = y[v] = load(x + (at + v) * n);
          to_probabilities<E>(y, from, to_log2);
#pragma GCC unroll 4
          for (int v = 0; v < kCount; ++v) {
            sum += y[v];
            store(x + (at + v) * n, careful ? select(score[v] == minus_infinity, broadcast<C>(C(-1)), y[v]) : y[v]);
          }
        });
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

  // Meanwhile what is needed next comes.
  template <class T>
  void add_values(const Rows<E>& weights, const Rows<T>& v, int64_t keys, const RowsAhead& next, bool careful) const {
    const int64_t dim = padded<C>(p.Dv);
    const Operand<E, Unit::k> operand{weights.data, weights.stride};
    if (careful) return add_values_carefully(v, keys, operand, part.out, rows());
    if constexpr (sizeof(T) == sizeof(E))
      if (rows() >= kManyRows)
        return multiply_meanwhile<Onto::c>(operand, 0, rows(), v.data, v.stride, part.out, dim, dim, part.out, keys,
                                           next);
    few_rows.add_values(part.out, p.Dv, weights, v, keys, next);
  }

  // Absent pairs, marked by -1, are left out one by one; the rest is added up in the same order.
  template <class T, Unit unit>
  HEEDFUL_CALLED void add_values_carefully(const Rows<T>& v, int64_t keys, Operand<E, unit> weights, C* out,
                                           int64_t count) const {
    if (!in_lanes && rows() < kManyRows)  // which few_rows adds up
      add_values_in_order<SumInOrder<E, false>>(v, keys, weights, out, count);
    else
      add_values_in_order<SumInOrder<E>>(v, keys, weights, out, count);
  }
  template <class SumOfKeys, class T, Unit unit>
  HEEDFUL_FN void add_values_in_order(const Rows<T>& v, int64_t keys, Operand<E, unit> weights, C* out,
                                      int64_t count) const {
    const int64_t dim = padded<C>(p.Dv);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < dim; d += n) {
        SumOfKeys sum;
        for (int64_t j = 0; j < terms<E>(keys); ++j) {
          Vec<E> x[1];
          Few::load_values(x, v, j, keys, d, p.Dv);
          const Vec<E> weight = broadcast_element(weights.at(r, j));
          sum.add(j, where_unmarked<E>(x[0], weight), weight);
        }
        store(out + r * dim + d, load(out + r * dim + d) + sum.total());
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
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
    S* const out = row_of<S>(p.out, band.batch, h, band.q_row);
    C* const lse = static_cast<C*>(p.lse) + query_index(p, band, h);
    for (int64_t i = 0; i < band.queries; i += n) {  // a vector of rows
      const int64_t rows = least<int64_t>(band.queries - i, n), row = x * band.queries + i;
      Vec<C> top = broadcast<C>(sink);
      for (int64_t c = 0; c < count; ++c) top = maximum(top, load_first<C>(partial_of(c).maximum + row, rows));
      const Vec<C> reference = select(top == minus_infinity, Vec<C>{}, top);
      const auto weight = [&](Vec<C> most) { return exp2<C>(most - reference, broadcast<C>(C(unit * kLog2e))); };
      Vec<C> sum = sink == -kInfinity<C> ? Vec<C>{} : weight(broadcast<C>(sink));
      C* const total = partial_of(0).out + row * dim;
      for (int64_t c = 0; c < count; ++c) {
        const Partial part = partial_of(c);
        const Vec<C> w = weight(load_first<C>(part.maximum + row, rows)), more = load_first<C>(part.sum + row, rows);
        sum += more * w;
        for (int64_t r = 0; r < rows; ++r) {
          if (count == 1 && w[r] == 1 && more[r] != 0) continue;
          C* const to = total + r * dim;
          for (int64_t d = 0; d < dim; d += n) {
            const Vec<C> o = more[r] == 0 ? Vec<C>{} : load(part.out + (row + r) * dim + d) * w[r];
            store(to + d, c ? load(to + d) + o : o);
          }
        }
      }
      // A NaN among the scores shows in the sum alone.
      const auto dead = (top == minus_infinity) & (sum == sum);
      const Vec<C> log = log2<C>(sum);
      for (int64_t r = 0; r < rows; ++r) {
        lse[i + r] = dead[r] ? -kInfinity<C> : C(reference[r] * unit + log[r] * kLn2);
        for (int64_t d = 0; d < p.Dv; ++d)
          from_compute(dead[r] ? C(0) : total[r * dim + d] / sum[r], out + (i + r) * p.out.stride[2] + d);
      }
    }
    for (int64_t i = band.queries; i < band.q_rows; ++i) {
      lse[i] = -kInfinity<C>;
      for (int64_t d = 0; d < p.Dv; ++d) from_compute(C(0), out + i * p.out.stride[2] + d);
    }
  }
};

}  // namespace heedful::HEEDFUL_TARGET
