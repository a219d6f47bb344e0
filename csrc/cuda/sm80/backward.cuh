// Attention backward by mma.sync. A block of four warps has 64 rows of one side, queries or keys, whose gradients stay
// in its registers, and goes over tiles of the other side's rows:
//
//   queries    S = Q K^T     dP = dO V^T                     dQ += dS K
//   keys       S^T = K Q^T   dP^T = V dO^T   dV += P^T dO    dK += dS^T Q
//
// Both sides compute S and dP anew, so that no gradient is ever added up in memory: no atomics, and the same bits every
// time. A key's block goes over all heads that share it. Where registers hold one result only, dK and dV take turns.
#pragma once

#include "../backward_rows.cuh"
#include "scores.cuh"
#include "tiles.cuh"

namespace heedful::HEEDFUL_TARGET {

template <class Config>
struct Backward {
  using S = typename Config::Storage;
  static constexpr bool kGeneral = Config::kGeneral, kOfKeys = Config::kSide != Side::queries;
  static constexpr bool kFirst = Config::kSide != Side::values;                                  // dQ or dK
  static constexpr bool kSecond = Config::kSide == Side::keys || Config::kSide == Side::values;  // dV
  static constexpr int kDim = Config::kDim, kRows = Config::kRows, kStep = Config::kStep;
  static constexpr int kN = kStep / 8, kColumns = kDim / 8;
  static constexpr int kNumbers = kOfKeys ? 2 * kN : 2;  // of queries, that a lane has in a tile

  const Problem& p;
  const RowTask<kOfKeys ? RowsOf::keys : RowsOf::queries> task;
  const Span span;
  const int own_rows, end;                   // rows of this side in memory; those that exist
  const int lane, row0;                      // the warp's first row
  const uint32_t tile0, tile1;               // this side's: Q and dO, or K and V
  float sum0[1][kFirst ? kColumns : 1][4];   // dQ or dK
  float sum1[1][kSecond ? kColumns : 1][4];  // dV
  float own[2];                              // what a row loses of itself (similarity.h)
  float lse[kNumbers], delta[kNumbers];

  HEEDFUL_DEVICE explicit Backward(const Problem& problem)
      : p(problem),
        task(p, kWarps * kRows),
        span(band()),
        own_rows(int(kOfKeys ? band().k_rows : band().q_rows)),
        end(kOfKeys ? span.keys : span.queries),
        lane(thread_index() % 32),
        row0(task.row0 + thread_index() / 32 * kRows),
        tile0(shared_base()),
        tile1(shared_base() + Config::kOwnBytes) {}

  HEEDFUL_DEVICE Band band() const { return Band(p, task.b); }
  HEEDFUL_DEVICE int group() const { return int(p.Hq / p.Hk); }
  HEEDFUL_DEVICE int kv_head() const { return kOfKeys ? task.h : task.h / group(); }
  HEEDFUL_DEVICE uint32_t stage(int n) const { return tile0 + 2 * Config::kOwnBytes + n * 2 * Config::kStepBytes; }
  HEEDFUL_DEVICE static bool aligned(const View& x) { return !kGeneral || is_aligned<S>(x); }

