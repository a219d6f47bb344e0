// Hard attention, backward: the forward kernel finds each query's best key again, and dO goes to that key's value.
//
//   dV[best_i] += z_i dO[i]        the gradients of everything else are zero
//
// Phases: 1. best_i;  2. dV, one task for each key/value head, which adds in the order of heads and queries.
#pragma once

#include "forward.h"

namespace heedful::HEEDFUL_TARGET {

template <class S>
struct HardBackward {
  using C = Compute<S>;
  static constexpr int n = kLanes<C>;

  struct Workspace {
    int64_t* best;  // [B, Hq, Sq]; below 0: none
    C* dv;          // [B, Hk, keys, padded Dv]
  };
  static size_t carve(const Problem& p, char* base, Workspace* w) {
    Carver carve{base};
    w->best = carve.take<int64_t>(query_count(p));
    w->dv = carve.take<C>(key_count(p) * padded<C>(p.Dv));
    return carve.size;
  }

  static void plan(const Problem& p, Plan* plan) {
    Workspace w;
    Forward<S>::plan(p, plan);  // the same tasks and scratch
    plan->phases[0].run = &find;
    plan->phases[1] = {p.B * p.Hk, &scatter};
    plan->phase_count = 2;
    plan->workspace_bytes = carve(p, nullptr, &w);
  }

  static void find(const Problem& p, int64_t task, void* scratch) {
    Workspace w;
    carve(p, static_cast<char*>(p.workspace), &w);
    Forward<S>::find_best_keys(p, task, scratch, w.best);
  }

  static void scatter(const Problem& p, int64_t task, void*) {
    const int64_t b = task / p.Hk, hk = task % p.Hk, stride = padded<C>(p.Dv);
    const Band band(p, b);
    Workspace w;
    carve(p, static_cast<char*>(p.workspace), &w);
    C* dv = w.dv + key_index(p, band, hk) * stride;
    for (int64_t x = 0; x < band.k_rows * stride; ++x) dv[x] = 0;
    for (int64_t h = hk * heads_per_group(p); h < (hk + 1) * heads_per_group(p); ++h) {
      const int64_t* best = w.best + query_index(p, band, h);
      for (int64_t i = 0; i < band.queries; ++i) {
        if (best[i] < 0) continue;
        const C z = has_dropout(p) ? keep_pair<C>(p, b, h, i, best[i]) : C(1);
        const S* dout = row_of<const S>(p.dout, band.batch, h, band.q_row + i);
        for (int64_t d = 0; d < p.Dv; ++d) dv[best[i] * stride + d] += z * C(to_compute(dout[d * p.dout.stride[3]]));
      }
      clear(row_of<S>(p.dq, band.batch, h, band.q_row), p.dq.stride[2], band.q_rows, p.D);
    }
    clear(row_of<S>(p.dk, band.batch, hk, band.k_row), p.dk.stride[2], band.k_rows, p.D);
    store_rows<C>(row_of<S>(p.dv, band.batch, hk, band.k_row), p.dv.stride[2], dv, stride, band.k_rows, p.Dv, C(1));
  }

  static void clear(S* to, int64_t stride, int64_t rows, int64_t dim) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < dim; ++d) from_compute(C(0), to + r * stride + d);
  }
};

}  // namespace heedful::HEEDFUL_TARGET
