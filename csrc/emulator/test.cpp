// Tests of the emulator itself: each instruction against its definition in the PTX manual, written out once more; and
// faults planted in a kernel, each of which has to be caught by name.
#include "sm90/test.h"

#include <cfloat>

#include "../cuda/ptx.h"
#include "../test_report.h"

namespace {

using namespace heedful::emulated;
using heedful::report;
using heedful::emulator::Fault;
using heedful::emulator::machine;
using heedful::emulator::Order;
using heedful::emulator::Statistics;
using heedful::emulator::Use;

// What launching raises; empty where nothing.
std::string fault_of(const heedful::emulator::Grid& grid, const std::function<void()>& kernel) {
  try {
    heedful::emulator::launch(grid, kernel);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

// ---- instructions ---------------------------------------------------------------------------------------------------

template <class T>
void test_conversions(const char* name, float smallest) {
  bool same = true, middle = true, even = true;
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float x = widen(T{uint16_t(bits)}), next = widen(T{uint16_t(bits + 1)});
    same &= narrow<T>(x).bits == bits && narrow<T>(-x).bits == (bits | 0x8000) && x < next;
    if (std::isinf(next)) continue;
    const float half = (x + next) / 2;
    middle &= narrow<T>(std::nextafter(half, 0.0f)).bits == bits;
    middle &= narrow<T>(std::nextafter(half, INFINITY)).bits == bits + 1;
    even &= narrow<T>(half).bits == bits + bits % 2;
  }
  report(same && middle && even && widen(T{1}) == smallest, std::string("conversions of ") + name);
  report(pack<T>(1.0f, 2.0f) == (uint32_t(narrow<T>(1.0f).bits) | uint32_t(narrow<T>(2.0f).bits) << 16), "pack");
}

// PTX manual, 9.7.14.5.8: rows and columns of the elements ai, bi and ci that a lane holds.
template <class T>
void test_mma(const char* name) {
  float a[16][16], b[16][8], expected[16][8], got[16][8];
  const auto small = [](int n) { return float(n * 37 % 17 - 8) / 4; };
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = small(i * 16 + k);
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = small(k * 11 + j * 5 + 1);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      expected[i][j] = float(i - j);
      for (int k = 0; k < 16; ++k) expected[i][j] += a[i][k] * b[k][j];
    }
  heedful::emulator::launch({1, 32, 0}, [&] {
    const int lane = thread_index(), group = lane >> 2, in_group = lane % 4;
    uint32_t fragment_a[4], fragment_b[2];
    float c[4];
    for (int i = 0; i < 8; i += 2) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 : in_group * 2 + 8;
      fragment_a[i / 2] = pack<T>(a[row][column], a[row][column + 1]);
    }
    for (int i = 0; i < 4; i += 2) {
      const int row = i < 2 ? in_group * 2 : in_group * 2 + 8;
      fragment_b[i / 2] = pack<T>(b[row][group], b[row + 1][group]);
    }
    const auto row = [&](int i) { return i < 2 ? group : group + 8; };
    const auto column = [&](int i) { return in_group * 2 + (i & 1); };
    for (int i = 0; i < 4; ++i) c[i] = float(row(i) - column(i));
    mma<T>(c, fragment_a, fragment_b[0], fragment_b[1]);
    for (int i = 0; i < 4; ++i) got[row(i)][column(i)] = c[i];
  });
  report(!std::memcmp(got, expected, sizeof got), std::string("mma of ") + name);
}

