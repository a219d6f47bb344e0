// Attention forward. A task is one block of queries of one head; the block's queries lie in vector lanes, so that
// maximum, sum and masks are vertical and K and V are read where they lie, an element broadcast at a time:
//
//   S^T[key][query]  = sum_d   K[key][d]  * Q^T[d][query]       Q^T packed once
//   O^T[d][query]   += sum_key V[key][d]  * P^T[key][query]     rescaled to the running maximum as it is loaded
//
// The block's lanes are split into panels of kVectors vectors (the last ones of a single vector); a panel keeps its own
// state and goes over a key block on its own, while the key block stays in the cache for all of them.
//
// The products' operands are numbers of the compute type, or pairs of bfloat16 (operands.h): of D in the first product,
// of keys in the second.
//
// Phases: those of decoding (decode.h), for sequences of few queries;  values made into pairs, where many blocks share
// them;  blocks of queries.
#pragma once

#include "ahead.h"
#include "decode.h"
#include "embedding.h"
#include "kernels.h"
#include "microkernel.h"
#include "online_softmax.h"
#include "scores.h"
#include "spans.h"
#include "whole_steps.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E = Compute<S>>
struct Forward {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  // K, V and S blocks of 128 keys and 64 queries at D = 64 are 32 KB each: they share the second-level cache. Those of
  // pairs are half as large.
  static constexpr int64_t kQueries = 64, kKeys = 128 * kDepth<E>;
  // Which way values lie where they are made into pairs: along the keys for tile registers, else along Dv.
  static constexpr Unit kValueUnit = kInTiles<E> ? Unit::k : Unit::row;
  static constexpr Int<C> kNoKey = -1;
  static_assert(kQueries == kMaskTile && kVectors * n <= kMaskTile);  // with masks a block has one row of their tiles

  struct Scratch {
    E *q, *k, *v, *weights;  // weights: the probabilities, in the scores' place where they are numbers
    C *out, *maximum, *sum, *scores;
    bool* has_out;  // at a panel's first lane, whether it has had keys
    Int<C>* best;
    ScoreParts<C> parts;
  };
  // A null base only measures.
  static size_t carve(const Problem& p, char* base, Scratch* s) {
    const int64_t panel = kVectors * n, lanes = most<int64_t>(block_queries(p), kQueries), keys = least(kKeys, p.Sk);
    Carver carve{base};
    s->q = carve.take<E>(terms<E>(embedded_dim(p)) * lanes);
    s->out = carve.take<C>(p.Dv * lanes);
    s->maximum = carve.take<C>(lanes);
    s->sum = carve.take<C>(lanes);
    s->has_out = carve.take<bool>(lanes);
    s->scores = carve.take<C>(keys * panel);
    if constexpr (kBFloat16x2) {
      s->weights = carve.take<E>(terms<E>(keys) * panel);
      s->k = k_in_place(p) ? nullptr : carve.take<E>(keys * terms<E>(p.D));
      s->v = v_in_place(p) ? nullptr : carve.take<E>(Steps::of(keys) * step_size(p));
    } else {
      s->weights = s->scores;
      s->k = k_in_place(p) ? nullptr : carve.take<C>(keys * padded<C>(embedded_dim(p)));
      s->v = v_in_place(p) ? nullptr : carve.take<C>(keys * value_stride(p, keys));
    }
    s->best = p.normalizer == Normalizer::hard ? carve.take<Int<C>>(lanes) : nullptr;
    s->parts = ScoreParts<C>(p, carve, keys, panel, lanes, false);
    return carve.size;
  }

  // Rows that follow each other closely are read where they lie; others are packed (and widened), block by block, and
  // so are values whose rows have few places in a cache: a product takes some elements of each.
  static bool k_in_place(const Problem& p) {
    return lie_close_as_operand<E, S>(p.k, p.D) && p.similarity == Similarity::dot;
  }
  static bool v_in_place(const Problem& p) {
    if constexpr (kBFloat16x2) return shares_values(p);
    return lie_close_as_operand<E, S>(p.v, p.Dv) && lie_spread<S>(p.v, p.Sq);
  }

