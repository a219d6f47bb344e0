#include "block.h"

#include <algorithm>

#include "sm90/sm90.h"

namespace heedful::emulator {
namespace {

Block* running = nullptr;

const char* state_name(Thread::State state) {
  switch (state) {
    case Thread::State::ready:
      return "runs";
    case Thread::State::at_warp:
      return "waits for its warp at ";
    case Thread::State::at_warpgroup:
      return "waits for its warpgroup at ";
    case Thread::State::at_block:
      return "waits for its block at ";
    case Thread::State::at_event:
      return "waits at ";
    default:
      return "has left";
  }
}

std::string describe(const Thread& thread) {
  std::string what = "lane " + std::to_string(thread.lane()) + " of warp " + std::to_string(thread.warp()) + " " +
                     state_name(thread.state);
  if (thread.state != Thread::State::ready && thread.state != Thread::State::done)
    what += std::string(thread.instruction) + ", " + text(thread.where);
  return what;
}

}  // namespace

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

Block& block() { return *running; }

Block::Block(const Grid& grid, const std::function<void()>& kernel) : grid_(grid), kernel_(kernel) {}
Block::~Block() = default;

Sm90& Block::sm90(const Where& where) {
  if (!sm90_) throw Fault("an instruction of sm_90a, " + text(where) + ", in a block that was launched without");
  return *sm90_;
}

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
    if (block.sm90_) block.sm90_->check_leaving(self.index);
  } catch (const std::exception& error) {
    if (block.fault_.empty()) block.fault_ = error.what();
  }
  block.self().state = Thread::State::done;
  block.self().fiber.suspend();
}

void Block::run(int64_t index_of_block) {
  index = index_of_block;
  random_.seed(machine().seed * 1000003 + uint64_t(index));
  sm90_.reset(grid_.sm90 ? new Sm90(*this) : nullptr);
  shared.reset(grid_.shared_bytes, sm90_ ? &sm90_->words : nullptr);
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
  at_warpgroup_.assign(size_t(grid_.threads / 128), 0);
  warp_epoch_.assign(size_t(grid_.threads / 32), 0);
  at_block_ = 0, block_epoch_ = 0;
  for (;;) {
    if (sm90_) sm90_->pass_time(ready_.empty());
    if (ready_.empty()) break;
    current_ = &threads_[size_t(next_thread())];
    current_->fiber.resume();
    if (!fault_.empty()) throw Fault("block " + std::to_string(index) + ": " + fault_);
  }
  for (const Thread& thread : threads_)
    if (thread.state != Thread::State::done) report_stuck();
  if (sm90_) sm90_->end();
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
  if (sm90_) {
    // Lanes of a warp may well wait for different things there. Of threads that follow each other the first one is
    // named.
    std::string what = "deadlock:";
    const Thread* last = nullptr;
    for (const Thread& thread : threads_) {
      const bool same = last && last->state == thread.state && last->instruction == thread.instruction &&
                        last->where.line() == thread.where.line();
      if (!same && thread.state != Thread::State::done) what.append(" ").append(describe(thread)).append(", and on;");
      last = &thread;
    }
    throw Fault(what + sm90_->describe());
  }
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
  if (last_to_come(at_warp_[size_t(self.warp())], first, 32, instruction, where)) {
    Lanes lanes;
    for (int n = 0; n < 32; ++n) lanes[size_t(n)] = threads_[size_t(first + n)].arguments;
    perform(lanes);
    release(first, 32);
  }
  self.fiber.suspend();
}

void Block::meet_warpgroup(const char* instruction, const Where& where, void* arguments,
                           void (*perform)(const WarpgroupLanes&)) {
  Thread& self = *current_;
  const int warpgroup = self.index / 128, first = warpgroup * 128;
  if (first + 128 > grid_.threads)
    throw Fault(std::string(instruction) + ", " + text(where) + ": not a whole warpgroup");
  wait(Thread::State::at_warpgroup, instruction, where, arguments);
  if (last_to_come(at_warpgroup_[size_t(warpgroup)], first, 128, instruction, where)) {
    WarpgroupLanes lanes;
    for (int n = 0; n < 128; ++n) lanes[size_t(n)] = threads_[size_t(first + n)].arguments;
    perform(lanes);
    release(first, 128);
  }
  self.fiber.suspend();
}

bool Block::last_to_come(int& came, int first, int count, const char* instruction, const Where& where) {
  if (++came < count) return false;
  for (int n = first; n < first + count; ++n) {
    const Thread& other = threads_[size_t(n)];
    if (other.instruction != instruction || other.where.line() != where.line() ||
        other.where.column() != where.column() || other.where.file_name() != where.file_name())
      throw Fault("divergence: " + describe(other) + ", " + describe(*current_));
  }
  ++machine().statistics.instructions[instruction];
  came = 0;
  return true;
}

void Block::wait_for(const void* event, const char* instruction, const Where& where) {
  wait(Thread::State::at_event, instruction, where, nullptr);
  self().event = event;
  self().fiber.suspend();
}

void Block::wake(const void* event) {
  for (const Thread& thread : threads_)
    if (thread.state == Thread::State::at_event && thread.event == event) release(thread.index, 1);
}

void Block::sync_warp(const Where& where) {
  meet_warp("sync_warp", where, nullptr, [](const Lanes&) {
    Block& block = *running;
    ++block.warp_epoch_[size_t(block.self().warp())];
    if (block.sm90_) block.sm90_->clocks.meet(block.self().warp() * 32, 32);
  });
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
    if (sm90_) sm90_->clocks.meet(0, grid_.threads);
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
