#include "named_barriers.h"

#include <algorithm>

namespace heedful::emulator {

struct NamedBarriers::Arrival {
  NamedBarriers* all;
  size_t number;
  int threads;
  bool waits;
  const Where* where;
  int64_t generation = 0;  // that its warp came in
};

std::string NamedBarriers::describe(size_t number) const {
  const Barrier& b = barriers_[number];
  return "barrier " + std::to_string(number) + " (" + std::to_string(b.come) + " of " + std::to_string(b.expected) +
         " threads have come)";
}

std::string NamedBarriers::describe() const {
  std::string all;
  for (size_t n = 1; n < 16; ++n)
    if (barriers_[n].come) all.append(" ").append(describe(n)).append(";");
  return all;
}

void NamedBarriers::meet(int barrier, int threads, bool waits, const Where& where) {
  const char* instruction = waits ? "sync_named" : "arrive_named";
  const std::string what = std::string(instruction) + ", " + text(where);
  if (barrier < 1 || barrier > 15) throw Fault(what + ": barrier " + std::to_string(barrier));
  if (threads < 32 || threads % 32 || threads > block_.grid().threads)
    throw Fault("barrier count: " + what + ": " + std::to_string(threads) + " threads");
  Barrier& b = barriers_[size_t(barrier)];
  Arrival mine{this, size_t(barrier), threads, waits, &where};
  block_.meet_warp(instruction, where, &mine, [](const Block::Lanes& lanes) {
    for (void* lane : lanes)
      if (static_cast<Arrival*>(lane)->number != static_cast<Arrival*>(lanes[0])->number)
        throw Fault("divergence: lanes of a warp come to different barriers");
    for (void* lane : lanes) {
      Arrival& arrival = *static_cast<Arrival*>(lane);
      arrival.generation = arrival.all->barriers_[arrival.number].generation;
    }
    arrive(*static_cast<Arrival*>(lanes[0]), block().self().warp());
  });
  if (waits && b.generation == mine.generation) block_.wait_for(&b, instruction, where);
}

void NamedBarriers::arrive(const Arrival& arrival, int warp) {
  NamedBarriers& all = *arrival.all;
  Barrier& b = all.barriers_[arrival.number];
  if (b.come && b.expected != arrival.threads)
    throw Fault("barrier count: " + text(*arrival.where) + " says " + std::to_string(arrival.threads) + ", " +
                text(b.where) + " says otherwise: " + all.describe(arrival.number));
  if (std::count(b.warps.begin(), b.warps.end(), warp))
    throw Fault("barrier count: warp " + std::to_string(warp) + " comes twice, " + text(*arrival.where) + ": " +
                all.describe(arrival.number));
  b.expected = arrival.threads, b.come += 32, b.where = *arrival.where;
  b.warps.push_back(warp);
  if (arrival.waits) b.waiting.push_back(warp);
  for (int n = 0; n < 32; ++n) all.clocks_.release(warp * 32 + n, b.arrived);
  if (b.come < b.expected) return;
  for (int waiting : b.waiting)
    for (int n = 0; n < 32; ++n) all.clocks_.acquire(waiting * 32 + n, b.arrived);
  b.come = 0, b.arrived = Clock(), ++b.generation;
  b.warps.clear(), b.waiting.clear();
  all.block_.wake(&b);
}

void NamedBarriers::check_end() const {
  for (size_t n = 1; n < 16; ++n)
    if (barriers_[n].come) throw Fault("barrier count: a block ends with " + describe(n));
}

}  // namespace heedful::emulator
