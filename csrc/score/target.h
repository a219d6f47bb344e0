// Score features are written once for CPU lanes and for CUDA. Whoever includes them names the target's own namespace in
// HEEDFUL_TARGET, so that no inline function is shared by code compiled for different instruction sets. What every
// target needs of numbers is here.
#pragma once

#include <cstdint>

#ifndef HEEDFUL_TARGET
#error "define HEEDFUL_TARGET (a namespace below heedful) before including score headers"
#endif

#ifdef __CUDACC__
#define HEEDFUL_FN __host__ __device__ __forceinline__
#else
#define HEEDFUL_FN inline __attribute__((always_inline))
#endif

// Called by its own code: worth a call, too large to copy to every caller.
#define HEEDFUL_CALLED __attribute__((noinline))

namespace heedful::HEEDFUL_TARGET {

// How elements lie in memory, and the type they are computed in.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class C>
constexpr C kInfinity = C(__builtin_inf());

template <class T>
HEEDFUL_FN T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
HEEDFUL_FN T most(T a, T b) {
  return a < b ? b : a;
}
HEEDFUL_FN int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

}  // namespace heedful::HEEDFUL_TARGET
