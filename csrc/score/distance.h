// Biases that depend on how far a key lies after the query's position, distance = j - position, and on the head alone:
// ALiBi, and a table of learned numbers (T5's, clipped relative positions).
//   value        f(distance) = -slope * |distance| + table[bucket(distance)]
//   derivative   d(slope) = -sum |distance| ds,  d(table[n]) = sum of ds where bucket(distance) = n
// A tile has few distances, one for each diagonal: values are looked up, and gradients added up, diagonal by diagonal.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "mask.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

HEEDFUL_FN bool has_distances(const Problem& p) { return p.slopes.data || p.table.data; }

// The parameters' numbers of one head of one sequence.
template <class C>
struct DistanceBias {
  C slope;         // 0 where there is none
  const C* table;  // its row n is table[n * stride]; null where there is none
  int64_t stride, last_row, max_distance;
  const int64_t* buckets;  // of rows that no one may have checked

  HEEDFUL_FN DistanceBias(const Problem& p, int64_t b, int64_t h)
      : slope(p.slopes.data ? static_cast<const C*>(p.slopes.data)[b * p.slopes.batch_stride + h] : C(0)),
        table(p.table.data ? static_cast<const C*>(p.table.data) + b * p.table.batch_stride + h : nullptr),
        stride(p.Hq),
        last_row(p.table_rows - 1),
        max_distance(p.max_distance),
        buckets(p.buckets) {}

  HEEDFUL_FN int64_t bucket(int64_t distance) const {
    return clamp(buckets[clamp(distance, -max_distance, max_distance) + max_distance], 0, last_row);
  }
  HEEDFUL_FN C value(int64_t distance) const {
    const C far = C(distance < 0 ? -distance : distance);
    return (table ? table[bucket(distance) * stride] : C(0)) - (slope == C(0) ? C(0) : slope * far);
  }
  // Without a table, of any lanes of |distance|.
  template <class Far>
  HEEDFUL_FN Far value_of_slope(Far far) const {
    return slope == C(0) ? Far{} : -(slope * far);
  }
  // `ds` is the sum over a diagonal. to_slope is one number, to_table one for each row.
  HEEDFUL_FN void add_gradient(int64_t distance, double ds, double* to_slope, double* to_table) const {
    *to_slope -= ds * double(distance < 0 ? -distance : distance);
    if (table) to_table[bucket(distance)] += ds;
  }
};

}  // namespace heedful::HEEDFUL_TARGET
