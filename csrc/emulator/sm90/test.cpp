// Tests of the emulator's sm_90a: each instruction against its definition in the PTX manual, written out once more.
#include "test.h"

#include "../../cuda/sm90/ptx.h"
#include "../../test_report.h"

namespace {

using namespace heedful::emulated;
using heedful::for_all_seeds;
using heedful::machine;
using heedful::report;
using heedful::emulator::launch;

// A block whose first 8 bytes are an mbarrier.
void begin(int count) {
  if (thread_index() == 0) {
    init_mbarrier(0, count);
    fence_mbarrier_init();
  }
  sync_block();
}

uint16_t small(int n) { return narrow<Float16>(float(n * 37 % 17 - 8) / 4).bits; }

// ---- mbarriers ------------------------------------------------------------------------------------------------------

void test_mbarrier() {
  bool phases = true, bytes = true, ordered = true;
  alignas(16) float from[64];
  for (int n = 0; n < 64; ++n) from[n] = float(n);
  for_all_seeds([&] {
    launch({1, 64, 1024, true}, [&] {
      begin(3);
      // Of a new mbarrier the phase before the first one has ended. Three arrivals end a phase.
      const uint32_t other = 8;
      if (thread_index() == 0) {
        init_mbarrier(other, 1);
        fence_mbarrier_init();
        phases &= try_wait(0, 1) && !try_wait(0, 0);
        for (uint32_t phase = 0; phase < 5; ++phase) {
          arrive(0), arrive(0);
          phases &= !try_wait(0, phase & 1);
          arrive(0);
          phases &= try_wait(0, phase & 1) && !try_wait(0, ~phase & 1);
        }
      }
      sync_block();
      // A phase ends when its arrivals and its bytes are there, whichever comes last; the bytes come in two copies.
      for (uint32_t phase = 0; phase < 3; ++phase) {
        if (thread_index() == 32) {
          if (phase == 1) load_bulk(128, from, 64, other);
          arrive_expecting(other, 256);
          if (phase != 1) load_bulk(128, from, 64, other);
          load_bulk(192, from + 16, 192, other);
        }
        wait_mbarrier(other, phase & 1);
        bytes &= load_shared<float>(uint32_t(128 + 4 * thread_index())) == float(thread_index());
        sync_block();
      }
      // What a thread wrote before its arrival, others may read after their wait.
      store_shared(uint32_t(512 + 4 * thread_index()), float(thread_index()));
      sync_warp();
      if (thread_index() % 32 == 0) arrive(0);
      if (thread_index() == 5) arrive(0);
      wait_mbarrier(0, 1);
      ordered &= load_shared<float>(uint32_t(512 + 4 * (63 - thread_index()))) == float(63 - thread_index());
    });
  });
  report(phases, "mbarrier: phases"), report(bytes, "mbarrier: bytes"), report(ordered, "mbarrier: order");
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Where the manual's figures put 16-byte unit `unit` of row `row`: patterns of 8, 4 and 2 units, which repeat after
// 1024, 512 and 256 bytes.
uint32_t in_figure(Swizzle swizzle, uint32_t row, uint32_t unit, uint32_t row_bytes) {
  switch (swizzle) {
    case Swizzle::bytes128:
      return row * 128 + (unit ^ row % 8) * 16;
    case Swizzle::bytes64:
      return row * 64 + (unit ^ row / 2 % 4) * 16;
    case Swizzle::bytes32:
      return row * 32 + (unit ^ row / 4 % 2) * 16;
    default:
      return row * row_bytes + unit * 16;
  }
}

void test_tiles() {
  // [3][4][20][72]: the third dimension's rows have gaps.
  constexpr uint64_t kSize[4] = {72, 20, 4, 3}, kStride[4] = {1, 80, 80 * 21, 80 * 21 * 5};
  std::vector<uint16_t> from(kStride[3] * 3), to(from.size());
  for (size_t n = 0; n < from.size(); ++n) from[n] = uint16_t(n * 7 + 1);
  const struct {
    Swizzle swizzle;
    uint32_t width;
  } swizzles[] = {{Swizzle::none, 24}, {Swizzle::bytes32, 16}, {Swizzle::bytes64, 32}, {Swizzle::bytes128, 64}};
  const int corners[][4] = {{0, 0, 0, 0}, {32, 5, 1, 2}, {-8, -3, 0, 1}, {61, 15, 3, -1}, {72, 0, 0, 0}};
  bool loads = true, stores = true;
  for (int dimensions = 2; dimensions <= 4; ++dimensions)
    for (const auto& s : swizzles)
      for (const auto& at : corners) {
        TensorMap map{from.data(), Element::bf16, dimensions, {}, {}, {s.width, 9, 2, 2}, s.swizzle};
        for (int n = 0; n < dimensions; ++n) map.size[n] = kSize[n];
        for (int n = 1; n < dimensions; ++n) map.stride[n - 1] = 2 * kStride[n];
        TensorMap out = map;
        out.data = to.data();
        const uint32_t rows = 9u << (dimensions - 2), bytes = rows * s.width * 2;
        std::fill(to.begin(), to.end(), uint16_t(0));
        machine().seed = uint64_t(at[0] + 10);
        launch({1, 32, 16384, true}, [&] {
          begin(1);
          if (thread_index() == 0) {
            arrive_expecting(0, bytes);
            if (dimensions == 2) load_tile(1024, map, 0, {at[0], at[1]});
            if (dimensions == 3) load_tile(1024, map, 0, {at[0], at[1], at[2]});
            if (dimensions == 4) load_tile(1024, map, 0, {at[0], at[1], at[2], at[3]});
          }
          wait_mbarrier(0, 0);
          if (thread_index() != 0) return;
          for (uint32_t row = 0; row < rows; ++row)
            for (uint32_t x = 0; x < s.width; ++x) {
              const int64_t i[4] = {at[0] + int(x), at[1] + int(row % 9), at[2] + int(row / 9 % 2),
                                    at[3] + int(row / 18)};
              int64_t offset = 0;
              bool inside = true;
              for (int n = 0; n < dimensions; ++n) {
                inside &= i[n] >= 0 && i[n] < int64_t(kSize[n]);
                offset += i[n] * int64_t(kStride[n]);
              }
              const uint32_t address = 1024 + in_figure(s.swizzle, row, x / 8, s.width * 2) + x % 8 * 2;
              loads &= load_shared<uint16_t>(address) == (inside ? from[size_t(offset)] : 0);
            }
          if (dimensions == 2) store_tile(out, 1024, {at[0], at[1]});
          if (dimensions == 3) store_tile(out, 1024, {at[0], at[1], at[2]});
          if (dimensions == 4) store_tile(out, 1024, {at[0], at[1], at[2], at[3]});
          commit_stores();
          wait_stores<0>();
        });
        for (int64_t n = 0; n < int64_t(to.size()); ++n) {
          const int64_t i[4] = {n % 80, n / 80 % 21, n / (80 * 21) % 5, n / (80 * 21 * 5)};
          bool inside = true;
          for (int k = 0; k < 4; ++k) {
            const int64_t first = k < dimensions ? at[k] : 0, count = k >= dimensions ? 1
                                                                      : k             ? (k == 1 ? 9 : 2)
                                                                                      : s.width;
            inside &= i[k] < int64_t(kSize[k]) && i[k] >= first && i[k] < first + count;
          }
          stores &= to[size_t(n)] == (inside ? from[size_t(n)] : 0);
        }
      }
  report(loads, "load_tile"), report(stores, "store_tile");
}

void test_sums() {
  std::vector<float> to(16 * 32, 1), more(64, 1);
  const TensorMap map{to.data(), Element::f32, 2, {32, 16}, {128}, {32, 4}, Swizzle::bytes128};
  launch({1, 32, 2048, true}, [&] {
    for (uint32_t n = uint32_t(thread_index()); n < 128; n += 32)
      store_shared(1024 + in_figure(Swizzle::bytes128, n / 32, n % 32 / 4, 128) + n % 4 * 4, float(n));
    fence_async_shared();
    sync_warp();
    if (thread_index() != 0) return;
    for (int n = 0; n < 3; ++n) {
      add_tile(map, 1024, {0, 14});  // two of its rows lie out of the tensor
      add_bulk(more.data(), 1024, 256);
      commit_stores();
      wait_stores<0>();
    }
  });
  bool tile = true, bulk = true;
  for (size_t n = 0; n < to.size(); ++n) tile &= to[n] == (n < 14 * 32 ? 1.0f : 1 + 3 * float(n - 14 * 32));
  for (uint32_t n = 0; n < more.size(); ++n) {
    const uint32_t row = n / 32, unit = n % 32 / 4 ^ row;  // as it lies in shared memory
    bulk &= more[n] == 1 + 3 * float(row * 32 + unit * 4 + n % 4);
  }
  report(tile, "add_tile"), report(bulk, "add_bulk");
}

// ---- products -------------------------------------------------------------------------------------------------------

void test_descriptor() {
  constexpr uint64_t bits = MatrixDescriptor{0x12340, 0x2000, 0x400, Swizzle::bytes64}.bits();
  report(bits == (0x1234u | uint64_t{0x200} << 16 | uint64_t{0x40} << 32 | uint64_t{2} << 62), "descriptor");
  report(MatrixDescriptor{0, 0, 0, Swizzle::bytes128}.bits() >> 62 == 1, "descriptor of 128-byte swizzle");
  report(MatrixDescriptor{0, 0, 0, Swizzle::bytes32}.bits() >> 62 == 3, "descriptor of 32-byte swizzle");
  report(advance(bits, 64) == bits + 4, "descriptor, advanced");
}

// An operand [rows][16] as the manual's figures of canonical layouts have it, with offsets that leave gaps.
struct Operand {
  Major major;
  Swizzle swizzle;
  uint32_t start, leading, stride;

  uint64_t descriptor() const { return MatrixDescriptor{start, leading, stride, swizzle}.bits(); }
  // Bytes from its start to number k of a row.
  uint32_t at(uint32_t row, uint32_t k) const {
    const uint32_t swizzles[] = {16, 128, 64, 32}, width = swizzles[uint32_t(swizzle)];
    if (major == Major::k) {
      if (swizzle == Swizzle::none) return row / 8 * stride + k / 8 * leading + row % 8 * 16 + k % 8 * 2;
      return row / 8 * stride + in_figure(swizzle, row % 8, k / 8, 0) + k % 8 * 2;
    }
    if (swizzle == Swizzle::none) return row / 8 * stride + k / 8 * leading + k % 8 * 16 + row % 8 * 2;
    const uint32_t along = width / 2;  // rows in a swizzle's width
    return row / along * leading + k / 8 * stride + in_figure(swizzle, k % 8, row % along / 8, 0) + row % 8 * 2;
  }
};

template <class T, int kColumns, Major kMajorA, Major kMajorB>
bool right_product(Swizzle swizzle, bool a_in_registers) {
  // Groups of 8 rows take 1024 bytes at most. Every second kilobyte is a gap.
  const Operand a{kMajorA, swizzle, 0, kMajorA == Major::k ? 1024u : 4096u, kMajorA == Major::k ? 2048u : 1024u};
  const Operand b{kMajorB, swizzle, 65536, kMajorB == Major::k ? 1024u : 2048u, kMajorB == Major::k ? 2048u : 1024u};
  const auto plain = [](Operand o) {
    if (o.major == Major::mn && o.swizzle == Swizzle::none) o.leading = 1024, o.stride = 2048;
    return o;
  };
  const Operand of_a = plain(a), of_b = plain(b);
  const auto value = [](uint32_t of, uint32_t row, uint32_t k) {
    return widen(T{narrow<T>(widen(Float16{small(int(of + row * 5 + k * 3))})).bits});
  };
  bool right = true;
  launch({1, 128, 65536 + 2048 * (kColumns / 8 + 1), true}, [&] {
    const uint32_t thread = uint32_t(thread_index()), lane = thread % 32, warp = thread / 32;
    for (uint32_t n = thread; n < 64 * 16; n += 128)
      store_shared(of_a.start + of_a.at(n / 16, n % 16), narrow<T>(value(0, n / 16, n % 16)).bits);
    for (uint32_t n = thread; n < kColumns * 16; n += 128)
      store_shared(of_b.start + of_b.at(n / 16, n % 16), narrow<T>(value(9, n / 16, n % 16)).bits);
    fence_async_shared();
    sync_block();
    // Figure "WGMMA .m64nNk16 register fragment layout for matrix A": a0 and a1 in a register, and so on.
    uint32_t registers[4];
    for (uint32_t i = 0; i < 8; i += 2) {
      const uint32_t row = warp * 16 + lane / 4 + (i == 2 || i == 6 ? 8 : 0), k = lane % 4 * 2 + (i >= 4 ? 8 : 0);
      registers[i / 2] = pack<T>(value(0, row, k), value(0, row, k + 1));
    }
    // Figure "... for accumulator matrix D".
    const auto row_of = [&](uint32_t i) { return warp * 16 + lane / 4 + 8 * (i / 2 % 2); };
    const auto column_of = [&](uint32_t i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; };
    float d[kColumns / 2], other[kColumns / 2];
    for (uint32_t i = 0; i < kColumns / 2; ++i) d[i] = float(row_of(i)) - float(column_of(i));
    fence_wgmma();
    if (a_in_registers) {
      wgmma<T, kMajorB>(d, registers, of_b.descriptor());
      wgmma_zero<T, kMajorB>(other, registers, of_b.descriptor());
      wgmma<T, kMajorB>(other, registers, of_b.descriptor());
    } else {
      wgmma<T, kMajorA, kMajorB>(d, of_a.descriptor(), of_b.descriptor());
      wgmma_zero<T, kMajorA, kMajorB>(other, of_a.descriptor(), of_b.descriptor());
      wgmma<T, kMajorA, kMajorB>(other, of_a.descriptor(), of_b.descriptor());
    }
    commit_wgmma();
    wait_wgmma<0>();
    pin(d), pin(other);
    for (uint32_t i = 0; i < kColumns / 2; ++i) {
      float sum = 0;
      for (uint32_t k = 0; k < 16; ++k) sum += value(0, row_of(i), k) * value(9, column_of(i), k);
      right &= d[i] == float(row_of(i)) - float(column_of(i)) + sum && other[i] == 2 * sum;
    }
  });
  return right;
}

template <class T, int kColumns, Major kMajorA, Major kMajorB>
void test_products_of() {
  for (Swizzle swizzle : {Swizzle::none, Swizzle::bytes32, Swizzle::bytes64, Swizzle::bytes128}) {
    if (swizzle != Swizzle::bytes128 && kMajorB == Major::mn && kColumns % (swizzle == Swizzle::bytes64 ? 32 : 16))
      continue;
    machine().seed = kColumns;
    const std::string what = "wgmma, N " + std::to_string(kColumns) + ", swizzle " + std::to_string(int(swizzle)) +
                             (kMajorA == Major::k ? ", a K-major" : ", a MN-major") +
                             (kMajorB == Major::k ? ", b K-major" : ", b MN-major");
    report((right_product<T, kColumns, kMajorA, kMajorB>(swizzle, false)), what);
    report((right_product<T, kColumns, kMajorA, kMajorB>(swizzle, true)), what + ", a in registers");
  }
}

void test_products() {
  test_products_of<BFloat16, 64, Major::k, Major::k>(), test_products_of<Float16, 64, Major::k, Major::mn>();
  test_products_of<BFloat16, 64, Major::mn, Major::k>(), test_products_of<BFloat16, 128, Major::mn, Major::mn>();
  test_products_of<Float16, 8, Major::k, Major::k>(), test_products_of<Float16, 176, Major::k, Major::k>();
  test_products_of<BFloat16, 256, Major::k, Major::mn>();
}

// ---- some warps -----------------------------------------------------------------------------------------------------

// PTX manual, stmatrix: thread n holds elements (n / 4, 2 (n % 4)) and its right neighbour of each matrix.
void test_stmatrix() {
  bool plain = true, transposed = true;
  launch({1, 32, 1024, true}, [&] {
    const uint32_t lane = uint32_t(thread_index()), m = lane / 8, r = lane % 8;
    for (bool trans : {false, true}) {
      uint32_t mine[4];
      for (uint32_t x = 0; x < 4; ++x) {
        const uint32_t first = 100 * x + 10 * (lane / 4) + 2 * (lane % 4);
        mine[x] = first | (first + 1) << 16;
      }
      const uint32_t address = 16 * (8 * m + (r ^ m));
      trans ? stmatrix_transposed(address, mine) : stmatrix(address, mine);
      sync_warp();
      for (uint32_t column = 0; column < 8; ++column) {
        const uint32_t got = load_shared<uint16_t>(address + 2 * column);
        (trans ? transposed : plain) &= got == 100 * m + (trans ? 10 * column + r : 10 * r + column);
      }
      sync_warp();
    }
  });
  report(plain, "stmatrix"), report(transposed, "stmatrix.trans");
}

void test_named_barriers() {
  bool right = true;
  for_all_seeds([&] {
    launch({1, 128, 512, true}, [&] {
      const int warp = thread_index() / 32;
      // Warps 0 and 1 exchange; warp 2 only arrives for warp 3.
      const uint32_t own = uint32_t(4 * thread_index());
      for (int n = 0; n < 3; ++n) {
        if (warp < 2) {
          store_shared(own, float(thread_index() + n));
          sync_named(1, 64);
          right &= load_shared<float>(own ^ 128) == float((thread_index() ^ 32) + n);
          sync_named(1, 64);
        } else {
          if (warp == 2) store_shared(own, float(n)), arrive_named(2, 64), sync_named(3, 64);
          if (warp == 3) sync_named(2, 64), right &= load_shared<float>(own - 128) == float(n), arrive_named(3, 64);
        }
      }
    });
  });
  report(right, "named barriers");
}

void test_registers() {
  std::vector<int> order;
  launch({1, 384, 0, true}, [&] {
    // 168 each at first: those who take more go on only when the others have given theirs up.
    if (thread_index() / 128 == 0) {
      if (thread_index() % 128 == 0) order.push_back(0);
      lower_registers<24>();
    } else {
      raise_registers<240>();
      if (thread_index() % 128 == 0) order.push_back(1);
    }
  });
  report(order == std::vector<int>{0, 1, 1}, "setmaxnreg");
}

}  // namespace

void heedful::test_sm90() {
  for (const auto test : {test_mbarrier, test_tiles, test_sums, test_descriptor, test_products, test_stmatrix,
                          test_named_barriers, test_registers})
    try {
      test();
    } catch (const emulator::Fault& fault) {
      report(false, fault.what());
    }
}
