// Barriers of some warps of a block: whoever waits goes on when as many threads have come as each of them says.
#pragma once

#include <array>
#include <vector>

#include "../block.h"
#include "clocks.h"

namespace heedful::emulator {

class NamedBarriers {
 public:
  NamedBarriers(Block& block, Clocks& clocks) : block_(block), clocks_(clocks) {}

  void meet(int barrier, int threads, bool waits, const Where& where);
  std::string describe() const;
  void check_end() const;

 private:
  struct Barrier {
    int expected = 0, come = 0;
    int64_t generation = 0;
    std::vector<int> warps, waiting;  // that have come, and that wait
    Clock arrived;
    Where where;
  };
  struct Arrival;
  static void arrive(const Arrival& arrival, int warp);
  std::string describe(size_t number) const;

  Block& block_;
  Clocks& clocks_;
  std::array<Barrier, 16> barriers_;
};

}  // namespace heedful::emulator
