// One tile of backward, a block of keys and some queries of a head: its five products, and P and dS between them, a
// panel of keys at a time (backward.h).
#pragma once

#include "ahead.h"
#include "bias_gradients.h"
#include "embedding.h"
#include "gradient_rows.h"
#include "microkernel.h"
#include "paired_queries.h"
#include "row_state.h"
#include "scores.h"
#include "spans.h"
#include "tile_weights.h"

namespace heedful::HEEDFUL_TARGET {

template <class S, class E>
struct BackwardTile {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kBFloat16x2 = kDepth<E> == 2;
  static constexpr int64_t kQueries = kInTiles<E> ? 128 : 64;
  static_assert(kQueries <= kMostQueries && kQueries % kMaskTile == 0 && kMaskTile % kSumStep<E> == 0);
  // Whether dK and dV are added up turned: keys are in the lanes of P and dS, which tile registers turn for no product.
  static constexpr bool kTurned = kInTiles<E>;
  // Whether dQ comes out unscaled and embedded, to be taken back later: scales differ between the heads that share a
  // key, and their gradient needs dQ as it was before them.
  static bool defers_scale(const Problem& p) { return p.scales.data || p.similarity != Similarity::dot; }
  // Whether dS has the scale, for which V^T and delta get it. Else q has it, for dK, and K, for dQ, unless that is
  // deferred. Pairs would round it: their dK and dQ get it when they are stored.
  static bool scales_ds(const Problem& p) { return !kBFloat16x2 && !scales_first(p); }
  static bool scales_k(const Problem& p) { return !kBFloat16x2 && scales_first(p) && !defers_scale(p); }
  static C scale_when_stored(const Problem& p) { return kBFloat16x2 ? C(p.scale) : C(1); }
  static bool wants_distances(const Problem& p) { return p.slopes.gradient || p.table.gradient; }

  // Of q and dout: whether rows to multiply are read where they lie.
  static bool in_place(const View& view, int64_t dim) {
    if constexpr (kBFloat16x2) return lie_close_as_operand<E, S>(view, dim);
    return sizeof(S) == sizeof(E) && lie_in_vectors<C>(view, dim);
  }
  static bool q_in_place(const Problem& p) { return in_place(p.q, p.D) && (kBFloat16x2 || !scales_first(p)); }
  static bool k_in_place(const Problem& p) {
    return scales_ds(p) && lie_in_vectors<C>(p.k, p.D) && lie_close_as_operand<E, S>(p.k, p.D) &&
           lie_spread<S>(p.k, p.Sq);
  }
  static int64_t k_stride(const Problem& p) { return spread<C>(padded<C>(embedded_dim(p))); }
  // Whether queries are so many that their rows do not stay in the second cache from one block of keys to the next.
  static bool fetches_queries(const Problem& p) {
    constexpr int64_t kMostBytes = 1 << 20;
    return kVectors == 2 && p.Sq * (p.D + p.Dv) * int64_t(sizeof(S)) > kMostBytes;
  }
  // Queries of a panel whose numbers are made at a time: all where diagonals are added up, of which each part has its
  // own; more for large heads, whose keys come anew for each part.
  static int64_t part_queries(const Problem& p) {
    if (!kBFloat16x2 || wants_distances(p)) return kQueries;
    return p.D + p.Dv > 160 ? 64 : 32;
  }

  // q and dout as pairs.
  struct NoPairs {
    NoPairs() = default;
    NoPairs(Carver&, const Problem&, PairsOf, int64_t) {}
    static bool are_sparse(const Problem&) { return false; }
  };
  using Pairs = std::conditional_t<kBFloat16x2, PairsOfQueries<kQueries>, NoPairs>;

  struct Scratch {
    int64_t lanes;    // kKeys, or the keys there are
    E *kt, *vt;       // K^T and V^T, [D][lanes] in panels
    E *k, *q, *dout;  // [lanes][D], [kQueries][D]; null where they are read where they lie
    TileWeights<E> weights;
    C *dk_turned, *dv_turned;  // [D][lanes], of a head
    ScoreParts<C> parts;       // [kQueries][panel]

