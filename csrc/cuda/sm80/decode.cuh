// Attention forward of few queries over many keys (decoding), by mma.sync. The time is that of reading K and V, which
// happens once for all query heads that share them: the rows of a block's tile are the queries of every head of the
// group, row query * group + head. Blocks share the keys, too:
//
//   decode    a block's rows over one split of the keys: O, and each row's maximum and sum, into the workspace
//   combine   a row's splits, in order, become its result
//
// A tile of keys is computed as in forward.cuh, but that each row of a lane has a head and a query of its own.
#pragma once

#include "../rows.cuh"
#include "decodes.h"
#include "scores.cuh"
#include "tiles.cuh"

namespace heedful::HEEDFUL_TARGET {

HEEDFUL_FN int group_of(const Problem& p) { return int(p.Hq / p.Hk); }
// The most rows of a group that any sequence has.
HEEDFUL_FN int64_t most_rows(const Problem& p) { return group_of(p) * least<int64_t>(p.Sq, kFewQueries); }

// How the keys that a sequence's queries see are split. It follows from the sequence, heads and groups alone.
struct Splits {
  static constexpr int kFewestKeys = 256;  // 128 KB of K and V at D = 128 for each 32 KB that 64 rows leave behind
  static constexpr int kBlocks = 256;      // of a sequence: about what a GPU runs at once
  int first, end;                          // the keys seen
  int size, count;                         // keys of a split; splits

  HEEDFUL_FN static int64_t most(const Problem& p) {
    const int64_t parts = (p.Sk + kFewestKeys - 1) / kFewestKeys;
    return clamp(kBlocks / (p.Hk ? p.Hk : 1), 1, parts ? parts : 1);
  }
  HEEDFUL_FN Splits(const Problem& p, const Band& band, const Span& span) : first(0), end(0), size(0), count(0) {
    if (span.queries <= 0) return;
    first = span.first_key(0) / int(kMaskTile) * int(kMaskTile), end = span.end_key(span.queries - 1);
    if (first >= end) return;
    const int keys = end - first, tiles = (int(band.q_rows) * group_of(p) + 63) / 64, fewest = kFewestKeys * tiles;
    const int parts = int(clamp((keys + fewest - 1) / fewest, 1, most(p)));
    size = ((keys + parts - 1) / parts + int(kMaskTile) - 1) / int(kMaskTile) * int(kMaskTile);
    count = (keys + size - 1) / size;
  }
};

// Two numbers that are read and written together.
struct alignas(8) Pair {
  float x, y;
};

// What decode leaves in the workspace for combine: of each split of each group, O and {maximum, sum} by row. O is
// relative to the maximum; a row that met no pair has a sum of 0 and no O.
struct Partials {
  int64_t rows, pitch, all;  // pitch: of O; all: splits of all sequences of a kv head
  float* out;
  Pair* states;

  HEEDFUL_FN explicit Partials(const Problem& p)
      : rows(most_rows(p)),
        pitch((p.Dv + 7) / 8 * 8),
        all(p.k_offsets ? p.k_rows / Splits::kFewestKeys + p.B : p.B * Splits::most(p)),
        out(reinterpret_cast<float*>(static_cast<char*>(p.workspace) + norm_bytes(p))),
        states(reinterpret_cast<Pair*>(out + p.Hk * all * rows * pitch)) {}
  HEEDFUL_FN int64_t bytes(const Problem& p) const {
    return p.Hk * all * rows * int64_t(sizeof(Pair) + size_t(pitch) * sizeof(float));
  }

  // Row 0 of one split of one group, in the states and in O.
  HEEDFUL_FN int64_t first_row(const Problem& p, const Band& band, int64_t b, int64_t hk, int64_t split) const {
    // No earlier sequence has more than k_row / kFewestKeys + b splits together with those before.
    const int64_t before = p.k_offsets ? band.k_row / Splits::kFewestKeys + b : b * Splits::most(p);
    return (hk * all + before + split) * rows;
  }
};

template <class Config>
struct Decode {
  using S = typename Config::Storage;
  static constexpr bool kGeneral = Config::kGeneral;
  static constexpr int kDim = Config::kDim, kRows = Config::kRows, kKeys = Config::kKeys;
  static constexpr int kN = kKeys / 8, kColumns = kDim / 8;

