// Memory that is wanted next comes to the second cache while something else is computed: at an even pace within large
// products, where bursts would wait for memory and leave it idle afterwards; else whole rows at a time.
#pragma once

#include <cassert>

#include "microkernel.h"
#include "spans.h"

namespace heedful::HEEDFUL_TARGET {

// For memory that is read in order, a row of so many bytes after the other: the processor fetches what follows by
// itself, but stops at the page's end. Where a page begins a line of a later one is asked for.
HEEDFUL_FN void fetch_later_page(const void* row, int64_t bytes) {
  constexpr int64_t kPage = 4096, kPages = 4;
  if (int64_t(uintptr_t(row) % kPage) < bytes)
    __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(row) + kPages * kPage), 0, 2);
}

// Rows of memory so far apart that the processor does not guess the next.
struct RowsAhead {
  const char* data = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0;  // from row to row; of a row
  bool written = false;

  int64_t lines() const { return rows * ((bytes + kLine - 1) / kLine); }
};

// Fetches rows in order, whole ones.
struct RowByRow {
  RowsAhead rows, then;

  explicit RowByRow(const RowsAhead& rows, const RowsAhead& then = {}) : rows(rows), then(then) {
    if (!any()) take_next();
  }
  HEEDFUL_FN bool any() const { return rows.rows > 0; }
  HEEDFUL_FN void fetch_rows(int count) {
    for (; count > 0 && any(); --count) {
      for (int64_t at = 0; at < rows.bytes; at += kLine) fetch_line(at);
      take_row();
    }
  }
  // That it was asked often enough.
  HEEDFUL_FN void expect_end() const { assert(!any()); }

 protected:
  // To the second cache: strides of 4096 have few places in the first.
  HEEDFUL_FN void fetch_line(int64_t at) const {
    if (rows.written)
      __builtin_prefetch(rows.data + at, 1, 2);
    else
      __builtin_prefetch(rows.data + at, 0, 2);
  }
  HEEDFUL_FN void take_row() {
    rows.data += rows.stride;
    if (--rows.rows == 0) take_next();
  }
  HEEDFUL_FN void take_next() { rows = then, then = {}; }
};

// Fetches rows in order, their lines spread evenly over so many steps.
struct Ahead : RowByRow {
  int64_t lines, steps;
  int64_t due = 0, at = 0;  // lines times steps; bytes of the first row that were fetched

  Ahead(const RowsAhead& rows, const RowsAhead& then, int64_t steps)
      : RowByRow(rows, then), lines(rows.lines() + then.lines()), steps(most<int64_t>(steps, 1)) {}
  HEEDFUL_FN void step() {
    for (due += lines; due >= steps && any(); due -= steps) {
      fetch_line(at);
      at += kLine;
      if (at >= rows.bytes) at = 0, take_row();
    }
  }
};

struct SumMeanwhile : WholeSum {
  mutable Ahead ahead;
  HEEDFUL_FN void pause() const { ahead.step(); }
};
// A product whose sums are of `count` numbers, all of them; meanwhile rows come, if there are any.
template <Onto onto, class E, Unit unit>
HEEDFUL_FN void multiply_meanwhile(Operand<E, unit> a, int64_t m0, int64_t m1, const E* b, int64_t b_stride, Sum<E>* c,
                                   int64_t c_stride, int64_t lanes, Sum<E>* per_lane, int64_t count, Ahead& ahead) {
  if (!ahead.any()) return multiply<onto>(a, m0, m1, b, b_stride, c, c_stride, lanes, per_lane, WholeSum{count});
  const SumMeanwhile sum{{count}, ahead};
  multiply<onto>(a, m0, m1, b, b_stride, c, c_stride, lanes, per_lane, sum);
  ahead = sum.ahead;
}
// Likewise, all rows, then others.
template <Onto onto, class E, Unit unit>
HEEDFUL_FN void multiply_meanwhile(Operand<E, unit> a, int64_t m0, int64_t m1, const E* b, int64_t b_stride, Sum<E>* c,
                                   int64_t c_stride, int64_t lanes, Sum<E>* per_lane, int64_t count,
                                   const RowsAhead& rows, const RowsAhead& then = {}) {
  Ahead ahead(rows, then, pauses<E>(m1 - m0, lanes, count));
  multiply_meanwhile<onto>(a, m0, m1, b, b_stride, c, c_stride, lanes, per_lane, count, ahead);
  ahead.expect_end();
}

// Pauses of the products that spans have in parts.
template <class E, int kN>
HEEDFUL_FN int64_t pauses(const Spans<kN>& spans, int64_t numbers) {
  int64_t sum = 0;
  spans.for_each_part([&](int64_t from, int64_t to, int lo, int hi, int) {
    sum += pauses<E>(to - from, (hi - lo) * kLanes<E>, numbers);
  });
  return sum;
}

// A product of kN vectors, each over its span of the sum; meanwhile rows come, then others.
template <int kN>
struct SpansMeanwhile : SumMeanwhile {
  Spans<kN> spans;
};
template <int kN, Onto onto, class E, Unit unit>
HEEDFUL_CALLED void multiply_spans_meanwhile(Operand<E, unit> a, int64_t m0, int64_t m1, const E* b, int64_t b_stride,
                                             Sum<E>* c, int64_t c_stride, Sum<E>* per_lane, const Spans<kN>& spans,
                                             const RowsAhead& rows, const RowsAhead& then) {
  const int64_t steps = pauses<E>(m1 - m0, kN * kLanes<E>, spans.count());
  const SpansMeanwhile<kN> sum{{{spans.count()}, Ahead(rows, then, steps)}, spans};
  multiply_panel<kN, onto>(a, m0, m1, b, b_stride, c, c_stride, per_lane, sum);
  sum.ahead.expect_end();
}

HEEDFUL_FN int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
// A tile's part of a [B, Hq, Sq, Sk] tensor of elements of `size` bytes. Nothing comes of rows that lie otherwise.
HEEDFUL_FN RowsAhead ahead_of(const View& view, int64_t size, const Tile& t) {
  if (!view.data || view.stride[3] != 1) return {};
  const int64_t at = t.b * view.stride[0] + t.h * view.stride[1] + t.i0 * view.stride[2] + t.j0;
  const int64_t rows = view.stride[2] == 0 ? 1 : t.i1 - t.i0;
  return {static_cast<const char*>(view.data) + at * size, rows, view.stride[2] * size, (t.j1 - t.j0) * size};
}
// `rows` rows of one head of q, k, v or out, from row `first` on, likewise.
template <class S>
HEEDFUL_FN RowsAhead ahead_of(const View& view, int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t dim) {
  if (view.stride[3] != 1) return {};
  constexpr int64_t size = sizeof(S);
  return {reinterpret_cast<const char*>(row_of<const S>(view, batch, head, first)), rows, view.stride[2] * size,
          dim * size};
}

}  // namespace heedful::HEEDFUL_TARGET