// PTX manual, cvt.rna.tf32: numbers of 10 bits of mantissa stay, all others go to the nearest, ties away from 0.
void test_tf32_conversion() {
  bool same = true, nearest = true;
  const auto to = [](float x) { return std::bit_cast<float>(to_tf32(x)); };
  for (uint32_t bits = 0; bits < 0x7f800000; bits += 0x2000) {
    const float x = std::bit_cast<float>(bits), next = std::bit_cast<float>(bits + 0x2000);
    same &= to(x) == x && to(-x) == -x;
    const float middle = std::bit_cast<float>(bits + 0x1000), below = std::nextafter(middle, 0.0f);
    nearest &= to(middle) == next && to(-middle) == -next && to(below) == x && to(-below) == -x;
  }
  same &= to(INFINITY) == INFINITY && to(-INFINITY) == -INFINITY;
  same &= to(std::bit_cast<float>(0x7f801fffu)) == INFINITY && to(FLT_MAX) == INFINITY;
  for (uint32_t bits : {0x7f802000u, 0x7fc00000u, 0xffffffffu}) same &= std::isnan(to(std::bit_cast<float>(bits)));
  report(same && nearest, "conversions of TensorFloat-32");
}

// PTX manual, "Matrix Fragments for mma.m16n8k8": rows and columns of the elements ai, bi and ci of .tf32. What the
// numbers have below their 10 bits of mantissa does not count.
void test_mma_tf32() {
  float a[16][8], b[8][8], expected[16][8], got[16][8];
  const auto small = [](int n) { return float(n * 37 % 17 - 8) * 129 / 512; };
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 8; ++k) a[i][k] = small(i * 8 + k);
  for (int k = 0; k < 8; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = small(k * 11 + j * 5 + 1);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      expected[i][j] = float(i - j);
      for (int k = 0; k < 8; ++k) expected[i][j] += a[i][k] * b[k][j];
    }
  heedful::emulator::launch({1, 32, 0}, [&] {
    const int lane = thread_index(), group = lane >> 2, in_group = lane % 4;
    const auto with_low_bits = [](float x) { return std::bit_cast<uint32_t>(x) | 0x1fff; };
    uint32_t fragment_a[4], fragment_b[2];
    float c[4];
    for (int i = 0; i < 4; ++i) {
      const int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
      fragment_a[i] = with_low_bits(a[row][column]);
    }
    for (int i = 0; i < 2; ++i) fragment_b[i] = with_low_bits(b[i == 0 ? in_group : in_group + 4][group]);
    const auto row = [&](int i) { return i < 2 ? group : group + 8; };
    const auto column = [&](int i) { return in_group * 2 + (i & 1); };
    for (int i = 0; i < 4; ++i) c[i] = float(row(i) - column(i));
    mma<float>(c, fragment_a, fragment_b[0], fragment_b[1]);
    for (int i = 0; i < 4; ++i) got[row(i)][column(i)] = c[i];
  });
  report(!std::memcmp(got, expected, sizeof got), "mma of TensorFloat-32");
}

// PTX manual, ldmatrix: thread n holds elements (n / 4, 2 (n % 4)) and its right neighbour of each matrix.
void test_ldmatrix() {
  bool plain = true, transposed = true;
  heedful::emulator::launch({1, 32, 1024}, [&] {
    const int lane = thread_index();
    // Row r of matrix m lies at 16 * (8 m + (r ^ m)), and holds 100 m + 10 r + column.
    for (int n = lane; n < 256; n += 32) {
      const int m = n / 64, r = n / 8 % 8, column = n % 8;
      store_shared(uint32_t(16 * (8 * m + (r ^ m)) + 2 * column), uint16_t(100 * m + 10 * r + column));
    }
    sync_warp();
    const int m = lane / 8, r = lane % 8;
    uint32_t got[4];
    ldmatrix(got, uint32_t(16 * (8 * m + (r ^ m))));
    for (uint32_t x = 0; x < 4; ++x) {
      const uint32_t first = 100 * x + 10 * uint32_t(lane / 4) + uint32_t(2 * (lane % 4));
      plain &= got[x] == (first | (first + 1) << 16);
    }
    ldmatrix_transposed(got, uint32_t(16 * (8 * m + (r ^ m))));
    for (uint32_t x = 0; x < 4; ++x) {
      const uint32_t first = 100 * x + 10 * uint32_t(2 * (lane % 4)) + uint32_t(lane / 4);
      transposed &= got[x] == (first | (first + 10) << 16);
    }
  });
  report(plain, "ldmatrix"), report(transposed, "ldmatrix.trans");
}

