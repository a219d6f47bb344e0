// Tests of the CPU kernels without torch or Python, for sanitizers and cross-compiled runs: every instruction set that
// this machine has, against the definition of attention in double precision, over a sweep of shapes and options. Arrays
// have exactly the size that a call may touch, so that AddressSanitizer sees the first byte past it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using namespace heedful;
using namespace heedful::cpu;

std::mt19937_64 random_bits(1);

double random_normal() { return std::normal_distribution<double>()(random_bits); }

// An array [shape] in one of the storage types, with a stride between its rows that leaves a gap.
struct Array {
  DType dtype;
  int64_t shape[4], stride[4];
  std::vector<unsigned char> bytes;

  Array() = default;
  Array(DType t, int64_t a, int64_t b, int64_t c, int64_t d, int64_t gap = 0) : dtype(t), shape{a, b, c, d} {
    stride[3] = 1, stride[2] = d + gap, stride[1] = c * stride[2], stride[0] = b * stride[1];
    const bool empty = a == 0 || b == 0 || c == 0 || d == 0;
    const int64_t last = empty ? 0 : (a - 1) * stride[0] + (b - 1) * stride[1] + (c - 1) * stride[2] + d;
    bytes.resize(size_t(last) * width());
  }
  size_t width() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  View view() { return {bytes.data(), {stride[0], stride[1], stride[2], stride[3]}}; }
  size_t offset(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return size_t(a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]) * width();
  }
  double get(int64_t a, int64_t b, int64_t c, int64_t d) const {
    const unsigned char* p = bytes.data() + offset(a, b, c, d);
    if (dtype == DType::f64) return read<double>(p);
    if (dtype == DType::f32) return read<float>(p);
    const uint16_t bits = read<uint16_t>(p);
    if (dtype == DType::bf16) {
      const uint32_t wide = uint32_t(bits) << 16;
      float x;
      std::memcpy(&x, &wide, 4);
      return x;
    }
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return bits >> 15 ? -magnitude : magnitude;
  }
  // x is rounded toward zero in the two half types: inputs need be exact only in what is read back.
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double x) {
    unsigned char* p = bytes.data() + offset(a, b, c, d);
    const float f = float(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (dtype == DType::f64) return write(p, x);
    if (dtype == DType::f32) return write(p, f);
    if (dtype == DType::bf16) return write(p, uint16_t(bits >> 16));
    const int exponent = std::max(0, int(bits >> 23 & 255) - 112);
    write(p, uint16_t((bits >> 16 & 0x8000) | (exponent ? exponent << 10 | (bits >> 13 & 1023) : 0)));
  }
  void fill() {
    for (int64_t a = 0; a < shape[0]; ++a)
      for (int64_t b = 0; b < shape[1]; ++b)
        for (int64_t c = 0; c < shape[2]; ++c)
          for (int64_t d = 0; d < shape[3]; ++d) set(a, b, c, d, random_normal());
  }
  template <class T>
  static T read(const unsigned char* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  template <class T>
  static void write(unsigned char* p, T x) {
    std::memcpy(p, &x, sizeof x);
  }
};

struct Case {
  DType dtype;
  int64_t B, Hq, Hk, Sq, Sk, D, Dv;
  int64_t start, left, right;
  bool lengths, mask, bias, gap;
};

std::string describe(const Case& c) {
  char text[256];
  std::snprintf(text, sizeof text, "dtype %d B%ld H%ld/%ld S%ld/%ld D%ld/%ld start %ld left %ld right %ld%s%s%s%s",
                int(c.dtype), long(c.B), long(c.Hq), long(c.Hk), long(c.Sq), long(c.Sk), long(c.D), long(c.Dv),
                long(c.start), c.left == kUnbounded ? -1L : long(c.left), c.right == kUnbounded ? -1L : long(c.right),
                c.lengths ? " lengths" : "", c.mask ? " mask" : "", c.bias ? " bias" : "", c.gap ? " gap" : "");
  return text;
}

void run(Planner planner, Problem& p) {
  Plan plan;
  planner(p, &plan);
  const auto allocate = [](size_t bytes) {
    return std::unique_ptr<char, decltype(&std::free)>(
        static_cast<char*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64)), &std::free);
  };
  const auto scratch = allocate(plan.scratch_bytes), workspace = allocate(plan.workspace_bytes);
  p.workspace = workspace.get();
  for (int i = 0; i < plan.phase_count; ++i)
    for (int64_t t = 0; t < plan.phases[i].tasks; ++t) plan.phases[i].run(p, t, scratch.get());
}

int checks = 0, failures = 0;

