#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "sm90.h"

namespace heedful::emulator {
namespace {

uint64_t hash(const void* data, size_t bytes) {
  uint64_t h = 1469598103934665603u;
  for (size_t n = 0; n < bytes; n += 4) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(data) + n, 4);
    h = (h ^ word) * 1099511628211u;
  }
  return h;
}

bool all_poison(const float* values, size_t count) {
  return std::all_of(values, values + count, [](float x) { return std::bit_cast<uint32_t>(x) == kInFlight; });
}

// Where number `k` of row `mn` of an operand lies.
uint32_t operand_address(uint64_t descriptor, cuda::Major major, uint32_t mn, uint32_t k) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto swizzle = cuda::Swizzle(descriptor >> 62);
  const uint32_t row = width(swizzle), units = row / 16;
  const uint32_t number = (major == cuda::Major::k ? k : mn) % 8 * 2;
  if (major == cuda::Major::k) {
    const uint32_t unit = swizzle == cuda::Swizzle::none ? leading : 16;
    return cuda::swizzled(start + mn / 8 * stride + mn % 8 * row + k / 8 * unit, swizzle) + number;
  }
  const uint32_t unit = mn / 8, next_k = swizzle == cuda::Swizzle::none ? leading : stride;
  const uint32_t next_units = swizzle == cuda::Swizzle::none ? stride : leading;
  return cuda::swizzled(start + unit % units * 16 + unit / units * next_units + k % 8 * row + k / 8 * next_k, swizzle) +
         number;
}

}  // namespace

Wgmma::Wgmma(Block& block, Sm90& sm90)
    : block_(block),
      sm90_(sm90),
      warpgroups_(size_t(block.grid().threads / 128)),
      threads_(size_t(block.grid().threads)) {}

void Wgmma::fence() {
  OfThread& own = threads_[size_t(block_.self().index)];
  own.fenced = true;
  for (Registers& r : own.registers) r.fenced = hash(r.at, r.bytes);
}

// Registers that are not in flight as accumulators: they need a fence since they were last touched. What touches them
// is not seen; but what they hold is, of those that an instruction has used before.
void Wgmma::check_registers(int thread, const void* at, size_t bytes, bool values_matter, bool is_a, int number,
                            const Where& where) {
  OfThread& own = threads_[size_t(thread)];
  const auto fail = [&](const char* fault) {
    throw Fault(std::string(fault) + (is_a ? " a's registers" : " accumulators") + " of thread " +
                std::to_string(thread) + ", " + text(where));
  };
  auto known = std::find_if(own.registers.begin(), own.registers.end(),
                            [&](const Registers& r) { return r.at == at && r.bytes == bytes; });
  const uint64_t now = hash(at, bytes);
  if (known == own.registers.end()) {
    if (!own.fenced) fail("no wgmma fence: before the first use of");
    known = own.registers.insert(known, {at, bytes, now, now, 0, where, is_a});
  } else if (known->last && known->left != now) {
    fail("in flight: written while a wgmma reads them:");
  } else if (!own.fenced) {
    if (known->left != now || !values_matter) fail("no wgmma fence: since the last touch of");
  } else if (values_matter && known->fenced != now) {
    fail("no wgmma fence: touched after it:");
  }
  known->left = now, known->last = number, known->where = where, known->is_a = is_a;
}

std::shared_ptr<Wgmma::Accumulators> Wgmma::accumulators(const Block::WarpgroupLanes& calls, Warpgroup& group,
                                                         int first) {
  const auto of = [&](size_t lane) -> const WgmmaCall& { return *static_cast<WgmmaCall*>(calls[lane]); };
  const size_t count = size_t(of(0).count);
  for (const auto& d : group.in_flight) {
    if (d->registers[0] != of(0).d || d->returned[0]) continue;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (d->registers[lane] != of(lane).d || d->count != count || d->returned[lane])
        throw Fault("in flight: wgmma, " + text(of(lane).where) +
                    ": accumulators of another shape, or not in all lanes");
      if (!all_poison(of(lane).d, count))
        throw Fault("in flight: an accumulator of thread " + std::to_string(size_t(first) + lane) +
                    " was touched before wgmma, " + text(of(lane).where));
    }
    return d;
  }
  auto d = std::make_shared<Accumulators>();
  d->count = count;
  d->values.resize(kLanes * count);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    float* registers = d->registers[lane] = of(lane).d;
    check_registers(first + int(lane), registers, 4 * count, !of(lane).zero, false, 0, of(lane).where);
    std::copy_n(registers, count, &d->values[lane * count]);
    std::fill_n(registers, count, std::bit_cast<float>(kInFlight));
  }
  group.in_flight.push_back(d);
  return d;
}

