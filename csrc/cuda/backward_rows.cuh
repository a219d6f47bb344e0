// Attention backward, one query's or key's gradients at a time by one warp: lanes are pairs, then columns. It is the
// kernel of exact float32, float64 and hard attention, and the careful way of the others (see rows.cuh).
#pragma once

#include "norms.cuh"
#include "rows.cuh"

namespace heedful::HEEDFUL_TARGET {

// What backward keeps of each query, [B, Hq, q_rows]: delta = sum(dout * out) - dlse, and hard attention's key.
template <class C>
struct QueryStates {
  C* delta;
  int32_t* best;
  HEEDFUL_FN QueryStates(const Problem& p, int64_t offset)
      : delta(reinterpret_cast<C*>(static_cast<char*>(p.workspace) + offset)),
        best(reinterpret_cast<int32_t*>(delta + query_count(p))) {}
  static int64_t bytes(const Problem& p) { return query_count(p) * int64_t(sizeof(C) + sizeof(int32_t)); }
};

// One head of one sequence, with what a pair's gradients are made of.
template <class S>
struct HeadGradients {
  using C = Compute<S>;
  const Problem& p;
  const Band& band;
  const HeadScores<S> scores;
  const int hk;
  const C *lse, *delta;
  const int32_t* best;

  HEEDFUL_DEVICE HeadGradients(const Problem& problem, const Band& of_band, int b, int h)
      : p(problem), band(of_band), scores(problem, of_band, b, h), hk(h / int(problem.Hq / problem.Hk)) {
    const QueryStates<C> states(p, norm_bytes(p));
    const int64_t first = query_index(p, band, h);
    lse = static_cast<const C*>(p.lse) + first, delta = states.delta + first, best = states.best + first;
  }
  HEEDFUL_DEVICE const S* q(int i) const { return row_of<const S>(p.q, band.batch, scores.h, band.q_row + i); }
  HEEDFUL_DEVICE const S* k(int j) const { return row_of<const S>(p.k, band.batch, hk, band.k_row + j); }
  HEEDFUL_DEVICE const S* v(int j) const { return row_of<const S>(p.v, band.batch, hk, band.k_row + j); }
  HEEDFUL_DEVICE const S* dout(int i) const { return row_of<const S>(p.dout, band.batch, scores.h, band.q_row + i); }

