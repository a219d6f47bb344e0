// What happened before what, between threads that wait for each other by mbarriers and barriers of some warps.
//
// An agent is a thread, or asynchronous work that others wait for as one: what lands at one mbarrier, one warpgroup's
// products, one thread's bulk stores. Each has a time of its own, which a thread's advances whenever it lets others
// know what it did. A clock says up to what time of every agent its owner knows (a vector clock).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../fault.h"

namespace heedful::emulator {

using Time = int32_t;

constexpr int kNoAgent = -1;

// Something that an agent did.
struct Stamp {
  int agent = kNoAgent;
  Time time = 0;
  Where where;
};

class Clock {
 public:
  Time operator[](int agent) const { return size_t(agent) < known_.size() ? known_[size_t(agent)] : 0; }
  bool knows(const Stamp& event) const { return event.agent == kNoAgent || (*this)[event.agent] >= event.time; }
  void learn(int agent, Time time);
  void join(const Clock& other);         // what either knows
  void keep_common(const Clock& other);  // what both know

 private:
  std::vector<Time> known_;
};

class Clocks {
 public:
  // What a thread's fence is good for.
  enum Fence { async_proxy, mbarrier_init, kFences };

  explicit Clocks(int threads);
  // `parts` agents follow the first one, a warpgroup's warps: one that has waited speaks for it, but whoever writes by
  // ordinary stores over what the warpgroup reads has to know of each.
  int add_agent(const std::string& name, int parts = 0);
  int parts(int agent) const { return parts_[size_t(agent)]; }
  const std::string& name(int agent) const { return names_[size_t(agent)]; }

  const Clock& of(int thread) const { return clocks_[size_t(thread)]; }
  void learn(int thread, int agent, Time time) { clocks_[size_t(thread)].learn(agent, time); }
  Stamp now(int thread, const Where& where) const { return {thread, of(thread)[thread], where}; }
  // Lets whoever joins `to` know all that the thread knows.
  void release(int thread, Clock& to);
  void acquire(int thread, const Clock& from) { clocks_[size_t(thread)].join(from); }
  // A barrier of threads that follow each other.
  void meet(int first, int count);
  // What all of them know.
  Clock common(int first, int count) const;

  void fence(Fence kind, int thread);
  // Whether a thread has fenced what it did, and whoever has that clock knows of the fence.
  bool fenced(Fence kind, const Stamp& event, const Clock& known) const;

 private:
  void tick(int thread) { clocks_[size_t(thread)].learn(thread, of(thread)[thread] + 1); }

  std::vector<std::string> names_;
  std::vector<int> parts_;
  std::vector<Clock> clocks_;
  std::vector<std::vector<Time>> fences_[kFences];  // times, by thread
};

}  // namespace heedful::emulator