  HEEDFUL_DEVICE void run() {
    if (task.row0 >= own_rows) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int n = 0; n < (kFirst ? kColumns : 1); ++n) sum0[0][n][e] = 0;
#pragma unroll
      for (int n = 0; n < (kSecond ? kColumns : 1); ++n) sum1[0][n][e] = 0;
    }
    own[0] = own[1] = 0;
    go_over();
    finish();
  }

  // ---- the other side's tiles

  // Of which query head, and from which row on.
  struct Step {
    int h, at;
  };

  // The first one from `step` on that any pair is in; its head is past the last one where there is none.
  HEEDFUL_DEVICE Step visit(Step step, int first, int last, int end_head) const {
    for (;; step.at += kStep) {
      if (step.at >= last) step = {step.h + 1, first};
      if (step.h >= end_head || !kGeneral) return step;
      if (tile_of(step) != kEmptyTile) return step;
    }
  }
  HEEDFUL_DEVICE int32_t tile_of(Step step) const {
    if constexpr (!kGeneral) return kFullTile;
    return mask_tile(p, task.b, step.h, kOfKeys ? step.at : task.row0, kOfKeys ? task.row0 : step.at);
  }

  HEEDFUL_DEVICE void load_step(int n, Step step) const {
    const Band rows = band();
    const uint32_t to = stage(n);
    if constexpr (kOfKeys) {
      const TileLoader<S, kDim> q(p.q, rows.batch, step.h, rows.q_row, p.D, aligned(p.q));
      const TileLoader<S, kDim> dout(p.dout, rows.batch, step.h, rows.q_row, p.Dv, aligned(p.dout));
      q.template load<kStep, kGeneral>(to, step.at, span.queries);
      dout.template load<kStep, kGeneral>(to + Config::kStepBytes, step.at, span.queries);
    } else {
      const TileLoader<S, kDim> k(p.k, rows.batch, kv_head(), rows.k_row, p.D, aligned(p.k));
      const TileLoader<S, kDim> v(p.v, rows.batch, kv_head(), rows.k_row, p.Dv, aligned(p.v));
      k.template load<kStep, kGeneral>(to, step.at, span.keys);
      v.template load<kStep, kGeneral>(to + Config::kStepBytes, step.at, span.keys);
    }
  }
  HEEDFUL_DEVICE void load_own() const {
    const Band rows = band();
    const View &x = kOfKeys ? p.k : p.q, &y = kOfKeys ? p.v : p.dout;
    const int64_t row = kOfKeys ? rows.k_row : rows.q_row;
    const TileLoader<S, kDim> first(x, rows.batch, task.h, row, p.D, aligned(x));
    const TileLoader<S, kDim> second(y, rows.batch, task.h, row, p.Dv, aligned(y));
    first.template load<kWarps * kRows, kGeneral>(tile0, task.row0, end);
    second.template load<kWarps * kRows, kGeneral>(tile1, task.row0, end);
  }

  HEEDFUL_DEVICE int first_of(int row) const { return kOfKeys ? span.first_query(row) : span.first_key(row); }
  HEEDFUL_DEVICE int end_of(int row) const { return kOfKeys ? span.end_query(row) : span.end_key(row); }

  HEEDFUL_DEVICE void go_over() {
    const int last_row = least(task.row0 + kWarps * kRows, end) - 1;
    if (last_row < task.row0 || p.normalizer == Normalizer::hard) return;
    const int first = first_of(task.row0) / kStep * kStep, last = end_of(last_row);
    if (first >= last) return;
    const int head0 = kOfKeys ? task.h * group() : task.h, end_head = kOfKeys ? head0 + group() : head0 + 1;
    Step step = visit({head0, first}, first, last, end_head);
    if (step.h >= end_head) return;

    load_own();
    load_step(0, step);
    commit_copies();
    const int warp_last = least(row0 + kRows, end) - 1;
    const int warp_first = warp_last < row0 ? last : first_of(row0),
              warp_end = warp_last < row0 ? 0 : end_of(warp_last);
    if constexpr (!kOfKeys) load_numbers(task.h, row0 + fragment_row(lane));
    for (int n = 0; step.h < end_head; n ^= 1) {
      const Step next = visit({step.h, step.at + kStep}, first, last, end_head);
      wait_copies<0>();
      sync_block();
      if (next.h < end_head) load_step(n ^ 1, next);
      commit_copies();
      if (warp_first < step.at + kStep && step.at < warp_end) add_tile(stage(n), step);
      step = next;
    }
  }

  // What backward knows of the queries that a lane has: rows 0 and 8 from `first` on, or columns.
  HEEDFUL_DEVICE void load_numbers(int h, int first) {
    const Band rows = band();
    const QueryStates<float> states(p, norm_bytes(p));
    const int64_t index = query_index(p, rows, h);
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      const int i = first + (kOfKeys ? n / 2 * 8 + n % 2 : 8 * n);
      const bool exists = i < span.queries;
      const float of_row = exists ? load_global(static_cast<const float*>(p.lse) + index + i) : -kInfinity<float>;
      // NOTE: infinity stands for a query that saw nothing; one that saw an infinite score has NaN for gradients.
      lse[n] = of_row == -kInfinity<float> ? kInfinity<float> : of_row == kInfinity<float> ? of_row - of_row : of_row;
      delta[n] = exists ? load_global(states.delta + index + i) : 0;
    }
  }
  HEEDFUL_DEVICE static int number_of(int n, int e) { return kOfKeys ? 2 * n + e % 2 : e / 2; }

  HEEDFUL_DEVICE void add_tile(uint32_t other, Step step) {
    const int row = row0 + fragment_row(lane), column = step.at + fragment_column(lane);
    const Corner corner = kOfKeys ? Corner{column, row} : Corner{row, column};
    const uint32_t own_part = uint32_t(row0 - task.row0) * kPitch<S, kDim> + rows_first<S, kDim>(lane);
    float s[1][kN][4] = {}, dp[1][kN][4] = {};
    multiply_transposed<S, kDim>(s, tile0 + own_part, other + columns_first<S, kDim>(lane));
    multiply_transposed<S, kDim>(dp, tile1 + own_part, other + Config::kStepBytes + columns_first<S, kDim>(lane));
    if constexpr (kOfKeys) load_numbers(step.h, column);
    const bool covered = kOfKeys ? span.covers(step.at, step.at + kStep, row0, row0 + kRows)
                                 : span.covers(row0, row0 + kRows, step.at, step.at + kStep);
    if constexpr (kGeneral)
      to_gradients(s, dp, corner, step, covered);
    else
      to_plain_gradients(s, dp, corner, covered);
    if constexpr (kFirst) multiply<S, kDim>(sum0, dp, other + summed_rows<S, kDim>(lane));
    if constexpr (kSecond) multiply<S, kDim>(sum1, s, other + Config::kStepBytes + summed_rows<S, kDim>(lane));
  }

  // s becomes p, and dp ds.
  HEEDFUL_DEVICE void to_plain_gradients(float (&s)[1][kN][4], float (&dp)[1][kN][4], const Corner& corner,
                                         bool covered) const {
    if (!covered) mask_band<kOfKeys>(span, s, corner);
    const float scale = float(p.scale);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int x = number_of(n, e);
        const bool absent = s[0][n][e] == -kInfinity<float> || lse[x] == kInfinity<float>;
        const float prob = exp2_fast((s[0][n][e] * scale - lse[x]) * float(kLog2e));
        s[0][n][e] = absent ? 0 : prob;
        dp[0][n][e] = absent ? 0 : score_gradient(prob, dp[0][n][e], delta[x]);
      }
  }

  // s becomes z p; dp what the products with the other side's rows take: ds times what a pair has of its own.
  HEEDFUL_DEVICE void to_gradients(float (&s)[1][kN][4], float (&dp)[1][kN][4], const Corner& corner, Step step,
                                   bool covered) {
    const HeadScores<S> head(p, band(), task.b, step.h);
    float t[1][kN][4];
    apply_scores<kOfKeys>(head, band(), span, tile_of(step), s, corner, &t);
    if (!covered) mask_band<kOfKeys>(span, s, corner);
    // ds = p (z dp - delta); what is absent is 0 whatever its numbers are.
    float z[1][kN][4];
    const bool drops = has_dropout(p);
    if (drops) keep<kOfKeys>(head, z, corner, step.at);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int x = number_of(n, e);
        const bool absent = s[0][n][e] == -kInfinity<float> || lse[x] == kInfinity<float>;
        const float prob = exp2_fast((s[0][n][e] - lse[x]) * float(kLog2e)), factor = drops ? z[0][n][e] : 1;
        s[0][n][e] = absent ? 0 : prob * factor;
        dp[0][n][e] = absent ? 0 : score_gradient(prob, factor * dp[0][n][e], delta[x]);
        t[0][n][e] = absent ? 0 : t[0][n][e];
      }
    if (p.softcap != 0) {
      const float inverse = 1 / float(p.softcap);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[0][n][e] *= soft_cap_slope(t[0][n][e], inverse);
    }
    if (p.scales.data) {
      const float factor = head.factor();
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[0][n][e] *= factor, t[0][n][e] *= factor == 0 ? 0 : 1 / factor;
    }
    if (p.similarity == Similarity::dot) return;
    // The other side's norms, and what the rows lose of themselves.
    const bool cosine = p.similarity == Similarity::cosine;
    const Band rows = band();
    const float* norms =
        kOfKeys ? Norms(p).q + query_index(p, rows, step.h) : Norms(p).k + key_index(p, rows, kv_head());
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int other =
            least(step.at + fragment_column(lane) + 8 * n + e % 2, (kOfKeys ? span.queries : span.keys) - 1);
        own[e / 2] += cosine ? dp[0][n][e] * t[0][n][e] : dp[0][n][e];
        if (cosine) dp[0][n][e] = dp[0][n][e] == 0 ? 0 : dp[0][n][e] * load_global(norms + other);
      }
  }

  // ---- results

  HEEDFUL_DEVICE void finish() {
    const uint32_t part = uint32_t(row0 - task.row0) * kPitch<S, kDim>;
    const Band rows = band();
    const int64_t row = (kOfKeys ? rows.k_row : rows.q_row) + row0;
    // Products have been scaled by a number for each head already.
    const float scale = kGeneral && p.scales.data ? 1 : float(p.scale);
    sync_warp();
    uint32_t spoilt = 0;  // a bit for each of the warp's rows whose gradient is not finite
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 8 * r + fragment_row(lane);
      float own_part = 0, factor = scale;
      if constexpr (kGeneral && kFirst) {
        if (p.similarity != Similarity::dot && row0 + at < end) {
          own_part = own[r] * scale;
          if (p.similarity == Similarity::cosine) {
            const int64_t index = kOfKeys ? key_index(p, rows, task.h) : query_index(p, rows, task.h);
            const float norm = load_global((kOfKeys ? Norms(p).k : Norms(p).q) + index + row0 + at);
            // NOTE: t is scaled once already, where there is one scale for all heads.
            own_part = norm < float(1 / kSmallestNorm) ? own[r] * norm * norm : 0;
            factor *= norm;
          }
        }
        own_part += shuffle_xor(own_part, 1);
        own_part += shuffle_xor(own_part, 2);
      }
      bool finite = true;
      if constexpr (kFirst) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          float (&x)[4] = sum0[0][n];
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) x[e] = x[e] == 0 ? 0 : x[e] * factor;
          if (kGeneral && own_part != 0) {
            float a, b;
            Neighbours<S, kDim>(tile0 + part, at, n).load(a, b);
            x[2 * r] -= own_part * a, x[2 * r + 1] -= own_part * b;
          }
          finite &= x[2 * r] - x[2 * r] == 0 && x[2 * r + 1] - x[2 * r + 1] == 0;
        }
      }
      if constexpr (kSecond) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          finite &= sum1[0][n][2 * r] - sum1[0][n][2 * r] == 0 && sum1[0][n][2 * r + 1] - sum1[0][n][2 * r + 1] == 0;
      }
      spoilt |= uint32_t(!finite) << at;
    }