  // weight: z p; ds of the score; dt of the scaled similarity. present: the others count.
  struct Pair {
    bool present;
    C weight, ds, dt;
    Similar<C> similar;
  };
  // Of a pair inside of the band.
  HEEDFUL_DEVICE Pair pair(int i, int j) const {
    Pair x{};
    if (!scores.allows(i, j)) return x;
    if (p.normalizer == Normalizer::hard) {
      x.present = load_global(best + i) == j;
      x.weight = x.present ? scores.keep(i, j) : C(0);
      return x;
    }
    const Similar<C> of_pair = similar(p, q(i), k(j));
    C slope;
    const C s = scores.score(i, j, of_pair.value, &slope), of_row = load_global(lse + i);
    x.present = s != -kInfinity<C> && of_row != -kInfinity<C>;
    if (!x.present) return x;
    x.similar = of_pair;
    const C prob = exp2_of((s - of_row) * C(kLog2e)), z = scores.keep(i, j);
    const S *of_out = dout(i), *value = v(j);
    C dp = 0;
    for (int d = 0; d < int(p.Dv); ++d)
      dp += operand(p, of_out + d * p.dout.stride[3]) * operand(p, value + d * p.v.stride[3]);
    x.weight = prob * z;
    x.ds = score_gradient(prob, z * dp, load_global(delta + i));
    x.dt = x.ds * slope;
    return x;
  }
};

// Sums of rows by their weights, over the pairs of the lanes.
template <class S, class C, int kColumns>
HEEDFUL_DEVICE void add_rows(C (&sum)[kColumns], C weight, bool present, int pairs, const View& view, const S* rows,
                             int64_t row_stride, int column0, int64_t dim) {
  C part[kColumns] = {};
  for (int n = 0; n < pairs; ++n) {
    const C of_pair = shuffle(weight, n);
    if (!shuffle(uint32_t(present), n)) continue;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = column0 + c * 32 + thread_index() % 32;
      if (column < int(dim))
        part[c] += of_pair * C(widen(load_global(rows + n * row_stride + column * view.stride[3])));
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) sum[c] += part[c];
}

constexpr int kGradientColumns = 4;  // of a lane at a time

// Stores a gradient's columns: sum - own * x, where x is the row that it is the gradient of.
template <class S, class C>
HEEDFUL_DEVICE void store_gradient(S* to, const C (&sum)[kGradientColumns], C own, const S* x, int64_t x_stride,
                                   int column0, int64_t dim) {
#pragma unroll
  for (int c = 0; c < kGradientColumns; ++c) {
    const int column = column0 + c * 32 + thread_index() % 32;
    if (column >= int(dim)) continue;
    const C own_part = own == C(0) ? C(0) : own * C(widen(load_global(x + column * x_stride)));
    store_global(to + column, narrow<S>(sum[c] - own_part));
  }
}

// dq of query i.
template <class S>
HEEDFUL_DEVICE void gradient_of_query(const Problem& p, const Band& band, int b, int h, int i) {
  using C = Compute<S>;
  const HeadGradients<S> head(p, band, b, h);
  const Span span(band);
  const int lane = thread_index() % 32;
  const bool exists = i < span.queries && p.normalizer != Normalizer::hard;
  const int first = exists ? span.first_key(i) : 0, end = exists ? span.end_key(i) : 0;
  const C factor = head.scores.factor();
  for (int column0 = 0; column0 < int(p.D); column0 += 32 * kGradientColumns) {
    C sum[kGradientColumns] = {}, own = 0;
    for (int j0 = first; j0 < end; j0 += 32) {
      const int j = j0 + lane;
      const auto pair = j < end ? head.pair(i, j) : typename HeadGradients<S>::Pair{};
      const C of_similarity = pair.dt * factor;
      own += of_similarity * pair.similar.own_q;
      add_rows(sum, of_similarity * pair.similar.cross, pair.present, least(32, end - j0), p.k, head.k(j0),
               p.k.stride[2], column0, p.D);
    }
    store_gradient(row_of<S>(p.dq, band.batch, h, band.q_row + i), sum, sum_of_warp(own), head.q(i), p.q.stride[3],
                   column0, p.D);
  }
}

// dk and dv of key j, or one of them, over the heads that share it, in order.
template <class S>
HEEDFUL_DEVICE void gradients_of_key(const Problem& p, const Band& band, int b, int hk, int j, bool want_dk = true,
                                     bool want_dv = true) {
  using C = Compute<S>;
  const Span span(band);
  const int lane = thread_index() % 32, group = int(p.Hq / p.Hk);
  const bool exists = j < span.keys;
  const int first = exists ? span.first_query(j) : 0, end = exists ? span.end_query(j) : 0;
  for (int column0 = 0; column0 < int(most(p.D, p.Dv)); column0 += 32 * kGradientColumns) {
    C dk[kGradientColumns] = {}, dv[kGradientColumns] = {}, own = 0;
    for (int h = hk * group; h < (hk + 1) * group; ++h) {
      const HeadGradients<S> head(p, band, b, h);
      const C factor = head.scores.factor();
      for (int i0 = first; i0 < end; i0 += 32) {
        const int i = i0 + lane, pairs = least(32, end - i0);
        const auto pair = i < end ? head.pair(i, j) : typename HeadGradients<S>::Pair{};
        const C of_similarity = pair.dt * factor;
        const bool hard = p.normalizer == Normalizer::hard;
        own += of_similarity * pair.similar.own_k;
        add_rows(dk, of_similarity * pair.similar.cross, pair.present && !hard, pairs, p.q, head.q(i0), p.q.stride[2],
                 column0, p.D);
        add_rows(dv, pair.weight, pair.present, pairs, p.dout, head.dout(i0), p.dout.stride[2], column0, p.Dv);
      }
    }
    const S* k = row_of<const S>(p.k, band.batch, hk, band.k_row + j);
    own = sum_of_warp(own);
    if (want_dk)
      store_gradient(row_of<S>(p.dk, band.batch, hk, band.k_row + j), dk, own, k, p.k.stride[3], column0, p.D);
    if (want_dv) store_gradient(row_of<S>(p.dv, band.batch, hk, band.k_row + j), dv, C(0), k, 0, column0, p.Dv);
  }
}

// ---- kernels: a warp has a row --------------------------------------------------------------------------------------

template <class S>
HEEDFUL_KERNEL(32 * kRowsPerBlock, 1)
void query_states(HEEDFUL_PARAMETER Problem p) {
  using C = Compute<S>;
  const RowTask<RowsOf::queries> task(p, kRowsPerBlock);
  const Band band(p, task.b);
  const int i = task.row0 + thread_index() / 32, lane = thread_index() % 32;
  if (i >= band.queries) return;
  const QueryStates<C> states(p, norm_bytes(p));
  const int64_t index = query_index(p, band, task.h) + i;
  if (p.normalizer == Normalizer::hard) {
    const auto [top, best] = best_of_row(HeadScores<S>(p, band, task.b, task.h), band, Span(band), i);
    if (lane == 0) store_global(states.best + index, best);
    return;
  }
  const S *dout = row_of<const S>(p.dout, band.batch, task.h, band.q_row + i),
          *out = row_of<const S>(p.out, band.batch, task.h, band.q_row + i);
  C sum = 0;
  for (int d = lane; d < int(p.Dv); d += 32)
    sum += operand(p, dout + d * p.dout.stride[3]) * C(widen(load_global(out + d * p.out.stride[3])));
  sum = sum_of_warp(sum);
  if (lane) return;
  if (p.dlse.data) sum -= load_global(row_of<const C>(p.dlse, band.batch, task.h, band.q_row + i));
  // A gradient that arrives at a query that saw nothing is ignored.
  const bool dead = load_global(static_cast<const C*>(p.lse) + index) == -kInfinity<C>;
  store_global(states.delta + index, dead ? C(0) : sum);
}

template <class S>
HEEDFUL_KERNEL(32 * kRowsPerBlock, 1)
void backward_queries(HEEDFUL_PARAMETER Problem p) {
  const RowTask<RowsOf::queries> task(p, kRowsPerBlock);
  const Band band(p, task.b);
  const int i = task.row0 + thread_index() / 32;
  if (i < band.q_rows) gradient_of_query<S>(p, band, task.b, task.h, i);
}

template <class S>
HEEDFUL_KERNEL(32 * kRowsPerBlock, 1)
void backward_keys(HEEDFUL_PARAMETER Problem p) {
  const RowTask<RowsOf::keys> task(p, kRowsPerBlock);
  const Band band(p, task.b);
  const int j = task.row0 + thread_index() / 32;
  if (j < band.k_rows) gradients_of_key<S>(p, band, task.b, task.h, j);
}

template <class S>
void plan_query_states(const Problem& p, cuda::Plan* plan) {
  plan->workspace_bytes = size_t(norm_bytes(p) + QueryStates<Compute<S>>::bytes(p));
  plan->add(
      {&query_states<S>, RowTask<RowsOf::queries>::count(p, kRowsPerBlock), 32 * kRowsPerBlock, 0, "query_states"});
}

template <class S>
void plan_backward_rows(const Problem& p, cuda::Plan* plan) {
  plan_query_states<S>(p, plan);
  plan->add({&backward_queries<S>, RowTask<RowsOf::queries>::count(p, kRowsPerBlock), 32 * kRowsPerBlock, 0,
             "backward_rows"});
  plan->add(
      {&backward_keys<S>, RowTask<RowsOf::keys>::count(p, kRowsPerBlock), 32 * kRowsPerBlock, 0, "backward_rows"});
}

}  // namespace heedful::HEEDFUL_TARGET