    Scratch() = default;
    Scratch(Carver& carve, const Problem& p, int64_t lanes) : lanes(lanes) {
      const int64_t panel = kVectors * n, queries = least(kQueries, p.Sq), dim = embedded_dim(p);
      kt = carve.take<E>(terms<E>(dim) * lanes);
      vt = carve.take<E>(terms<E>(p.Dv) * lanes);
      k = k_in_place(p) ? nullptr : carve.take<E>(terms<E>(lanes) * k_stride(p));
      q = q_in_place(p) ? nullptr : carve.take<E>(queries * terms<E>(padded<C>(dim)));
      dout = in_place(p.dout, p.Dv) ? nullptr : carve.take<E>(queries * terms<E>(padded<C>(p.Dv)));
      weights = TileWeights<E>(carve, queries, lanes, least(part_queries(p), queries), panel);
      dk_turned = carve.take<C>(kTurned ? p.D * lanes : 0);
      dv_turned = carve.take<C>(kTurned ? p.Dv * lanes : 0);
      parts = ScoreParts<C>(p, carve, queries, panel, lanes, true);
    }
  };

  // A query head, and where its sums go.
  struct Head {
    const RowState<C>* rows;  // of its queries
    GradientRows<C> dq;
    double* distances;  // null where unwanted
  };
  // Whether absent pairs are left out one by one; whether the keys have sums of other tiles to add to, and the queries
  // of other keys; the queries of the head's next tile.
  struct Way {
    bool careful, adds_to_keys, adds_to_queries;
    int64_t next_i0, next_i1;
  };

  const Problem& p;
  const Band& band;
  const Scratch& s;
  const Pairs& pairs;
  const int64_t hk;

  // Keys from j0 on, for all tiles.
  void pack_keys(int64_t j0, int64_t keys) const {
    const S *k = row_of<const S>(p.k, band.batch, hk, band.k_row + j0),
            *v = row_of<const S>(p.v, band.batch, hk, band.k_row + j0);
    const int64_t dim = embedded_dim(p);
    for_each_panel<C>(padded<C>(keys), [&](int64_t l, auto vectors) {
      const int64_t width = vectors.value * n, present = least(keys - l, width);
      E *kt = s.kt + l * terms<E>(dim), *vt = s.vt + l * terms<E>(p.Dv);
      load_operand(kt, width, Source<S>{k + l * p.k.stride[2], p.k.stride[3], p.k.stride[2]}, p.D, present, width);
      embed_lanes(p, Role::key, kt, width, C(1));
      load_operand(vt, width, Source<S>{v + l * p.v.stride[2], p.v.stride[3], p.v.stride[2]}, p.Dv, present, width,
                   scales_ds(p) ? C(p.scale) : C(1));
    });
    if (!s.k) return;
    load_operand(s.k, k_stride(p), Source<S>{k, p.k.stride[2], p.k.stride[3]}, keys, p.D, padded<C>(dim),
                 scales_k(p) ? C(p.scale) : C(1));
    embed_rows(p, Role::key, s.k, k_stride(p), keys, C(1));
  }

  // Those from j0 on, which were packed.
  Rows<E> key_rows(int64_t j0) const {
    if (s.k) return {s.k, k_stride(p)};
    return in_memory<E>(Source<S>{row_of<const S>(p.k, band.batch, hk, band.k_row + j0), p.k.stride[2], 1});
  }

  // A tile's queries and what arrives at them: to be added up, and as rows to multiply.
  struct Queries {
    Rows<E> q, dout, q_rows, dout_rows;
  };
  Queries load_queries(const Tile& t) const {
    const int64_t queries = t.i1 - t.i0, d = padded<C>(embedded_dim(p)), dv = padded<C>(p.Dv);
    const auto source = [&](const View& view) -> Source<S> {
      return {row_of<const S>(view, band.batch, t.h, band.q_row + t.i0), view.stride[2], view.stride[3]};
    };
    const Source<S> q = source(p.q), dout = source(p.dout);
    if constexpr (kBFloat16x2) {
      const auto rows = [&](E* to, Source<S> from, int64_t dim) -> Rows<E> {
        if (!to) return in_memory<E>(from);
        load_row_pairs(to, terms<E>(padded<C>(dim)), from, queries, dim);
        return {to, terms<E>(padded<C>(dim))};
      };
      if (pairs.q.of == PairsOf::tile) {
        pairs.q.pack(band, t.b, t.h, t.i0, t.i1, q);
        pairs.dout.pack(band, t.b, t.h, t.i0, t.i1, dout);
      }
      return {pairs.q.at(band, t.b, t.h, t.i0), pairs.dout.at(band, t.b, t.h, t.i0), rows(s.q, q, p.D),
              rows(s.dout, dout, p.Dv)};
    } else {
      const C scale = query_scale<E>(p, t.b, t.h);  // scores want it, and dK
      const Rows<C> q_rows = load_rows<C>(s.q, q, queries, p.D, d, p.similarity == Similarity::dot ? scale : C(1)),
                    dout_rows = load_rows<C>(s.dout, dout, queries, p.Dv, dv);
      if (s.q) embed_rows(p, Role::query, s.q, d, queries, scale);
      return {q_rows, dout_rows, q_rows, dout_rows};
    }
  }