  const Problem& p;
  const Task task;  // of a group and a split
  const int kv_head, group;
  const Span span;
  const int rows;        // that exist
  const int lane, row0;  // the warp's first row
  const float to_log2;   // what one unit of a score is worth in powers of two
  const uint32_t queries;
  uint32_t of_row;                 // query and head of the warp's row lane % 16; past the last one, as of the last one
  int covered_first, covered_end;  // the keys that all of the warp's rows see
  float out[1][kColumns][4];
  float top[2], sum[2];  // maximum and this lane's part of the sum, of rows 8 r + lane / 4

  HEEDFUL_DEVICE explicit Decode(const Problem& problem)
      : p(problem),
        task(most_rows(p), p.Hk * Splits::most(p), Config::kTileRows),
        kv_head(task.h / int(Splits::most(p))),
        group(group_of(p)),
        span(band()),
        rows(decodes(p, band().q_rows) ? least(span.queries, int(p.Sq)) * group : 0),
        lane(thread_index() % 32),
        row0(task.row0 + thread_index() / 32 * kRows),
        to_log2(float(kGeneral ? kLog2e : p.scale * kLog2e)),
        queries(shared_base()) {}

  // NOTE: made anew where it is needed, for registers' sake.
  HEEDFUL_DEVICE Band band() const { return Band(p, task.b); }
  HEEDFUL_DEVICE int split() const { return task.h % int(Splits::most(p)); }
  HEEDFUL_DEVICE int query_of(int row) const { return row / group; }
  HEEDFUL_DEVICE int head_of(int row) const { return kv_head * group + row % group; }
  HEEDFUL_DEVICE uint32_t stage(int n) const { return queries + Config::kQueryBytes + n * 2 * Config::kKeyBytes; }

