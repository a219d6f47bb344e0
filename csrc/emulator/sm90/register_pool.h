// setmaxnreg: registers that some warps give up for others to take, of those that the block was launched with.
#pragma once

#include <vector>

#include "../block.h"

namespace heedful::emulator {

class RegisterPool {
 public:
  explicit RegisterPool(Block& block);

  void set(int registers, bool raise, const Where& where);
  std::string describe() const;
  void check_end() const;

 private:
  Block& block_;
  std::vector<int> of_warp_;  // of each thread
  int free_ = 0;              // of the block's, after what is given up and before it is taken
};

}  // namespace heedful::emulator