  // What comes meanwhile: the next tile's rows, and those of this one that its last product adds to.
  struct QueriesAhead {
    RowsAhead q, dout, dq;

    // What a panel of keys takes of them.
    QueriesAhead of_panel(int64_t l, int64_t width, int64_t lanes) const {
      const auto part = [&](RowsAhead rows) -> RowsAhead {
        if (!rows.rows) return {};
        const int64_t first = rows.rows * l / lanes, end = rows.rows * least(l + width, lanes) / lanes;
        if (first >= end) return {};
        rows.data += first * rows.stride, rows.rows = end - first;
        return rows;
      };
      return {part(q), part(dout), part(dq)};
    }
  };
  QueriesAhead queries_ahead(const Head& head, const Tile& t, const Way& way) const {
    if (!fetches_queries(p)) return {};
    const int64_t first = band.q_row + way.next_i0, count = way.next_i1 - way.next_i0, size = sizeof(C);
    const GradientRows<C>& dq = head.dq;
    return {ahead_of<S>(p.q, band.batch, t.h, first, count, p.D),
            ahead_of<S>(p.dout, band.batch, t.h, first, count, p.Dv),
            {reinterpret_cast<const char*>(dq.row(t.i0)), t.i1 - t.i0, dq.stride * size, dq.width * size, true}};
  }

  // `sum` has the keys' gradients, unless they are turned.
  void run(const Head& head, const Tile& t, const KeyGradients<C>& sum, const Way& way) const {
    const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0;
    const Queries rows = load_queries(t);
    if (s.parts.distances) load_distances<InLanes::keys>(s.parts.distances, s.lanes, p, band, t);
    const QueriesAhead ahead = queries_ahead(head, t, way);
    for_each_panel<C>(padded<C>(keys), [&](int64_t l, auto vectors) {
      score_panel<vectors.value>(head, t, rows, ahead.of_panel(l, vectors.value * n, padded<C>(keys)), l, way.careful);
    });
    if (kBFloat16x2 && keys % 2) s.weights.clear_key(keys, queries);
    way.adds_to_keys ? add_to_keys<Onto::c>(t, rows, sum, way) : add_to_keys<Onto::nothing>(t, rows, sum, way);
    way.adds_to_queries ? add_to_queries<Onto::c>(head, t, way) : add_to_queries<Onto::nothing>(head, t, way);
  }

 private:
  // ---- products over queries and keys -------------------------------------------------------------------------------

  // Careful products leave absent pairs out one by one; they are added up in the same order, so that the bits do not
  // depend on the way.
  template <Onto onto>
  void add_to_queries(const Head& head, const Tile& t, const Way& way) const {
    const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0;
    const GradientRows<C> dq = head.dq.from_row(t.i0);
    const Operand<E, Unit::k> grads{s.weights.grad_rows, s.weights.grad_stride};
    const Rows<E> k = key_rows(t.j0);
    if (!way.careful)
      return multiply<onto>(grads, 0, queries, k.data, k.stride, dq.data, dq.stride, dq.width, dq.data,
                            KeysSeen{band, t});
    if (onto == Onto::nothing) dq.clear(0, queries);
    for (int64_t i = 0; i < queries; ++i)
      add_row_carefully(dq.row(i), dq.width, grads, i, keys, k,
                        [&](int64_t j) { return j < keys && !s.weights.is_absent(i, j); });
  }

  Operand<E, Unit::row> along_queries(const E* weights) const { return {weights, s.weights.lanes}; }

