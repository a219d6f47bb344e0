// Vectors of this instruction set, by the compiler's vector extensions, and the few functions that kernels need on
// them. HEEDFUL_VECTOR_BYTES and HEEDFUL_VECTOR_REGISTERS are set by isa/*.cpp. Nothing here calls a math library.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../problem.h"
#include "../score/target.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace heedful::HEEDFUL_TARGET {

template <class T, int kBytes = HEEDFUL_VECTOR_BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T in_memory __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = HEEDFUL_VECTOR_BYTES / sizeof(T);

// What a lane comparison gives: all ones or all zeros, in integers as wide as T.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Int = typename IntOf<T>::type;

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct LanesUpTo : LanesUpTo<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesUpTo<0, kLane...> {
  using list = LaneList<kLane...>;
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Hands out aligned pieces of one buffer; with a null base it only measures.
struct Carver {
  char* base;
  size_t size = 0;
  template <class T>
  HEEDFUL_FN T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + size) : nullptr;
    size += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

template <class T>
HEEDFUL_FN Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::in_memory*>(p);
}
template <class T>
HEEDFUL_FN void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::in_memory*>(p) = v;
}
template <class T>
HEEDFUL_FN Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class T>
HEEDFUL_FN Vec<T> iota() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}

template <class M, class V>
HEEDFUL_FN V select(M mask, V a, V b) {
  return mask ? a : b;
}
// b where a or b is NaN, as the processor's own instruction has it, which GCC does not always find.
template <class V>
HEEDFUL_FN V maximum(V a, V b) {
  static_assert(std::is_floating_point_v<decltype(a[0] + 0)>);
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64
  if constexpr (sizeof(a[0]) == sizeof(float)) return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  return (V)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__) && HEEDFUL_VECTOR_BYTES == 32
  if constexpr (sizeof(a[0]) == sizeof(float)) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <class V>
HEEDFUL_FN V minimum(V a, V b) {
  static_assert(std::is_floating_point_v<decltype(a[0] + 0)>);
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64
  if constexpr (sizeof(a[0]) == sizeof(float)) return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
  return (V)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__) && HEEDFUL_VECTOR_BYTES == 32
  if constexpr (sizeof(a[0]) == sizeof(float)) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}
template <class V>
HEEDFUL_FN bool any(V mask) {
  using T = decltype(mask[0] + 0);
  T bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(mask[0]); ++i) bits |= mask[i];
  return bits != 0;
}
// Of all lanes, in a fixed order: halves are joined until one lane is left.
template <int kStep, class V, int... kLane>
HEEDFUL_FN V other_half(V v, LaneList<kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}
template <class T, int kStep = kLanes<T> / 2>
HEEDFUL_FN T sum_lanes(Vec<T> v) {
  v += other_half<kStep>(v, typename LanesUpTo<kLanes<T>>::list{});
  if constexpr (kStep > 1) return sum_lanes<T, kStep / 2>(v);
  return v[0];
}
// All ones where a lane is infinite or NaN.
template <class T>
HEEDFUL_FN Vec<Int<T>> not_finite(Vec<T> v) {
  return ~(v - v == Vec<T>{});
}

// ---- exp2 and log2 -------------------------------------------------------------------------------------------------

