// Tests of the CPU kernels without torch or Python, for sanitizers and cross-compiled runs: every instruction set that
// this machine has, against the definition of attention in double precision, over a sweep of shapes and options.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../select.h"
#include "kernel_test_cases.h"
#include "kernel_test_check.h"
#include "kernel_test_definition.h"

namespace heedful::cpu {
extern const InstructionSet kSplitBf16;      // kernel_test_bf16.cpp
extern const InstructionSet kEmulatedTiles;  // kernel_test_tiles.cpp
}  // namespace heedful::cpu

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

const std::vector<const InstructionSet*> kInstructionSets = [] {
  std::vector<const InstructionSet*> runnable{&kSplitBf16};
#if defined(__x86_64__)  // nothing else has tile registers
  runnable.push_back(&kEmulatedTiles);
#endif
  const std::vector<std::string>& here = this_machine().cpu;
  for (const InstructionSet* isa : instruction_sets())
    if (std::find(here.begin(), here.end(), isa->name) != here.end()) runnable.push_back(isa);
  return runnable;
}();

void test(const Call& call) {
  const Case& c = call.c;
  Call expected = call.in_float64();
  define(expected.problem(), c.dtype);
  // One thread takes large blocks of queries and joins groups of keys, many take small ones and split groups of heads,
  // and two may do neither: each set meets all in turn.
  constexpr int64_t kThreads[] = {1, 2, 64};
  static size_t tests = 0;
  size_t turn = tests++;
  for (const InstructionSet* isa : kInstructionSets) {
    ++turn;
    Call got = call;
    Problem p = got.problem();
    if (!isa->forward[int(DType::f32)] && why_not_bf16(p)) continue;
    p.threads = kThreads[turn % 3];
    run(isa->forward[int(c.dtype)], p);
    run(isa->backward[int(c.dtype)], p);
    compare_results(isa->name, got, expected);
    compare_gradients(isa->name, got, expected);
  }
}

void test(const Case& c) { test(Call(c)); }

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
  // Masks of several words, from the middle of a block of keys on.
  for (Layout layout : {Layout::rows, Layout::heads_inside, Layout::columns})
    for (Dims tiles : {"", "ij"})
      test({.dtype = dtype,
            .Sq = 150,
            .Sk = 333,
            .layout = layout,
            .start = 170,
            .left = 131,
            .right = 20,
            .mask = "ij",
            .tiles = tiles,
            .bias = "ij"});
  // Nothing to do.
  test({.dtype = dtype, .B = 0, .Sq = 4, .Sk = 4});
  test({.dtype = dtype, .Sq = 0, .Sk = 4});
  test({.dtype = dtype, .Sq = 4, .Sk = 0});
}

// Where edges of bands lie among vectors and panels, and pairs of keys: windows as narrow as one key and wider than a
// panel, sequences that end anywhere in it.
void test_edges(DType dtype) {
  for (int64_t left : {0, 1, 15, 33, 62, 63, 101})
    for (int64_t right : {0, 3})
      for (int64_t start : {0, 37}) {
        Case c{.dtype = dtype, .B = 2, .Hq = 2, .Hk = 1, .Sq = 150, .Sk = 171, .D = 6, .Dv = 5, .start = start};
        c.left = left, c.right = right;
        c.lengths = c.poison = left % 2;
        test(c);
      }
  // A second block of keys, too, one open end, positions before the keys and after them, values that are NaN to some.
  Case wide{.dtype = dtype, .B = 1, .Hq = 2, .Hk = 1, .Sq = 150, .Sk = 401, .D = 6, .Dv = 5, .start = 201};
  for (auto [left, right] : {std::pair<int64_t, int64_t>{70, 0}, {101, 3}, {kUnbounded, 0}, {64, kUnbounded}, {-3, 90}})
    for (int64_t start : {-40, 201, 340}) {
      wide.left = left, wide.right = right, wide.start = start;
      Call call(wide);
      for (int64_t key : {170, 260, 400}) call.v.set_row(0, key, NAN);
      test(call);
    }
  wide.Sk = 171, wide.left = 70, wide.right = 0, wide.start = 21;
  for (const Case& c : features_of(wide)) test(c);
}

// A value that is NaN reaches the queries that see its key and no others, wherever it lies in tiles and vectors.
void test_spoiled_values(DType dtype) {
  for (int64_t S : {20, 40, 70})
    for (int64_t start : {0, 1})
      for (int64_t heads : {1, 24})  // which share what is made of the values
        for (int64_t key = 0; key < S; key += S == 20 ? 1 : 5) {
          Call call({.dtype = dtype, .Hq = heads, .Sq = S, .Sk = S + 1, .D = 8, .Dv = 8, .start = start, .right = 0});
          call.v.set_row(0, key, NAN);
          test(call);
        }
}

