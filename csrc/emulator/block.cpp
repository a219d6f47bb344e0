#include "block.h"

#include <algorithm>

namespace heedful::emulator {
namespace {

Block* running = nullptr;

const char* state_name(Thread::State state) {
  switch (state) {
    case Thread::State::ready:
      return "runs";
    case Thread::State::at_warp:
      return "waits for its warp at ";
    case Thread::State::at_block:
      return "waits for its block at ";
    default:
      return "has left";
  }
}

std::string describe(const Thread& thread) {
  std::string what = "lane " + std::to_string(thread.lane()) + " of warp " + std::to_string(thread.warp()) + " " +
                     state_name(thread.state);
  if (thread.state == Thread::State::at_warp || thread.state == Thread::State::at_block)
    what += std::string(thread.instruction) + ", " + text(thread.where);
  return what;
}

}  // namespace

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

Block& block() { return *running; }

void launch(const Grid& grid, const std::function<void()>& kernel) {
  if (grid.threads % 32 || grid.threads < 32 || grid.threads > 1024)
    throw Fault("a block of " + std::to_string(grid.threads) + " threads");
  Block block(grid, kernel);
  running = &block;
  for (int64_t n = 0; n < grid.blocks; ++n) block.run(n);
  running = nullptr;
}

void Block::body(void* argument) {
  Block& block = *static_cast<Block*>(argument);
  try {
    block.kernel_();
    Thread& self = block.self();
    for (const auto& group : self.groups)
      if (!group.empty()) throw Fault("unwaited: a thread leaves with a copy in flight");
    if (!self.open_group.empty()) throw Fault("unwaited: a thread leaves with a copy that was never committed");
  } catch (const std::exception& error) {
    if (block.fault_.empty()) block.fault_ = error.what();
  }
  block.self().state = Thread::State::done;
  block.self().fiber.suspend();
}

void Block::run(int64_t index_of_block) {
  index = index_of_block;
  random_.seed(machine().seed * 1000003 + uint64_t(index));
  shared.reset(grid_.shared_bytes);
  if (threads_.empty()) threads_ = std::vector<Thread>(size_t(grid_.threads));
  ready_.clear();
  for (Thread& thread : threads_) {
    thread.index = int(&thread - threads_.data());
    thread.state = Thread::State::ready;
    thread.open_group.clear(), thread.groups.clear();
    thread.fiber.start(&body, this);
    ready_.push_back(thread.index);
  }
  at_warp_.assign(size_t(grid_.threads / 32), 0);
  warp_epoch_.assign(size_t(grid_.threads / 32), 0);
  at_block_ = 0, block_epoch_ = 0;
  while (!ready_.empty()) {
    current_ = &threads_[size_t(next_thread())];
    current_->fiber.resume();
    if (!fault_.empty()) throw Fault("block " + std::to_string(index) + ": " + fault_);
  }
  for (const Thread& thread : threads_)
    if (thread.state != Thread::State::done) report_stuck();
  count_traffic();
}

int Block::next_thread() {
  size_t at;
  switch (machine().order) {
    case Order::lowest:
      at = size_t(std::min_element(ready_.begin(), ready_.end()) - ready_.begin());
      break;
    case Order::highest:
      at = size_t(std::max_element(ready_.begin(), ready_.end()) - ready_.begin());
      break;
    default:
      at = random_() % ready_.size();
  }
  const int thread = ready_[at];
  ready_[at] = ready_.back();
  ready_.pop_back();
  return thread;
}

// Nobody can go on. Lanes of one warp that wait at different places have diverged.
void Block::report_stuck() const {
  for (const Thread& thread : threads_) {
    const Thread& first = threads_[size_t(thread.warp() * 32)];
    if (thread.state != first.state) throw Fault("divergence: " + describe(thread) + ", " + describe(first));
  }
  std::string what = "deadlock:";
  for (size_t n = 0; n < threads_.size(); n += 32) what.append(" ").append(describe(threads_[n])).append(";");
  throw Fault(what);
}

void Block::wait(Thread::State state, const char* instruction, const Where& where, void* arguments) {
  Thread& self = *current_;
  self.state = state, self.instruction = instruction, self.where = where, self.arguments = arguments;
}

void Block::release(int first, int count) {
  for (int n = first; n < first + count; ++n) {
    threads_[size_t(n)].state = Thread::State::ready;
    ready_.push_back(n);
  }
}

void Block::meet_warp(const char* instruction, const Where& where, void* arguments, void (*perform)(const Lanes&)) {
  Thread& self = *current_;
  const int first = self.warp() * 32;
  wait(Thread::State::at_warp, instruction, where, arguments);
  if (++at_warp_[size_t(self.warp())] == 32) {
    Lanes lanes;
    for (int n = 0; n < 32; ++n) {
      const Thread& other = threads_[size_t(first + n)];
      if (other.instruction != instruction || other.where.line() != where.line() ||
          other.where.column() != where.column() || other.where.file_name() != where.file_name())
        throw Fault("divergence: " + describe(other) + ", " + describe(self));
      lanes[size_t(n)] = other.arguments;
    }
    ++machine().statistics.instructions[instruction];
    perform(lanes);
    at_warp_[size_t(self.warp())] = 0;
    release(first, 32);
  }
  self.fiber.suspend();
}

void Block::sync_warp(const Where& where) {
  meet_warp("sync_warp", where, nullptr, [](const Lanes&) { ++block().warp_epoch_[size_t(block().self().warp())]; });
}

void Block::sync_block(const Where& where) {
  Thread& self = *current_;
  wait(Thread::State::at_block, "sync_block", where, nullptr);
  if (++at_block_ == grid_.threads) {
    for (const Thread& other : threads_)
      if (other.where.line() != where.line() || other.where.column() != where.column())
        throw Fault("divergence: " + describe(other) + ", " + describe(self));
    ++machine().statistics.instructions["sync_block"];
    at_block_ = 0;
    ++block_epoch_;
    release(0, grid_.threads);
  }
  self.fiber.suspend();
}

// Lanes come one after the other: the n-th time that each comes to a place is one access of the warp.
void Block::note_traffic(const Where& where, uint32_t address, int bytes, bool store) {
  Thread& self = *current_;
  Site& site = sites_.try_emplace({self.warp(), where.file_name(), where.line(), where.column()}).first->second;
  site.bytes = bytes, site.store = store;
  const size_t lane = size_t(self.lane()), n = site.count[lane]++;
  if (n == site.accesses.size()) {
    site.accesses.emplace_back();
    site.accesses.back().fill(-1);
  }
  site.accesses[n][lane] = address;
}

void Block::count_traffic() {
  for (auto& [place, site] : sites_)
    for (const auto& addresses : site.accesses)
      (site.store ? machine().statistics.stores : machine().statistics.loads).add(addresses, site.bytes);
  sites_.clear();
}

}  // namespace heedful::emulator