  // Larger blocks where each packs keys or values, but under a bool or block mask, which has words for kQueries, and as
  // long as threads have enough of them: more of a band's, which are unlike. Smaller ones where there would be too few
  // for several threads; half a panel for windows so narrow that a panel's queries have no key in common (spans.h).
  // Results do not depend on it: a query's key blocks lie where they lie, and masked keys add nothing.
  static int64_t block_queries(const Problem& p) {
    constexpr int64_t kFewTasks = 4, kPanel = kVectors * n, kMostElements = 1 << 16;
    const auto side = [](int64_t keys) { return clamp(keys, -kQueries, 2 * kQueries); };
    if (kVectors > 2 && side(p.left) + side(p.right) + 1 < kPanel) return kPanel / 2;
    const auto tasks = [&](int64_t sequences, int64_t queries) {
      return sequences * p.Hq * ((p.Sq + queries - 1) / queries);
    };
    if ((!k_in_place(p) || !v_in_place(p)) && !p.mask.data && !p.tiles.data) {
      const int64_t sequences = has_unlike_sequences(p) ? 1 : p.B;
      const bool banded = p.left != kUnbounded || p.right != kUnbounded;
      for (int64_t large = 4 * kQueries; large > kQueries; large /= 2)
        if (p.Sq > large / 2 && large * (p.D + p.Dv) <= kMostElements &&
            tasks(sequences, large) >= (banded ? 2 : 1) * kFewTasks * p.threads)
          return large;
    }
    return tasks(p.B, kQueries) < kFewTasks ? least(kQueries, 2 * kPanel) : kQueries;
  }
  static int64_t blocks(const Problem& p) {
    const int64_t queries = block_queries(p);
    return (p.Sq + queries - 1) / queries;
  }

  static void plan(const Problem& p, Plan* plan) {
    Scratch s;
    plan->phase_count = 0;
    plan->scratch_bytes = carve(p, nullptr, &s);
    plan->workspace_bytes = 0;
    const bool may_decode = Decode<S, E>::may_decode(p);
    if (may_decode) Decode<S, E>::plan(p, plan);
    if (may_decode && p.Sq <= Decode<S, E>::kFewQueries) return;
    if (shares_values(p)) {
      plan->phases[plan->phase_count++] = {p.B * p.Hk * value_blocks(p), &pair_values};
      Carver workspace{nullptr};
      workspace.take<E>(steps(p).count() * step_size(p));
      plan->workspace_bytes = most(plan->workspace_bytes, workspace.size);
    }
    plan->phases[plan->phase_count++] = {p.B * p.Hq * blocks(p), &run};
  }

  // ---- values as pairs, which many blocks of queries share ----------------------------------------------------------

  // Where they are worth a phase, and no more are made than the blocks read, whatever a window leaves of them.
  static constexpr int64_t kManyQueries = 7 * kQueries;
  static bool shares_values(const Problem& p) {
    const int64_t queries = heads_per_group(p) * p.Sq;
    return kBFloat16x2 && queries > kManyQueries && queries >= p.Sk;
  }
  // A block of keys is a task.
  using Steps = WholeSteps<E>;
  static int64_t value_blocks(const Problem& p) { return (p.Sk + kKeys - 1) / kKeys; }
  static int64_t step_size(const Problem& p) { return terms<E>(Steps::kRows) * spread<C>(padded<C>(p.Dv)); }
  static Steps steps(const Problem& p) { return Steps::of_call(p, p.Hk, p.k_offsets, p.k_rows, p.Sk); }
  static E* shared_values(const Problem& p, const Band& band, int64_t b, int64_t hk, int64_t block) {
    return static_cast<E*>(p.workspace) + steps(p).at(b, hk, band.k_row, block * kKeys) * step_size(p);
  }
  static void pair_values(const Problem& p, int64_t task, void*) {
    const int64_t block = task % value_blocks(p), head = task / value_blocks(p), b = head / p.Hk, hk = head % p.Hk;
    const int64_t j0 = block * kKeys;
    const Band band(p, b);
    const int64_t j1 = least(j0 + kKeys, band.keys);
    if (j0 >= j1 || Decode<S, E>::decodes(p, band)) return;
    const S* v = row_of<const S>(p.v, band.batch, hk, band.k_row + j0);
    load_values(p, shared_values(p, band, b, hk, block), {v, p.v.stride[2], p.v.stride[3]}, j1 - j0);
  }
  static int64_t value_stride(const Problem& p, int64_t keys) {
    return spread<C>(padded<C>(kValueUnit == Unit::k ? terms<E>(keys) : p.Dv));
  }
  static Rows<E> load_values(const Problem& p, E* to, Source<S> from, int64_t keys) {
    const int64_t stride = value_stride(p, keys);
    if constexpr (kValueUnit == Unit::k)
      load_row_operand(to, stride, Source<S>{from.data, from.lane_stride, from.row_stride}, p.Dv, keys);
    else
      load_operand(to, stride, from, keys, p.Dv, stride);
    return {to, stride};
  }
  // From its first key on to the key `j` of a block.
  static Rows<E> values_from(Rows<E> v, int64_t j) {
    return {v.data + terms<E>(j) * (kValueUnit == Unit::k ? 1 : v.stride), v.stride};
  }