void Wgmma::issue(const Block::WarpgroupLanes& calls) {
  const WgmmaCall& any = *static_cast<WgmmaCall*>(calls[0]);
  Block& block = emulator::block();
  Sm90& sm90 = block.sm90(any.where);
  Wgmma& all = sm90.wgmma;
  const int first = block.self().index / 128 * 128;
  Warpgroup& group = all.warpgroups_[size_t(first / 128)];
  if (group.agent == kNoAgent)
    group.agent = sm90.clocks.add_agent("a wgmma of warpgroup " + std::to_string(first / 128), 4);
  Product product{++group.issued, all.accumulators(calls, group, first), {}, any};
  product.d->last = product.number;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const WgmmaCall& call = *static_cast<WgmmaCall*>(calls[lane]);
    if (call.b != any.b || (!call.a_registers && call.a != any.a))
      throw Fault("divergence: wgmma, " + text(any.where) + ": threads bring different descriptors");
    const int thread = first + int(lane);
    if (call.a_registers) {
      all.check_registers(thread, call.a_registers, 16, true, true, product.number, call.where);
      std::copy_n(call.a_registers, 4, product.a_registers[lane].begin());
    }
    all.threads_[size_t(thread)].uncommitted = product.number;
  }
  // Take the operands.
  const Clock known = sm90.clocks.common(first, int(kLanes));
  const AsyncAccess by{{group.agent, product.number, any.where}, "wgmma", known};
  const auto take = [&](uint64_t descriptor, cuda::Major major, uint32_t rows) {
    const auto swizzle = cuda::Swizzle(descriptor >> 62);
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    if ((descriptor >> 49 & 7) || (swizzle != cuda::Swizzle::none && start % (8 * width(swizzle)) >= width(swizzle)))
      throw Fault("misaligned: wgmma, " + text(any.where) + ": an operand does not start where its swizzle repeats");
    for (uint32_t mn = 0; mn < rows; mn += major == cuda::Major::k ? 1 : 8)
      for (uint32_t k = 0; k < 16; k += major == cuda::Major::k ? 8 : 1) {
        const uint32_t address = operand_address(descriptor, major, mn, k);
        block.shared.check_bounds(address, 16, block.access(any.where));
        sm90.words.async_read(address, 16, by);
      }
  };
  if (!any.a_registers) take(any.a, any.major_a, 64);
  take(any.b, any.major_b, uint32_t(any.count) * 2);
  if (sm90.early())
    all.multiply(product);
  else
    group.to_do.push_back(std::move(product));
}