void test_lanes() {
  bool shuffles = true, votes = true;
  heedful::emulator::launch({2, 64, 0}, [&] {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    shuffles &= shuffle(uint32_t(thread_index()), lane * 7) == uint32_t(warp * 32 + lane * 7 % 32);
    shuffles &= shuffle_xor(float(thread_index()), 5) == float(warp * 32 + (lane ^ 5));
    votes &= !any_lane(false) && any_lane(lane == 17) && any_lane(warp == block_index()) == (warp == block_index());
  });
  report(shuffles, "shuffle"), report(votes, "any_lane");
}

void test_poison() {
  bool poisoned = true;
  heedful::emulator::launch({2, 32, 128}, [&] {
    const uint32_t address = uint32_t(4 * thread_index());
    poisoned &= std::isnan(load_shared<float>(address));
    store_shared(address, 1.0f);
  });
  report(poisoned, "poison of shared memory");
}

void test_copies() {
  bool filled = true;
  alignas(16) unsigned char from[16];
  for (int n = 0; n < 16; ++n) from[n] = uint8_t(n + 1);
  for (uint64_t seed = 0; seed < 4; ++seed) {
    machine().seed = seed;
    heedful::emulator::launch({1, 32, 512}, [&] {
      const int bytes = thread_index() % 17;
      copy_async(uint32_t(16 * thread_index()), from, bytes);
      commit_copies();
      wait_copies<0>();
      const uint4 got = load_shared<uint4>(uint32_t(16 * thread_index()));
      unsigned char all[16];
      std::memcpy(all, &got, 16);
      for (int n = 0; n < 16; ++n) filled &= all[n] == (n < bytes ? n + 1 : 0);
    });
  }
  report(filled, "copy_async");
}

void test_wavefronts() {
  const auto loads = [](const std::function<uint32_t(int)>& address) {
    machine().statistics = Statistics();
    heedful::emulator::launch({1, 32, 4096}, [&] {
      uint32_t r[4];
      ldmatrix(r, address(thread_index()));
    });
    return machine().statistics.loads.wavefronts;
  };
  report(loads([](int lane) { return uint32_t(16 * lane); }) == 4, "wavefronts of rows one after the other");
  report(loads([](int lane) { return uint32_t(128 * lane); }) == 32, "wavefronts of rows in the same banks");
  report(loads([](int lane) { return uint32_t(128 * lane + 16 * (lane % 8)); }) == 4, "wavefronts of swizzled rows");
  report(loads([](int) { return 0u; }) == 4, "wavefronts of one row");
}

// ---- planted faults -------------------------------------------------------------------------------------------------

enum class Planted {
  nothing,
  no_barrier,
  barrier_before_wait,
  lax_wait,
  refill_before_barrier,
  no_commit_at_tail,
  never_committed,
  swizzle_one_side,
  no_swizzle,
  wrong_row,
  branch_around_ldmatrix,
  other_ldmatrix_in_branch,
  barrier_in_one_warp,
  one_more_barrier,
  lane_leaves,
  shared_too_small,
  past_the_input,
  input_written,
  output_twice,
  misaligned_row,
  exchange_without_sync,
};

// out [64][16] = a [64][64 tiles] b [16][64 tiles]^T, tile by tile: four warps of 16 rows, two stages.
struct Product {
  static constexpr int kTiles = 3;
  static constexpr uint32_t kRowBytes = 128, kA = 64 * kRowBytes, kStage = kA + 16 * kRowBytes, kShared = 2 * kStage;
  const Float16 *a, *b;  // [64][192], [16][192]
  float* out;            // [64][16]
  Planted planted;

  bool is(Planted fault) const { return planted == fault; }