#pragma unroll
    for (int n = 16; n; n /= 2) spoilt |= shuffle_xor(spoilt, n);
    const auto store = [&](const auto& sum, uint32_t tile, const View& view, int64_t dim) {
      store_rows<S, kDim>(sum, tile + part, view, row_of<S>(view, rows.batch, task.h, row), own_rows - row0, dim,
                          spoilt);
    };
    if constexpr (kFirst) store(sum0, tile0, kOfKeys ? p.dk : p.dq, p.D);
    if constexpr (kSecond) store(sum1, tile1, p.dv, p.Dv);
    // Absent pairs let infinite and NaN rows through, as in forward: such rows are done again, pair by pair.
#pragma unroll 1
    for (int n = 0; n < kRows; ++n) {
      if (!(spoilt >> n & 1) || row0 + n >= own_rows) continue;
      if constexpr (kOfKeys)
        gradients_of_key<S>(p, band(), task.b, task.h, row0 + n, kFirst, kSecond);
      else
        gradient_of_query<S>(p, band(), task.b, task.h, row0 + n);
    }
  }
};

template <class Config>
HEEDFUL_KERNEL(kThreads, Config::kDim < 256 ? 2 : 1)
void backward(HEEDFUL_PARAMETER Problem p) {
  Backward<Config>(p).run();
}