  static void run(const Problem& p, int64_t task, void* scratch) {
    const Forward f = of_task(p, task, scratch);
    if (f.i0 >= f.i1 || Decode<S, E>::decodes(p, f.band)) return;
    const ProductRegisters<E> registers;
    f.load_queries();
    f.attend(false);
    if (f.s.best) return f.store_best();
    // A masked V_j is multiplied by a probability of 0, which lets infinities and NaNs through. They show in the result
    // and are rare: only then is the block done again, leaving masked pairs out one by one.
    if (!f.result_is_finite()) f.attend(true);
    f.store_result();
  }

  // Hard attention, for backward: best[query] is the key that it takes, below 0 for none.
  static void find_best_keys(const Problem& p, int64_t task, void* scratch, int64_t* best) {
    const Forward f = of_task(p, task, scratch);
    if (f.i0 >= f.i1) return;
    f.load_queries();
    f.attend(false);
    for (int64_t i = f.i0; i < f.i1; ++i) best[query_index(p, f.band, f.h) + i] = f.s.best[i - f.i0];
  }

  // The last block of a head comes first: under a causal mask it has the most keys.
  static Forward of_task(const Problem& p, int64_t task, void* scratch) {
    const int64_t queries = block_queries(p), per_head = blocks(p), head = task / per_head;
    Scratch s;
    carve(p, static_cast<char*>(scratch), &s);
    const Band band(p, head / p.Hq);
    const int64_t i0 = (per_head - 1 - task % per_head) * queries, i1 = least(band.q_rows, i0 + queries);
    return {p, band, s, head / p.Hq, head % p.Hq, i0, i1};
  }

  const Problem& p;
  const Band band;
  const Scratch s;
  const int64_t b, h, i0, i1;

  int64_t kv_head() const { return h / heads_per_group(p); }
  int64_t lanes() const { return padded<C>(i1 - i0); }

  void load_queries() const {
    const S* q = row_of<const S>(p.q, band.batch, h, band.q_row);
    const int64_t dim = embedded_dim(p);
    const C scale = query_scale<E>(p, b, h);
    for_each_panel<C>(lanes(), [&](int64_t l, auto vectors) {
      const int64_t width = vectors.value * n, i = i0 + l;
      const int64_t present = clamp(least(i1, band.queries) - i, 0, width);
      const Source<S> source{q + i * p.q.stride[2], p.q.stride[3], p.q.stride[2]};
      E* to = s.q + l * terms<E>(dim);
      load_operand(to, width, source, p.D, present, width, p.similarity == Similarity::dot ? scale : C(1));
      embed_lanes(p, Role::query, to, width, scale);
    });
  }

