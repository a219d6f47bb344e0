// Attention backward, five products a tile. Keys lie in vector lanes and key blocks go outermost, so that dK and dV
// stay local and nothing of the sequence's length is packed; masks and biases are read along their rows.
//
//   P[i][key]   = exp(scale * sum_d Q[i][d] K^T[d][key] - lse_i)              dV[key][d] += sum_i P[i][key]  dO[i][d]
//   dS[i][key]  = P * (sum_d dO[i][d] V^T[d][key] - delta_i)                  dK[key][d] += sum_i dS[i][key] Q[i][d]
//                                                            dQ[i][d]   += sum_key dS[i][key] scale K[key][d]
// Phases: 1. delta_i = sum_d dO O - dlse_i, lse in the scores' units, and whether q and dO are finite;  2. everything
// above, one task for each (head, group of key blocks);  3. the groups' dQ added up in order;  4. likewise the query
// heads' dK and dV;  5. likewise the gradients of parameters. Where heads keep all threads busy, a task takes one
// through 1 to 3, with dQ at hand; how heads and keys are dealt out is in backward_tasks.h.
//
// The products' operands are numbers of the compute type, or pairs of bfloat16 (operands.h) along each product's sum:
// q, dO and dS are then there twice.
#pragma once

#include "ahead.h"
#include "backward_tasks.h"
#include "bias_gradients.h"
#include "embedding.h"
#include "hard.h"
#include "kernels.h"
#include "key_gradients.h"
#include "microkernel.h"
#include "row_state.h"
#include "scores.h"
#include "spans.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E = Compute<S>>
struct Backward : BackwardTasks {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  static constexpr int64_t kQueries = kInTiles<E> ? 128 : 64;
  static_assert(kQueries <= kMostQueries);
  // Which way P and dS lie for the sums over queries: along those for tile registers, else along the keys.
  static constexpr Unit kWeightUnit = kInTiles<E> ? Unit::k : Unit::row;

  // ---- plan ---------------------------------------------------------------------------------------------------------

  // Whether a task takes all groups of its heads, in order. The bits are the same.
  static bool joins_groups(const Problem& p) {
    constexpr int64_t kMostBytes = 4 << 20;
    return keeps_busy(p, task_heads(p)) && int64_t(sizeof(C)) * dq_size(p) <= kMostBytes;
  }

  // Whether the first group adds dQ up in the output itself; the parts that lie elsewhere.
  static bool dq_in_place(const Problem& p) { return sizeof(S) == sizeof(C) && p.D % n == 0 && embedded_dim(p) == p.D; }
  static int64_t dq_parts(const Problem& p) { return task_groups(p) - dq_in_place(p); }
  static int64_t dq_size(const Problem& p) {
    return dq_parts(p) * heads_per_task(p) * p.Sq * padded<C>(embedded_dim(p));
  }
  // Whether dQ comes out unscaled and embedded, for phase 3 to take back: scales differ between the heads that share a
  // key, and their gradient needs dQ as it was before them.
  static bool defers_scale(const Problem& p) { return p.scales.data || p.similarity != Similarity::dot; }
  static bool in_place(const View& view, int64_t dim) { return sizeof(S) == sizeof(E) && lie_in_vectors<C>(view, dim); }
  static bool q_in_place(const Problem& p) { return in_place(p.q, p.D) && !scales_first(p); }
  // Whether K has the scale of dQ. Pairs would round it; dQ gets it when it is stored.
  static bool scales_k(const Problem& p) { return !kBFloat16x2 && !defers_scale(p); }
  static bool wants_distances(const Problem& p) { return p.slopes.gradient || p.table.gradient; }

  // What the rows of one task of phases 1 and 3 add to the parameters of their head.
  struct RowSums {
    double sink, scale;
  };
  struct Workspace {
    RowState<C>* rows;  // [B, Hq, Sq]
    bool* finite;       // [B, Hq, tasks a head]: whether the rows' q and dout are
    C* dq;              // [dq_parts, B, Hq, Sq, padded embedded dim]; of joined groups the task's, of its heads alone
    KeyGradients<C> of_heads;  // of split heads: [B, Hq, Sk]
    RowSums* row_sums;         // [B, Hq, tasks a head]
    double* distances;         // [B, groups, Hq, 1 + table_rows]: of the slope, then of the table
  };
  static size_t carve(const Problem& p, char* base, Workspace* w) {
    Carver carve{base};
    w->rows = carve.take<RowState<C>>(query_count(p));
    w->finite = carve.take<bool>(row_tasks(p));
    w->dq = joins_groups(p) ? nullptr : carve.take<C>(dq_parts(p) * query_count(p) * padded<C>(embedded_dim(p)));
    w->of_heads = KeyGradients<C>::take(carve, p, splits_heads(p) ? key_count(p) * heads_per_group(p) : 0);
    w->row_sums = p.sinks.gradient || p.scales.gradient ? carve.take<RowSums>(row_tasks(p)) : nullptr;
    w->distances = wants_distances(p) ? carve.take<double>(p.B * task_groups(p) * p.Hq * (1 + p.table_rows)) : nullptr;
    return carve.size;
  }