// The largest difference, over the largest value expected or 1, the size of the inputs: gradients are differences of
// such.
void compare(const Case& c, const char* isa, const char* what, const Array& got,
             const std::function<double(int64_t, int64_t, int64_t, int64_t)>& expected) {
  double error = 0, largest = 1;
  for (int64_t a = 0; a < got.shape[0]; ++a)
    for (int64_t b = 0; b < got.shape[1]; ++b)
      for (int64_t i = 0; i < got.shape[2]; ++i)
        for (int64_t d = 0; d < got.shape[3]; ++d) {
          const double x = got.get(a, b, i, d), y = expected(a, b, i, d);
          if (std::isinf(y) ? x != y : !(std::fabs(x - y) <= 1e30)) error = INFINITY;
          if (std::isfinite(y)) error = std::max(error, std::fabs(x - y)), largest = std::max(largest, std::fabs(y));
        }
  const double allowed = c.dtype == DType::f64    ? 1e-12
                         : c.dtype == DType::f32  ? 2e-5
                         : c.dtype == DType::bf16 ? 2e-2
                                                  : 3e-3;
  ++checks;
  if (error > allowed * largest) {
    ++failures;
    std::printf("FAILED %s: %s: %s is off by %g of %g\n", isa, describe(c).c_str(), what, error, largest);
  }
}

void test(const InstructionSet& isa, const Case& c) {
  const DType compute = c.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t gap = c.gap ? 3 : 0;
  Array q(c.dtype, c.B, c.Hq, c.Sq, c.D, gap), k(c.dtype, c.B, c.Hk, c.Sk, c.D, gap),
      v(c.dtype, c.B, c.Hk, c.Sk, c.Dv, gap);
  Array out(c.dtype, c.B, c.Hq, c.Sq, c.Dv), lse(compute, 1, c.B, c.Hq, c.Sq), dout = out, dlse = lse;
  Array dq(c.dtype, c.B, c.Hq, c.Sq, c.D), dk(c.dtype, c.B, c.Hk, c.Sk, c.D), dv(c.dtype, c.B, c.Hk, c.Sk, c.Dv);
  Array bias(c.dtype, 1, c.Hq, c.Sq, c.Sk), dbias(compute, 1, c.Hq, c.Sq, c.Sk);
  std::vector<unsigned char> mask(size_t(c.Sq * c.Sk));
  for (Array* x : {&q, &k, &v, &dout, &dlse, &bias}) x->fill();
  for (auto& x : mask) x = random_bits() % 4 != 0;
  std::vector<int64_t> q_lengths, k_lengths;
  for (int64_t b = 0; b < c.B; ++b) {
    q_lengths.push_back(c.Sq - b);
    k_lengths.push_back(c.Sk * 2 / 3 - b);
  }

  Problem p{};
  p.dtype = c.dtype;
  p.B = c.B, p.Hq = c.Hq, p.Hk = c.Hk, p.Sq = c.Sq, p.Sk = c.Sk, p.D = c.D, p.Dv = c.Dv;
  p.scale = 0.3;
  p.q = q.view(), p.k = k.view(), p.v = v.view(), p.out = out.view(), p.lse = lse.bytes.data();
  p.q_start = c.start, p.left = c.left, p.right = c.right;
  if (c.lengths) p.q_lengths = q_lengths.data(), p.k_lengths = k_lengths.data();
  if (c.mask) p.mask = {mask.data(), {0, 0, c.Sk, 1}};
  if (c.bias) {
    p.bias = bias.view(), p.bias.stride[0] = 0, p.bias_dtype = c.dtype;
    p.dbias = dbias.view(), p.dbias.stride[0] = 0;
  }
  run(isa.forward[int(c.dtype)], p);
  p.dout = dout.view(), p.dq = dq.view(), p.dk = dk.view(), p.dv = dv.view();
  p.dlse = {dlse.bytes.data(), {dlse.stride[1], dlse.stride[2], dlse.stride[3], 0}};
  run(isa.backward[int(c.dtype)], p);

  // The definition.
  Array e_out(DType::f64, c.B, c.Hq, c.Sq, c.Dv), e_lse(DType::f64, 1, c.B, c.Hq, c.Sq),
      e_dq(DType::f64, c.B, c.Hq, c.Sq, c.D);
  Array e_dk(DType::f64, c.B, c.Hk, c.Sk, c.D), e_dv(DType::f64, c.B, c.Hk, c.Sk, c.Dv),
      e_dbias(DType::f64, 1, c.Hq, c.Sq, c.Sk);
  const auto add = [](Array& to, int64_t a, int64_t b, int64_t i, int64_t d, double x) {
    to.set(a, b, i, d, to.get(a, b, i, d) + x);
  };
  std::vector<double> s(size_t(c.Sk)), prob(size_t(c.Sk));
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.Hq; ++h)
      for (int64_t i = 0; i < c.Sq; ++i) {
        const int64_t hk = h / (c.Hq / c.Hk), position = c.start + i;
        double top = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < c.Sk; ++j) {
          double x = 0;
          for (int64_t d = 0; d < c.D; ++d) x += q.get(b, h, i, d) * k.get(b, hk, j, d);
          x = x * p.scale + (c.bias ? bias.get(0, h, i, j) : 0);
          const bool seen = (c.left == kUnbounded || j >= position - c.left) &&
                            (c.right == kUnbounded || j <= position + c.right) &&
                            (!c.lengths || (i < q_lengths[size_t(b)] && j < k_lengths[size_t(b)])) &&
                            (!c.mask || mask[size_t(i * c.Sk + j)]);
          s[size_t(j)] = seen ? x : -INFINITY;
          top = std::max(top, s[size_t(j)]);
        }
        for (int64_t j = 0; j < c.Sk; ++j)
          sum += prob[size_t(j)] = s[size_t(j)] == -INFINITY ? 0 : std::exp(s[size_t(j)] - top);
        const double l = top == -INFINITY ? -INFINITY : top + std::log(sum);
        e_lse.set(0, b, h, i, l);
        if (l == -INFINITY) continue;
        std::vector<double> dp(size_t(c.Sk), 0.0);
        for (int64_t j = 0; j < c.Sk; ++j) {
          prob[size_t(j)] /= sum;
          for (int64_t d = 0; d < c.Dv; ++d) {
            add(e_out, b, h, i, d, prob[size_t(j)] * v.get(b, hk, j, d));
            add(e_dv, b, hk, j, d, prob[size_t(j)] * dout.get(b, h, i, d));
            dp[size_t(j)] += dout.get(b, h, i, d) * v.get(b, hk, j, d);
          }
          delta += prob[size_t(j)] * dp[size_t(j)];
        }
        for (int64_t j = 0; j < c.Sk; ++j) {
          const double ds = prob[size_t(j)] * (dp[size_t(j)] - delta + dlse.get(0, b, h, i));
          add(e_dbias, 0, h, i, j, ds);
          for (int64_t d = 0; d < c.D; ++d) {
            add(e_dq, b, h, i, d, p.scale * ds * k.get(b, hk, j, d));
            add(e_dk, b, hk, j, d, p.scale * ds * q.get(b, h, i, d));
          }
        }
      }
  const auto against = [](const Array& x) {
    return [&x](int64_t a, int64_t b, int64_t i, int64_t d) { return x.get(a, b, i, d); };
  };
  compare(c, isa.name, "out", out, against(e_out));
  compare(c, isa.name, "lse", lse, against(e_lse));
  compare(c, isa.name, "dq", dq, against(e_dq));
  compare(c, isa.name, "dk", dk, against(e_dk));
  compare(c, isa.name, "dv", dv, against(e_dv));
  if (c.bias) compare(c, isa.name, "dbias", dbias, against(e_dbias));
}

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> all = {&kBaseline};
#ifdef HEEDFUL_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    all.push_back(&kAvx2);
#endif
#ifdef HEEDFUL_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all.push_back(&kAvx512);
#endif
  return all;
}

}  // namespace