  uint32_t at(uint32_t base, int row, int chunk, bool reading) const {
    const bool swizzled = !is(Planted::no_swizzle) && !(is(Planted::swizzle_one_side) && reading);
    return base + uint32_t(row) * kRowBytes + uint32_t(swizzled ? chunk ^ (row & 7) : chunk) * 16;
  }
  void load(int tile) const {
    const uint32_t base = uint32_t(tile % 2) * kStage;
    for (int n = thread_index(); n < 80 * 8; n += 128) {
      const int row = n / 8, chunk = n % 8;
      const int column = tile * 64 + chunk * 8 + (is(Planted::past_the_input) && n == 639 && tile == 2 ? 8 : 0);
      const Float16* from = row < 64 ? a + row * 192 + column : b + (row - 64) * 192 + column;
      copy_async(at(base, row, chunk, false), from, 16);
    }
  }
  void run() const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    float c[2][4] = {};
    load(0);
    commit_copies();
    for (int tile = 0; tile < kTiles; ++tile) {
      if (is(Planted::refill_before_barrier) && tile + 1 < kTiles) load(tile + 1);
      if (is(Planted::barrier_before_wait)) sync_block();
      if (is(Planted::lax_wait))
        wait_copies<1>();
      else
        wait_copies<0>();
      if (is(Planted::barrier_in_one_warp) && warp == 1 && tile == 1) sync_warp(), sync_block();
      if (!is(Planted::no_barrier) && !is(Planted::barrier_before_wait)) sync_block();
      if (!is(Planted::refill_before_barrier) && tile + 1 < kTiles) load(tile + 1);
      const bool tail = tile + 1 == kTiles;
      if (!(is(Planted::no_commit_at_tail) && tile + 2 == kTiles) && !(is(Planted::never_committed) && !tail))
        commit_copies();
      const uint32_t base = uint32_t(tile % 2) * kStage;
      for (int k = 0; k < 4; ++k) {
        const int row = warp * 16 + lane % 16 + (is(Planted::wrong_row) && lane == 9 ? -1 : 0);
        uint32_t of_a[4] = {}, of_b[4];
        const uint32_t address = at(base, row, 2 * k + lane / 16, true);
        if (is(Planted::branch_around_ldmatrix)) {
          if (lane != 3) ldmatrix(of_a, address);
        } else if (is(Planted::other_ldmatrix_in_branch) && lane < 16) {
          ldmatrix(of_a, address);
        } else {
          ldmatrix(of_a, address + (is(Planted::misaligned_row) ? 4 : 0));
        }
        ldmatrix(of_b, at(base, 64 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2, true));
        mma<Float16>(c[0], of_a, of_b[0], of_b[1]);
        mma<Float16>(c[1], of_a, of_b[2], of_b[3]);
        if (is(Planted::lane_leaves) && thread_index() == 40 && tile == 2 && k == 2) return;
      }
    }
    if (is(Planted::one_more_barrier) && warp == 2) sync_block();
    if (is(Planted::exchange_without_sync)) {
      sync_block();
      store_shared(uint32_t(4 * thread_index()), c[0][0]);
      c[0][0] = load_shared<float>(uint32_t(4 * (thread_index() ^ 1)));
    }
    for (int n = 0; n < 2; ++n)
      for (int e = 0; e < 4; ++e) {
        const int row = warp * 16 + lane / 4 + e / 2 * 8;
        store_global(out + row * 16 + n * 8 + lane % 4 * 2 + e % 2, c[n][e]);
        if (is(Planted::output_twice) && row == 5) store_global(out + row * 16, 0.0f);
        if (is(Planted::input_written) && row == 5) store_global(const_cast<Float16*>(a), Float16{0});
      }
  }
};