  Source<S> source(const View& view, int64_t j) const {
    return {row_of<const S>(view, band.batch, kv_head(), band.k_row + j), view.stride[2], view.stride[3]};
  }
  // Keys [j0, j1): elements along each row.
  Rows<E> key_rows(int64_t j0, int64_t j1) const {
    const Source<S> from = source(p.k, j0);
    if (!s.k) return in_memory<E>(from);
    const int64_t width = kBFloat16x2 ? terms<E>(p.D) : padded<C>(embedded_dim(p));
    load_row_operand(s.k, width, from, j1 - j0, p.D);
    embed_rows(p, Role::key, s.k, width, j1 - j0, C(1));
    return {s.k, width};
  }
  // Their values: elements along the keys.
  Rows<E> value_rows(int64_t j0, int64_t j1) const {
    const Source<S> from = source(p.v, j0);
    if (s.v) return load_values(p, s.v, from, j1 - j0);
    if constexpr (kBFloat16x2) {
      const int64_t block = j0 / kKeys, keys = least(kKeys, band.keys - block * kKeys);
      return values_from({shared_values(p, band, b, kv_head(), block), value_stride(p, keys)}, j0 % kKeys);
    } else {
      return in_memory<E>(from);
    }
  }

  // What follows a task's last keys does not follow in memory: meanwhile, unless masks leave nothing of them, rows come
  // of its output, and of the queries that the thread takes next, as a rule; with them a short sequence's keys, values.
  struct NextAhead {
    RowsAhead out, q, k, v;
  };
  NextAhead next_ahead() const {
    NextAhead ahead;
    ahead.out = ahead_of<S>(p.out, band.batch, h, band.q_row + i0, i1 - i0, p.Dv);
    ahead.out.written = true;
    const int64_t task = (b * p.Hq + h + 1) * blocks(p) - 1 - i0 / block_queries(p) + p.threads;
    if (task >= p.B * p.Hq * blocks(p)) return ahead;
    const Forward next = of_task(p, task, nullptr);
    const int64_t last = least(next.i1, next.band.queries) - 1;
    if (last < next.i0) return ahead;
    ahead.q = ahead_of<S>(p.q, next.band.batch, next.h, next.band.q_row + next.i0, last + 1 - next.i0, p.D);
    if (p.Sq > kQueries || p.Sk > kKeys || (next.b == b && next.kv_head() == kv_head())) return ahead;
    ahead.k = ahead_of<S>(p.k, next.band.batch, next.kv_head(), next.band.k_row, next.band.keys, p.D);
    ahead.v = ahead_of<S>(p.v, next.band.batch, next.kv_head(), next.band.k_row, next.band.keys, p.Dv);
    return ahead;
  }

  struct Block {
    Tile tile;
    Rows<E> k, v;
    NextAhead ahead;  // of the last one
  };

  void attend(bool careful) const {
    const C sink = sink_of<C>(p, b, h, -kInfinity<C>);
    for (int64_t l = 0; l < lanes(); ++l) {
      s.maximum[l] = sink;
      s.sum[l] = sink == -kInfinity<C> ? C(0) : C(1);
      s.has_out[l] = false;
      if (s.best) s.best[l] = kNoKey;
    }
    attend_blocks(careful);
    if (!s.best) for_each_panel<C>(lanes(), [&](int64_t l, auto vectors) { clear_out<vectors.value>(l); });
  }
  // O of a panel that has had no keys.
  template <int kN>
  HEEDFUL_FN void clear_out(int64_t l) const {
    if (s.has_out[l]) return;
    for (int64_t x = l * p.Dv; x < (l + kN * n) * p.Dv; x += n) store(s.out + x, Vec<C>{});
    s.has_out[l] = true;
  }
  void attend_blocks(bool careful) const {
    const int64_t last = least(i1, band.queries) - 1;
    if (last < i0 || band.first_key(i0) >= band.end_key(last)) return;
    const int64_t first_key = first_key_of(i0), end_key = end_key_of(last);
    const int64_t block_keys = p.tiles.data ? kMaskTile : kKeys;
    for (int64_t j0 = first_key, next; j0 < end_key; j0 = next) {
      next = (j0 / block_keys + 1) * block_keys;
      const int64_t j1 = least(next, end_key);
      Tile tile{b, h, i0, last + 1, j0, j1};
      if (!find_masks(p, InLanes::queries, s.parts.words, &tile)) continue;
      const Block block{tile, key_rows(j0, j1), s.best ? Rows<E>{} : value_rows(j0, j1),
                        j1 == end_key ? next_ahead() : NextAhead{}};
      if (s.parts.distances) load_distances<InLanes::queries>(s.parts.distances, lanes(), p, band, tile);
      for_each_panel<C>(lanes(), [&](int64_t l, auto vectors) { attend_block<vectors.value>(block, l, careful); });
    }
  }

