// Tests of the CPU kernels without torch or Python, for sanitizers and cross-compiled runs: every instruction set that
// this machine has, against the definition of attention in double precision, over a sweep of shapes and options.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../select.h"
#include "kernel_test_call.h"
#include "kernel_test_definition.h"

namespace {

using namespace heedful;
using namespace heedful::cpu;

// ---- checks ---------------------------------------------------------------------------------------------------------

void run(Planner planner, Problem& p) {
  Plan plan;
  planner(p, &plan);
  const auto allocate = [](size_t bytes) {
    char* data = static_cast<char*>(std::aligned_alloc(64, bytes));
    std::memset(data, 0xff, bytes);
    return std::unique_ptr<char, decltype(&std::free)>(data, &std::free);
  };
  const auto scratch = allocate(plan.scratch_bytes), workspace = allocate(plan.workspace_bytes);
  p.workspace = workspace.get();
  for (int i = 0; i < plan.phase_count; ++i)
    for (int64_t t = 0; t < plan.phases[i].tasks; ++t) plan.phases[i].run(p, t, scratch.get());
}

int checks = 0, failures = 0;

void report(bool passed, const std::string& what) {
  ++checks;
  if (passed) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// The largest difference, over the largest value expected or `size`, that of what gradients are differences of.
void compare(const Case& c, const char* isa, const char* what, double size, const Array& got, const Array& expected) {
  if (got.bytes.empty()) return;
  double error = 0;
  got.for_each([&](const Shape& at) {
    const double x = got.get(at), y = expected.get(at);
    if (std::isfinite(x) && std::isfinite(y))
      error = std::max(error, std::fabs(x - y)), size = std::max(size, std::fabs(y));
    else if (x != y && !(std::isnan(x) && std::isnan(y)))
      error = INFINITY;
  });
  constexpr double kAllowed[] = {3e-5, 1e-12, 3e-2, 4e-3};  // by DType
  report(error <= kAllowed[int(c.dtype)] * size, std::string(isa) + ": " + describe(c) + ": " + what + " is off by " +
                                                     std::to_string(error) + " of " + std::to_string(size));
}

const std::vector<const InstructionSet*> kInstructionSets = [] {
  std::vector<const InstructionSet*> runnable;
  const std::vector<std::string>& here = this_machine().cpu;
  for (const InstructionSet* isa : instruction_sets())
    if (std::find(here.begin(), here.end(), isa->name) != here.end()) runnable.push_back(isa);
  return runnable;
}();

void test(const Case& c) {
  const Call call(c);
  Call expected = call.in_float64();
  define(expected.problem());
  for (const InstructionSet* isa : kInstructionSets) {
    Call got = call;
    Problem p = got.problem();
    run(isa->forward[int(c.dtype)], p);
    run(isa->backward[int(c.dtype)], p);
    const auto check = [&](const char* what, Array Call::* result, double size = 1) {
      compare(c, isa->name, what, size, got.*result, expected.*result);
    };
    check("out", &Call::out), check("lse", &Call::lse);
    check("dq", &Call::dq), check("dk", &Call::dk), check("dv", &Call::dv);
    // Sums over queries, each rounded on its own, of what scores are made of.
    const double queries = std::sqrt(double(c.B * c.Sq));
    check("dbias", &Call::dbias, std::strchr(c.bias, 'i') ? 1 : queries);
    check("dsinks", &Call::dsinks, queries), check("dtable", &Call::dtable, queries);
    check("dscales", &Call::dscales, queries * double(c.D));
    check("dslopes", &Call::dslopes, queries * double(c.Sk));
  }
}

// Known answers of Random123, on which both ends of the dropout tests stand.
void test_philox() {
  using Words = std::array<uint32_t, 4>;
  report(philox({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, "philox of zeros");
  report(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822) ==
             Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
         "philox of the digits of pi");
}

// ---- cases ----------------------------------------------------------------------------------------------------------

// Masks and positions, over sizes around the edges of vectors, panels and blocks.
void test_shapes(DType dtype) {
  for (int64_t S : {1, 2, 7, 17, 33, 65, 129})
    for (int64_t D : {1, 5, 16, 33}) {
      const Case c{.dtype = dtype, .B = 2, .Hq = 2, .Hk = 2, .Sq = S, .Sk = S, .D = D, .Dv = D};
      Case causal = c, ragged = c, masked = c;
      causal.B = causal.Hk = 1, causal.right = 0;
      ragged.Sk += 3, ragged.Dv += 2, ragged.start = 3, ragged.lengths = true, ragged.layout = Layout::heads_inside;
      masked.Hk = 1, masked.mask = "ij", masked.bias = "hij";
      for (const Case& x : {causal, ragged, masked}) test(x);
    }
  // Offsets of the first query, where bounds off by one show.
  for (int64_t start = -24; start <= 24; ++start)
    for (int64_t left : {kUnbounded, int64_t{0}, int64_t{5}})
      test({.dtype = dtype,
            .Sq = 19,
            .Sk = 21,
            .lengths = start % 2 == 0,
            .start = start,
            .left = left,
            .right = 2,
            .bias = start % 3 == 0 ? "hij" : ""});
  // Several key blocks and groups of them.
  test({.dtype = dtype, .Hq = 2, .Sq = 70, .Sk = 1100, .D = 8, .Dv = 8, .start = 1030, .right = 0});
  test({.dtype = dtype,
        .Sq = 200,
        .Sk = 300,
        .D = 9,
        .Dv = 7,
        .start = 100,
        .left = 64,
        .right = 0,
        .mask = "ij",
        .bias = "ij"});
  // Nothing to do.
  test({.dtype = dtype, .B = 0, .Sq = 4, .Sk = 4});
  test({.dtype = dtype, .Sq = 0, .Sk = 4});
  test({.dtype = dtype, .Sq = 4, .Sk = 0});
}

// Every feature on its own.
void test_features(DType dtype) {
  const Case plain{.dtype = dtype, .B = 3, .Hq = 4, .Hk = 2, .Sq = 67, .Sk = 70, .D = 5, .Dv = 6, .start = 3};
  std::vector<Case> cases;
  const auto add = [&](auto change) {
    cases.push_back(plain);
    change(cases.back());
  };
  for (double scale : {-0.3, 0.0, 1e-30}) add([&](Case& c) { c.scale = scale; });
  for (double softcap : {0.5, 30.0}) add([&](Case& c) { c.softcap = softcap; });
  for (Per per : {Per::head, Per::sequence}) {
    add([&](Case& c) { c.scales = per; });
    add([&](Case& c) { c.sinks = per; });
    add([&](Case& c) { c.slopes = per; });
    add([&](Case& c) { c.table = per; });
  }
  for (Similarity similarity : {Similarity::cosine, Similarity::gaussian}) {
    add([&](Case& c) { c.similarity = similarity; });
    add([&](Case& c) { c.similarity = similarity, c.scales = Per::head; });
  }
  if (dtype != DType::f16) add([&](Case& c) { c.similarity = Similarity::cosine, c.zero_rows = true; });  // 1 / eps
  for (double dropout : {0.3, 1.0}) add([&](Case& c) { c.dropout = dropout; });
  for (Dims dims : {"ij", "bij", "hij", "bhij"}) add([&](Case& c) { c.tiles = dims; });
  for (Dims dims : {"1", "b", "h", "i", "j", "ij", "bhij"}) add([&](Case& c) { c.bias = dims, c.bias_f32 = true; });
  for (Dims dims : {"bhij", "j", "i", "b"}) add([&](Case& c) { c.mask = dims; });
  add([&](Case& c) { c.packed = true; });
  add([&](Case& c) { c.starts = true, c.left = 9, c.right = 1; });
  add([&](Case& c) { c.layout = Layout::columns; });
  add([&](Case& c) { c.poison = c.lengths = true, c.mask = "ij"; });
  // Hard attention: softcap rounds scores, but equal ones equally.
  add([&](Case& c) { c.hard = true, c.scale = 0.25; });
  add([&](Case& c) { c.hard = true, c.scale = 0.25, c.softcap = 30; });
  for (const Case& c : cases) test(c);
}

// Many keys: groups of key blocks have sums of their own. Many queries: so have rows.
void test_groups(DType dtype) {
  for (Dims tiles : {"", "hij"})
    for (bool packed : {false, true}) {
      const Case c{.dtype = dtype,
                   .B = 2,
                   .Hq = 2,
                   .packed = packed,
                   .starts = true,
                   .right = 500,
                   .tiles = tiles,
                   .softcap = 5,
                   .scales = Per::head,
                   .sinks = Per::sequence,
                   .slopes = Per::head,
                   .table = Per::sequence,
                   .similarity = Similarity::gaussian,
                   .dropout = 0.2};
      Case wide = c, tall = c;
      wide.Sq = 11, wide.Sk = 1100;
      tall.Sq = 600, tall.Sk = 11;
      test(wide), test(tall);
    }
}

// All features at random.
Case random_case(DType dtype) {
  Case c{.dtype = dtype};
  const auto dims = [](int64_t absent) {
    constexpr Dims kAll[] = {"bhij", "hij", "ij", "bij", "bi", "j", "hj", "bh"};
    return one_in(absent) ? kAll[below(8)] : "";
  };
  const auto per = [] { return one_in(3) ? Per(between(1, 2)) : Per::none; };
  const auto bound = [] { return one_in(3) ? between(-2, 80) : kUnbounded; };
  c.B = between(1, 4), c.Hk = between(1, 2), c.Hq = c.Hk * between(1, 3);
  c.Sq = between(1, one_in(3) ? 140 : 40), c.Sk = between(1, one_in(3) ? 140 : 40);
  c.D = between(2, 20), c.Dv = between(1, 20), c.layout = Layout(below(3));
  c.packed = one_in(3), c.lengths = one_in(3), c.starts = one_in(3), c.poison = one_in(3), c.wanted = !one_in(6);
  c.dlse = !one_in(6);
  c.start = between(-20, 20), c.left = bound(), c.right = bound();
  c.mask = dims(4), c.bias = dims(3), c.bias_f32 = one_in(2);
  constexpr Dims kTiles[] = {"ij", "bij", "hij", "bhij"};
  if (one_in(3)) c.tiles = kTiles[below(4)];
  if (c.poison && *c.mask) c.mask = "bhij";
  c.scales = per(), c.sinks = per(), c.slopes = per(), c.table = per();
  c.similarity = Similarity(below(3)), c.hard = one_in(5);
  c.dropout_batch = between(1, c.B);
  if (one_in(3)) c.dropout = 0.4;
  if (c.hard) {
    c.scale = 0.25;
    if (c.similarity == Similarity::cosine) c.similarity = Similarity::dot;
  } else if (one_in(3)) {
    c.softcap = 2;
  }
  return c;
}

}  // namespace

int main() {
  test_philox();
  for (int t = 0; t < 4; ++t) {
    const DType dtype = DType(t);
    test_shapes(dtype);
    test_features(dtype);
    test_groups(dtype);
    for (int n = 0; n < 250; ++n) test(random_case(dtype));
  }
  for (const InstructionSet* isa : kInstructionSets) std::printf("%s ", isa->name);
  std::printf("\n%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