int main() {
  const int64_t none = kUnbounded;
  for (const InstructionSet* isa : instruction_sets()) {
    const int before = checks;
    for (int t = 0; t < 4; ++t) {
      const DType dtype = DType(t);
      // Sizes around the edges of vectors, panels and blocks.
      for (int64_t S : {1, 2, 7, 17, 33, 65, 129})
        for (int64_t D : {1, 5, 16, 33}) {
          test(*isa, {dtype, 1, 2, 1, S, S, D, D, 0, none, 0, false, false, false, false});
          test(*isa, {dtype, 2, 2, 2, S, S + 3, D, D + 2, 3, none, none, true, false, false, true});
          test(*isa, {dtype, 2, 2, 1, S, S, D, D, 0, none, none, false, true, true, false});
        }
      // Offsets of the first query, where bounds off by one show.
      for (int64_t start = -24; start <= 24; ++start)
        for (int64_t left : {none, int64_t{0}, int64_t{5}})
          test(*isa, {dtype, 1, 1, 1, 19, 21, 4, 4, start, left, 2, start % 2 == 0, false, start % 3 == 0, false});
      // Several key blocks and groups of them.
      test(*isa, {dtype, 1, 2, 1, 70, 1100, 8, 8, 1030, none, 0, false, false, false, false});
      test(*isa, {dtype, 1, 1, 1, 200, 300, 9, 7, 100, 64, 0, false, true, true, true});
      // Nothing to do.
      test(*isa, {dtype, 0, 1, 1, 4, 4, 4, 4, 0, none, none, false, false, false, false});
      test(*isa, {dtype, 1, 1, 1, 0, 4, 4, 4, 0, none, none, false, false, false, false});
      test(*isa, {dtype, 1, 1, 1, 4, 0, 4, 4, 0, none, none, false, false, false, false});
    }
    std::printf("%s: %d checks\n", isa->name, checks - before);
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