  HEEDFUL_DEVICE void run() {
    if (task.row0 >= rows) return;
    const Splits splits(p, band(), span);
    if (split() >= splits.count) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = -kInfinity<float>, sum[r] = 0;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) out[0][n][2 * r] = out[0][n][2 * r + 1] = 0;
    }
    const int row = least(row0 + lane % kRows, rows - 1);
    of_row = uint32_t(row % group * kFewQueries + query_of(row));
    covered_first = span.first_key(query_of(least(row0 + kRows, rows) - 1)), covered_end = span.end_key(query_of(row0));
    const int first = splits.first + split() * splits.size;
    attend(first, least(first + splits.size, splits.end));
    store();
  }

  // The first tile from key j on that is not empty for all of the block's rows.
  HEEDFUL_DEVICE int visit(int j, int end) const {
    if constexpr (kGeneral)
      if (p.tiles.data)
        for (; j < end; j += kKeys) {
          bool any = false;
          for (int row = task.row0 + lane; row < least(task.row0 + Config::kTileRows, rows); row += 32)
            any |= mask_tile(p, task.b, head_of(row), query_of(row), j) != kEmptyTile;
          if (any_lane(any)) return j;
        }
    return j;
  }

  HEEDFUL_DEVICE void attend(int first, int end) {
    const int last = least(task.row0 + Config::kTileRows, rows) - 1;
    first = most(first, span.first_key(query_of(task.row0)) / kKeys * kKeys);
    end = least(end, span.end_key(query_of(last)));
    int j = visit(first, end);
    if (j >= end) return;

    const Band sequence = band();
    const TileLoader<S, kDim> k(p.k, sequence.batch, kv_head, sequence.k_row, p.D, !kGeneral || is_aligned<S>(p.k)),
        v(p.v, sequence.batch, kv_head, sequence.k_row, p.Dv, !kGeneral || is_aligned<S>(p.v));
    const TileLoader<S, kDim> q(p.q, sequence.batch, kv_head * group, sequence.q_row, p.D,
                                !kGeneral || is_aligned<S>(p.q));
    q.template load<Config::kTileRows, kGeneral>(
        queries, task.row0, rows, [&](int row) { return row % group * p.q.stride[1] + query_of(row) * p.q.stride[2]; });
    const auto load = [&](int n, int from) {
      k.template load<kKeys, kGeneral>(stage(n), from, span.keys);
      v.template load<kKeys, kGeneral>(stage(n) + Config::kKeyBytes, from, span.keys);
    };
    load(0, j);
    commit_copies();
    for (int n = 0; j < end; n ^= 1) {
      const int next = visit(j + kKeys, end);
      wait_copies<0>();
      sync_block();
      if (next < end) load(n ^ 1, next);
      commit_copies();
      if (row0 < rows) attend_tile(stage(n), j);
      j = next;
    }
  }

  HEEDFUL_DEVICE void attend_tile(uint32_t keys, int j) {
    const uint32_t q = queries + uint32_t(row0 - task.row0) * kPitch<S, kDim> + rows_first<S, kDim>(lane);
    const bool covered = covered_first <= j && j + kKeys <= covered_end;
    float s[1][kN][4] = {};
    multiply_transposed<S, kDim>(s, q, keys + columns_first<S, kDim>(lane));
    // f of what a lane has of its row 8 r + lane / 4.
    const auto change = [&](int r, auto f) {
      float half[1][kN][2];
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) half[0][n / 2][n % 2] = s[0][n / 2][2 * r + n % 2];
      f(half);
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) s[0][n / 2][2 * r + n % 2] = half[0][n / 2][n % 2];
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // NOTE: asked of another lane in each tile anew, for registers' sake.
      const uint32_t query_and_head = shuffle(of_row, 8 * r + fragment_row(lane));
      const int query = int(query_and_head % kFewQueries), head = kv_head * group + int(query_and_head / kFewQueries);
      const Corner corner{query, j + fragment_column(lane)};
      const auto scores = [&] { return HeadScores<S>(p, band(), task.b, head); };
      change(r, [&](auto& x) {
        if constexpr (kGeneral) {
          const int32_t tile = mask_tile(p, task.b, head, query, j);
          apply_scores<false>(scores(), band(), span, tile, x, corner);
        }
        if (!covered) mask_band<false>(span, x, corner);
      });
      to_weights(s[0], out[0], r, to_log2, top[r], sum[r]);
      if constexpr (kGeneral)
        if (has_dropout(p)) change(r, [&](auto& x) { drop(scores(), x, query, j); });
    }
    multiply<S, kDim>(out, s, keys + Config::kKeyBytes + summed_rows<S, kDim>(lane));
  }

  HEEDFUL_DEVICE void store() const {
    const Partials partials(p);
    const int64_t part = partials.first_row(p, band(), task.b, kv_head, split());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const int row = row0 + 8 * r + fragment_row(lane);
      if (row >= rows) continue;
      if (lane % 4 == 0) store_global(partials.states + part + row, Pair{top[r], total});
      if (total == 0) continue;
      float* to = partials.out + (part + row) * partials.pitch + fragment_column(lane);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        if (8 * n < int(p.Dv))
          store_global(reinterpret_cast<Pair*>(to + 8 * n), Pair{out[0][n][2 * r], out[0][n][2 * r + 1]});
    }
  }
};

template <class Config>
HEEDFUL_KERNEL(kThreads, 2)
void decode(HEEDFUL_PARAMETER Problem p) {
  Decode<Config>(p).run();
}

