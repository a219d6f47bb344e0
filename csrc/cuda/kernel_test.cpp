// Tests of the CUDA kernels without a GPU, torch or Python: their sources run on the CPU (csrc/emulator), against the
// definition of attention in double precision, over a sweep of shapes and options.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "../cpu/kernel_test_cases.h"
#include "../cpu/kernel_test_check.h"
#include "../cpu/kernel_test_definition.h"
#include "../emulator/block.h"
#include "plans.h"

namespace {

using namespace heedful;
using emulator::Fault;
using emulator::machine;
using emulator::Order;
using emulator::Use;

// ---- one call -------------------------------------------------------------------------------------------------------

// What the kernels may touch, and how.
void register_arrays(Call& call, std::vector<unsigned char>& workspace, bool backward) {
  machine().memory.clear();
  const auto add = [](const char* name, auto& x, Use use) {
    machine().memory.add(name, x.data(), x.size() * sizeof(x[0]), use);
  };
  add("q", call.q.bytes, Use::read), add("k", call.k.bytes, Use::read), add("v", call.v.bytes, Use::read);
  add("bias", call.bias.bytes, Use::read), add("mask", call.mask, Use::read), add("bits", call.bits, Use::read);
  for (auto* x : {&call.scales, &call.sinks, &call.slopes, &call.table}) add("a parameter", x->bytes, Use::read);
  const Use result = backward ? Use::read : Use::write_once;
  add("out", call.out.bytes, result), add("lse", call.lse.bytes, result);
  if (backward) {
    add("dout", call.dout.bytes, Use::read), add("dlse", call.dlse.bytes, Use::read);
    for (Array* x :
         {&call.dq, &call.dk, &call.dv, &call.dbias, &call.dscales, &call.dsinks, &call.dslopes, &call.dtable})
      add("a gradient", x->bytes, Use::write_once);
  }
  add("workspace", workspace, Use::any);
}

void run(const cuda::Plan& plan, Problem& p, Call& call, bool backward) {
  std::vector<unsigned char> workspace(plan.workspace_bytes + 256, 0xff);
  p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
  register_arrays(call, workspace, backward);
  for (int n = 0; n < plan.launch_count; ++n) {
    const cuda::Launch& launch = plan.launches[n];
    emulator::launch({launch.blocks, launch.threads, launch.shared_bytes}, [&] { launch.kernel(p); });
  }
}

void run(Call& call, void (*plan_of)(const Problem&, cuda::Plan*), bool backward, std::string* name) {
  Problem p = call.problem();
  cuda::Plan plan;
  plan_of(p, &plan);
  *name = plan.launch_count ? plan.launches[plan.launch_count - 1].name : "no kernel";
  run(plan, p, call, backward);
}

void set_timing() {
  static uint64_t seed = 0;
  machine().seed = ++seed;
  machine().order = Order(seed % 3);
}

void test(const Case& c, bool with_backward = true) {
  set_timing();
  const Call call(c);
  Call expected = call.in_float64(), got = call;
  define(expected.problem(), c.dtype);
  std::string name;
  const auto kernel = [&] { return name + ", seed " + std::to_string(machine().seed); };
  try {
    run(got, &emulated::plan_forward, false, &name);
    compare_results(kernel(), got, expected);
    if (!with_backward) return;
    run(got, &emulated::plan_backward, true, &name);
  } catch (const Fault& fault) {
    return report(false, kernel() + ": " + describe(c) + ": " + fault.what());
  }
  compare_gradients(kernel(), got, expected);
}

// Whatever the timing, the bits are the same.
void test_same_bits(const Case& c, bool with_backward = true) {
  const Call call(c);
  std::vector<std::vector<unsigned char>> first;
  for (int n = 0; n < 3; ++n) {
    set_timing();
    Call got = call;
    std::string name;
    run(got, &emulated::plan_forward, false, &name);
    if (with_backward) run(got, &emulated::plan_backward, true, &name);
    std::vector<std::vector<unsigned char>> all;
    for (Array* x : {&got.out, &got.lse, &got.dq, &got.dk, &got.dv, &got.dbias, &got.dscales, &got.dsinks, &got.dslopes,
                     &got.dtable})
      all.push_back(x->bytes);
    if (n == 0) first = all;
    report(all == first, "other bits at another timing: " + describe(c));
  }
}

// Whatever else is in its batch, a packed sequence gets the same bits.
void test_same_bits_alone(const Case& c) {
  const Call call(c);
  Call together = call, alone = call;
  std::string name;
  run(together, &emulated::plan_forward, false, &name);
  for (size_t b = 0; b < size_t(c.B); ++b) {
    Problem p = alone.problem();
    p.q_offsets += b, p.k_offsets += b, p.B = 1;
    p.Sq = p.q_offsets[1] - p.q_offsets[0], p.Sk = p.k_offsets[1] - p.k_offsets[0];
    cuda::Plan plan;
    emulated::plan_forward(p, &plan);
    run(plan, p, alone, false);
  }
  report(together.out.bytes == alone.out.bytes && together.lse.bytes == alone.lse.bytes,
         "other bits in another batch: " + describe(c));
}

// ---- cases ----------------------------------------------------------------------------------------------------------

// What tensor cores take: bfloat16 and float16 by turns, or float32 as TensorFloat-32.
enum class Numbers { halves, tf32 };
DType type_of(Numbers numbers, int n) {
  return numbers == Numbers::tf32 ? DType::f32 : n % 2 ? DType::f16 : DType::bf16;
}
// Sweeps over bands go over all of them for one kind of numbers; another differs in its tiles, and takes every fifth.
bool is_swept(Numbers numbers, int n) { return numbers == Numbers::halves || n % 5 == 0; }
bool fits(Numbers numbers, int64_t D, int64_t Dv) { return std::max(D, Dv) <= (numbers == Numbers::tf32 ? 128 : 256); }

Case square(DType dtype, int64_t S, int64_t D) {
  Case c{.dtype = dtype, .tf32 = true, .B = 2, .Hq = 2, .Sq = S, .Sk = S, .D = D, .Dv = D};
  c.scale = 1 / std::sqrt(double(D));
  return c;
}

// Sizes around the edges of warps' rows, tiles and padded head dims. With heads inside rows of 8 n - 3 numbers, rows
// are aligned and their last chunk is not whole.
void test_shapes(Numbers numbers) {
  int n = 0;
  constexpr int64_t kDims[][2] = {{64, 64}, {40, 64}, {1, 3}, {128, 72}, {100, 100}, {16, 136}, {256, 256}, {250, 33}};
  for (const auto& [D, Dv] : kDims)
    for (int64_t S : {1, 16, 63, 65, 130}) {
      if ((D + Dv > 256 && S > 65) || !fits(numbers, D, Dv)) continue;
      Case full = square(type_of(numbers, n++), S, D), causal = full, ragged = full;
      full.B = 1, full.Dv = Dv;
      causal.Dv = Dv, causal.Hk = 2, causal.right = 0, causal.B = 1;
      ragged.D = D / 8 * 8 + 5, ragged.Dv = Dv / 8 * 8 + 5, ragged.layout = Layout::heads_inside;
      ragged.Sk += 3, ragged.start = 3, ragged.right = 0, ragged.lengths = true;
      for (const Case& c : {full, causal, ragged}) test(c);
    }
  // Nothing to do.
  for (auto size : {&Case::B, &Case::Sq, &Case::Sk}) {
    Case c = square(type_of(numbers, n++), 4, 64);
    c.*size = 0, c.dropout_batch = 1;
    test(c);
  }
}

// Offsets of the first query and lengths, where bounds of blocks and tiles that are off by one show.
void test_offsets(Numbers numbers) {
  int n = -1;
  for (int64_t start = -135; start <= 200; start += start > -5 && start < 5 ? 1 : 9)
    for (int64_t left : {kUnbounded, int64_t{0}, int64_t{50}})
      for (int64_t right : {int64_t{0}, int64_t{17}}) {
        if (!is_swept(numbers, ++n)) continue;
        Case c{.dtype = type_of(numbers, n / 2), .tf32 = true, .Sq = 130 + n % 5, .Sk = 125 + n % 7, .D = 64, .Dv = 64};
        c.scale = 0.125;
        c.start = start, c.left = left, c.right = right, c.lengths = n % 3 == 0, c.poison = n % 2;
        if (n % 4 == 0) c.bias = "hij";
        test(c);
      }
}

void test_features(Numbers numbers) {
  for (auto [n, D] : {std::pair{0, 64}, {1, 5}}) {
    const int64_t S = numbers == Numbers::tf32 ? 35 : 67;  // one tile of keys more, of either
    Case plain = square(type_of(numbers, n), S, D);
    plain.B = 2, plain.Hq = 4, plain.Hk = 2, plain.Sk = S + 3, plain.start = 3;
    for (const Case& c : features_of(plain)) test(c);
  }
}

// Few queries over keys around the edges of tiles and splits.
void test_decode(Numbers numbers) {
  int n = -1;
  const auto test_decoding = [](const Case& c, bool timings) {
    test(c, false);
    if (timings) test_same_bits(c, false);
  };
  for (int64_t Sk : {1, 63, 64, 65, 191, 255, 256, 257, 319, 321, 512, 513, 900})
    for (int64_t group : {1, 2, 3, 7, 32}) {
      constexpr int64_t kDims[][2] = {{64, 64}, {40, 24}, {128, 128}, {72, 100}, {256, 256}, {16, 3}, {136, 250}};
      const auto [D, Dv] = kDims[++n % 7];
      const int64_t Sq = 1 + n % 8;
      if (!fits(numbers, D, Dv)) continue;
      Case c{.dtype = type_of(numbers, n / 7),
             .tf32 = true,
             .Hq = group,
             .Sq = Sq,
             .Sk = Sk,
             .D = D,
             .Dv = Dv,
             .scale = 0.1};
      if (n % 2) c.right = 0, c.start = Sk - Sq;
      if (n % 3 == 0) c.B = 2, c.lengths = c.poison = true;
      if (n % 4 == 0) c.Hk = 2, c.Hq *= 2, c.layout = Layout(n / 4 % 3);
      test_decoding(c, n % 3 == 0);
    }
  for (int64_t D : {64, 21, 160}) {
    if (!fits(numbers, D, D)) continue;
    const Case plain{.dtype = type_of(numbers, D == 21),
                     .tf32 = true,
                     .B = 2,
                     .Hq = 6,
                     .Hk = 2,
                     .Sq = 3,
                     .Sk = 330,
                     .D = D,
                     .Dv = D,
                     .start = 100};
    for (const Case& c : features_of(plain)) test_decoding(c, D == 64);
  }
  for (int64_t edge : {0, 64, 256, 320, 420})
    for (int64_t start = edge - 3; start <= edge + 2; ++start)
      for (int64_t left : {kUnbounded, int64_t{0}, int64_t{63}, int64_t{300}})
        for (int64_t right : {int64_t{0}, int64_t{17}}) {
          if (!is_swept(numbers, ++n)) continue;
          Case c{.dtype = type_of(numbers, n / 2),
                 .tf32 = true,
                 .Hq = 3,
                 .Sq = 1 + n % 8,
                 .Sk = 420,
                 .D = 64,
                 .Dv = 64,
                 .scale = 0.1};
          c.start = start, c.left = left, c.right = right, c.lengths = n % 3 == 0, c.poison = n % 2;
          if (n % 4 == 0) c.bias = "hij";
          test(c, false);
        }
  // Packed, with sequences of more queries, which the forward kernel takes.
  for (int64_t Sq : {8, 16, 17, 60})
    for (int64_t Sk : {70, 600}) {
      Case c{.dtype = type_of(numbers, ++n),
             .tf32 = true,
             .B = 5,
             .Hq = 4,
             .Hk = 2,
             .Sq = Sq,
             .Sk = Sk,
             .D = 64,
             .Dv = 64,
             .packed = true};
      test_decoding(c, true), test_same_bits_alone(c);
      c.sinks = c.slopes = Per::head, c.bias = "h", c.right = 2, c.start = Sk - Sq, c.similarity = Similarity::cosine;
      test_decoding(c, true), test_same_bits_alone(c);
    }
}

Case random_case(DType dtype, bool tf32 = false) {
  Case c{.dtype = dtype, .tf32 = tf32};
  const bool tiles = tf32 || dtype == DType::bf16 || dtype == DType::f16;
  const int64_t longest = tiles ? 140 : 40, widest = tiles && one_in(4) ? (tf32 ? 128 : 150) : 60;
  c.B = between(1, 3), c.Hk = between(1, 2), c.Hq = c.Hk * between(1, 2);
  c.Sq = between(1, one_in(3) ? longest : 40), c.Sk = between(1, one_in(3) ? longest : 40);
  c.D = between(1, widest), c.Dv = between(1, widest);
  c.scale = 1 / std::sqrt(double(c.D));
  return with_random_features(c);
}

std::vector<std::string> wanted;  // stages whose names hold one of these; all, where there are none

template <class F>
void stage(const std::string& name, F f) {
  const auto holds = [&](const std::string& part) { return name.find(part) != std::string::npos; };
  if (!wanted.empty() && std::none_of(wanted.begin(), wanted.end(), holds)) return;
  random_bits.seed(1);  // the same cases whichever stages run
  const auto start = std::chrono::steady_clock::now();
  const int before = checks;
  f();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%-24s %5d checks %7.1f s\n", name.c_str(), checks - before, seconds.count());
}

}  // namespace

