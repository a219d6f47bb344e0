// wgmma: a warpgroup's products. Operands are read some time between an instruction's issue and the wait for its group;
// the accumulators are handed back at the wait. Until then they hold a poison of their own, so that a touch is seen: a
// write at the wait, a read wherever the numbers leave registers (check_poison). Registers are known by the arrays that
// stand for them: an array that is filled anew while a wgmma reads it is a fault.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "../../cuda/sm90/descriptor.h"
#include "../block.h"
#include "clocks.h"
#include "poison.h"

namespace heedful::emulator {

// One thread's part of an instruction.
struct WgmmaCall {
  float* d;
  int count;                    // N / 2
  const uint32_t* a_registers;  // null: a lies in shared memory
  uint64_t a, b;                // descriptors
  cuda::Major major_a, major_b;
  bool zero;  // d is set, not added to
  float (*widen)(uint16_t);
  Where where;
};

class Wgmma {
 public:
  Wgmma(Block& block, Sm90& sm90);

  void fence();
  static void issue(const Block::WarpgroupLanes& calls);
  void commit(const Where& where);
  void wait(size_t groups, const Where& where);

  void multiply_some();
  void check_leaving(int thread) const;

 private:
  static constexpr size_t kLanes = 128;
  // Accumulators in flight: where each lane's lie, and their values after the instructions that are done.
  struct Accumulators {
    std::array<float*, kLanes> registers;
    size_t count;
    std::vector<float> values;  // [lane][count]
    int last;                   // the last instruction that adds to them
    std::array<bool, kLanes> returned = {};
  };
  struct Product {
    int number;
    std::shared_ptr<Accumulators> d;
    std::array<std::array<uint32_t, 4>, kLanes> a_registers;
    WgmmaCall call;
  };
  struct Warpgroup {
    int agent = kNoAgent;
    int issued = 0;
    std::deque<Product> to_do;
    std::vector<std::shared_ptr<Accumulators>> in_flight;
  };
  // Registers that some instruction has used: what they held then, and at the last fence.
  struct Registers {
    const void* at;
    size_t bytes;
    uint64_t left, fenced;  // hashes
    int last;               // instruction in flight that uses them; 0: none
    Where where;
    bool is_a;
  };
  struct OfThread {
    bool fenced = false;     // since the last commit
    int uncommitted = 0;     // the last instruction, if no commit has followed it
    std::deque<int> groups;  // each one's last instruction
    int waited = 0;          // the last instruction that was waited for
    std::vector<Registers> registers;
  };

  std::shared_ptr<Accumulators> accumulators(const Block::WarpgroupLanes& calls, Warpgroup& group, int first);
  void check_registers(int thread, const void* at, size_t bytes, bool values_matter, bool is_a, int number,
                       const Where& where);
  Warpgroup& warpgroup_of(int thread, const char* instruction, const Where& where);
  void multiply(Product& product);

  Block& block_;
  Sm90& sm90_;
  std::vector<Warpgroup> warpgroups_;
  std::vector<OfThread> threads_;
};

}  // namespace heedful::emulator