// 2^(x factor) for x <= 0 (or NaN, which stays NaN) and a factor above 0; exactly 0 from 2^kLowest down: the products
// that it goes into would come below the normal numbers, where some processors take a hundred cycles each. x factor =
// n + r with |r| <= 1/2; a polynomial in r, and n as the exponent. Adding 1.5 * 2^mantissa and -kLowest rounds to n,
// and leaves n - kLowest in the low bits: an exponent's field of 0, which is that of 0, where n has come to kLowest.
// What such exponents lack to the bias, the polynomial has. With a fused multiply-add x factor is never rounded itself.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kLowest = -116.0f, kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLacking = 2048;                          // 2^(127 + kLowest)
  static constexpr int kMantissa = 23, kDegree = 6;
  // Relative error 2.1e-8 on [-1/2, 1/2], below the rounding of the steps.
  static constexpr float kPolynomial[kDegree + 1] = {1.0f,           0.693147242f,   0.240226522f,   0.0555031039f,
                                                     0.00961769279f, 0.00134066434f, 0.000155946778f};
};
template <>
struct Exp2<double> {
  static constexpr double kLowest = -1012.0, kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLacking = 2048;                                 // 2^(1023 + kLowest)
  static constexpr int kMantissa = 52, kDegree = 13;
  // ln(2)^k / k!; the first term left out is 2^-14 ln(2)^14 / 14! = 4e-18.
  static constexpr double kPolynomial[kDegree + 1] = {
      1.00000000000000000000e+0,  6.93147180559945309417e-1, 2.40226506959100712334e-1, 5.55041086648215799531e-2,
      9.61812910762847716198e-3,  1.33335581464284434234e-3, 1.54035303933816099544e-4, 1.52527338040598402800e-5,
      1.32154867901443094884e-6,  1.01780860092396997275e-7, 7.05491162080112332988e-9, 4.44553827187081149760e-10,
      2.56784359934882051420e-11, 1.36914888539041288809e-12};
};

// Of several vectors, in step: one by one, each would wait for its own last result. Registers hold three of each.
constexpr int kInStep = HEEDFUL_VECTOR_REGISTERS / 4;
// y = factor * sum_k coefficients[k] r^k
template <class T, int kCount, int kTerms>
HEEDFUL_FN void polynomial_each(Vec<T> (&y)[kCount], const Vec<T> (&r)[kCount], const T (&coefficients)[kTerms],
                                T factor) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) y[i] = broadcast<T>(coefficients[kTerms - 1] * factor);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * r[i] + broadcast<T>(coefficients[k] * factor);
}
template <class T, int kCount>
HEEDFUL_FN void exp2_each(Vec<T> (&x)[kCount], Vec<T> factor) {
  using E = Exp2<T>;
  const Vec<T> round = broadcast<T>(E::kRound - E::kLowest), low = broadcast<T>(E::kLowest) / factor;
  Vec<T> shifted[kCount], r[kCount], y[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = maximum(low, x[i]);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) shifted[i] = x[i] * factor + round;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) r[i] = x[i] * factor - (shifted[i] - round);
  polynomial_each<T>(y, r, E::kPolynomial, E::kLacking);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)  // a product, so that NaN stays NaN
    x[i] = y[i] * (Vec<T>)((Vec<Int<T>>)shifted[i] << E::kMantissa);
}
// 2^x of what goes into products of bfloat16, likewise. Where there are instructions for both, x is reduced to [0, 1],
// and the power of two comes last.
template <int kCount>
HEEDFUL_FN void coarse_exp2_each(Vec<float> (&x)[kCount]) {
#if defined(__AVX512DQ__) && HEEDFUL_VECTOR_BYTES == 64
  // Relative error 2.9e-6, none at 0.
  constexpr float kPolynomial[] = {1.0f, 0.693044841f, 0.241280198f, 0.0522424728f, 0.0134266838f};
  constexpr int kFromFloor = 1;
  Vec<float> r[kCount], y[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) r[i] = (Vec<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x[i], kFromFloor);
  polynomial_each<float>(y, r, kPolynomial, 1);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const auto high = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(Exp2<float>::kLowest), _CMP_NLT_UQ);
    x[i] = (Vec<float>)_mm512_maskz_scalef_ps(high, (__m512)y[i], (__m512)x[i]);
  }
#else
  exp2_each<float>(x, broadcast<float>(1));
