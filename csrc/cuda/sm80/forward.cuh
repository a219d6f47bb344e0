// Attention forward by mma.sync. A block of four warps has kQueries queries of one head; each warp owns kRows of them,
// whose scores and results stay in its registers, and goes over tiles of kKeys keys:
//
//   S [kRows][kKeys] = Q K^T      Q, K by ldmatrix
//   O [kRows][kDim] += P V        P from the registers that S is in, V by ldmatrix.trans; of float32, number by number
//
// K and V of the next tile are copied into a second stage meanwhile; one barrier a tile says that the copies of this
// one have come and that everybody is done with the one before.
#pragma once

#include "../rows.cuh"
#include "decodes.h"
#include "scores.cuh"
#include "tiles.cuh"

namespace heedful::HEEDFUL_TARGET {

template <class Config>
struct Forward {
  using S = typename Config::Storage;
  static constexpr bool kGeneral = Config::kGeneral;
  static constexpr int kDim = Config::kDim, kRows = Config::kRows, kKeys = Config::kKeys;
  static constexpr int kM = kRows / 16, kN = kKeys / 8, kColumns = kDim / 8;

  const Problem& p;
  const RowTask<RowsOf::queries> task;
  const Span span;
  const int own_rows;      // of the sequence, in memory
  const int lane, row0;    // the warp's first query
  const bool hard;         // hard attention
  const float to_log2;     // what one unit of a score is worth in powers of two
  const uint32_t queries;  // the tile of Q
  float out[kM][kColumns][4];
  float top[kM][2], sum[kM][2];    // maximum and this lane's part of the sum, of rows 16 m + 8 r + lane / 4
  int best[kGeneral ? kM : 1][2];  // hard attention: this lane's best key

  HEEDFUL_DEVICE explicit Forward(const Problem& problem)
      : p(problem),
        task(p, Config::kQueries),
        span(band()),
        own_rows(int(band().q_rows)),
        lane(thread_index() % 32),
        row0(task.row0 + thread_index() / 32 * kRows),
        hard(kGeneral && p.normalizer == Normalizer::hard),
        // Plain scores stay products: their distance from the maximum loses least before it is scaled.
        to_log2(float(kGeneral ? kLog2e : p.scale * kLog2e)),
        queries(shared_base()) {}

  // NOTE: made anew where it is needed: its 64-bit numbers would take 18 registers throughout.
  HEEDFUL_DEVICE Band band() const { return Band(p, task.b); }
  HEEDFUL_DEVICE HeadScores<S> head() const { return HeadScores<S>(p, band(), task.b, task.h); }
  HEEDFUL_DEVICE int kv_head() const { return task.h / int(p.Hq / p.Hk); }
  HEEDFUL_DEVICE uint32_t stage(int n) const { return queries + Config::kQueryBytes + n * 2 * Config::kKeyBytes; }

  HEEDFUL_DEVICE void run() {
    if (task.row0 >= own_rows || decodes(p, own_rows)) return;
    start();
    attend();
    if (hard)
      store_best();
    else
      finish();
  }

