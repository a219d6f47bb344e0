// Attention backward, five products a tile (backward_tile.h). Keys lie in vector lanes and key blocks go outermost, so
// that dK and dV stay local; masks and biases are read along their rows.
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
// q, dO and dS are then there twice; phase 1 makes the pairs along the queries, as a rule, for all key blocks.
#pragma once

#include "backward_tasks.h"
#include "backward_tile.h"
#include "hard.h"
#include "phases.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E = Compute<S>>
struct Backward : BackwardTasks {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  using Tiles = BackwardTile<S, E>;
  static constexpr int64_t kQueries = Tiles::kQueries;
  static_assert(kRowsPerTask % kQueries == 0);
  static constexpr bool kTurned = Tiles::kTurned;

  // ---- plan ---------------------------------------------------------------------------------------------------------

  // Whether a task takes all groups of its heads, in order. The bits are the same.
  static bool joins_groups(const Problem& p) {
    constexpr int64_t kMostBytes = 4 << 20;  // of dQ alone
    return keeps_busy(p, task_heads(p)) && int64_t(sizeof(C)) * dq_size(p) <= kMostBytes;
  }

  // Whether dK and dV are added up in the output itself, and dQ of the first group.
  static bool keys_in_place(const Problem& p) {
    return dq_in_place(p) && !splits_heads(p) && p.similarity == Similarity::dot && p.Dv % n == 0 &&
           lie_close_as_operand<E, S>(p.dk, p.D) && lie_close_as_operand<E, S>(p.dv, p.Dv);
  }
  static bool dq_in_place(const Problem& p) { return sizeof(S) == sizeof(C) && p.D % n == 0 && embedded_dim(p) == p.D; }
  // Parts of dQ that lie elsewhere.
  static int64_t dq_parts(const Problem& p) { return task_groups(p) - dq_in_place(p); }
  static int64_t dq_size(const Problem& p) {
    return dq_parts(p) * heads_per_task(p) * p.Sq * padded<C>(embedded_dim(p));
  }

  // What the rows of one task of phases 1 and 3 add to the parameters of their head.
  struct RowSums {
    double sink, scale;
  };
  struct Workspace {
    RowState<C>* rows;  // [B, Hq, Sq]
    bool* finite;       // [B, Hq, tasks a head]: whether the rows' q and dout are
    bool joins;         // groups
    C* dq;              // [dq_parts, B, Hq, Sq, padded embedded dim]; of joined groups the task's, of its heads alone
    PairsOf pairs_of;
    typename Tiles::Pairs pairs;  // of the call, or the task's
    KeyGradients<C> of_heads;     // of split heads: [B, Hq, Sk]
    RowSums* row_sums;            // [B, Hq, tasks a head]
    double* distances;            // [B, groups, Hq, 1 + table_rows]: of the slope, then of the table
  };
  static size_t carve(const Problem& p, char* base, Workspace* w) {
    Carver carve{base};
    w->rows = carve.take<RowState<C>>(query_count(p));
    w->finite = carve.take<bool>(row_tasks(p));
    w->joins = joins_groups(p);
    w->dq = w->joins ? nullptr : carve.take<C>(dq_parts(p) * query_count(p) * padded<C>(embedded_dim(p)));
    w->pairs_of = pairs_of(p, w->joins);
    if (w->pairs_of == PairsOf::call) w->pairs = {carve, p, PairsOf::call, 0};
    w->of_heads = KeyGradients<C>::take(carve, p, splits_heads(p) ? key_count(p) * heads_per_group(p) : 0);
    w->row_sums = p.sinks.gradient || p.scales.gradient ? carve.take<RowSums>(row_tasks(p)) : nullptr;
    w->distances =
        Tiles::wants_distances(p) ? carve.take<double>(p.B * task_groups(p) * p.Hq * (1 + p.table_rows)) : nullptr;
    return carve.size;
  }