void test_features(DType dtype) {
  const Case plain{.dtype = dtype, .B = 3, .Hq = 4, .Hk = 2, .Sq = 67, .Sk = 70, .D = 5, .Dv = 6, .start = 3};
  for (const Case& c : features_of(plain)) test(c);
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

// Heads so large that tiles of backward take more queries of a panel at a time; several tiles, an odd number of keys.
void test_large_heads(DType dtype) {
  for (bool packed : {false, true}) {
    Case c{.dtype = dtype, .B = 2, .Hq = 2, .Hk = 1, .Sq = 150, .Sk = 171, .D = 96, .Dv = 80, .start = 37};
    c.packed = packed, c.right = 0;
    test(c);
    c.dropout = 0.2;
    test(c);
  }
}

// Rows that would lie in few places of a cache; so many queries that they are fetched ahead.
void test_large_rows(DType dtype) {
  test({.dtype = dtype, .B = 1, .Hq = 2, .Hk = 1, .Sq = 260, .Sk = 171, .D = 128, .Dv = 256, .start = 37, .right = 0});
  for (int64_t left : {kUnbounded, int64_t{1300}})
    test({.dtype = dtype, .B = 1, .Hq = 2, .Hk = 1, .Sq = 1400, .Sk = 40, .D = 128, .Dv = 256, .left = left});
}

// Blocks of queries, and query heads, that share values: kernels for pairs of bfloat16 make them once.
void test_shared_values() {
  for (Layout layout : {Layout::rows, Layout::heads_inside, Layout::columns})
    for (bool packed : {false, true})
      for (double dropout : {0.0, 0.2}) {
        Case c{.dtype = DType::bf16, .B = 2, .Hq = 8, .Hk = 2, .Sq = 260, .Sk = 281, .D = 9, .Dv = 35};
        c.layout = layout, c.packed = packed, c.lengths = !packed, c.poison = true;
        c.left = 150, c.right = 0, c.start = 20, c.dropout = dropout;
        test(c);
        c.left = 6;  // blocks of half a panel
        if (!dropout) test(c);
      }
}

Case random_case(DType dtype) {
  Case c{.dtype = dtype};
  c.B = between(1, 4), c.Hk = between(1, 2), c.Hq = c.Hk * between(1, 3);
  c.Sq = between(1, one_in(3) ? 140 : 40), c.Sk = between(1, one_in(3) ? 140 : 40);
  c.D = between(2, 20), c.Dv = between(1, 20);
  return with_random_features(c);
}

// Few queries of many heads on one key/value head: few rows, many, and more than a task takes.
void test_many_heads(DType dtype) {
  const Case plain{.dtype = dtype, .B = 2, .Hq = 38, .Hk = 2, .Sq = 3, .Sk = 70, .D = 5, .Dv = 6, .start = 67};
  for (const Case& c : features_of(plain)) test(c);
  Case in_place = plain, chunks = plain;
  in_place.D = 16, in_place.Dv = 32, in_place.right = 0;
  chunks.B = 1, chunks.Sk = 2100, chunks.D = chunks.Dv = 16, chunks.start = 2090, chunks.left = 2060, chunks.right = 0;
  test(in_place), test(chunks);
  for (int64_t heads : {7, 8, 15, 16, 17, 31, 32, 33, 48}) {
    Case c = in_place;
    c.Hq = 2 * heads, c.Sq = 1;
    test(c);
  }
  for (int n = 0; n < 50; ++n) {
    Case c{.dtype = dtype, .B = between(1, 3), .Hk = between(1, 2), .Sq = between(1, 4), .Sk = between(1, 140)};
    c.Hq = c.Hk * between(4, 20), c.D = between(2, 40), c.Dv = between(1, 40);
    test(with_random_features(c));
    c.Hq = c.Hk * between(1, 9), c.Sq = between(5, 50);
    test(with_random_features(c));
  }
  // Rows that nothing but their band masks, whole vectors of them: edges of bands, values that are NaN to some of them.
  for (Layout layout : {Layout::rows, Layout::heads_inside, Layout::columns})
    for (auto [heads, queries] :
         {std::pair<int64_t, int64_t>{16, 1}, {16, 3}, {24, 2}, {32, 2}, {66, 1}, {80, 1}, {64, 3}})
      for (int64_t D : {8, 33}) {
        Case c{.dtype = dtype, .B = 3, .Hq = heads, .Hk = 1, .Sq = queries, .Sk = 150, .D = D, .Dv = D + 1};
        c.layout = layout, c.left = 70, c.right = 0, c.start = 120, c.packed = D == 33, c.lengths = D == 8;
        Call call(c);
        call.v.set_row(0, 119, NAN);
        test(call);
      }
  // Few rows, a span of many blocks at a time; one or two read memory in order.
  for (int64_t heads : {1, 2, 5}) {
    const Case c{.dtype = dtype, .B = 1, .Hq = heads, .Hk = 1, .Sq = 1, .Sk = 1130, .D = 16, .Dv = 16, .start = 1129};
    for (const Case& x : features_of(c)) test(x);
    Case window = c, ends = c;
    window.left = 1100, window.right = 0, ends.lengths = ends.packed = true;
    test(window), test(ends);
  }
  for (int64_t heads : {1, 5, 16}) {  // several chunks of such rows, and of rows in lanes
    Case c{.dtype = dtype, .B = 2, .Hq = heads, .Hk = 1, .Sq = 1, .Sk = 4200, .D = 16, .Dv = 16, .lengths = true};
    test(c);
  }
  // Several chunks of some sequences, of packed and padded ones.
  for (bool packed : {false, true})
    for (int64_t queries : {3, 20}) {
      Case c{.dtype = dtype, .B = 5, .Hq = 5, .Hk = 1, .Sq = queries, .Sk = 4200, .D = 4, .Dv = 8};
      c.packed = packed, c.lengths = !packed, c.right = 0, c.start = 2100;
      test(c);
    }
}

}  // namespace

int main() {
  test_philox();
  for (int t = 0; t < 4; ++t) {
    const DType dtype = DType(t);
    test_shapes(dtype);
    test_edges(dtype);
    test_spoiled_values(dtype);
    test_features(dtype);
    test_groups(dtype);
    test_large_heads(dtype);
    for (int n = 0; n < 250; ++n) test(random_case(dtype));
  }
  for (int t = 0; t < 4; ++t) test_many_heads(DType(t));
  test_shared_values();
  for (int t = 0; t < 4; ++t) test_large_rows(DType(t));
  for (const InstructionSet* isa : kInstructionSets) std::printf("%s ", isa->name);
  std::printf("\n");
  return summary();
}