  static void plan(const Problem& p, Plan* plan) {
    if constexpr (!kBFloat16x2)  // which leave it to others
      if (p.normalizer == Normalizer::hard) return HardBackward<S>::plan(p, plan);
    Workspace w;
    Scratch s;
    int& count = plan->phase_count = 0;
    if (joins_groups(p)) {
      plan->phases[count++] = {head_tasks(p), &run};
    } else {
      plan->phases[count++] = {row_tasks(p), &prepare};
      plan->phases[count++] = {head_tasks(p) * task_groups(p), &run};
      if (finishes(p)) plan->phases[count++] = {row_tasks(p), &finish};
    }
    if (splits_heads(p)) plan->phases[count++] = {p.B * p.Hk * key_blocks(p, p.Sk), &add_heads};
    if (p.sinks.gradient || p.scales.gradient || wants_distances(p)) plan->phases[count++] = {p.Hq, &add_parameters};
    plan->scratch_bytes = carve(p, nullptr, &s);
    plan->workspace_bytes = carve(p, nullptr, &w);
  }

  static bool finishes(const Problem& p) { return dq_parts(p) > 0 || defers_scale(p); }

  // ---- phase 1 ------------------------------------------------------------------------------------------------------

  static void prepare(const Problem& p, int64_t task, void*) {
    const Band band = band_of_row_task(p, task);
    const RowTask t = row_task(p, band, task);
    Workspace w;
    carve(p, static_cast<char*>(p.workspace), &w);
    const int64_t row = query_index(p, band, t.h);
    const C* lse = static_cast<const C*>(p.lse) + row;
    const C sink = sink_of<C>(p, t.b, t.h, -kInfinity<C>);
    const double unit = score_unit(p);
    double sink_sum = 0;
    for (int64_t i = t.i0; i < t.i1; ++i) {
      const RowState<C> state = w.rows[row + i] = row_state<S>(p, band, t.h, i, lse[i], unit);
      if (p.sinks.gradient && lse[i] != -kInfinity<C>) {
        const C below = most<C>(lse[i] - sink, 0);
        sink_sum += sink_gradient(exp2<C>(broadcast<C>(-below), broadcast<C>(C(kLog2e)))[0], state.delta);
      }
    }
    if (w.row_sums) w.row_sums[task] = {sink_sum, 0};
    const int64_t present = least(t.i1, band.queries) - t.i0;
    const S *q = row_of<const S>(p.q, band.batch, t.h, band.q_row + t.i0),
            *g = row_of<const S>(p.dout, band.batch, t.h, band.q_row + t.i0);
    w.finite[task] = all_finite<C>(q, p.q.stride[2], p.q.stride[3], present, p.D) &&
                     all_finite<C>(g, p.dout.stride[2], p.dout.stride[3], present, p.Dv);
  }

  // ---- phase 2 ------------------------------------------------------------------------------------------------------