#endif
}
// f(row, number of rows) for [row, end), kAtOnce together, of the rest half as many, and so on.
template <int kAtOnce, class F>
HEEDFUL_FN void for_each_step(int64_t row, int64_t end, F f) {
  for (; row + kAtOnce <= end; row += kAtOnce) f(row, Constant<kAtOnce>{});
  if constexpr (kAtOnce > 1) for_each_step<kAtOnce / 2>(row, end, f);
}
template <class T>
HEEDFUL_FN Vec<T> exp2(Vec<T> x, Vec<T> factor) {
  Vec<T> only[1] = {x};
  exp2_each<T>(only, factor);
  return only[0];
}
template <class T>
HEEDFUL_FN Vec<T> exp2(Vec<T> x) {
  return exp2<T>(x, broadcast<T>(T(1)));
}

// log2 of normal positive numbers (infinity and NaN stay). x = 2^n * y with y in [sqrt(1/2), sqrt(2));
// log(y) = 2 atanh(t), t = (y - 1) / (y + 1), |t| <= 0.1716.
template <class T>
HEEDFUL_FN Vec<T> log2(Vec<T> x) {
  using E = Exp2<T>;
  const Vec<Int<T>> bits = (Vec<Int<T>>)x;
  // Subtracting the bits of sqrt(1/2) carries into the exponent exactly where the mantissa is past sqrt(2).
  const Vec<Int<T>> half_root = (Vec<Int<T>>)broadcast<T>(T(0.70710678118654752));
  const Vec<Int<T>> n = (bits - half_root) >> E::kMantissa;
  const Vec<T> y = (Vec<T>)(bits - (n << E::kMantissa));
  const Vec<T> t = (y - T(1)) / (y + T(1)), t2 = t * t;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;  // t^(2 kTerms) / (2 kTerms + 1) is below half an ulp
  Vec<T> sum = broadcast<T>(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * t2 + broadcast<T>(T(1) / (2 * k + 1));
  const Vec<T> result = __builtin_convertvector(n, Vec<T>) + t * sum * T(2.8853900817779268);  // 2 / ln(2)
  return select(not_finite<T>(x), x, result);
}

// tanh(x) = x P(x^2) / Q(x^2), a rational fit that is 2.1e-8 off at most for |x| <= 9.02, where it has come to 1.
HEEDFUL_FN Vec<float> tanh(Vec<float> x) {
  constexpr float kEnd = 9.02f;
  constexpr float kP[] = {1.0f, 0.133797377f, 0.00349405780f, 2.05838387e-05f, 1.33195162e-08f};
  constexpr float kQ[] = {1.0f, 0.467130542f, 0.0258711632f, 0.000328312977f, 7.76221157e-07f};
  x = x > broadcast<float>(kEnd) ? broadcast<float>(kEnd) : x;
  x = x < broadcast<float>(-kEnd) ? broadcast<float>(-kEnd) : x;
  const Vec<float> x2 = x * x;
  Vec<float> p = broadcast<float>(kP[4]), q = broadcast<float>(kQ[4]);
#pragma GCC unroll 4
  for (int k = 3; k >= 0; --k) {
    p = p * x2 + broadcast<float>(kP[k]);
    q = q * x2 + broadcast<float>(kQ[k]);
  }
  return x * p / q;
}
// Near 0 Pade's [5/6], x^13 / 1.4e9 off, where a difference of exponentials loses all; further out
// (1 - y) / (1 + y), y = exp(-2 |x|).
HEEDFUL_FN Vec<double> tanh(Vec<double> x) {
  const Vec<double> x2 = x * x, magnitude = x < Vec<double>{} ? -x : x;
  const Vec<double> p = x * (10395.0 + x2 * (1260.0 + x2 * 21.0));
  const Vec<double> q = 10395.0 + x2 * (4725.0 + x2 * (210.0 + x2));
  const Vec<double> y = exp2<double>(magnitude * -2.8853900817779268);  // 2 / ln(2)
  const Vec<double> above = x < Vec<double>{} ? y - 1.0 : 1.0 - y;
  const auto far = magnitude > broadcast<double>(0.25);
  return select(far, above, p) / select(far, y + 1.0, q);
}

// 1 - tanh(x)^2 = 4 y / (1 + y)^2, y = exp(-2 |x|), exact to rounding down to 2^-114.
template <class T>
HEEDFUL_FN Vec<T> tanh_slope_of(Vec<T> x) {
  const Vec<T> magnitude = x < Vec<T>{} ? -x : x;
  const Vec<T> y = exp2<T>(magnitude * T(-2.8853900817779268)), root = T(2) / (T(1) + y);
  return y * root * root;
}
HEEDFUL_FN Vec<float> tanh_slope(Vec<float> x) { return tanh_slope_of<float>(x); }
HEEDFUL_FN Vec<double> tanh_slope(Vec<double> x) { return tanh_slope_of<double>(x); }

// ---- integers -------------------------------------------------------------------------------------------------------

// Products of the low 32 bits of each lane.
HEEDFUL_FN Vec<uint64_t> multiply_low(Vec<uint64_t> a, uint32_t b) {
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64  // the form without a mask sets off a warning in GCC 12
  return (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__) && HEEDFUL_VECTOR_BYTES == 32
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__) && HEEDFUL_VECTOR_BYTES == 16
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__) && HEEDFUL_VECTOR_BYTES == 16
  return (Vec<uint64_t>)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
