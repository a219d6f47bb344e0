// What backward's tiles need of a query, made once for all of them.
#pragma once

#include "../score/mask.h"
#include "tiles.h"

namespace heedful::HEEDFUL_TARGET {

// lse, in the scores' own units, is rounded; the probabilities' `weight` makes up for that.
template <class C>
struct RowState {
  C lse, weight, delta;
};

// Of query i of a head, whose scores' unit is `unit`: delta = sum_d dO O - dlse. A row that attends to nothing has no
// score above -inf; no gradient that arrives at it counts.
template <class S, class C = Compute<S>>
HEEDFUL_FN RowState<C> row_state(const Problem& p, const Band& band, int64_t h, int64_t i, C lse, double unit) {
  constexpr int n = kLanes<C>;
  if (lse == -kInfinity<C>) return {kInfinity<C>, 1, 0};
  const S *g = row_of<const S>(p.dout, band.batch, h, band.q_row + i),
          *o = row_of<const S>(p.out, band.batch, h, band.q_row + i);
  const int64_t whole = p.dout.stride[3] == 1 && p.out.stride[3] == 1 ? p.Dv / n * n : 0;
  // An out of 0 adds nothing: a query that has only a sink to attend to ignores its dout, NaN included.
  Vec<C> lanes = {};
  for (int64_t d = 0; d < whole; d += n) {
    const Vec<C> x = load_as(o + d, C());
    lanes += select(x == Vec<C>{}, Vec<C>{}, load_as(g + d, C()) * x);
  }
  C delta = sum_lanes<C>(lanes);
  for (int64_t d = whole; d < p.Dv; ++d) {
    const C x = C(to_compute(o[d * p.out.stride[3]]));
    delta += x == 0 ? C(0) : C(to_compute(g[d * p.dout.stride[3]])) * x;
  }
  if (p.dlse.data) delta -= row_of<const C>(p.dlse, band.batch, h, band.q_row + i)[0];
  const double exact = double(lse) / unit, lost = (exact - double(C(exact))) * unit;
  // Past 2^13 the scores themselves are rounded more coarsely than this.
  return {C(exact), lost * lost < 0x1p-20 ? C(1 - lost) : C(1), delta};
}

}  // namespace heedful::HEEDFUL_TARGET