// A block has one row of one head; a thread has two columns.
template <class S, int kDim, bool kGeneral>
HEEDFUL_KERNEL(kDim / 2, 1)
void combine(HEEDFUL_PARAMETER Problem p) {
  const int queries = int(least<int64_t>(p.Sq, kFewQueries)), i = block_index() % queries;
  const int h = block_index() / queries % int(p.Hq), b = block_index() / queries / int(p.Hq);
  const Band band(p, b);
  if (!decodes(p, band.q_rows) || i >= band.q_rows) return;
  const Span span(band);
  const HeadScores<S> head(p, band, b, h);
  const bool exists = i < span.queries;
  const int group = group_of(p), column = 2 * thread_index(), count = exists ? Splits(p, band, span).count : 0;
  const Partials partials(p);
  const int64_t row = partials.first_row(p, band, b, h / group, 0) + i * group + h % group;

  const float sink = kGeneral && exists ? head.sink() : -kInfinity<float>;
  const float unit = kGeneral ? 1 : float(p.scale), to_log2 = unit * float(kLog2e);
  float top = sink;
#pragma unroll 4
  for (int n = 0; n < count; ++n) top = maximum(top, load_global(partials.states + row + n * partials.rows).x);
  const float reference = softmax_reference(top, -kInfinity<float>);
  float sum = sink == -kInfinity<float> ? 0 : exp2_fast((sink - reference) * to_log2);
  Pair out = {0, 0};
#pragma unroll 4
  for (int n = 0; n < count; ++n) {
    const int64_t at = row + n * partials.rows;
    const Pair state = load_global(partials.states + at);
    if (state.y == 0) continue;
    const float weight = exp2_fast((state.x - reference) * to_log2);
    sum += state.y * weight;
    if (column >= int(p.Dv)) continue;
    const Pair part = load_global(reinterpret_cast<const Pair*>(partials.out + at * partials.pitch + column));
    out.x += part.x * weight, out.y += part.y * weight;
  }

  // As the forward kernel ends.
  const bool dead = top == -kInfinity<float> && sum == sum;
  const float factor = dead ? 0 : (kGeneral && has_dropout(p) ? float(kept_weight(p)) : 1) / sum;
  out = dead ? Pair{0, 0} : Pair{out.x * factor, out.y * factor};
  const bool finite = dead || (sum - sum == 0 && out.x - out.x == 0 && out.y - out.y == 0);
  const uint32_t spoilt = any_lane(!finite);
  const int warp = thread_index() / 32;
  if (thread_index() % 32 == 0) store_shared(shared_base() + uint32_t(4 * warp), spoilt);
  sync_block();
  uint32_t any_spoilt = 0;
#pragma unroll
  for (int n = 0; n < kDim / 64; ++n) any_spoilt |= load_shared<uint32_t>(shared_base() + uint32_t(4 * n));
  if (any_spoilt) {
    if (warp == 0) attend_row(head, band, span, i);
    return;
  }
  S* to = row_of<S>(p.out, band.batch, h, band.q_row + i) + column;
  if (column < int(p.Dv)) store_global(to, narrow<S>(out.x));
  if (column + 1 < int(p.Dv)) store_global(to + 1, narrow<S>(out.y));
  if (thread_index() == 0)
    store_global(static_cast<float*>(p.lse) + query_index(p, band, h) + i,
                 dead ? -kInfinity<float> : reference * unit + log2_of(sum) * float(kLn2));
}

template <class S, int kDim>
void plan_decode_sm80(const Problem& p, cuda::Plan* plan) {
  const Partials partials(p);
  const auto add = [&](auto config, const char* name) {
    using Config = decltype(config);
    plan->add({&decode<Config>, task_count(p.B, partials.rows, p.Hk * Splits::most(p), Config::kTileRows), kThreads,
               Config::kSharedBytes, name});
    plan->add({&combine<S, kDim, Config::kGeneral>, p.B * p.Hq * least<int64_t>(p.Sq, kFewQueries), kDim / 2,
               kDim / 64 * 4, name});
  };
  plan->workspace_bytes = size_t(norm_bytes(p) + partials.bytes(p));
  if (is_plain<S>(p)) return add(DecodeConfig<S, kDim, false>(), "sm80/decode, plain");
  plan_norms<S>(p, plan);
  add(DecodeConfig<S, kDim, true>(), "sm80/decode, general");
}

}  // namespace heedful::HEEDFUL_TARGET
