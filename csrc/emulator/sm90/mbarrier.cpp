#include "mbarrier.h"

#include "sm90.h"

namespace heedful::emulator {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

}  // namespace

std::string Mbarriers::describe(uint32_t address, const Mbarrier& m) const {
  return "the mbarrier at " + std::to_string(address) + " (phase " + std::to_string(m.phase) + ", parity " +
         std::to_string(m.phase & 1) + ", " + std::to_string(m.pending) + " of " + std::to_string(m.count) +
         " arrivals to come, transaction count " + std::to_string(m.expected) + ", " + std::to_string(m.in_flight) +
         " bytes in flight)";
}

std::string Mbarriers::describe() const {
  std::string all;
  for (const auto& [address, mbarrier] : mbarriers_) all.append(" ").append(describe(address, mbarrier)).append(";");
  return all;
}

void Mbarriers::init(uint32_t address, int count, const Where& where) {
  if (count < 1 || count > kMostArrivals)
    throw Fault("init_mbarrier, " + text(where) + ": a count of " + std::to_string(count));
  const Access by = block_.access(where);
  block_.shared.check_bounds(address, 8, by);
  if (mbarriers_.count(address))
    throw Fault("init_mbarrier, " + text(where) + ": is one already: " + describe(address, mbarriers_[address]));
  block_.sm90(where).words.take(address, 8, by);
  Mbarrier& mbarrier = mbarriers_[address];
  mbarrier.count = mbarrier.pending = count;
  mbarrier.agent = clocks_.add_agent("a bulk load to the mbarrier at " + std::to_string(address));
  mbarrier.init = clocks_.now(block_.self().index, where);
}

Mbarriers::Mbarrier& Mbarriers::find(uint32_t address, const char* instruction, const Where& where) {
  const auto found = mbarriers_.find(address);
  const auto fail = [&](const std::string& fault, const std::string& why) {
    throw Fault(fault + ": " + instruction + ", " + text(where) + ", at " + std::to_string(address) + why);
  };
  if (found == mbarriers_.end()) fail("uninitialised mbarrier", "");
  Mbarrier& mbarrier = found->second;
  const Clock& known = clocks_.of(block_.self().index);
  if (!known.knows(mbarrier.init)) fail("race", ": no barrier since its init, " + text(mbarrier.init.where));
  if (!clocks_.fenced(Clocks::mbarrier_init, mbarrier.init, known))
    fail("no fence_mbarrier_init", ": not between its init, " + text(mbarrier.init.where) + ", and the barrier");
  return mbarrier;
}

void Mbarriers::arrive(uint32_t address, int64_t expected_bytes, const Where& where) {
  Mbarrier& mbarrier = find(address, "arrive", where);
  if (!mbarrier.pending) throw Fault("count underflow: arrive, " + text(where) + ": " + describe(address, mbarrier));
  mbarrier.expected += expected_bytes;
  mbarrier.with_bytes |= expected_bytes > 0;
  if (mbarrier.expected > kMostBytes)
    throw Fault("transaction count overflow: " + text(where) + ": " + describe(address, mbarrier));
  clocks_.release(block_.self().index, mbarrier.arrived);
  --mbarrier.pending;
  end_phase_if_complete(address, mbarrier);
}

void Mbarriers::end_phase_if_complete(uint32_t address, Mbarrier& mbarrier) {
  if (mbarrier.pending) return;
  if (mbarrier.expected < 0)
    throw Fault("transaction count: more bytes have landed than were expected: " + describe(address, mbarrier));
  if (mbarrier.expected) return;
  if (mbarrier.in_flight)
    throw Fault("transaction count: a phase ends before its copies: " + describe(address, mbarrier));
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  mbarrier.unwaited = mbarrier.with_bytes, mbarrier.with_bytes = false;
  mbarrier.ended.join(mbarrier.arrived);
  block_.wake(&mbarrier);
}

bool Mbarriers::test(uint32_t address, uint32_t parity, const Where& where) {
  if (parity > 1) throw Fault("wait_mbarrier, " + text(where) + ": a parity of " + std::to_string(parity));
  Mbarrier& mbarrier = find(address, "wait_mbarrier", where);
  if (uint32_t(mbarrier.phase & 1) == parity) return false;
  clocks_.acquire(block_.self().index, mbarrier.ended);
  mbarrier.unwaited = false;
  return true;
}

void Mbarriers::wait(uint32_t address, uint32_t parity, const Where& where) {
  while (!test(address, parity, where)) block_.wait_for(&mbarriers_[address], "wait_mbarrier", where);
}

void Mbarriers::begin_load(uint32_t address, uint32_t bytes, const Where& where) {
  find(address, "a bulk load", where).in_flight += bytes;
}

Stamp Mbarriers::land(uint32_t address, uint32_t bytes, const Where& where) {
  Mbarrier& mbarrier = mbarriers_[address];
  mbarrier.in_flight -= bytes, mbarrier.expected -= bytes;
  mbarrier.arrived.learn(mbarrier.agent, ++mbarrier.landed);
  const Stamp stamp{mbarrier.agent, mbarrier.landed, where};
  end_phase_if_complete(address, mbarrier);
  return stamp;
}

void Mbarriers::check_end() const {
  for (const auto& [address, mbarrier] : mbarriers_) {
    if (mbarrier.in_flight || mbarrier.unwaited)
      throw Fault("unwaited: a block ends with a bulk load that nobody has waited for: " + describe(address, mbarrier));
    if (mbarrier.expected) throw Fault("transaction count: a block ends with " + describe(address, mbarrier));
  }
}

}  // namespace heedful::emulator
