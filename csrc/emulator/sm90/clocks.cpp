#include "clocks.h"

#include <algorithm>

namespace heedful::emulator {

void Clock::learn(int agent, Time time) {
  if (size_t(agent) >= known_.size()) known_.resize(size_t(agent) + 1);
  known_[size_t(agent)] = std::max(known_[size_t(agent)], time);
}

void Clock::join(const Clock& other) {
  if (other.known_.size() > known_.size()) known_.resize(other.known_.size());
  for (size_t n = 0; n < other.known_.size(); ++n) known_[n] = std::max(known_[n], other.known_[n]);
}

void Clock::keep_common(const Clock& other) {
  if (other.known_.size() < known_.size()) known_.resize(other.known_.size());
  for (size_t n = 0; n < known_.size(); ++n) known_[n] = std::min(known_[n], other.known_[n]);
}

Clocks::Clocks(int threads) : clocks_(size_t(threads)) {
  for (int n = 0; n < threads; ++n) add_agent("thread " + std::to_string(n));
  for (int n = 0; n < threads; ++n) clocks_[size_t(n)].learn(n, 1);
  for (auto& of_kind : fences_) of_kind.resize(size_t(threads));
}

int Clocks::add_agent(const std::string& name, int parts) {
  const int agent = int(names_.size());
  names_.resize(names_.size() + 1 + size_t(parts), name);
  parts_.resize(names_.size());
  parts_[size_t(agent)] = parts;
  return agent;
}

void Clocks::release(int thread, Clock& to) {
  to.join(of(thread));
  tick(thread);
}

void Clocks::meet(int first, int count) {
  Clock all;
  for (int n = first; n < first + count; ++n) all.join(of(n));
  for (int n = first; n < first + count; ++n) {
    clocks_[size_t(n)] = all;
    tick(n);
  }
}

Clock Clocks::common(int first, int count) const {
  Clock all = of(first);
  for (int n = first + 1; n < first + count; ++n) all.keep_common(of(n));
  return all;
}

void Clocks::fence(Fence kind, int thread) {
  fences_[kind][size_t(thread)].push_back(of(thread)[thread]);
  tick(thread);
}

bool Clocks::fenced(Fence kind, const Stamp& event, const Clock& known) const {
  const auto& times = fences_[kind][size_t(event.agent)];
  const auto first = std::lower_bound(times.begin(), times.end(), event.time);
  return first != times.end() && *first <= known[event.agent];
}

}  // namespace heedful::emulator