  static void plan(const Problem& p, Plan* plan) {
    if constexpr (!kBFloat16x2)  // which leave it to others
      if (p.normalizer == Normalizer::hard) return HardBackward<S>::plan(p, plan);
    Workspace w;
    Scratch s;
    int& count = plan->phase_count = 0;
    if (joins_groups(p)) {
      const double pairs = double(heads_per_task(p)) * p.Sq * p.Sk;
      plan->phases[count++] = phase_of(p, head_tasks(p), &run, pairs * 2.5 * (p.D + p.Dv));
    } else {
      plan->phases[count++] = {row_tasks(p), &prepare};
      plan->phases[count++] = {head_tasks(p) * task_groups(p), &run};
      if (finishes(p)) plan->phases[count++] = {row_tasks(p), &finish};
    }
    if (splits_heads(p)) plan->phases[count++] = {p.B * p.Hk * key_blocks(p, p.Sk), &add_heads};
    if (p.sinks.gradient || p.scales.gradient || Tiles::wants_distances(p))
      plan->phases[count++] = {p.Hq, &add_parameters};
    plan->scratch_bytes = carve(p, nullptr, &s);
    plan->workspace_bytes = carve(p, nullptr, &w);
  }

  static PairsOf pairs_of(const Problem& p, bool joins) {
    return joins ? PairsOf::sequence : Tiles::Pairs::are_sparse(p) ? PairsOf::tile : PairsOf::call;
  }

  static bool finishes(const Problem& p) { return dq_parts(p) > 0 || Tiles::defers_scale(p); }

  // ---- phase 1 ------------------------------------------------------------------------------------------------------

