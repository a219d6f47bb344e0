// Which keys each vector of queries sees, where a mask's edge crosses a block: the rest of the block is left out of its
// products, vector by vector.
#pragma once

#include "lanes.h"

namespace heedful::HEEDFUL_TARGET {

// Of kN vectors; both limits rise from one to the next, and there are keys, if any, that all of them see.
template <int kN>
struct Spans {
  int64_t first[kN], end[kN];
  int64_t first_whole, end_whole;  // keys between them are seen by every query of every vector

  static Spans all(int64_t count) {
    Spans spans;
    for (int v = 0; v < kN; ++v) spans.first[v] = 0, spans.end[v] = count;
    spans.first_whole = 0, spans.end_whole = count;
    return spans;
  }
  HEEDFUL_FN bool same() const { return first[kN - 1] == first[0] && end[kN - 1] == end[0]; }
  HEEDFUL_FN bool whole() const { return first_whole == first[0] && end_whole == end[kN - 1]; }
  HEEDFUL_FN int64_t count() const { return end[kN - 1] - first[0]; }

  // f(from, to, lo, hi) for each run that the vectors [lo, hi) share: those that see it.
  template <class F>
  HEEDFUL_FN void for_each_run(F f) const {
    rise<1>(f);
    f(first[kN - 1], end[0], Constant<0>{}, Constant<kN>{});
    fall<1>(f);
  }
  // Likewise, of one vector in part, which f is told, or -1.
  template <class F>
  HEEDFUL_FN void for_each_part(F f) const {
    for (int v = 0; v < kN; ++v) {
      const int64_t to = v + 1 < kN ? first[v + 1] : first_whole;
      if (first[v] < to) f(first[v], to, 0, v + 1, v);
    }
    if (first_whole < end_whole) f(first_whole, end_whole, 0, kN, -1);
    for (int v = 0; v < kN; ++v) {
      const int64_t from = v > 0 ? end[v - 1] : end_whole;
      if (from < end[v]) f(from, end[v], v, kN, v);
    }
  }

 private:
  template <int kHi, class F>
  HEEDFUL_FN void rise(F f) const {
    if constexpr (kHi < kN) {
      if (first[kHi - 1] < first[kHi]) f(first[kHi - 1], first[kHi], Constant<0>{}, Constant<kHi>{});
      rise<kHi + 1>(f);
    }
  }
  template <int kLo, class F>
  HEEDFUL_FN void fall(F f) const {
    if constexpr (kLo < kN) {
      if (end[kLo - 1] < end[kLo]) f(end[kLo - 1], end[kLo], Constant<kLo>{}, Constant<kN>{});
      fall<kLo + 1>(f);
    }
  }
};

}  // namespace heedful::HEEDFUL_TARGET