  template <Onto onto>
  void add_to_keys(const Tile& t, const Queries& rows, const KeyGradients<C>& sum, const Way& way) const {
    if constexpr (kTurned)
      add_turned<onto>(t, rows, way);
    else
      way.careful ? add_rows_carefully<onto>(t, rows, sum) : add_rows<onto>(t, rows, sum);
  }
  template <Onto onto>
  void add_rows(const Tile& t, const Queries& rows, const KeyGradients<C>& sum) const {
    const auto add = [&](const GradientRows<C>& to, const E* weights, Rows<E> right) {
      multiply<onto>(along_queries(weights), 0, t.j1 - t.j0, right.data, right.stride, to.data, to.stride, to.width,
                     to.data, QueriesThatSee<false>{band, t});
    };
    add(sum.dv, s.weights.weights, rows.dout);
    add(sum.dk, s.weights.grads, rows.q);
  }
  template <Onto onto>
  void add_rows_carefully(const Tile& t, const Queries& rows, const KeyGradients<C>& sum) const {
    const int64_t queries = t.i1 - t.i0, keys = t.j1 - t.j0;
    if (onto == Onto::nothing) sum.clear(0, keys);
    for (int64_t j = 0; j < keys; ++j) {
      const auto seen = [&](int64_t i) { return i < queries && !s.weights.is_absent(i, j); };
      add_row_carefully(sum.dv.row(j), sum.dv.width, along_queries(s.weights.weights), j, queries, rows.dout, seen);
      add_row_carefully(sum.dk.row(j), sum.dk.width, along_queries(s.weights.grads), j, queries, rows.q, seen);
    }
  }

  template <Onto onto>
  void add_turned(const Tile& t, const Queries& rows, const Way& way) const {
    const int64_t queries = t.i1 - t.i0, lanes = padded<C>(t.j1 - t.j0);
    const auto add = [&](C* to, Rows<E> left, int64_t dim, const E* weights) {
      const Operand<E, Unit::k> a{left.data, left.stride};
      if (!way.careful)
        return multiply<onto>(a, 0, dim, weights, s.weights.lanes, to, s.lanes, lanes, to,
                              QueriesThatSee<true>{band, t});
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t l = 0; l < lanes; l += n) {
          C* const sum = to + d * s.lanes + l;
          const Vec<C> more =
              sum_unmarked(a, d, 0, terms<E>(queries), weights + l, s.weights.weights + l, s.weights.lanes);
          store(sum, onto == Onto::c ? load(sum) + more : more);
        }
    };
    add(s.dv_turned, rows.dout, p.Dv, s.weights.weights);
    add(s.dk_turned, rows.q, p.D, s.weights.grads);
  }

  // ---- scores and gradients -----------------------------------------------------------------------------------------

  // P and dS of one panel of keys; zero where no pair is left.
  template <int kN>
  HEEDFUL_FN void score_panel(const Head& head, const Tile& t, const Queries& rows, const QueriesAhead& ahead,
                              int64_t l, bool careful) const {
    constexpr int width = kN * n;
    const int64_t queries = t.i1 - t.i0;
    Tile panel = t;
    panel.j0 = t.j0 + l, panel.j1 = least<int64_t>(t.j1, panel.j0 + width);
    const int64_t first = clamp(band.first_query(panel.j0) - t.i0, 0, queries),
                  end = clamp(band.end_query(panel.j1 - 1) - t.i0, first, queries);
    // Pairs of queries stay together.
    const int64_t r0 = first < end ? first / kDepth<E> * kDepth<E> : 0,
                  r1 = first < end ? least(terms<E>(end) * kDepth<E>, queries) : 0;
    const Vec<C> absent = broadcast<C>(careful ? C(-1) : C(0));
    s.weights.clear(0, r0, l, width, absent), skip_bias<C>(p, {t.b, t.h, t.i0, t.i0 + r0, panel.j0, panel.j1});
    s.weights.clear(r1, queries, l, width, absent), skip_bias<C>(p, {t.b, t.h, t.i0 + r1, t.i1, panel.j0, panel.j1});
    const int64_t step = part_queries(p);
    for (int64_t r = r0, next; r < r1; r = next) {
      next = least((r / step + 1) * step, r1);
      panel.i0 = t.i0 + r, panel.i1 = t.i0 + next;
      score_part<kN>(head, t, panel, rows, ahead, absent, careful);
    }
  }

