// How backward's work is cut into tasks: heads, groups of key blocks, rows. What decides a bit of the result (how many
// groups of several blocks there are) follows from a sequence's own lengths, the number of heads, and which masks and
// gradients the call has: never from the machine, nor from the other sequences.
#pragma once

#include "../score/blocks.h"
#include "../score/mask.h"
#include "lanes.h"

namespace heedful::HEEDFUL_TARGET {

// A number of query heads and the key/value head they share.
struct HeadGroup {
  int64_t hk, first, end;
};

struct BackwardTasks {
  static constexpr int64_t kKeys = 128;
  static constexpr int64_t kRowsPerTask = 256;  // of those that take rows of queries

  // ---- heads --------------------------------------------------------------------------------------------------------

  // Where a bias broadcasts over batch or heads, a task goes over those itself, in order: nobody else adds to its part
  // of the bias gradient.
  static bool sums_batch(const Problem& p) { return p.dbias.data && p.dbias.stride[0] == 0; }
  static bool sums_heads(const Problem& p) { return p.dbias.data && p.dbias.stride[1] == 0; }

  // Whether a task has a single query head of a group, and leaves its dK and dV to be added up (each head's are added
  // up by themselves anyway, so the bits are the same): where there are too few key/value heads, and not so many keys
  // that these parts would be much larger than q; a little larger, where a thread would idle.
  static bool splits_heads(const Problem& p) {
    const int64_t queries = (p.q_offsets ? 1 : p.B) * p.q_rows, keys = (p.k_offsets ? 1 : p.B) * p.k_rows;
    const bool idle = p.B * p.Hk * key_blocks(p, p.Sk) < p.threads;
    return heads_per_group(p) > 1 && !sums_heads(p) && !few_queries(idle ? 2 * queries : queries, keys) &&
           !keeps_busy(p, p.Hk);
  }
  // What tasks are dealt of a sequence: groups of heads, or the heads of groups that are split.
  static int64_t heads_per_task(const Problem& p) { return splits_heads(p) ? 1 : heads_per_group(p); }
  static int64_t head_groups(const Problem& p) { return splits_heads(p) ? p.Hq : p.Hk; }
  static HeadGroup head_group(const Problem& p, int64_t x) {
    const int64_t heads = heads_per_group(p);
    if (splits_heads(p)) return {x / heads, x, x + 1};
    return {x, x * heads, (x + 1) * heads};
  }

  static int64_t task_batches(const Problem& p) { return sums_batch(p) ? least<int64_t>(p.B, 1) : p.B; }
  static int64_t task_heads(const Problem& p) { return sums_heads(p) ? least<int64_t>(p.Hk, 1) : head_groups(p); }
  static int64_t head_tasks(const Problem& p) { return task_batches(p) * task_heads(p); }

  // Whether tasks of `heads` of each sequence keep all threads busy but for an eighth of the time.
  static bool keeps_busy(const Problem& p, int64_t heads) {
    constexpr int64_t kEach = 4;
    const int64_t sequences = task_batches(p),
                  tasks = (has_unlike_sequences(p) || p.tiles.data ? least(sequences, int64_t{1}) : sequences) * heads;
    if (p.threads == 1) return tasks > 0;
    return tasks >= kEach * p.threads && 9 * tasks / p.threads >= 8 * ((tasks - 1) / p.threads + 1);
  }

  // ---- keys ---------------------------------------------------------------------------------------------------------

  static int64_t key_block(const Problem& p) { return p.tiles.data ? kMaskTile : kKeys; }
  static int64_t key_blocks(const Problem& p, int64_t keys) { return (keys + key_block(p) - 1) / key_block(p); }

  // Groups of a sequence's key blocks, each with its own dQ. Group g takes the blocks g, g + groups, and so on: under a
  // causal mask their work is nearly the same.
  static int64_t groups(const Problem& p, const Band& band) {
    return groups(p, band.keys, few_queries(band.queries, band.keys));
  }
  static int64_t task_groups(const Problem& p) {  // of any sequence
    return groups(p, p.Sk, has_unlike_sequences(p) || few_queries(p.Sq, p.Sk));
  }

  // ---- rows ---------------------------------------------------------------------------------------------------------

  // Rows [i0, i1) of one head.
  struct RowTask {
    int64_t b, h, i0, i1;
  };
  static int64_t row_tasks_per_head(const Problem& p) { return (p.Sq + kRowsPerTask - 1) / kRowsPerTask; }
  static int64_t row_tasks(const Problem& p) { return p.B * p.Hq * row_tasks_per_head(p); }
  static RowTask row_task(const Problem& p, const Band& band, int64_t task) {
    const int64_t per_head = row_tasks_per_head(p), head = task / per_head, i0 = task % per_head * kRowsPerTask;
    return {head / p.Hq, head % p.Hq, i0, least(band.q_rows, i0 + kRowsPerTask)};
  }
  static Band band_of_row_task(const Problem& p, int64_t task) { return Band(p, task / row_tasks_per_head(p) / p.Hq); }
  template <class F>
  static void for_row_tasks(const Problem& p, int64_t b, HeadGroup heads, F f) {
    const int64_t count = row_tasks_per_head(p), sequence = b * p.Hq;
    for (int64_t task = (sequence + heads.first) * count; task < (sequence + heads.end) * count; ++task) f(task);
  }

 private:
  // Too few for tasks of single query heads: dK and dV of each would be much larger than its q.
  static bool few_queries(int64_t queries, int64_t keys) { return keys > 4 * queries; }

  // Enough groups for 16 tasks a sequence, each of two blocks as a rule: eight groups cost 3 % (their dQ is added up).
  // A bias's gradient that is summed over the batch wants block x in group x % wanted for all sequences, so nothing of
  // theirs may decide what is wanted; and so it is for one sequence, whose bits are to be those of a batch.
  static int64_t groups(const Problem& p, int64_t keys, bool few) {
    if (p.dbias.data && p.dbias.stride[3] == 0) return 1;  // all keys of a query add to one element
    const int64_t heads = few || p.dbias.data || !p.Hq ? p.Hk : p.Hq, least_blocks = p.dbias.data ? 1 : 2;
    const int64_t wanted = clamp((16 + heads - 1) / most<int64_t>(heads, 1), 1, 8), blocks = key_blocks(p, keys);
    if (blocks == 2 && splits_pair(p)) return least<int64_t>(2, wanted);  // no more than a longer sequence has
    return clamp((blocks + least_blocks - 1) / least_blocks, 1, wanted);
  }
  // Two blocks alone, where one task would leave a thread idle. What a block adds to dQ is added up by itself, so
  // groups of one block give the same bits as one of both.
  static bool splits_pair(const Problem& p) {
    return !p.dbias.data && !p.slopes.gradient && !p.table.gradient && head_tasks(p) < p.threads;
  }
};

}  // namespace heedful::HEEDFUL_TARGET