  HEEDFUL_DEVICE void start() {
    const float sink = kGeneral ? head().sink() : -kInfinity<float>;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[m][r] = sink;
        // One lane of a row has the sink in its part of the sum.
        sum[m][r] = kGeneral && sink != -kInfinity<float> && lane % 4 == 0 ? 1 : 0;
        if constexpr (kGeneral) best[m][r] = kNoKey;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) out[m][n][2 * r] = out[m][n][2 * r + 1] = 0;
      }
  }

  // The first tile from key j on that is not empty for all of the block's queries.
  HEEDFUL_DEVICE int visit(int j, int end) const {
    if constexpr (kGeneral)
      if (p.tiles.data)
        for (; j < end; j += kKeys)
          for (int i = task.row0; i < task.row0 + Config::kQueries && i < span.queries; i += int(kMaskTile))
            if (mask_tile(p, task.b, task.h, i, j) != kEmptyTile) return j;
    return j;
  }

  HEEDFUL_DEVICE void attend() {
    const int last = least(task.row0 + Config::kQueries, span.queries) - 1;
    if (last < task.row0) return;
    const int end = span.end_key(last);
    int j = visit(span.first_key(task.row0) / kKeys * kKeys, end);
    if (j >= end) return;

    // Copies: Q and the first tile's K and V make the first group.
    const bool k_aligned = !kGeneral || is_aligned<S>(p.k), v_aligned = !kGeneral || is_aligned<S>(p.v);
    const Band rows = band();
    const TileLoader<S, kDim> k(p.k, rows.batch, kv_head(), rows.k_row, p.D, k_aligned),
        v(p.v, rows.batch, kv_head(), rows.k_row, p.Dv, v_aligned);
    const TileLoader<S, kDim> q(p.q, rows.batch, task.h, rows.q_row, p.D, !kGeneral || is_aligned<S>(p.q));
    q.template load<Config::kQueries, kGeneral>(queries, task.row0, span.queries);
    const auto load = [&](int n, int first) {
      k.template load<kKeys, kGeneral>(stage(n), first, span.keys);
      v.template load<kKeys, kGeneral>(stage(n) + Config::kKeyBytes, first, span.keys);
    };
    load(0, j);
    commit_copies();

    // The keys that any of the warp's queries sees.
    const int warp_last = least(row0 + kRows, span.queries) - 1;
    const int warp_first = warp_last < row0 ? end : span.first_key(row0);
    const int warp_end = warp_last < row0 ? 0 : span.end_key(warp_last);
    for (int n = 0; j < end; n ^= 1) {
      const int next = visit(j + kKeys, end);
      wait_copies<0>();
      sync_block();
      if (next < end) load(n ^ 1, next);
      commit_copies();
      const int32_t tile = kGeneral && row0 < span.queries ? mask_tile(p, task.b, task.h, row0, j) : kFullTile;
      if (warp_first < j + kKeys && j < warp_end && tile != kEmptyTile) attend_tile(stage(n), j, tile);
      j = next;
    }
  }

  HEEDFUL_DEVICE void attend_tile(uint32_t keys, int j, int32_t tile) {
    const Corner corner{row0 + fragment_row(lane), j + fragment_column(lane)};
    const uint32_t q = queries + uint32_t(row0 - task.row0) * kPitch<S, kDim> + rows_first<S, kDim>(lane);
    float s[kM][kN][4] = {};
    multiply_transposed<S, kDim>(s, q, keys + columns_first<S, kDim>(lane));
    if constexpr (kGeneral) apply_scores<false>(head(), band(), span, tile, s, corner);
    if (!span.covers(row0, row0 + kRows, j, j + kKeys)) mask_band<false>(span, s, corner);
    if (hard) return find_best(s, corner);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) to_weights(s[m], out[m], r, to_log2, top[m][r], sum[m][r]);
    if constexpr (kGeneral)
      if (has_dropout(p)) drop(head(), s, corner.query, j);
    multiply<S, kDim>(out, s, keys + Config::kKeyBytes + summed_rows<S, kDim>(lane));
  }

  // ---- results

  HEEDFUL_DEVICE void finish() {
    const float weight = kGeneral && has_dropout(p) ? float(kept_weight(p)) : 1;
    const float unit = kGeneral ? 1 : float(p.scale);
    float lse[kM][2];
    uint32_t spoilt = 0;  // a bit for each of the warp's rows whose result is not finite
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 16 * m + 8 * r + fragment_row(lane);
        float total = sum[m][r];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        // A NaN among the scores shows in the sum alone.
        const bool dead = row0 + at >= span.queries || (top[m][r] == -kInfinity<float> && total == total);
        lse[m][r] = dead ? -kInfinity<float>
                         : softmax_reference(top[m][r], -kInfinity<float>) * unit + log2_of(total) * float(kLn2);
        const float factor = dead ? 0 : weight / total;
        bool finite = dead || total - total == 0;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            out[m][n][e] = dead ? 0 : out[m][n][e] * factor;
            finite &= out[m][n][e] - out[m][n][e] == 0;
          }
        spoilt |= uint32_t(!finite) << at;
      }