  static void prepare(const Problem& p, int64_t task, void*) {
    Workspace w;
    carve(p, static_cast<char*>(p.workspace), &w);
    prepare_rows(p, w, task);
  }
  static void prepare_rows(const Problem& p, const Workspace& w, int64_t task) {
    const Band band = band_of_row_task(p, task);
    const RowTask t = row_task(p, band, task);
    const int64_t row = query_index(p, band, t.h);
    const C* lse = static_cast<const C*>(p.lse) + row;
    const C sink = sink_of<C>(p, t.b, t.h, -kInfinity<C>);
    const double unit = score_unit(p);
    double sink_sum = 0;
    for (int64_t i = t.i0; i < t.i1; ++i) {
      const RowState<C> state = w.rows[row + i] = row_state<S>(p, band, t.h, i, lse[i], unit);
      if (Tiles::scales_ds(p)) w.rows[row + i].delta *= C(p.scale);
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
    if constexpr (kBFloat16x2) {
      if (w.pairs_of == PairsOf::tile) return;
      w.pairs.q.pack(band, t.b, t.h, t.i0, t.i0 + present, {q, p.q.stride[2], p.q.stride[3]});
      w.pairs.dout.pack(band, t.b, t.h, t.i0, t.i0 + present, {g, p.dout.stride[2], p.dout.stride[3]});
    }
  }

  // ---- phase 2 ------------------------------------------------------------------------------------------------------

  struct Scratch {
    typename Tiles::Scratch tile;
    KeyGradients<C> sum;          // [kKeys]
    KeyGradients<C> other;        // likewise, of a head that is added to others
    C* row;                       // [D]
    C* dq;                        // of joined groups
    typename Tiles::Pairs pairs;  // of the task's heads, or of a tile
  };
  static size_t carve(const Problem& p, char* base, Scratch* s) {
    const int64_t keys = least(kKeys, padded<C>(p.Sk)), heads = heads_per_task(p);
    const bool joins = joins_groups(p);
    Carver carve{base};
    s->tile = typename Tiles::Scratch(carve, p, keys);
    s->sum = KeyGradients<C>::take(carve, p, keys);
    s->other = KeyGradients<C>::take(carve, p, heads > 1 ? keys : 0);
    s->row = carve.take<C>(padded<C>(p.D));
    s->dq = joins ? carve.take<C>(dq_size(p)) : nullptr;
    const PairsOf of = pairs_of(p, joins);
    if (of != PairsOf::call) s->pairs = {carve, p, of, heads};
    return carve.size;
  }

  // The first groups come first: under a causal mask their keys are seen by the most queries.
  static void run(const Problem& p, int64_t task, void* scratch) {
    const int64_t batches = task_batches(p), heads = task_heads(p);
    const int64_t g0 = task / (batches * heads), b0 = task / heads % batches, h0 = task % heads;
    Workspace w;
    Scratch s;
    carve(p, static_cast<char*>(p.workspace), &w);
    carve(p, static_cast<char*>(scratch), &s);
    const ProductRegisters<E> registers;
    const bool joins = w.joins;
    if (joins) w.dq = s.dq;
    if (w.pairs_of != PairsOf::call) w.pairs = s.pairs;
    for (int64_t b = b0; b < (sums_batch(p) ? p.B : b0 + 1); ++b)
      for (int64_t x = h0; x < (sums_heads(p) ? p.Hk : h0 + 1); ++x) {
        const Band band(p, b);
        const HeadGroup heads = head_group(p, x);
        if (joins) for_row_tasks(p, b, heads, [&](int64_t rows) { prepare_rows(p, w, rows); });
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

  template <class T = const S>
  T* key_row(const View& view, int64_t j) const {
    return row_of<T>(view, band.batch, heads.hk, band.k_row + j);
  }

  static GradientRows<C> dq_rows(const Problem& p, const Workspace& w, const Band& band, int64_t group, int64_t h) {
    const int64_t stride = padded<C>(embedded_dim(p)), heads = heads_per_task(p), part = group - dq_in_place(p);
    if (part < 0) return {row_of<C>(p.dq, band.batch, h, band.q_row), p.dq.stride[2], stride};
    const int64_t row = w.joins ? (part * heads + h % heads) * p.Sq : part * query_count(p) + query_index(p, band, h);
    return {w.dq + row * stride, stride, stride};
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
    const int64_t queries = p.tiles.data || p.mask.data ? kMaskTile : kQueries;  // masks have words for so many
    return kBFloat16x2 || p.tiles.data ? (i0 / queries + 1) * queries : i0 + queries;
  }
  void run_key_block(int64_t j0, int64_t block_end, bool finite) const {
    const int64_t j1 = least(block_end, band.keys), keys = j1 - j0;
    const bool careful = !(finite && keys_are_finite(j0, keys));
    const int64_t rows = block_end - j0, first = keys > 0 ? sum_step_down<E>(band.first_query(j0)) : 0,
                  end = keys > 0 ? least(sum_step_up<E>(band.end_query(j1 - 1)), band.queries) : 0;
    const bool splits = splits_heads(p), starts = starts_dq(j0);
    const Tiles tiles{p, band, s.tile, w.pairs, heads.hk};
    const bool in_place = keys_in_place(p);
    const KeyGradients<C> total = splits ? of_head(heads.first, j0) : in_place ? in_output(j0) : s.sum;
    // A tile's sum is added to what is there: a head of one tile may add it to the others' at once, with the same bits,
    // unless it is turned. What is turned is turned back when its head is done; of a head alone, when it is stored.
    const bool one = heads.end - heads.first == 1, apart = !one && (kTurned || tile_end(first) < end);
    const bool turns_last = kTurned && !splits && one;
    bool packed = false, any = false;
    for (int64_t h = heads.first; h < heads.end; ++h) {
      const bool other = apart && any;
      const KeyGradients<C>& sum = other ? s.other : total;
      const typename Tiles::Head head = head_of(h);
      if (starts) head.dq.clear(0, first), head.dq.clear(end, band.q_rows);
      skip_bias<C>(p, {b, h, 0, first, j0, j1}), skip_bias<C>(p, {b, h, end, p.Sq, j0, j1});
      bool summed = false;
      for (int64_t i0 = first, next; i0 < end; i0 = next) {
        next = tile_end(i0);
        Tile tile{b, h, i0, least(next, end), j0, j1};
        if (!find_masks(p, InLanes::keys, s.tile.parts.words, &tile)) {
          if (starts) head.dq.clear(tile.i0, tile.i1);
          skip_bias<C>(p, tile);
          continue;
        }
        if (!packed) tiles.pack_keys(j0, keys);
        packed = true;
        tiles.run(head, tile, sum,
                  {careful, summed || (any && !apart), !starts, least(next, end), least(tile_end(next), end)});
        summed = true;
      }
      if (!summed) continue;
      if (kTurned && !turns_last) {
        store_transposed(sum.dk.data, sum.dk.stride, s.tile.dk_turned, s.tile.lanes, p.D, keys);
        store_transposed(sum.dv.data, sum.dv.stride, s.tile.dv_turned, s.tile.lanes, p.Dv, keys);
      }
      if (other) total.add(sum, keys);
      any = true;
    }
    if (turns_last) return finish_turned(j0, any ? j1 : j0, block_end);
    total.clear(any ? keys : 0, rows);
    if (!splits && !in_place) finish_keys(total, j0, block_end);
  }

  typename Tiles::Head head_of(int64_t h) const {
    return {w.rows + query_index(p, band, h), dq_rows(p, w, band, group, h),
            w.distances ? distance_sums(p, w, b, group, h) : nullptr};
  }
  KeyGradients<C> of_head(int64_t h, int64_t j0) const {
    return w.of_heads.from_row((band.batch * p.Hq + h) * p.k_rows + band.k_row + j0);
  }

  KeyGradients<C> in_output(int64_t j0) const {
    if constexpr (sizeof(S) != sizeof(C)) return s.sum;  // not asked for
    return {{reinterpret_cast<C*>(key_row<S>(p.dk, j0)), p.dk.stride[2], p.D},
            {reinterpret_cast<C*>(key_row<S>(p.dv, j0)), p.dv.stride[2], p.Dv}};
  }
  // Keys from j1 on have no gradients.
  void finish_turned(int64_t j0, int64_t j1, int64_t block_end) const {
    store_transposed(key_row<S>(p.dk, j0), p.dk.stride[2], s.tile.dk_turned, s.tile.lanes, p.D, j1 - j0,
                     Tiles::scale_when_stored(p));
    store_transposed(key_row<S>(p.dv, j0), p.dv.stride[2], s.tile.dv_turned, s.tile.lanes, p.Dv, j1 - j0);
    if (j1 >= block_end) return;
    s.sum.clear(0, block_end - j1);
    finish_keys(s.sum, j1, block_end);
  }
  void finish_keys(const KeyGradients<C>& sum, int64_t j0, int64_t block_end) const {
    if (p.similarity != Similarity::dot)
      for (int64_t j = j0; j < least(block_end, band.keys); ++j) {
        load_tile<C>(s.row, padded<C>(p.D), Source<S>{key_row(p.k, j), 0, p.k.stride[3]}, 1, p.D, padded<C>(p.D), C(1));
        pull_back(p, Role::key, sum.dk.row(j - j0), s.row);
      }
    store_rows<C>(key_row<S>(p.dk, j0), p.dk.stride[2], sum.dk.data, sum.dk.stride, block_end - j0, p.D,
                  Tiles::scale_when_stored(p));
    store_rows<C>(key_row<S>(p.dv, j0), p.dv.stride[2], sum.dv.data, sum.dv.stride, block_end - j0, p.Dv, C(1));
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
    const GradientRows<C> sum = dq_rows(p, w, band, 0, t.h);
    for (int64_t part = 1; part < parts; ++part) sum.add(dq_rows(p, w, band, part, t.h), t.i0, t.i1);
    if (Tiles::defers_scale(p)) {
      double scale_sum = 0;
      for (int64_t i = t.i0; i < t.i1; ++i) scale_sum += take_back(p, band, s, t.b, t.h, i, sum.row(i));
      if (w.row_sums) w.row_sums[task].scale = scale_sum;
    }
    if (!dq_in_place(p) && t.i0 < t.i1)
      store_rows<C>(row_of<S>(p.dq, band.batch, t.h, band.q_row + t.i0), p.dq.stride[2], sum.row(t.i0), sum.stride,
                    t.i1 - t.i0, p.D, Tiles::scale_when_stored(p));
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
    load_tile<C>(s.sum.dk.data, padded<C>(dim), q, 1, p.D, padded<C>(dim), C(1));  // the memory of phase 2
    embed_rows(p, Role::query, s.sum.dk.data, padded<C>(dim), 1, C(1));
    const C scale_gradient = inner_product(s.sum.dk.data, g, dim), scale = scale_of<C>(p, b, h);
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
    const KeyGradients<C> sum = of.of_head(of.heads.first, j0);
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