// Arguments run only the stages whose names hold one of them.
int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  wanted.assign(arguments + 1, arguments + count);
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  for (const Numbers numbers : {Numbers::halves, Numbers::tf32}) {
    const std::string of = numbers == Numbers::tf32 ? ", TensorFloat-32" : "";
    stage("shapes" + of, [&] { test_shapes(numbers); });
    stage("offsets" + of, [&] { test_offsets(numbers); });
    stage("features" + of, [&] { test_features(numbers); });
    stage("decode" + of, [&] { test_decode(numbers); });
  }
  stage("same bits", [] {
    for (DType dtype : {DType::bf16, DType::f16, DType::f32})
      for (int n = 0; n < 4; ++n) test_same_bits(random_case(dtype));
  });
  for (DType dtype : {DType::bf16, DType::f16})
    stage(std::string("random ") + names[int(dtype)], [&] {
      for (int n = 0; n < 100; ++n) test(random_case(dtype));
    });
  stage("random TensorFloat-32", [] {
    for (int n = 0; n < 4; ++n) test_same_bits(random_case(DType::f32, true));
    for (int n = 0; n < 100; ++n) test(random_case(DType::f32, true));
  });
  const emulator::Statistics& s = machine().statistics;
  report(s.loads.wavefronts == s.loads.least && s.stores.wavefronts == s.stores.least, "bank conflicts");
  for (const auto& [name, instructions] : s.instructions)
    std::printf("%s %lld, ", name.c_str(), static_cast<long long>(instructions));
  std::printf("shared memory wavefronts %lld of %lld at least\n",
              static_cast<long long>(s.loads.wavefronts + s.stores.wavefronts),
              static_cast<long long>(s.loads.least + s.stores.least));
  for (DType dtype : {DType::f32, DType::f64})
    stage(std::string("row by row ") + names[int(dtype)], [&] {
      for (int n = 0; n < 100; ++n) test(random_case(dtype));
    });
  return summary();
}
