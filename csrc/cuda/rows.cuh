// Attention forward, one query at a time by one warp: lanes are keys for the scores, and columns for the result. Every
// storage type, head dim, layout and option; pair by pair, so that absent pairs take no part whatever their numbers
// are. It is the kernel of exact float32 and float64, and the careful way of the others where a result is not finite.
#pragma once

#include "kernels.h"
#include "pair.h"

namespace heedful::HEEDFUL_TARGET {

template <class C>
HEEDFUL_DEVICE C sum_of_warp(C x) {
#pragma unroll
  for (int n = 16; n; n /= 2) x += shuffle_xor(x, n);
  return x;
}
template <class C>
HEEDFUL_DEVICE C maximum_of_warp(C x) {
#pragma unroll
  for (int n = 16; n; n /= 2) x = maximum(x, shuffle_xor(x, n));
  return x;
}

// A number of q, k, v or dout as products take it, by which what goes row by row beside them agrees with them: with the
// lse of scores of rounded numbers, and with differences of products. One that would round to infinity stays.
template <class S>
HEEDFUL_DEVICE Compute<S> operand(const Problem& p, const S* x) {
  const Compute<S> y = Compute<S>(widen(load_global(x)));
  if constexpr (sizeof(S) == 4) {
    if (!cuda::rounds_to_tf32(p)) return y;
    const float rounded = from_bits(to_tf32(y));
    return rounded - rounded == 0 ? rounded : y;
  }
  return y;
}

// The similarity of a query and a key, with its derivatives: d/dq = cross * k - own_q * q, d/dk = cross * q - own_k *
// k.
template <class C>
struct Similar {
  C value, cross, own_q, own_k;
};
template <class S, class C = Compute<S>>
HEEDFUL_DEVICE Similar<C> similar(const Problem& p, const S* q, const S* k) {
  C qk = 0, qq = 0, kk = 0;
  for (int d = 0; d < int(p.D); ++d) {
    const C x = operand(p, q + d * p.q.stride[3]), y = operand(p, k + d * p.k.stride[3]);
    qk += x * y;
    if (p.similarity == Similarity::dot) continue;
    qq += x * x, kk += y * y;
  }
  if (p.similarity == Similarity::dot) return {qk, 1, 0, 0};
  if (p.similarity == Similarity::gaussian) return {qk - qq / 2 - kk / 2, 1, 1, 1};
  const C of_q = inverse_norm(qq), of_k = inverse_norm(kk), cosine = qk * of_q * of_k;
  constexpr C kSmallest = C(kSmallestNorm * kSmallestNorm);
  return {cosine, of_q * of_k, qq > kSmallest ? cosine * of_q * of_q : 0, kk > kSmallest ? cosine * of_k * of_k : 0};
}

// Hard attention: whether a score takes the place of the best one so far. A NaN is larger than all, of equal ones the
// first key counts, and a sink (top without a key) has to be larger than every score.
constexpr int kNoKey = -1;
template <class C>
HEEDFUL_DEVICE bool is_better(C score, int key, C top, int best) {
  const bool equal = score == top || (score != score && top != top);
  return score > top || (score != score && top == top) ||
         (equal && key != kNoKey && (best == kNoKey || key < best) && score != -kInfinity<C>);
}

template <class C>
struct Best {
  C top;
  int key;
};
template <class S>
HEEDFUL_DEVICE Best<Compute<S>> best_of_row(const HeadScores<S>& head, const Band& band, const Span& span, int i) {
  using C = Compute<S>;
  const Problem& p = head.p;
  const S *q = row_of<const S>(p.q, band.batch, head.h, band.q_row + i),
          *k = row_of<const S>(p.k, band.batch, head.h / int(p.Hq / p.Hk), band.k_row);
  Best<C> best{head.sink(), kNoKey};
  for (int j = span.first_key(i) + thread_index() % 32; j < span.end_key(i); j += 32) {
    if (!head.allows(i, j)) continue;
    const C s = head.score(i, j, similar(p, q, k + j * p.k.stride[2]).value);
    if (is_better(s, s == -kInfinity<C> ? kNoKey : j, best.top, best.key)) best = {s, j};
  }
#pragma unroll
  for (int n = 16; n; n /= 2) {
    const C top = shuffle_xor(best.top, n);
    const int key = int(shuffle_xor(uint32_t(best.key), n));
    if (is_better(top, key, best.top, best.key)) best = {top, key};
  }
  return best;
}

// out and lse of query i.
template <class S>
HEEDFUL_DEVICE void attend_row(const HeadScores<S>& head, const Band& band, const Span& span, int i) {
  using C = Compute<S>;
  constexpr int kColumns = 4;  // of a lane at a time
  const Problem& p = head.p;
  const int lane = thread_index() % 32, hk = head.h / int(p.Hq / p.Hk);
  const S *q = row_of<const S>(p.q, band.batch, head.h, band.q_row + i),
          *k = row_of<const S>(p.k, band.batch, hk, band.k_row), *v = row_of<const S>(p.v, band.batch, hk, band.k_row);
  S* out = row_of<S>(p.out, band.batch, head.h, band.q_row + i);
  const bool exists = i < span.queries;
  const int first = exists ? span.first_key(i) : 0, end = exists ? span.end_key(i) : 0;
  const C sink = exists ? head.sink() : -kInfinity<C>;
  C lse = -kInfinity<C>;
  int column0 = 0;
  do {
    C result[kColumns] = {};
    const auto store = [&] {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = column0 + c * 32 + lane;
        if (column < int(p.Dv)) store_global(out + column, narrow<S>(result[c]));
      }
    };
    // Adds rows of V to `to`.
    const auto add_value = [&](C(&to)[kColumns], C weight, int j) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = column0 + c * 32 + lane;
        if (column < int(p.Dv)) to[c] += weight * C(widen(load_global(v + j * p.v.stride[2] + column * p.v.stride[3])));
      }
    };
    if (p.normalizer == Normalizer::hard) {
      const Best<C> best = exists ? best_of_row(head, band, span, i) : Best<C>{-kInfinity<C>, kNoKey};
      if (best.key != kNoKey) add_value(result, head.keep(i, best.key), best.key);
      lse = best.top;
      store();
      continue;
    }
    C top = sink, sum = sink == -kInfinity<C> ? C(0) : C(1);
    for (int j0 = first; j0 < end; j0 += 32) {
      const int j = j0 + lane;
      C s = -kInfinity<C>;
      if (j < end && head.allows(i, j)) s = head.score(i, j, similar(p, q, k + j * p.k.stride[2]).value);
      const bool absent = s == -kInfinity<C>;
      const C new_top = maximum(top, maximum_of_warp(s)), reference = softmax_reference(new_top, -kInfinity<C>);
      const C factor = exp2_of((top - reference) * C(kLog2e));
      C prob = absent ? C(0) : exp2_of((s - reference) * C(kLog2e));
      top = new_top;
      sum = sum * factor + sum_of_warp(prob);
      if (!absent) prob *= head.keep(i, j);
      C part[kColumns] = {};
      for (int n = 0; n < 32 && j0 + n < end; ++n) {
        const C weight = shuffle(prob, n);
        if (!shuffle(uint32_t(absent), n)) add_value(part, weight, j0 + n);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) result[c] = result[c] * factor + part[c];
    }
    const bool dead = top == -kInfinity<C> && sum == sum;
    lse = dead ? -kInfinity<C> : softmax_reference(top, -kInfinity<C>) + log2_of(sum) * C(kLn2);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) result[c] = dead ? C(0) : result[c] / sum;
    store();
  } while ((column0 += kColumns * 32) < int(p.Dv));
  if (lane == 0) store_global(static_cast<C*>(p.lse) + query_index(p, band, head.h) + i, lse);
}

constexpr int kRowsPerBlock = 4;

template <class S>
HEEDFUL_KERNEL(32 * kRowsPerBlock, 1)
void forward_rows(HEEDFUL_PARAMETER Problem p) {
  const RowTask<RowsOf::queries> task(p, kRowsPerBlock);
  const Band band(p, task.b);
  const int i = task.row0 + thread_index() / 32;
  if (i < band.q_rows) attend_row(HeadScores<S>(p, band, task.b, task.h), band, Span(band), i);
}

template <class S>
void plan_forward_rows(const Problem& p, cuda::Plan* plan) {
  const int64_t blocks = RowTask<RowsOf::queries>::count(p, kRowsPerBlock);
  plan->add({&forward_rows<S>, blocks, 32 * kRowsPerBlock, 0, "forward_rows"});
}

}  // namespace heedful::HEEDFUL_TARGET