  struct Scratch {
    E *kt, *vt, *k;         // K^T and V^T, [D][kKeys] in panels; K, numbers scaled unless deferred, [kKeys][D]
    E *q, *dout;            // [kQueries][D]; null where they are read where they lie
    E *q_rows, *dout_rows;  // of pairs: likewise, but along D
    C *p, *ds;              // [kQueries][kKeys]
    E *weights, *grads;     // P and dS as operands, likewise; of tile registers turned
    E* grad_rows;           // dS, pairs along the keys
    KeyGradients<C> sum;    // [kKeys]
    KeyGradients<C> other;  // likewise, of a head that is added to others
    C* row;                 // [D]
    C* dq;                  // of joined groups
    ScoreParts<C> parts;    // [kQueries][panel]
  };
  static size_t carve(const Problem& p, char* base, Scratch* s) {
    const int64_t panel = kVectors * n, keys = least(kKeys, padded<C>(p.Sk)), queries = least(kQueries, p.Sq);
    const int64_t dim = embedded_dim(p);
    Carver carve{base};
    s->kt = carve.take<E>(terms<E>(dim) * keys);
    s->vt = carve.take<E>(terms<E>(p.Dv) * keys);
    s->k = carve.take<E>(terms<E>(keys) * padded<C>(dim));
    s->sum = KeyGradients<C>::take(carve, p, keys);
    s->other = KeyGradients<C>::take(carve, p, heads_per_task(p) > 1 ? keys : 0);
    s->q = q_in_place(p) ? nullptr : carve.take<E>(terms<E>(queries) * padded<C>(dim));
    s->dout = in_place(p.dout, p.Dv) ? nullptr : carve.take<E>(terms<E>(queries) * padded<C>(p.Dv));
    s->p = carve.take<C>(queries * keys);
    s->ds = carve.take<C>(queries * keys);
    if constexpr (kBFloat16x2) {
      s->q_rows = carve.take<E>(queries * terms<E>(padded<C>(dim)));
      s->dout_rows = carve.take<E>(queries * terms<E>(padded<C>(p.Dv)));
      s->weights = carve.take<E>(padded<C>(terms<E>(queries)) * keys);
      s->grads = carve.take<E>(padded<C>(terms<E>(queries)) * keys);
      s->grad_rows = carve.take<E>(queries * terms<E>(keys));
    } else {
      s->weights = s->p, s->grads = s->grad_rows = s->ds;
    }
    s->row = carve.take<C>(padded<C>(p.D));
    s->dq = joins_groups(p) ? carve.take<C>(dq_size(p)) : nullptr;
    s->parts = ScoreParts<C>(p, carve, queries, panel, keys, true);
    return carve.size;
  }

  // The first groups come first: under a causal mask their keys are seen by the most queries.
  static void run(const Problem& p, int64_t task, void* scratch) {
    const int64_t batches = task_batches(p), heads = task_heads(p);
    const int64_t g0 = task / (batches * heads), b0 = task / heads % batches, h0 = task % heads;
    const bool joins = joins_groups(p);
    Workspace w;
    Scratch s;
    carve(p, static_cast<char*>(p.workspace), &w);
    carve(p, static_cast<char*>(scratch), &s);
    const ProductRegisters<E> registers;
    if (joins) w.dq = s.dq;
    for (int64_t b = b0; b < (sums_batch(p) ? p.B : b0 + 1); ++b)
      for (int64_t x = h0; x < (sums_heads(p) ? p.Hk : h0 + 1); ++x) {
        const Band band(p, b);
        const HeadGroup heads = head_group(p, x);
        if (joins) for_row_tasks(p, b, heads, [&](int64_t rows) { prepare(p, rows, scratch); });
        for (int64_t group = g0; group < (joins ? task_groups(p) : g0 + 1); ++group)
          Backward{{}, p, band, w, s, b, heads, group}.run_group();
        if (joins && finishes(p)) for_row_tasks(p, b, heads, [&](int64_t rows) { finish_rows(p, w, s, rows); });
      }
  }

  const Problem& p;
  const Band band;
  const Workspace w;
  const Scratch s;
  const int64_t b;
  const HeadGroup heads;
  const int64_t group;

  int64_t lanes_k() const { return least(kKeys, padded<C>(p.Sk)); }

  const S* query_row(const View& view, int64_t head, int64_t i) const {
    return row_of<const S>(view, band.batch, head, band.q_row + i);
  }
  template <class T = const S>
  T* key_row(const View& view, int64_t j) const {
    return row_of<T>(view, band.batch, heads.hk, band.k_row + j);
  }

  struct Sums {
    C* data;
    int64_t stride;
  };
  static Sums dq_rows(const Problem& p, const Workspace& w, const Band& band, int64_t group, int64_t h) {
    if (dq_in_place(p) && group == 0) return {row_of<C>(p.dq, band.batch, h, band.q_row), p.dq.stride[2]};
    const int64_t part = group - dq_in_place(p), stride = padded<C>(embedded_dim(p)), heads = heads_per_task(p);
    const int64_t row =
        joins_groups(p) ? (part * heads + h % heads) * p.Sq : part * query_count(p) + query_index(p, band, h);
    return {w.dq + row * stride, stride};
  }
  static double* distance_sums(const Problem& p, const Workspace& w, int64_t b, int64_t group, int64_t h) {
    return w.distances + ((b * task_groups(p) + group) * p.Hq + h) * (1 + p.table_rows);
  }