  // A panel, from lane l on, over the keys of a block that it sees.
  template <int kN>
  HEEDFUL_FN void attend_block(const Block& block, int64_t l, bool careful) const {
    // Queries past the sequence's length stay in their lanes, and are left out when the result is stored: padding must
    // not change how the others are computed.
    const int64_t i = i0 + l, end = least(least(i1, band.queries), i + kN * n);
    if (end <= i || band.first_key(i) >= band.end_key(end - 1)) return;
    const Tile& all = block.tile;
    Block part = block;
    Tile& tile = part.tile;
    tile.i0 = i, tile.i1 = end, tile.j0 = most(all.j0, first_key_of(i)), tile.j1 = least(all.j1, end_key_of(end - 1));
    if (tile.j0 >= tile.j1) return;
    part.k.data += (tile.j0 - all.j0) * part.k.stride;
    part.v = values_from(part.v, tile.j0 - all.j0);
    if (l + kN * n < lanes()) part.ahead = {};  // the last panel sees the last keys
    attend_panel<kN>(part, distances_of<InLanes::queries>(s.parts, all, tile), l, careful);
  }
  // Keys that are added up together stay together: no bits depend on the block, and those that are masked are marked.
  int64_t first_key_of(int64_t i) const { return sum_step_down<E>(band.first_key(i)); }
  int64_t end_key_of(int64_t i) const { return least(sum_step_up<E>(band.end_key(i)), band.keys); }

  // A panel over the keys of a tile.
  template <int kN>
  HEEDFUL_FN void attend_panel(const Block& part, const C* distances, int64_t l, bool careful) const {
    constexpr int width = kN * n;
    const Tile& tile = part.tile;
    const Rows<E>&k = part.k, &v = part.v;
    const NextAhead& next = part.ahead;
    const int64_t keys = tile.j1 - tile.j0, dim = embedded_dim(p);
    const auto spans = Spans<kN>::template of<kDepth<E>, n>(
        tile.i1 - tile.i0, keys, [&](int64_t x) { return band.first_key(tile.i0 + x) - tile.j0; },
        [&](int64_t x) { return band.end_key(tile.i0 + x) - tile.j0; });
    const bool by_parts = !spans.whole() && !tile.words && keeps_products<E>(p);
    alignas(64) C top[width], rescale[width];
    clear_tops<kN>(top);
    Ahead ahead(p.bias.data ? ahead_of(p.bias, size_of(p.bias_dtype), tile) : next.q, next.out, pauses<E>(spans, dim));
    spans.for_each_part([&](int64_t from, int64_t to, int lo, int hi, int edge) {
      const Vec<C> before = load(top + most(edge, 0) * n);
      multiply_meanwhile<Onto::nothing_topped, E, Unit::k>(
          {k.data + from * k.stride, k.stride}, 0, to - from, s.q + l * terms<E>(dim) + lo * n, width,
          s.scores + from * width + lo * n, width, (hi - lo) * n, top + lo * n, dim, ahead);
      if (edge >= 0 && by_parts)
        store(top + edge * n,
              mask_edge<InLanes::queries>(band, tile, edge * n, from, to, s.scores + edge * n, width, before));
    });
    ahead.expect_end();
    if (!by_parts && !is_plain<E>(p, band, tile)) finish_scores<kN>(tile, spans, distances, top);
    if (s.best) return find_best<kN>(spans, tile.j0, l);
    const Vec<C> to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    E* const joined = kBFloat16x2 && !s.parts.keep ? s.weights : nullptr;  // dropout comes before pairs are joined
    online_softmax<kN, E>(s.scores, joined, spans, to_log2, top, s.maximum + l, s.sum + l, rescale, careful);
    if (s.parts.keep) drop_weights<kN>(tile);
    if constexpr (kInTiles<E>) clear_unseen(spans, keys);
    C* const out = s.out + l * p.Dv;
    const bool same = kN == 1 || kInTiles<E> || spans.same();
    if (careful || !same) clear_out<kN>(l);
    if (careful) return add_values_carefully<kN>(spans, v, out, rescale);
    const Operand<E, kValueUnit> values{v.data, v.stride};
    if constexpr (kN > 1 && !kInTiles<E>)
      if (!same)
        return multiply_spans_meanwhile<kN, Onto::scaled_c>(values, 0, p.Dv, s.weights, width, out, width, rescale,
                                                            spans, next.k, next.v);
    const auto add_values = [&](auto onto) {
      multiply_meanwhile<onto.value>(values, 0, p.Dv, s.weights, width, out, width, width, rescale, keys, next.k,
                                     next.v);
    };
    if (s.has_out[l]) return add_values(std::integral_constant<Onto, Onto::scaled_c>{});
    add_values(std::integral_constant<Onto, Onto::nothing>{});
    s.has_out[l] = true;
  }

