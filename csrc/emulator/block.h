// Runs blocks of a CUDA kernel on the CPU: threads are fibers, which stop where threads wait for each other.
//
//   launch({.blocks = 3, .threads = 128, .shared_bytes = 49152}, [&] { kernel(problem); });
//
// What depends on timing on a GPU depends on a seed here: which thread goes on, and when an asynchronous copy lands.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fault.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"

namespace heedful::emulator {

enum class Order { lowest, highest, random };

struct Grid {
  int64_t blocks;
  int threads;
  uint32_t shared_bytes;
  bool sm90 = false;  // whether the kernel uses instructions of sm_90a
};

struct Statistics {
  std::map<std::string, int64_t> instructions;  // of warps, by name
  Traffic loads, stores;
};

// The machine: options, and what its last launches have shown.
struct Machine {
  Order order = Order::random;
  uint64_t seed = 1;
  GlobalMemory memory;
  Statistics statistics;
};
Machine& machine();

// Raises the first Fault of any thread.
void launch(const Grid& grid, const std::function<void()>& kernel);

// ---- what instructions need -----------------------------------------------------------------------------------------

struct Copy {
  uint32_t to;
  std::array<unsigned char, 16> bytes;
  bool landed;
};

struct Thread {
  enum class State { ready, at_warp, at_warpgroup, at_block, at_event, done };
  int index = 0;
  State state = State::done;
  const char* instruction = "";  // where it waits
  Where where;
  void* arguments = nullptr;
  const void* event = nullptr;   // that it waits for
  std::vector<Copy> open_group;  // of copies that no commit has closed
  std::vector<std::vector<Copy>> groups;
  Fiber fiber;

  int warp() const { return index / 32; }
  int lane() const { return index % 32; }
};

class Sm90;

class Block {
 public:
  Block(const Grid& grid, const std::function<void()>& kernel);
  ~Block();
  void run(int64_t index);

  int64_t index = 0;
  const Grid& grid() const { return grid_; }
  Thread& self() { return *current_; }
  SharedMemory shared;

  // All lanes of the caller's warp meet at one instruction; the last one to come performs it for all 32.
  using Lanes = std::array<void*, 32>;
  void meet_warp(const char* instruction, const Where& where, void* arguments, void (*perform)(const Lanes&));
  using WarpgroupLanes = std::array<void*, 128>;
  void meet_warpgroup(const char* instruction, const Where& where, void* arguments,
                      void (*perform)(const WarpgroupLanes&));
  // The caller alone stops until somebody lets go on whoever waits for that event.
  void wait_for(const void* event, const char* instruction, const Where& where);
  void wake(const void* event);
  bool anyone_ready() const { return !ready_.empty(); }
  void sync_warp(const Where& where);
  void sync_block(const Where& where);

  Access access(const Where& where, bool whole_warp = false) {
    return {self().index, block_epoch_, warp_epoch_[size_t(self().warp())], where, whole_warp};
  }
  bool coin() { return random_() & 1; }
  uint64_t random() { return random_(); }
  // What instructions of sm_90a need: a fault in a block that was launched without.
  Sm90& sm90(const Where& where);
  // One lane's part of a warp's shared memory access, for the count of wavefronts.
  void note_traffic(const Where& where, uint32_t address, int bytes, bool store);

 private:
  static void body(void* block);
  void wait(Thread::State state, const char* instruction, const Where& where, void* arguments);
  void release(int first, int count);
  // Counts the caller in; whether it is the last of them, all of which have come to the same place.
  bool last_to_come(int& came, int first, int count, const char* instruction, const Where& where);
  int next_thread();
  [[noreturn]] void report_stuck() const;
  void count_traffic();

  const Grid grid_;
  const std::function<void()>& kernel_;
  std::vector<Thread> threads_;
  std::vector<int> ready_;
  Thread* current_ = nullptr;
  std::unique_ptr<Sm90> sm90_;
  std::vector<int> at_warp_, at_warpgroup_;
  int at_block_ = 0;
  int64_t block_epoch_ = 0;
  std::vector<int64_t> warp_epoch_;
  std::string fault_;
  std::mt19937_64 random_;

  struct Site {
    int bytes;
    bool store;
    std::array<size_t, 32> count = {};
    std::vector<std::array<int64_t, 32>> accesses;
  };
  std::map<std::tuple<int, const char*, uint32_t, uint32_t>, Site> sites_;  // by warp and place in the source
};

// The block that runs.
Block& block();

}  // namespace heedful::emulator
