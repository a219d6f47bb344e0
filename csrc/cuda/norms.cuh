// One number for each row of q and k, of which similarities are made of their products:
//   cosine     q . k * n_i * n_j     n = 1 / |x|
//   gaussian   q . k + n_i + n_j     n = -|x|^2 / 2
#pragma once

#include "kernels.h"
#include "rows.cuh"

namespace heedful::HEEDFUL_TARGET {

struct Norms {
  float *q, *k;  // [B, Hq, q_rows], [B, Hk, k_rows]; null where there are none

  HEEDFUL_FN explicit Norms(const Problem& p) : q(static_cast<float*>(p.workspace)), k(q + query_count(p)) {}
};
// What they take of the workspace.
HEEDFUL_FN int64_t norm_bytes(const Problem& p) {
  return p.similarity == Similarity::dot ? 0 : (query_count(p) + key_count(p)) * 4 / 16 * 16 + 16;
}

// A warp takes a row.
template <class S>
HEEDFUL_KERNEL(128, 1)
void norms_of_rows(HEEDFUL_PARAMETER Problem p) {
  const int64_t index = int64_t(block_index()) * 4 + thread_index() / 32, queries = query_count(p);
  if (index >= queries + key_count(p)) return;
  const bool of_query = index < queries;
  const View& view = of_query ? p.q : p.k;
  const int64_t rows = of_query ? p.q_rows : p.k_rows, heads = of_query ? p.Hq : p.Hk;
  const int64_t n = of_query ? index : index - queries;
  const S* x = row_of<const S>(view, n / rows / heads, n / rows % heads, n % rows);
  float squared = 0;
  for (int d = thread_index() % 32; d < int(p.D); d += 32) {
    const float y = operand(p, x + d * view.stride[3]);  // distances are differences
    squared += y * y;
  }
  squared = sum_of_warp(squared);
  if (thread_index() % 32) return;
  const float norm = p.similarity == Similarity::cosine ? inverse_norm(squared) : squared * -0.5f;
  store_global((of_query ? Norms(p).q : Norms(p).k) + n, norm);
}

template <class S>
void plan_norms(const Problem& p, cuda::Plan* plan) {
  if (p.similarity == Similarity::dot) return;
  plan->add({&norms_of_rows<S>, (query_count(p) + key_count(p) + 3) / 4, 128, 0, "norms_of_rows"});
}

}  // namespace heedful::HEEDFUL_TARGET