// PTX manual, "Matrix Fragments for wgmma.mma_async.m64nNk16": each warp has 16 rows of a and d.
void Wgmma::multiply(Product& product) {
  const WgmmaCall& call = product.call;
  const size_t columns = size_t(call.count) * 2;
  std::vector<float> a(64 * 16), b(16 * columns);  // b: [k][column]
  const auto number = [&](uint32_t address) {
    uint16_t bits;
    std::memcpy(&bits, block_.shared.at(address), 2);
    return call.widen(bits);
  };
  for (uint32_t i = 0; i < 64; ++i)
    for (uint32_t k = 0; k < 16; ++k) {
      const size_t lane = i / 16 * 32 + i % 8 * 4 + k % 8 / 2;
      const uint32_t pair = product.a_registers[lane][i / 8 % 2 + k / 8 * 2];
      a[i * 16 + k] = call.a_registers ? call.widen(uint16_t(k % 2 ? pair >> 16 : pair))
                                       : number(operand_address(call.a, call.major_a, i, k));
    }
  for (uint32_t j = 0; j < columns; ++j)
    for (uint32_t k = 0; k < 16; ++k) b[k * columns + j] = number(operand_address(call.b, call.major_b, j, k));
  std::vector<float> row(columns);
  for (size_t i = 0; i < 64; ++i) {
    const auto at = [&](size_t j) -> float& {
      return product.d
          ->values[(i / 16 * 32 + i % 8 * 4 + j % 8 / 2) * product.d->count + j / 8 * 4 + i / 8 % 2 * 2 + j % 2];
    };
    for (size_t j = 0; j < columns; ++j) row[j] = call.zero ? 0 : at(j);
    for (size_t k = 0; k < 16; ++k)
      for (size_t j = 0; j < columns; ++j) row[j] += a[i * 16 + k] * b[k * columns + j];
    for (size_t j = 0; j < columns; ++j) at(j) = row[j];
  }
}

void Wgmma::multiply_some() {
  for (Warpgroup& group : warpgroups_) {
    if (group.to_do.empty() || !block_.coin()) continue;
    multiply(group.to_do.front());
    group.to_do.pop_front();
  }
}

Wgmma::Warpgroup& Wgmma::warpgroup_of(int thread, const char* instruction, const Where& where) {
  if (size_t(thread / 128) >= warpgroups_.size())
    throw Fault(std::string(instruction) + ", " + text(where) + ": not a whole warpgroup");
  return warpgroups_[size_t(thread / 128)];
}

void Wgmma::commit(const Where& where) {
  OfThread& own = threads_[size_t(block_.self().index)];
  own.groups.push_back(warpgroup_of(block_.self().index, "commit_wgmma", where).issued);
  own.uncommitted = 0;
  own.fenced = false;
}

void Wgmma::wait(size_t groups, const Where& where) {
  const int thread = block_.self().index;
  OfThread& own = threads_[size_t(thread)];
  Warpgroup& group = warpgroup_of(thread, "wait_wgmma", where);
  const size_t lane = size_t(thread % 128);
  while (own.groups.size() > groups) own.waited = own.groups.front(), own.groups.pop_front();
  for (; !group.to_do.empty() && group.to_do.front().number <= own.waited; group.to_do.pop_front())
    multiply(group.to_do.front());
  if (own.waited) {
    sm90_.clocks.learn(thread, group.agent, own.waited);
    sm90_.clocks.learn(thread, group.agent + 1 + int(lane / 32), own.waited);
  }
  for (const auto& d : group.in_flight) {
    if (d->last > own.waited || d->returned[lane]) continue;
    if (!all_poison(d->registers[lane], d->count))
      throw Fault("in flight: an accumulator of thread " + std::to_string(thread) + " was touched before wait_wgmma, " +
                  text(where));
    std::copy_n(&d->values[lane * d->count], d->count, d->registers[lane]);
    d->returned[lane] = true;
    for (Registers& r : own.registers)
      if (r.at == d->registers[lane] && r.bytes == 4 * d->count) r.left = r.fenced = hash(r.at, r.bytes);
  }
  std::erase_if(group.in_flight, [](const auto& d) {
    return std::all_of(d->returned.begin(), d->returned.end(), [](bool returned) { return returned; });
  });
  for (Registers& r : own.registers) {
    if (!r.is_a || !r.last || r.last > own.waited) continue;
    r.last = 0;
    if (hash(r.at, r.bytes) != r.left)
      throw Fault("in flight: a's registers of thread " + std::to_string(thread) + ", wgmma, " + text(r.where) +
                  ", were written before wait_wgmma, " + text(where));
  }
}

void Wgmma::check_leaving(int thread) const {
  const OfThread& own = threads_[size_t(thread)];
  if (own.uncommitted || !own.groups.empty()) throw Fault("unwaited: a thread leaves with a wgmma in flight");
}

}  // namespace heedful::emulator