  // f(part of the tile, its first key's place in the tile, the place after its last one), as many keys at a time as
  // stay in the first cache whatever is done to them.
  template <class F>
  HEEDFUL_FN static void for_each_part(const Tile& tile, F f) {
    Tile part = tile;
    for (; part.j0 < tile.j1; part.j0 = part.j1) {
      part.j1 = least((part.j0 / kWord + 1) * kWord, tile.j1);
      f(part, part.j0 - tile.j0, part.j1 - tile.j0);
    }
  }

  // A panel's products become scores, of which the largest are found.
  template <int kN>
  HEEDFUL_FN void finish_scores(const Tile& tile, const Spans<kN>& spans, const C* distances, C* top) const {
    constexpr int64_t width = kN * n;
    clear_tops<kN>(top);
    for_each_part(tile, [&](const Tile& part, int64_t from, int64_t to) {
      C* const scores = s.scores + from * width;
      apply_scores<InLanes::queries, E>(p, band, part, scores, width, width, s.parts,
                                        distances ? distances + (tile.j1 - tile.j0 - to) : nullptr);
      find_tops<kN, C>(scores, spans.between(from, to), top);
    });
  }

  // Dropout of a panel's weights; those of pairs are joined then.
  template <int kN>
  HEEDFUL_FN void drop_weights(const Tile& tile) const {
    constexpr int64_t width = kN * n;
    for_each_part(tile, [&](const Tile& part, int64_t from, int64_t to) {
      C* const weights = s.scores + from * width;
      load_keep<InLanes::queries>(s.parts.keep, width, p, part);
      drop(weights, width, s.parts.keep, width, to - from);
      if constexpr (kBFloat16x2) join_rows(s.weights + terms<E>(from) * width, width, weights, width, to - from, width);
    });
  }

  // Weights of keys that a vector of queries does not see and others do: tile registers take them all.
  template <int kN>
  HEEDFUL_FN void clear_unseen(const Spans<kN>& spans, int64_t keys) const {
    for (int v = 0; v < kN; ++v) {
      const auto clear = [&](int64_t from, int64_t to) {
        for (int64_t j = from; j < to; ++j) store(s.weights + (j * kN + v) * n, Vec<E>{});
      };
      clear(0, spans.first[v] / kDepth<E>), clear(terms<E>(spans.end[v]), terms<E>(keys));
    }
  }

  template <int kN>
  HEEDFUL_FN void add_values_carefully(const Spans<kN>& keys, Rows<E> v, C* out, const C* rescale) const {
    constexpr int stride = kN * n;
    for (int64_t d = 0; d < p.Dv; ++d)
      for (int x = 0; x < kN; ++x) {
        const E* const weights = s.weights + x * n;
        const Operand<E, kValueUnit> values{v.data, v.stride};
        const Vec<C> sum = sum_unmarked(values, d, keys.first[x] / kDepth<E>, terms<E>(keys.end[x]), weights, weights,
                                        int64_t{stride});
        C* to = out + d * stride + x * n;
        store(to, sum + load(to) * load(rescale + x * n));
      }
  }