// The fault that a run raises, "numbers" or "wavefronts" where only those are wrong, or nothing.
std::string run_planted(Planted planted) {
  std::vector<Float16> a(64 * 192), b(16 * 192);
  std::vector<float> out(64 * 16, NAN);
  for (size_t n = 0; n < a.size(); ++n) a[n] = narrow<Float16>(float(n * 29 % 23) - 11);
  for (size_t n = 0; n < b.size(); ++n) b[n] = narrow<Float16>(float(n * 31 % 19) - 9);
  machine().statistics = Statistics();
  machine().memory.clear();
  machine().memory.add("a", a.data(), 2 * a.size(), Use::read);
  machine().memory.add("b", b.data(), 2 * b.size(), Use::read);
  machine().memory.add("out", out.data(), 4 * out.size(), Use::write_once);
  const uint32_t bytes = Product::kShared - (planted == Planted::shared_too_small ? 16 : 0);
  const std::string fault = fault_of({1, 128, bytes}, [&] { Product{a.data(), b.data(), out.data(), planted}.run(); });
  machine().memory.clear();
  if (!fault.empty()) return fault;
  for (size_t i = 0; i < 64; ++i)
    for (size_t j = 0; j < 16; ++j) {
      float expected = 0;
      for (size_t k = 0; k < 192; ++k) expected += widen(a[i * 192 + k]) * widen(b[j * 192 + k]);
      if (out[i * 16 + j] != expected) return "numbers";
    }
  const Statistics& s = machine().statistics;
  if (s.loads.wavefronts != s.loads.least || s.stores.wavefronts != s.stores.least) return "wavefronts";
  return "nothing";
}

void test_planted() {
  const struct {
    Planted planted;
    const char *name, *found;
  } cases[] = {
      {Planted::nothing, "nothing", "nothing"},
      {Planted::no_barrier, "a removed barrier", "race"},
      {Planted::barrier_before_wait, "a barrier before its wait", "race"},
      {Planted::lax_wait, "a wait too lax", "in flight"},
      {Planted::refill_before_barrier, "a refill before the barrier", "race"},
      {Planted::no_commit_at_tail, "no commit at the tail", "in flight"},
      {Planted::never_committed, "copies never committed", "in flight"},
      {Planted::swizzle_one_side, "a swizzle on one side", "numbers"},
      {Planted::no_swizzle, "no swizzle", "wavefronts"},
      {Planted::wrong_row, "a wrong row in one lane", "numbers"},
      {Planted::branch_around_ldmatrix, "ldmatrix in a branch", "divergence"},
      {Planted::other_ldmatrix_in_branch, "two ldmatrix in two branches", "divergence"},
      {Planted::barrier_in_one_warp, "another barrier in one warp", "divergence"},
      {Planted::one_more_barrier, "one more barrier in one warp", "deadlock"},
      {Planted::lane_leaves, "a lane that leaves early", "divergence"},
      {Planted::shared_too_small, "too little shared memory", "out of bounds"},
      {Planted::past_the_input, "a load past the end", "out of bounds"},
      {Planted::input_written, "an input written", "an input is written"},
      {Planted::output_twice, "a result written twice", "written twice"},
      {Planted::misaligned_row, "a misaligned row", "misaligned"},
      {Planted::exchange_without_sync, "an exchange without sync_warp", "race"},
  };
  for (const auto& c : cases)
    for (Order order : {Order::lowest, Order::highest, Order::random})
      for (uint64_t seed = 0; seed < 4; ++seed) {
        machine().order = order, machine().seed = seed;
        const std::string got = run_planted(c.planted);
        report(got.find(c.found) != std::string::npos && (got == "nothing") == (c.planted == Planted::nothing),
               std::string(c.name) + ", order " + std::to_string(int(order)) + ", seed " + std::to_string(seed) +
                   ": expected " + c.found + ", got: " + got);
      }
}

}  // namespace

int main() {
  test_conversions<BFloat16>("bfloat16", std::ldexp(1.0f, -133));
  test_conversions<Float16>("float16", std::ldexp(1.0f, -24));
  test_mma<BFloat16>("bfloat16"), test_mma<Float16>("float16");
  test_tf32_conversion(), test_mma_tf32();
  test_ldmatrix();
  test_lanes();
  test_poison();
  test_copies();
  test_wavefronts();
  test_planted();
  heedful::test_sm90(), heedful::test_planted_sm90();
  return heedful::summary();
}