#pragma unroll
    for (int n = 16; n; n /= 2) spoilt |= shuffle_xor(spoilt, n);
    const Band rows = band();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 16 * m + 8 * r + fragment_row(lane);
        if (lane % 4 == 0 && row0 + at < own_rows && !(spoilt >> at & 1))
          store_global(static_cast<float*>(p.lse) + query_index(p, rows, task.h) + row0 + at, lse[m][r]);
      }
    store_rows<S, kDim>(out, queries + uint32_t(row0 - task.row0) * kPitch<S, kDim>, p.out,
                        row_of<S>(p.out, rows.batch, task.h, rows.q_row + row0), own_rows - row0, p.Dv, spoilt);
    // NOTE: an absent pair has a weight of 0, which lets infinite and NaN values through. They show in the result and
    // are rare: only such rows are done again, pair by pair.
#pragma unroll 1
    for (int n = 0; n < kRows; ++n)
      if (spoilt >> n & 1 && row0 + n < own_rows) attend_row(head(), band(), span, row0 + n);
  }

  // ---- hard attention

  HEEDFUL_DEVICE void find_best(const float (&s)[kM][kN][4], const Corner& corner) {
    if constexpr (kGeneral) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (is_better(s[m][n][e], corner.key + 8 * n + e % 2, top[m][e / 2], best[m][e / 2]))
              top[m][e / 2] = s[m][n][e], best[m][e / 2] = corner.key + 8 * n + e % 2;
    }
  }

  HEEDFUL_DEVICE void store_best() {
    if constexpr (kGeneral) {
      const Band rows = band();
      const S* v = row_of<const S>(p.v, rows.batch, kv_head(), rows.k_row);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int x = 1; x < 4; x *= 2) {
            const float other = shuffle_xor(top[m][r], x);
            const int others_best = int(shuffle_xor(uint32_t(best[m][r]), x));
            if (is_better(other, others_best, top[m][r], best[m][r])) top[m][r] = other, best[m][r] = others_best;
          }
          for (int n = 0; n < 8; ++n) {
            const int i = row0 + 16 * m + 8 * r + n;
            const int key = int(shuffle(uint32_t(best[m][r]), 4 * n));
            const float score = shuffle(top[m][r], 4 * n);
            if (i >= own_rows) continue;
            const bool exists = i < span.queries;
            if (lane == 0)
              store_global(static_cast<float*>(p.lse) + query_index(p, rows, task.h) + i,
                           exists ? score : -kInfinity<float>);
            const bool found = exists && key != kNoKey;
            const float z = found ? head().keep(i, key) : 0;
            S* to = row_of<S>(p.out, rows.batch, task.h, rows.q_row + i);
            for (int d = lane; d < int(p.Dv); d += 32)
              store_global(to + d, narrow<S>(found ? z * widen(load_global(v + key * p.v.stride[2] + d * p.v.stride[3]))
                                                   : 0.0f));
          }
        }
    }
  }
};

template <class Config>
HEEDFUL_KERNEL(kThreads, 2)
void forward(HEEDFUL_PARAMETER Problem p) {
  Forward<Config>(p).run();
}

template <class S, int kDim>
void plan_forward_sm80(const Problem& p, cuda::Plan* plan) {
  const auto add = [&](auto config, const char* name) {
    using Config = decltype(config);
    plan->add(
        {&forward<Config>, RowTask<RowsOf::queries>::count(p, Config::kQueries), kThreads, Config::kSharedBytes, name});
  };
  if (is_plain<S>(p)) return add(ForwardConfig<S, kDim, false>(), "sm80/forward, plain");
  if (!may_decode(p)) plan_norms<S>(p, plan);  // else they are planned already
  plan->workspace_bytes = most(plan->workspace_bytes, size_t(norm_bytes(p)));
  add(ForwardConfig<S, kDim, true>(), "sm80/forward, general");
}

}  // namespace heedful::HEEDFUL_TARGET