  bool result_is_finite() const {
    return all_finite<C, C>(s.out, lanes(), 1, p.Dv, lanes()) && all_finite<C, C>(s.sum, 0, 1, 1, lanes());
  }

  // Hard attention: the largest score and its key, of equal ones the first. A NaN is larger than all; a sink, which the
  // search starts with, has to be larger than every score.
  template <int kN>
  HEEDFUL_FN void find_best(const Spans<kN>& keys, int64_t j0, int64_t l) const {
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
    for (int v = 0; v < kN; ++v) {
      Vec<C> top = load(s.maximum + l + v * n);
      Vec<Int<C>> best = load(s.best + l + v * n);
      for (int64_t j = keys.first[v]; j < keys.end[v]; ++j) {
        const Vec<C> x = load(s.scores + (j * kN + v) * n);
        const auto first = (x == top) & (best == kNoKey) & (x != minus_infinity);
        const auto better = (x > top) | first | ((x != x) & (top == top));
        top = select(better, x, top);
        best = select(better, broadcast<Int<C>>(Int<C>(j0 + j)), best);
      }
      store(s.maximum + l + v * n, top);
      store(s.best + l + v * n, best);
    }
  }

  void store_best() const {
    S* out = row_of<S>(p.out, band.batch, h, band.q_row);
    C* lse = static_cast<C*>(p.lse) + query_index(p, band, h);
    for (int64_t i = i0; i < i1; ++i) {
      const bool exists = i < band.queries;
      const Int<C> best = exists ? s.best[i - i0] : kNoKey;
      lse[i] = exists ? s.maximum[i - i0] : -kInfinity<C>;
      const C z = best == kNoKey ? C(0) : has_dropout(p) ? keep_pair<C>(p, b, h, i, best) : C(1);
      const S* v = row_of<const S>(p.v, band.batch, kv_head(), band.k_row + (best == kNoKey ? 0 : best));
      for (int64_t d = 0; d < p.Dv; ++d)
        from_compute(best == kNoKey ? C(0) : C(to_compute(v[d * p.v.stride[3]])) * z, out + i * p.out.stride[2] + d);
    }
  }

  // out = O / sum, transposed to rows; lse = maximum + log(sum). A row without scores is 0 and -inf.
  void store_result() const {
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
    S* out = row_of<S>(p.out, band.batch, h, band.q_row);
    C* lse = static_cast<C*>(p.lse) + query_index(p, band, h);
    const double unit = score_unit(p);
    for_each_panel<C>(lanes(), [&](int64_t l, auto vectors) {
      constexpr int kN = decltype(vectors)::value;
      const int64_t i = i0 + l, present = least<int64_t>(i1 - i, kN * n);
      alignas(64) C reference[kN * n], log[kN * n];
      for (int v = 0; v < kN; ++v) {
        const Vec<C> sum = load(s.sum + l + v * n), top = load(s.maximum + l + v * n);
        // A NaN among the scores shows in the sum alone.
        const Vec<Int<C>> past = iota<Int<C>>() >= Int<C>(clamp(band.queries - i - v * n, 0, n));
        const Vec<Int<C>> dead = past | ((top == minus_infinity) & (sum == sum));
        store(reference + v * n, select(dead, Vec<C>{}, top));
        store(log + v * n, select(dead, minus_infinity, log2<C>(sum)));
        const Vec<C> inverse = C(1) / sum;
        C* o = s.out + l * p.Dv + v * n;
        for (int64_t d = 0; d < p.Dv; ++d)
          store(o + d * kN * n, select(dead, Vec<C>{}, load(o + d * kN * n) * inverse));
      }
      for (int64_t r = 0; r < present; ++r) lse[i + r] = C(reference[r] * unit + log[r] * kLn2);
      store_transposed<C>(out + i * p.out.stride[2], p.out.stride[2], s.out + l * p.Dv, kN * n, p.Dv, present);
    });
  }
};

}  // namespace heedful::HEEDFUL_TARGET
