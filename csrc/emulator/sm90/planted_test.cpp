// Whole kernels of sm_90a against sums in double precision, and faults planted in them, each of which has to be caught
// by name.
#include <string>
#include <vector>

#include "../../test_report.h"
#include "kernels.cuh"
#include "test.h"

namespace heedful {
namespace {

using namespace emulated;
using emulator::Fault;
using emulator::launch;
using emulator::Use;

std::string fault_of(const emulator::Grid& grid, const std::function<void()>& kernel) {
  try {
    launch(grid, kernel);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

// Tensor maps that are wrong on one side.
enum class Map { right, values_unswizzled, out_unswizzled, short_values };

template <class T>
TensorMap map_of(std::vector<T>& data, uint64_t rows, uint64_t columns, uint32_t box_rows, Swizzle swizzle) {
  return {data.data(),
          std::is_same_v<T, BFloat16> ? Element::bf16 : Element::f16,
          2,
          {columns, rows},
          {columns * 2},
          {64, box_rows},
          swizzle};
}

// The fault that a run raises, "numbers" where only those are wrong, or nothing.
template <class T>
std::string run_product(Planted fault_planted, Map wrong = Map::right) {
  planted = fault_planted;
  std::vector<T> a(128 * 256), b(64 * 256), values(64 * 128), out(128 * 128);
  for (size_t n = 0; n < a.size(); ++n) a[n] = narrow<T>(float(n * 29 % 23) / 16 - 0.6f);
  for (size_t n = 0; n < b.size(); ++n) b[n] = narrow<T>(float(n * 31 % 19) / 16 - 0.5f);
  for (size_t n = 0; n < values.size(); ++n) values[n] = narrow<T>(float(n * 13 % 29) / 32 - 0.4f);
  machine().memory.clear();
  machine().memory.add("a", a.data(), 2 * a.size(), Use::read);
  machine().memory.add("b", b.data(), 2 * b.size(), Use::read);
  machine().memory.add("values", values.data(), 2 * values.size() - (wrong == Map::short_values ? 2 : 0), Use::read);
  machine().memory.add("out", out.data(), 2 * out.size(), Use::write_once);
  const TensorMap of_a = map_of(a, 128, 256, 128, Swizzle::bytes128), of_b = map_of(b, 64, 256, 64, Swizzle::bytes128);
  const auto unless = [&](Map map) { return wrong == map ? Swizzle::none : Swizzle::bytes128; };
  const TensorMap of_values = map_of(values, 64, 128, 64, unless(Map::values_unswizzled));
  const TensorMap of_out = map_of(out, 128, 128, 64, unless(Map::out_unswizzled));
  const std::string fault = fault_of({1, ProductConfig::kThreads, ProductConfig::kShared, true},
                                     [&] { product<T>(of_a, of_b, of_values, of_out); });
  machine().memory.clear();
  if (!fault.empty()) return fault;
  double s[128][64];
  for (size_t i = 0; i < 128; ++i)
    for (size_t j = 0; j < 64; ++j) {
      s[i][j] = 0;
      for (size_t k = 0; k < 256; ++k) s[i][j] += double(widen(a[i * 256 + k])) * widen(b[j * 256 + k]);
    }
  const double unit = std::is_same_v<T, BFloat16> ? 0x1p-8 : 0x1p-11;
  for (size_t i = 0; i < 128; ++i)
    for (size_t j = 0; j < 128; ++j) {
      double sum = 0, magnitude = 0;
      for (size_t k = 0; k < 64; ++k) {
        sum += s[i][k] * widen(values[k * 128 + j]);
        magnitude += std::fabs(s[i][k] * widen(values[k * 128 + j]));
      }
      if (!(std::fabs(widen(out[i * 128 + j]) - sum) <= unit * (magnitude + std::fabs(sum)) + 1e-4)) return "numbers";
    }
  return "nothing";
}

std::string run_sums(Planted fault_planted) {
  planted = fault_planted;
  std::vector<float> from(4 * 1024), sums(1024, 0.5f), more(1024, 0.5f);
  for (size_t n = 0; n < from.size(); ++n) from[n] = 1 / float(1 + n * 7919 % 1021);
  machine().memory.clear();
  machine().memory.add("from", from.data(), 4 * from.size(), Use::read);
  machine().memory.add("sums", sums.data(), 4 * sums.size(), Use::any);
  machine().memory.add("more", more.data(), 4 * more.size(), Use::any);
  const TensorMap map{sums.data(), Element::f32, 2, {32, 32}, {128}, {32, 32}, Swizzle::bytes128};
  const std::string fault = fault_of({1, 128, 16384, true}, [&] { ordered_sums<4>(map, more.data(), from.data()); });
  machine().memory.clear();
  if (!fault.empty()) return fault;
  for (uint32_t n = 0; n < 1024; ++n) {
    float in_tile = 0.5f, in_memory = 0.5f;
    for (uint32_t warp = 0; warp < 4; ++warp) {
      in_tile += from[warp * 1024 + n];
      in_memory += from[warp * 1024 + (n ^ (n / 32 % 8) << 2)];
    }
    if (sums[n] != in_tile || more[n] != in_memory) return "numbers";
  }
  return "nothing";
}

// `found`: what the fault's text has to hold; where it depends on the order of threads, any of these.
using Found = std::vector<std::string>;
void expect(const char* name, const Found& found, const std::function<std::string()>& run) {
  for_all_seeds([&] {
    const std::string got = run();
    const bool named =
        std::any_of(found.begin(), found.end(), [&](const auto& text) { return got.find(text) != std::string::npos; });
    report(named && (got == "nothing") == (found[0] == "nothing"),
           std::string(name) + ", order " + std::to_string(int(machine().order)) + ", seed " +
               std::to_string(machine().seed) + ": expected " + found[0] + ", got: " + got);
  });
}
void expect(const char* name, Planted fault, const Found& found) {
  expect(name, found, [=] { return run_product<BFloat16>(fault); });
}

// ---- what the kernels have no place for
// ------------------------------------------------------------------------------

void test_small_faults() {
  const auto of = [](int threads, const std::function<void()>& kernel) {
    return [=] {
      const std::string fault = fault_of({1, threads, 32768, true}, kernel);
      return fault.empty() ? "nothing" : fault;
    };
  };
  const auto ready = [](int count) {
    if (thread_index() == 0) init_mbarrier(0, count), fence_mbarrier_init();
    sync_block();
  };
  expect("a block that was launched without sm_90a", {"launched without"},
         [] { return fault_of({1, 32, 64, false}, [] { fence_async_shared(); }); });
  expect("an arrival too many while bytes are to come", {"count underflow"}, of(32, [=] {
           ready(1);
           if (thread_index() == 0) arrive_expecting(0, 16), arrive(0);
         }));
  expect("an mbarrier initialised twice", {"is one already"}, of(32, [=] {
           ready(1);
           if (thread_index() == 0) init_mbarrier(0, 1);
         }));
  expect("an mbarrier's word written", {"belongs to an mbarrier"}, of(32, [=] {
           ready(1);
           if (thread_index() == 0) store_shared(4, 1.0f);
         }));
  expect("a load that nobody waits for", {"unwaited"}, of(32, [=] {
           static const std::vector<uint4> zeros(8);
           ready(1);
           if (thread_index() == 0) arrive_expecting(0, 128), load_bulk(128, zeros.data(), 128, 0);
         }));
  // Rows that threads read themselves, and a lead that lets the next load come over them.
  const auto rows = [](bool joined) {
    static const std::vector<uint4> zeros(8);
    if (thread_index() == 0) init_mbarrier(0, 1), init_mbarrier(8, 1), fence_mbarrier_init();
    sync_block();
    if (thread_index() == 32) {
      for (uint32_t turn = 0; turn < 3; ++turn) {
        wait_mbarrier(8, (turn & 1) ^ 1);
        arrive_expecting(0, 128), load_bulk(128, zeros.data(), 128, 0);
      }
    } else if (thread_index() < 32) {
      for (uint32_t turn = 0; turn < 3; ++turn) {
        wait_mbarrier(0, turn & 1);
        load_shared<float>(uint32_t(128 + 4 * thread_index()));
        if (joined) sync_warp();
        if (thread_index() == 0) arrive(8);
      }
    }
  };
  expect("rows read by threads", {"nothing"}, of(64, [=] { rows(true); }));
  expect("rows released before all have read them", {"race"}, of(64, [=] { rows(false); }));
  // copy_async beside all that: its bytes are a thread's stores, for the proxies too.
  const auto copies = [](bool waited, bool fenced) {
    static const std::vector<uint4> zeros(128);
    const uint64_t at = MatrixDescriptor{1024, 128, 256, Swizzle::none}.bits();
    copy_async(uint32_t(1024 + 16 * thread_index()), &zeros[size_t(thread_index())], 16);
    commit_copies();
    if (waited) wait_copies<0>();
    if (fenced) fence_async_shared();
    sync_block();
    float d[32];
    fence_wgmma();
    wgmma_zero<BFloat16>(d, at, at);
    commit_wgmma();
    wait_wgmma<0>();
    wait_copies<0>();
  };
  expect("operands copied by copy_async", {"nothing"}, of(128, [=] { copies(true, true); }));
  expect("copy_async not waited for", {"in flight"}, of(128, [=] { copies(false, true); }));
  expect("no proxy fence after copy_async", {"no proxy fence"}, of(128, [=] { copies(true, false); }));
  // An operand by ordinary stores: [64][16] without swizzle, for a and b both.
  const auto operand = [](bool fenced, bool barrier, bool fenced_late, bool written_over) {
    const uint64_t at = MatrixDescriptor{1024, 128, 256, Swizzle::none}.bits();
    store_shared(uint32_t(1024 + 16 * thread_index()), uint4{0, 0, 0, 0});
    if (fenced) fence_async_shared();
    if (barrier) sync_block();
    if (fenced_late) fence_async_shared();
    float d[32];
    fence_wgmma();
    wgmma_zero<BFloat16>(d, at, at);
    commit_wgmma();
    wait_wgmma<0>();
    if (written_over) store_shared(uint32_t(1024 + 16 * thread_index()), uint4{1, 1, 1, 1});
  };
  expect("operands written by threads", {"nothing"}, of(128, [=] { operand(true, true, false, false); }));
  expect("no proxy fence before wgmma", {"no proxy fence"}, of(128, [=] { operand(false, true, false, false); }));
  expect("a proxy fence after the barrier", {"no proxy fence"}, of(128, [=] { operand(false, true, true, false); }));
  expect("no barrier before wgmma", {"race"}, of(128, [=] { operand(true, false, false, false); }));
  expect("an operand written over before all warps have waited", {"race"},
         of(128, [=] { operand(true, true, false, true); }));
  expect("a wgmma of half a warpgroup", {"not a whole warpgroup"}, of(64, [=] { operand(true, true, false, false); }));
  expect("a wgmma in one warp's branch", {"deadlock"}, of(128, [=] {
           if (thread_index() >= 32) operand(true, false, false, false);
         }));
  expect("an operand that starts amid its swizzle", {"does not start where"}, of(128, [] {
           const uint64_t at = MatrixDescriptor{1024 + 128, 0, 1024, Swizzle::bytes128}.bits();
           float d[32];
           fence_wgmma();
           wgmma_zero<BFloat16>(d, at, at);
         }));
  expect("a box wider than its swizzle", {"as wide as its swizzle"}, of(32, [=] {
           static std::vector<float> data(64);
           const TensorMap map{data.data(), Element::f32, 2, {64, 1}, {256}, {64, 1}, Swizzle::bytes128};
           ready(1);
           if (thread_index() == 0) arrive_expecting(0, 256), load_tile(1024, map, 0, {0, 0});
         }));
  // Zeros [64][16] as both operands; `run` issues.
  const auto zeros = [](const std::function<void(float (&)[32], uint64_t)>& run) {
    return [=] {
      store_shared(uint32_t(1024 + 16 * thread_index()), uint4{0, 0, 0, 0});
      fence_async_shared();
      sync_block();
      float d[32];
      fence_wgmma();
      run(d, MatrixDescriptor{1024, 128, 256, Swizzle::none}.bits());
    };
  };
  expect("threads that bring different descriptors", {"different descriptors"},
         of(128, zeros([](auto& d, uint64_t at) { wgmma_zero<BFloat16>(d, at + (thread_index() == 77), at); })));
  expect("a thread that leaves before wait_wgmma", {"unwaited"}, of(128, zeros([](auto& d, uint64_t at) {
                                                                      wgmma_zero<BFloat16>(d, at, at);
                                                                      commit_wgmma();
                                                                    })));
  expect("a thread that leaves before commit_wgmma", {"unwaited"},
         of(128, zeros([](auto& d, uint64_t at) { wgmma_zero<BFloat16>(d, at, at); })));
  expect("products in flight to one half of the accumulators", {"another shape"},
         of(128, zeros([](auto& d, uint64_t at) {
              wgmma_zero<BFloat16>(d, at, at);
              wgmma_zero<BFloat16>(reinterpret_cast<float (&)[16]>(d), at, at);
            })));
  expect("an operand that ends beyond shared memory", {"out of bounds"},
         of(128, zeros([](auto& d, uint64_t) {
              const uint64_t at = MatrixDescriptor{32768 - 1024, 128, 256, Swizzle::none}.bits();
              wgmma_zero<BFloat16>(d, at, at);
            })));
  expect("a warp that comes to a barrier twice", {"comes twice"}, of(96, [] {
           if (thread_index() < 32) arrive_named(1, 96), arrive_named(1, 96);
         }));
  expect("setmaxnreg in three warps of one warpgroup", {"not in all warps"}, of(128, [] {
           if (thread_index() < 96) lower_registers<40>();
         }));
  expect("setmaxnreg beyond its range", {"not a multiple of 8"}, of(128, [] { raise_registers<260>(); }));
}

}  // namespace

void test_planted_sm90() {
  expect("a product in bfloat16", {"nothing"}, [] { return run_product<BFloat16>(Planted::nothing); });
  expect("a product in float16", {"nothing"}, [] { return run_product<Float16>(Planted::nothing); });
  expect("a consumer's wrong parity", Planted::consumer_parity, {"race", "deadlock"});
  expect("a producer's wrong parity", Planted::producer_parity, {"deadlock"});
  expect("a stage released early", Planted::released_early, {"in flight"});
  expect("a stage never released", Planted::never_released, {"deadlock"});
  expect("a release too many", Planted::one_release_too_many, {"in flight"});
  expect("too few bytes expected", Planted::too_few_bytes, {"transaction count", "not waited for"});
  expect("too many bytes expected", Planted::too_many_bytes, {"transaction count 16"});
  expect("an mbarrier without fence_mbarrier_init", Planted::no_init_fence, {"no fence_mbarrier_init"});
  expect("an mbarrier without a barrier after its init", Planted::no_init_barrier, {"mbarrier"});
  expect("an mbarrier never initialised", Planted::never_initialised, {"uninitialised mbarrier"});
  expect("a load not waited for", Planted::no_wait_for_values, {"in flight"});
  expect("a load that one thread alone waits for", Planted::one_thread_waits_for_values, {"in flight"});
  expect("no fence_wgmma", Planted::no_wgmma_fence, {"no wgmma fence"});
  expect("no fence_wgmma after packing", Planted::no_wgmma_fence_after_packing, {"no wgmma fence"});
  expect("accumulators touched after fence_wgmma", Planted::touched_after_fence, {"no wgmma fence"});
  expect("accumulators read before the wait", Planted::accumulators_read_early, {"in flight"});
  expect("accumulators written before the wait", Planted::accumulators_written_early, {"in flight"});
  expect("a's registers overwritten in flight", Planted::a_registers_overwritten, {"in flight"});
  expect("an operand overwritten in flight", Planted::operand_overwritten, {"in flight"});
  expect("a wgmma never committed", Planted::never_committed, {"in flight"});
  expect("a wrong stride in a descriptor", Planted::wrong_stride, {"numbers"});
  expect("a wrong step along k", Planted::wrong_k_step, {"numbers"});
  expect("a wrong direction", Planted::wrong_major, {"numbers"});
  expect("no fence_async_shared", Planted::no_proxy_fence, {"no proxy fence"});
  expect("fence_async_shared after the barrier", Planted::proxy_fence_late, {"no proxy fence"});
  expect("no barrier before a store", Planted::no_barrier_before_store, {"race"});
  expect("staging reused before wait_stores_read", Planted::no_wait_read, {"in flight"});
  expect("no barrier after wait_stores_read", Planted::no_barrier_after_wait_read, {"race"});
  expect("a thread that leaves before wait_stores_read", Planted::leaves_before_wait_read, {"unwaited"});
  expect("staging without swizzle", Planted::no_swizzle_in_staging, {"numbers"});
  expect("a barrier that counts too few", Planted::too_few_at_barrier,
         {"barrier count", "of 96 threads have come", "race"});
  expect("a barrier that counts too many", Planted::too_many_at_barrier, {"barrier 1 (128 of 160"});
  expect("a barrier with two counts", Planted::two_counts, {"barrier count", "barrier 3 (128 of 256", "race"});
  expect("setmaxnreg beyond the pool", Planted::registers_beyond_pool, {"setmaxnreg"});
  expect("setmaxnreg in three warps", Planted::registers_in_three_warps, {"setmaxnreg"});
  expect("setmaxnreg.dec forgotten", Planted::registers_not_lowered, {"setmaxnreg"});
  expect("a load's swizzle on one side", {"numbers"},
         [] { return run_product<BFloat16>(Planted::nothing, Map::values_unswizzled); });
  expect("a store's swizzle on one side", {"numbers"},
         [] { return run_product<BFloat16>(Planted::nothing, Map::out_unswizzled); });
  expect("a tensor shorter than its map", {"out of bounds"},
         [] { return run_product<BFloat16>(Planted::nothing, Map::short_values); });
  expect("sums in order", {"nothing"}, [] { return run_sums(Planted::nothing); });
  expect("sums that wait for the read only", {"unordered"}, [] { return run_sums(Planted::sums_wait_for_read_only); });
  expect("sums in any order", {"unordered"}, [] { return run_sums(Planted::sums_in_any_order); });
  test_small_faults();
}

}  // namespace heedful