  void run_group() const {
    const int64_t parts = groups(p, band), block = key_block(p);
    if (w.distances)
      for (int64_t h = heads.first; h < heads.end; ++h)
        for (int64_t x = 0; x < 1 + p.table_rows; ++x) distance_sums(p, w, b, group, h)[x] = 0;
    for (int64_t h = heads.first; h < heads.end && group == 0; ++h) skip_bias<C>(p, {b, h, 0, p.Sq, band.keys, p.Sk});
    if (group >= parts) return;
    const bool finite = queries_are_finite();
    // Keys past the sequence's end, too: their gradients are zero. The first block starts dQ, without keys too.
    int64_t j0 = group * block;
    do {
      run_key_block(j0, least(j0 + block, band.k_rows), finite);
      j0 += parts * block;
    } while (j0 < band.k_rows);
  }

  // Whether the keys from j0 on are the group's first: they write dQ, to which all others add.
  bool starts_dq(int64_t j0) const { return j0 == group * key_block(p); }
  void clear_dq(int64_t h, int64_t i0, int64_t i1) const {
    const Sums dq = dq_rows(p, w, band, group, h);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t d = 0; d < padded<C>(embedded_dim(p)); d += n) store(dq.data + i * dq.stride + d, Vec<C>{});
  }

  // A masked pair's zero probability would let infinities and NaNs through the products over queries and keys.
  bool queries_are_finite() const {
    bool finite = true;
    for_row_tasks(p, b, heads, [&](int64_t task) { finite &= w.finite[task]; });
    return finite;
  }
  bool keys_are_finite(int64_t j0, int64_t keys) const {
    return all_finite<C>(key_row(p.k, j0), p.k.stride[2], p.k.stride[3], keys, p.D) &&
           all_finite<C>(key_row(p.v, j0), p.v.stride[2], p.v.stride[3], keys, p.Dv);
  }

  int64_t tile_end(int64_t i0) const {
    if (p.tiles.data) return (i0 / kMaskTile + 1) * kMaskTile;
    return i0 + (p.mask.data ? least(kQueries, int64_t{kMaskTile}) : kQueries);  // a mask has words for so many
  }
  void run_key_block(int64_t j0, int64_t block_end, bool finite) const {
    const int64_t j1 = least(block_end, band.keys), keys = j1 - j0;
    const bool careful = !(finite && keys_are_finite(j0, keys));
    const int64_t rows = block_end - j0, first = keys > 0 ? band.first_query(j0) : 0,
                  end = keys > 0 ? band.end_query(j1 - 1) : 0;
    const bool splits = splits_heads(p);
    KeyGradients<C> total = splits ? of_head(heads.first, j0) : s.sum;
    // A tile's sum is added to what is there: a head of one tile may add it to the others' at once, with the same bits.
    const bool apart = heads.end - heads.first > 1 && tile_end(first) < end;
    total.clear(rows);
    bool packed = false;
    for (int64_t h = heads.first; h < heads.end; ++h) {
      const bool other = apart && h > heads.first;
      KeyGradients<C> sum = other ? s.other : total;
      if (other) sum.clear(rows);
      if (starts_dq(j0)) clear_dq(h, 0, first), clear_dq(h, end, band.q_rows);
      skip_bias<C>(p, {b, h, 0, first, j0, j1}), skip_bias<C>(p, {b, h, end, p.Sq, j0, j1});
      for (int64_t i0 = first, next; i0 < end; i0 = next) {
        next = tile_end(i0);
        Tile tile{b, h, i0, least(next, end), j0, j1};
        if (!find_masks(p, InLanes::keys, s.parts.words, &tile)) {
          if (starts_dq(j0)) clear_dq(h, tile.i0, tile.i1);
          skip_bias<C>(p, tile);
          continue;
        }
        if (!packed) pack_keys(j0, keys);
        packed = true;
        run_tile(tile, sum, careful);
      }
      if (other) total.add(sum, rows);
    }
    if (!splits) finish_keys(total, j0, block_end);
  }

  KeyGradients<C> of_head(int64_t h, int64_t j0) const {
    return w.of_heads.from_row((band.batch * p.Hq + h) * p.k_rows + band.k_row + j0);
  }

  void finish_keys(const KeyGradients<C>& sum, int64_t j0, int64_t block_end) const {
    if (p.similarity != Similarity::dot)
      for (int64_t j = j0; j < least(block_end, band.keys); ++j) {
        load_tile<C>(s.row, padded<C>(p.D), Source<S>{key_row(p.k, j), 0, p.k.stride[3]}, 1, p.D, padded<C>(p.D), C(1));
        pull_back(p, Role::key, sum.dk + (j - j0) * sum.dk_stride, s.row);
      }
    store_rows<C>(key_row<S>(p.dk, j0), p.dk.stride[2], sum.dk, sum.dk_stride, block_end - j0, p.D,
                  scales_first(p) && !kBFloat16x2 ? C(1) : C(p.scale));
    store_rows<C>(key_row<S>(p.dv, j0), p.dv.stride[2], sum.dv, sum.dv_stride, block_end - j0, p.Dv, C(1));
  }

  void pack_keys(int64_t j0, int64_t keys) const {
    const S *k = key_row(p.k, j0), *v = key_row(p.v, j0);
    const int64_t dim = embedded_dim(p);
    for_each_panel<C>(padded<C>(keys), [&](int64_t l, auto vectors) {
      const int64_t width = vectors.value * n, present = least(keys - l, width);
      E *kt = s.kt + l * terms<E>(dim), *vt = s.vt + l * terms<E>(p.Dv);
      load_operand(kt, width, Source<S>{k + l * p.k.stride[2], p.k.stride[3], p.k.stride[2]}, p.D, present, width);
      embed_lanes(p, Role::key, kt, width, C(1));
      load_operand(vt, width, Source<S>{v + l * p.v.stride[2], p.v.stride[3], p.v.stride[2]}, p.Dv, present, width);
    });
    load_operand(s.k, padded<C>(dim), Source<S>{k, p.k.stride[2], p.k.stride[3]}, keys, p.D, padded<C>(dim),
                 scales_k(p) ? C(p.scale) : C(1));
    embed_rows(p, Role::key, s.k, padded<C>(dim), keys, C(1));
  }

  // A tile's queries and what arrives at them: as rows to add up, and as rows to multiply (pairs along D).
  struct Queries {
    Rows<E> q, dout, q_rows, dout_rows;
  };
  Queries pack_queries(const Tile& t) const {
    const int64_t queries = t.i1 - t.i0, d = padded<C>(embedded_dim(p)), dv = padded<C>(p.Dv);
    const Source<S> q{query_row(p.q, t.h, t.i0), p.q.stride[2], p.q.stride[3]},
        dout{query_row(p.dout, t.h, t.i0), p.dout.stride[2], p.dout.stride[3]};
    if constexpr (kBFloat16x2) {
      load_pairs(s.q, d, q, queries, p.D, d);
      load_pairs(s.dout, dv, dout, queries, p.Dv, dv);
      load_row_pairs(s.q_rows, terms<E>(d), q, queries, p.D);
      load_row_pairs(s.dout_rows, terms<E>(dv), dout, queries, p.Dv);
      return {{s.q, d}, {s.dout, dv}, {s.q_rows, terms<E>(d)}, {s.dout_rows, terms<E>(dv)}};
    } else {
      const C scale = query_scale<E>(p, b, t.h);  // scores want it, and dK
      const Rows<C> q_rows = load_rows<C>(s.q, q, queries, p.D, d, p.similarity == Similarity::dot ? scale : C(1)),
                    dout_rows = load_rows<C>(s.dout, dout, queries, p.Dv, dv);
      if (s.q) embed_rows(p, Role::query, s.q, d, queries, scale);
      return {q_rows, dout_rows, q_rows, dout_rows};
    }
  }

  void run_tile(const Tile& t, const KeyGradients<C>& sum, bool careful) const {
    const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0, stride = lanes_k();
    const int64_t d = padded<C>(embedded_dim(p)), dv = padded<C>(p.Dv);
    const Queries rows = pack_queries(t);
    if (s.parts.distances) load_distances<InLanes::keys>(s.parts.distances, stride, p, band, t);
    for_each_panel<C>(padded<C>(keys),
                      [&](int64_t l, auto vectors) { score_panel<vectors.value>(t, rows, l, careful); });
    if (w.distances && !s.parts.slopes)  // else done before dS met the cap's slopes
      add_to_distances<C>(p, band, t, s.ds, stride, distance_sums(p, w, b, group, t.h));
    if constexpr (kBFloat16x2) {
      join_weights(s.weights, s.p, queries, padded<C>(keys));
      join_weights(s.grads, s.ds, queries, padded<C>(keys));
      join_lanes(s.grad_rows, terms<E>(stride), s.ds, stride, queries, keys);
    }
    const Sums dq = dq_rows(p, w, band, group, t.h);
    C* dq_tile = dq.data + t.i0 * dq.stride;
    if (careful && starts_dq(t.j0)) clear_dq(t.h, t.i0, t.i1);
    if (careful) return multiply_carefully(t, rows, sum, dq_tile, dq.stride);
    const QueriesThatSee seers{band, t};
    const KeysSeen seen{band, t};
    multiply<Onto::c>(weights(), 0, keys, rows.dout.data, rows.dout.stride, sum.dv, dv, dv, sum.dv, seers);
    multiply<Onto::c>(grads_of_keys(), 0, keys, rows.q.data, rows.q.stride, sum.dk, d, d, sum.dk, seers);
    const Operand<E, Unit::k> grads{s.grad_rows, terms<E>(stride)};
    if (starts_dq(t.j0))
      multiply<Onto::nothing>(grads, 0, queries, s.k, d, dq_tile, dq.stride, d, s.sum.dk, seen);
    else
      multiply<Onto::c>(grads, 0, queries, s.k, d, dq_tile, dq.stride, d, s.sum.dk, seen);
  }

  using Weights = Operand<E, kWeightUnit>;
  Weights weights() const { return {s.weights, weight_stride()}; }
  Weights grads_of_keys() const { return {s.grads, weight_stride()}; }
  int64_t weight_stride() const {
    return kWeightUnit == Unit::k ? padded<C>(terms<E>(least(kQueries, p.Sq))) : lanes_k();
  }
  void join_weights(E* to, const C* from, int64_t queries, int64_t keys) const {
    if constexpr (kWeightUnit == Unit::k)
      join_rows_turned(to, weight_stride(), from, lanes_k(), queries, keys);
    else
      join_rows(to, weight_stride(), from, lanes_k(), queries, keys);
  }

  // P and dS of one panel of keys; zero where no pair is left.
  template <int kN>
  HEEDFUL_FN void score_panel(const Tile& t, const Queries& rows, int64_t l, bool careful) const {
    constexpr int width = kN * n;
    const int64_t stride = lanes_k(), queries = t.i1 - t.i0;
    const int64_t ja = t.j0 + l, jb = least<int64_t>(t.j1, ja + width);
    const int64_t ia = clamp(band.first_query(ja), t.i0, t.i1), ib = clamp(band.end_query(jb - 1), ia, t.i1);
    C *prob = s.p + l, *grad = s.ds + l;
    const Vec<C> absent = broadcast<C>(careful ? C(-1) : C(0));
    const auto clear = [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r)
        for (int v = 0; v < kN; ++v) {
          store(prob + r * stride + v * n, absent);
          store(grad + r * stride + v * n, Vec<C>{});
        }
    };
    clear(0, ia - t.i0), skip_bias<C>(p, {t.b, t.h, t.i0, ia, ja, jb});
    clear(ib - t.i0, queries), skip_bias<C>(p, {t.b, t.h, ib, t.i1, ja, jb});
    if (ia >= ib) return;

    Tile panel = t;
    panel.i0 = ia, panel.i1 = ib, panel.j0 = ja, panel.j1 = jb;
    const int64_t r0 = ia - t.i0, r1 = ib - t.i0, dim = embedded_dim(p);
    const auto spans = Spans<kN>::template of<1, n>(
        jb - ja, ib - ia, [&](int64_t x) { return band.first_query(ja + x) - ia; },
        [&](int64_t x) { return band.end_query(ja + x) - ia; });
    const bool by_parts = !spans.whole() && !panel.words && keeps_products<E>(p);
    Ahead bias(ahead_of(p.bias, size_of(p.bias_dtype), panel), {}, pauses<E>(spans, dim));
    Ahead dbias(ahead_of(p.dbias, sizeof(C), panel), {}, pauses<E>(spans, p.Dv));
    spans.for_each_part([&](int64_t from, int64_t to, int lo, int hi, int edge) {
      multiply_meanwhile<Onto::nothing, E, Unit::k>({rows.q_rows.data, rows.q_rows.stride}, r0 + from, r0 + to,
                                                    s.kt + l * terms<E>(dim) + lo * n, width, prob + lo * n, stride,
                                                    (hi - lo) * n, s.sum.dk, dim, bias);
      multiply_meanwhile<Onto::nothing, E, Unit::k>({rows.dout_rows.data, rows.dout_rows.stride}, r0 + from, r0 + to,
                                                    s.vt + l * terms<E>(p.Dv) + lo * n, width, grad + lo * n, stride,
                                                    (hi - lo) * n, s.sum.dk, p.Dv, dbias);
      if (edge >= 0 && by_parts)
        mask_edge<InLanes::keys>(band, panel, edge * n, from, to, prob + r0 * stride + edge * n, stride, Vec<C>{});
    });
    bias.expect_end(), dbias.expect_end();
    const auto leave_out = [&](int v, int64_t from, int64_t to) {
      for (int64_t r = r0 + from; r < r0 + to; ++r) store(prob + r * stride + v * n, broadcast<C>(-kInfinity<C>));
    };
    for (int v = 0; v < kN && by_parts; ++v) leave_out(v, 0, spans.first[v]), leave_out(v, spans.end[v], ib - ia);
    const bool plain = is_plain<E>(p, band, panel);
    if (!plain && !by_parts)
      apply_scores<InLanes::keys, E>(p, band, panel, prob + r0 * stride, stride, int64_t{width}, s.parts,
                                     distances_of<InLanes::keys>(s.parts, t, panel));
    if (s.parts.keep) {
      load_keep<InLanes::keys>(s.parts.keep, int64_t{width}, p, panel);
      scale_pairs<C>(grad + r0 * stride, stride, s.parts.keep, width, r1 - r0);
    }
    const RowState<C>* state = w.rows + query_index(p, band, t.h) + t.i0;
    const Vec<C> to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    if (plain && !careful)
      gradients<kN, false>(prob, grad, r0, r1, state, to_log2, absent);
    else
      gradients<kN, true>(prob, grad, r0, r1, state, to_log2, absent);
    if (p.dbias.data) add_to_bias<C>(p, panel, grad + r0 * stride, stride);
    if (s.parts.slopes && w.distances)
      add_to_distances<C>(p, band, panel, grad + r0 * stride, stride, distance_sums(p, w, b, group, t.h));
    if (s.parts.slopes) scale_pairs<C>(grad + r0 * stride, stride, s.parts.slopes, width, r1 - r0);
    if (s.parts.keep) drop(prob + r0 * stride, stride, s.parts.keep, int64_t{width}, r1 - r0);
  }

  template <int kN, bool masked>
  HEEDFUL_FN void gradients(C* prob, C* grad, int64_t r0, int64_t r1, const RowState<C>* state, Vec<C> to_log2,
                            Vec<C> absent) const {
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
    for_each_step<kInStep / kN>(r0, r1, [&, stride = lanes_k()](int64_t r, auto rows) {
      constexpr int kCount = rows.value * kN;
      const auto at = [&](int i) { return (r + i / kN) * stride + i % kN * n; };
      Vec<C> score[kCount], probability[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        score[i] = load(prob + at(i));
        // No score is above lse, but for rounding, which for huge scores is huge.
        probability[i] = minimum(Vec<C>{}, score[i] - state[r + i / kN].lse);
      }
      exp2_each_as<E>(probability, to_log2);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const RowState<C>& row = state[r + i / kN];
        const Vec<C> x = probability[i] * row.weight;
        const Vec<C> y = score_gradient(x, load(grad + at(i)), broadcast<C>(row.delta));
        store(prob + at(i), masked ? select(score[i] == minus_infinity, absent, x) : x);
        store(grad + at(i), masked ? select(score[i] == minus_infinity, Vec<C>{}, y) : y);
      }
    });
  }

  // The three products, leaving absent pairs (P = -1) out one by one; added up in the same order, so that the bits do
  // not depend on the way.
  void multiply_carefully(const Tile& t, const Queries& rows, const KeyGradients<C>& sum, C* dq,
                          int64_t dq_stride) const {
    const int64_t stride = lanes_k(), dk = padded<C>(embedded_dim(p)), dv = padded<C>(p.Dv);
    const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0;
    const auto present = [&](int64_t i, int64_t j) { return i < queries && j < keys && !(s.p[i * stride + j] < 0); };
    for (int64_t j = 0; j < keys; ++j) {
      const auto seen = [&](int64_t i) { return present(i, j); };
      add_row_carefully(sum.dv + j * dv, dv, weights(), j, queries, rows.dout, seen);
      add_row_carefully(sum.dk + j * dk, dk, grads_of_keys(), j, queries, rows.q, seen);
    }
    const Operand<E, Unit::k> grads{s.grad_rows, terms<E>(stride)};
    for (int64_t i = 0; i < queries; ++i)
      add_row_carefully(dq + i * dq_stride, dk, grads, i, keys, {s.k, dk}, [&](int64_t j) { return present(i, j); });
  }

  // ---- phase 3 ------------------------------------------------------------------------------------------------------

  static void finish(const Problem& p, int64_t task, void* scratch) {
    Workspace w;
    Scratch s;
    carve(p, static_cast<char*>(p.workspace), &w);
    carve(p, static_cast<char*>(scratch), &s);
    finish_rows(p, w, s, task);
  }
  static void finish_rows(const Problem& p, const Workspace& w, const Scratch& s, int64_t task) {
    const Band band = band_of_row_task(p, task);
    const RowTask t = row_task(p, band, task);
    const int64_t parts = groups(p, band);
    const Sums sum = dq_rows(p, w, band, 0, t.h);
    for (int64_t part = 1; part < parts; ++part) {
      const Sums more = dq_rows(p, w, band, part, t.h);
      for (int64_t i = t.i0; i < t.i1; ++i)
        for (int64_t d = 0; d < padded<C>(embedded_dim(p)); d += n) {
          C* to = sum.data + i * sum.stride + d;
          store(to, load(to) + load(more.data + i * more.stride + d));
        }
    }
    if (defers_scale(p)) {
      double scale_sum = 0;
      for (int64_t i = t.i0; i < t.i1; ++i) scale_sum += take_back(p, band, s, t.b, t.h, i, sum.data + i * sum.stride);
      if (w.row_sums) w.row_sums[task].scale = scale_sum;
    }
    if (!dq_in_place(p) && t.i0 < t.i1)
      store_rows<C>(row_of<S>(p.dq, band.batch, t.h, band.q_row + t.i0), p.dq.stride[2], sum.data + t.i0 * sum.stride,
                    sum.stride, t.i1 - t.i0, p.D, scales_k(p) || defers_scale(p) ? C(1) : C(p.scale));
  }

  // The gradient g of an embedded, unscaled query becomes that of the query; returns what the row adds to d(scale):
  // sum_j ds_j q' . k'_j = q' . g.
  static double take_back(const Problem& p, const Band& band, const Scratch& s, int64_t b, int64_t h, int64_t i, C* g) {
    const int64_t dim = embedded_dim(p);
    bool idle = true;
    for (int64_t d = 0; d < dim; ++d) idle &= g[d] == 0;
    if (idle) return 0;  // a query that takes part in nothing may be NaN
    const Source<S> q{row_of<const S>(p.q, band.batch, h, band.q_row + i), 0, p.q.stride[3]};
    load_tile<C>(s.row, padded<C>(p.D), q, 1, p.D, padded<C>(p.D), C(1));
    load_tile<C>(s.sum.dk, padded<C>(dim), q, 1, p.D, padded<C>(dim), C(1));  // the memory of phase 2
    embed_rows(p, Role::query, s.sum.dk, padded<C>(dim), 1, C(1));
    const C scale_gradient = inner_product(s.sum.dk, g, dim), scale = scale_of<C>(p, b, h);
    pull_back(p, Role::query, g, s.row);
    for (int64_t d = 0; d < p.D; ++d) g[d] *= scale;
    return scale_gradient;
  }

  // ---- phase 4 ------------------------------------------------------------------------------------------------------

  // The parts of one key block's gradients, in the order of heads.
  static void add_heads(const Problem& p, int64_t task, void* scratch) {
    const int64_t blocks = key_blocks(p, p.Sk), head = task / blocks, b = head / p.Hk, hk = head % p.Hk;
    const int64_t j0 = task % blocks * key_block(p), heads = heads_per_group(p);
    const Band band(p, b);
    const int64_t end = least(j0 + key_block(p), band.k_rows);
    if (j0 >= end) return;
    Workspace w;
    Scratch s;
    carve(p, static_cast<char*>(p.workspace), &w);
    carve(p, static_cast<char*>(scratch), &s);
    const Backward of{{}, p, band, w, s, b, {hk, hk * heads, (hk + 1) * heads}, 0};
    KeyGradients<C> sum = of.of_head(of.heads.first, j0);
    for (int64_t h = of.heads.first + 1; h < of.heads.end; ++h) sum.add(of.of_head(h, j0), end - j0);
    of.finish_keys(sum, j0, end);
  }

  // ---- phase 5 ------------------------------------------------------------------------------------------------------

  // One head's parts, in order: of each sequence, then of its groups or rows.
  static void add_parameters(const Problem& p, int64_t h, void*) {
    Workspace w;
    carve(p, static_cast<char*>(p.workspace), &w);
    const auto add = [&](const Parameter& to, int64_t b, int64_t row, double x) {
      if (to.gradient) to.gradient[b * to.batch_stride + row * p.Hq + h] += x;
    };
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t rows = row_tasks_per_head(p), first = (b * p.Hq + h) * rows;
      for (int64_t task = first; w.row_sums && task < first + rows; ++task) {
        add(p.sinks, b, 0, w.row_sums[task].sink);
        add(p.scales, b, 0, w.row_sums[task].scale);
      }
      for (int64_t group = 0; w.distances && group < task_groups(p); ++group) {
        const double* sums = distance_sums(p, w, b, group, h);
        add(p.slopes, b, 0, sums[0]);
        for (int64_t row = 0; row < p.table_rows; ++row) add(p.table, b, row, sums[1 + row]);
      }
    }
  }
};

}  // namespace heedful::HEEDFUL_TARGET