template <class S, int kDim>
void plan_backward_sm80(const Problem& p, cuda::Plan* plan) {
  const auto add = [&](auto config, const char* name) {
    using Config = decltype(config);
    plan->add(
        {&HEEDFUL_TARGET::backward<Config>,
         RowTask < Config::kSide == Side::queries ? RowsOf::queries : RowsOf::keys > ::count(p, kWarps * Config::kRows),
         kThreads, Config::kSharedBytes, name});
  };
  const auto add_all = [&]<bool kGeneral>(const char* name) {
    add(BackwardConfig<S, kDim, kGeneral, Side::queries>(), name);
    if constexpr (kDim < 256) {
      add(BackwardConfig<S, kDim, kGeneral, Side::keys>(), name);
    } else {
      add(BackwardConfig<S, kDim, kGeneral, Side::keys_alone>(), name);
      add(BackwardConfig<S, kDim, kGeneral, Side::values>(), name);
    }
  };
  plan_query_states<S>(p, plan);
  if (is_plain<S>(p) && is_aligned<S>(p.dout)) return add_all.template operator()<false>("sm80/backward, plain");
  plan_norms<S>(p, plan);
  add_all.template operator()<true>("sm80/backward, general");
}

}  // namespace heedful::HEEDFUL_TARGET