#else
  return (a & 0xffffffff) * b;
#endif
}

// The low 32 bits of every lane of a (and of b, where lanes of T are half as wide), in lanes as wide as T.
template <int... kLane>
HEEDFUL_FN Vec<int32_t> even_lanes(Vec<int32_t> a, Vec<int32_t> b, LaneList<kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane)...);
}
template <class T>
HEEDFUL_FN Vec<Int<T>> low_halves(Vec<uint64_t> a, [[maybe_unused]] Vec<uint64_t> b) {
  if constexpr (sizeof(T) == 8) return (Vec<int64_t>)(a & 0xffffffff);
  if constexpr (sizeof(T) == 4)
    return even_lanes((Vec<int32_t>)a, (Vec<int32_t>)b, typename LanesUpTo<kLanes<float>>::list{});
}

// ---- storage <-> compute type -------------------------------------------------------------------------------------

// Bits of a vector's worth of 16-bit elements, widened.
HEEDFUL_FN Vec<int32_t> load_bits(const void* p) {
// GCC converts half of the elements at a time.
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64
  return (Vec<int32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && HEEDFUL_VECTOR_BYTES == 32
  return (Vec<int32_t>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
  typename VectorOf<uint16_t, HEEDFUL_VECTOR_BYTES / 2>::type bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, Vec<int32_t>);
}

HEEDFUL_FN Vec<float> load_as(const float* p, float) { return load(p); }
HEEDFUL_FN Vec<double> load_as(const double* p, double) { return load(p); }
HEEDFUL_FN Vec<double> load_as(const float* p, double) {
  typename VectorOf<float, HEEDFUL_VECTOR_BYTES / 2>::type v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}
HEEDFUL_FN Vec<float> load_as(const BFloat16* p, float) { return (Vec<float>)(load_bits(p) << 16); }
HEEDFUL_FN Vec<float> load_as(const Float16* p, float) {
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  typedef float Eight __attribute__((vector_size(32)));
  union {
    Vec<float> whole;
    Eight parts[sizeof(Vec<float>) / 32];
  } result;
  for (unsigned i = 0; i < sizeof(Vec<float>) / 32; ++i)
    result.parts[i] = (Eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
  return result.whole;
#elif defined(__aarch64__) && HEEDFUL_VECTOR_BYTES == 16
  return (Vec<float>)vcvt_f32_f16(vld1_f16((const float16_t*)p));
#else
  // Exponents move from bias 15 to 127 by a product with 2^112, which makes subnormals normal; 31 means infinity or
  // NaN.
  const Vec<int32_t> bits = load_bits(p), magnitude = (bits & 0x7fff) << 13;
  const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  const Vec<int32_t> special = (bits & 0x7c00) == 0x7c00;
  const Vec<int32_t> sign = (bits & 0x8000) << 16;
  return (Vec<float>)(sign | select(special, magnitude | 0x7f800000, (Vec<int32_t>)scaled));
#endif
}

// One element, for edges.
HEEDFUL_FN float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
HEEDFUL_FN uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
HEEDFUL_FN float to_compute(float x) { return x; }
HEEDFUL_FN double to_compute(double x) { return x; }
HEEDFUL_FN float to_compute(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
HEEDFUL_FN float to_compute(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7c00) == 0x7c00) return bits_to_float(sign | magnitude | 0x7f800000);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

HEEDFUL_FN void from_compute(float x, float* p) { *p = x; }
HEEDFUL_FN void from_compute(double x, double* p) { *p = x; }
// Round to nearest, ties to even.
HEEDFUL_FN void from_compute(float x, BFloat16* p) {
  const uint32_t bits = float_to_bits(x);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
HEEDFUL_FN void from_compute(float x, Float16* p) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds past 65504
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

HEEDFUL_FN void store_as(float* p, Vec<float> v) { store(p, v); }
HEEDFUL_FN void store_as(double* p, Vec<double> v) { store(p, v); }
// Rounded to nearest, ties to even, in the low half of each lane.
HEEDFUL_FN VectorOf<uint32_t>::type bfloat16_bits(Vec<float> v) {
  typedef VectorOf<uint32_t>::type Bits;
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (v != v) ? rounded * 0 + 0x7fc0 : rounded;
}
HEEDFUL_FN void store_as(BFloat16* p, Vec<float> v) {
  const auto narrow =
      __builtin_convertvector(bfloat16_bits(v), typename VectorOf<uint16_t, HEEDFUL_VECTOR_BYTES / 2>::type);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
HEEDFUL_FN void store_as(Float16* p, Vec<float> v) {
#if defined(__AVX512F__) && HEEDFUL_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  typedef float Eight __attribute__((vector_size(32)));
  union {
    Vec<float> whole;
    Eight parts[sizeof(Vec<float>) / 32];
  } source = {v};
  for (unsigned i = 0; i < sizeof(Vec<float>) / 32; ++i)
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)source.parts[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__) && HEEDFUL_VECTOR_BYTES == 16
  vst1_f16((float16_t*)p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < kLanes<float>; ++i) from_compute(v[i], p + i);
#endif
}

// ---- a vector's first lanes -----------------------------------------------------------------------------------------

// The bits [0, end), for any end of 0 and more.
HEEDFUL_FN uint64_t bits_below(int64_t end) { return end < 64 ? (uint64_t{1} << end) - 1 : ~uint64_t{}; }

// `count` elements or a vector's, then zeros.
template <class C, class S>
HEEDFUL_FN Vec<C> load_first(const S* p, int64_t count) {
  if (count >= kLanes<C>) return load_as(p, C());
  const uint64_t bytes = uint64_t(count) * sizeof(S);
#if defined(__AVX512BW__) && HEEDFUL_VECTOR_BYTES == 64
  S part[64 / sizeof(S)];  // written whole, so that it can be read at once
  _mm512_storeu_si512(part, _mm512_maskz_loadu_epi8(bits_below(int64_t(bytes)), p));
#else
  S part[kLanes<C>] = {};
  __builtin_memcpy(part, p, bytes);
#endif
  return load_as(part, C());
}
template <class S, class V>
HEEDFUL_FN void store_first(S* p, V v, int64_t count) {
  S part[sizeof v / sizeof v[0]];
  store_as(part, v);
  const uint64_t bytes = uint64_t(count) * sizeof(S);
#if defined(__AVX512BW__) && HEEDFUL_VECTOR_BYTES == 64
  const __mmask64 these = bits_below(int64_t(bytes));
  _mm512_mask_storeu_epi8(p, these, _mm512_maskz_loadu_epi8(these, part));
#else
  __builtin_memcpy(p, part, bytes);
#endif
}

}  // namespace heedful::HEEDFUL_TARGET