  // Of some of its queries.
  template <int kN>
  HEEDFUL_CALLED void score_part(const Head& head, const Tile& t, const Tile& part, const Queries& rows,
                                 const QueriesAhead& queries, Vec<C> absent, bool careful) const {
    constexpr int width = kN * n;
    const int64_t r0 = part.i0 - t.i0, count = part.i1 - part.i0, l = part.j0 - t.j0, dim = embedded_dim(p);
    const typename TileWeights<E>::Numbers numbers = s.weights.numbers(r0, l, width);
    C *const prob = numbers.p, *const grad = numbers.ds;
    const int64_t stride = numbers.stride;
    const auto spans = Spans<kN>::template of<1, n>(
        part.j1 - part.j0, count, [&](int64_t x) { return band.first_query(part.j0 + x) - part.i0; },
        [&](int64_t x) { return band.end_query(part.j0 + x) - part.i0; });
    const bool whole = spans.whole() && spans.count() == count;
    const bool by_parts = !whole && !part.words && keeps_products<E>(p);
    const RowsAhead bias = ahead_of(p.bias, size_of(p.bias_dtype), part), dbias = ahead_of(p.dbias, sizeof(C), part);
    Ahead of_scores(bias.rows ? bias : queries.q, queries.dq, pauses<E>(spans, dim)),
        of_grads(dbias.rows ? dbias : queries.dout, {}, pauses<E>(spans, p.Dv));
    const Operand<E, Unit::k> q{rows.q_rows.data + r0 * rows.q_rows.stride, rows.q_rows.stride},
        dout{rows.dout_rows.data + r0 * rows.dout_rows.stride, rows.dout_rows.stride};
    spans.for_each_part([&](int64_t from, int64_t to, int lo, int hi, int edge) {
      multiply_meanwhile<Onto::nothing>(q, from, to, s.kt + l * terms<E>(dim) + lo * n, width, prob + lo * n, stride,
                                        (hi - lo) * n, prob, dim, of_scores);
      multiply_meanwhile<Onto::nothing>(dout, from, to, s.vt + l * terms<E>(p.Dv) + lo * n, width, grad + lo * n,
                                        stride, (hi - lo) * n, prob, p.Dv, of_grads);
      if (edge >= 0 && by_parts)
        mask_edge<InLanes::keys>(band, part, edge * n, from, to, prob + edge * n, stride, Vec<C>{});
    });
    of_scores.expect_end(), of_grads.expect_end();
    const auto leave_out = [&](int v, int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) store(prob + r * stride + v * n, broadcast<C>(-kInfinity<C>));
    };
    for (int v = 0; v < kN && by_parts; ++v) leave_out(v, 0, spans.first[v]), leave_out(v, spans.end[v], count);
    const bool plain = is_plain<E>(p, band, part);
    if (!plain && !by_parts)
      apply_scores<InLanes::keys, E>(p, band, part, prob, stride, int64_t{width}, s.parts,
                                     distances_of<InLanes::keys>(s.parts, t, part));
    if (s.parts.keep) {
      load_keep<InLanes::keys>(s.parts.keep, int64_t{width}, p, part);
      scale_pairs<C>(grad, stride, s.parts.keep, width, count);
    }
    const bool joins = kBFloat16x2 && !s.parts.keep && !s.parts.slopes && !p.dbias.data && !head.distances;
    const RowState<C>* state = head.rows + part.i0;
    if (plain && !careful)
      gradients<kN, false>(prob, grad, stride, r0, count, l, state, absent, joins);
    else
      gradients<kN, true>(prob, grad, stride, r0, count, l, state, absent, joins);
    if (joins) return;
    if (p.dbias.data) add_to_bias<C>(p, part, grad, stride);
    if (head.distances) add_to_distances<C>(p, band, part, grad, stride, head.distances);
    if (s.parts.slopes) scale_pairs<C>(grad, stride, s.parts.slopes, width, count);
    if (s.parts.keep) drop(prob, stride, s.parts.keep, int64_t{width}, count);
    if constexpr (kBFloat16x2) s.weights.join_numbers(r0, count, l, width);
  }

  // A part's probabilities and dS, from scores and dP; r0 and l are where it lies in the tile.
  template <int kN, bool masked>
  HEEDFUL_FN void gradients(C* prob, C* grad, int64_t stride, int64_t r0, int64_t count, int64_t l,
                            const RowState<C>* state, Vec<C> absent, bool joins) const {
    const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>), to_log2 = broadcast<C>(C(score_unit(p) * kLog2e));
    for_each_step<kInStep / kN>(0, count, [&](int64_t r, auto rows) {
      constexpr int kCount = rows.value * kN;
      const auto at = [&](int i) { return (r + i / kN) * stride + i % kN * n; };
      Vec<C> score[kCount], probability[kCount], ds[kCount];
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
        probability[i] = masked ? select(score[i] == minus_infinity, absent, x) : x;
        ds[i] = masked ? select(score[i] == minus_infinity, Vec<C>{}, y) : y;
      }
      if constexpr (kBFloat16x2)
        if (joins) return s.weights.template store_pairs<kN>(r0 + r, l, probability, ds);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) store(prob + at(i), probability[i]), store(grad + at(i), ds[i]);
    });
  }
};

}  // namespace heedful::HEEDFUL_TARGET
