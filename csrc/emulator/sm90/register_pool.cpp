#include "register_pool.h"

#include <algorithm>

namespace heedful::emulator {
namespace {

constexpr int kOfMultiprocessor = 65536;

}  // namespace

// As many as __launch_bounds__(threads, 1) leaves to each thread.
RegisterPool::RegisterPool(Block& block)
    : block_(block),
      of_warp_(size_t(block.grid().threads / 32), std::min(256, kOfMultiprocessor / block.grid().threads / 8 * 8)) {}

void RegisterPool::set(int registers, bool raise, const Where& where) {
  const char* instruction = raise ? "setmaxnreg.inc" : "setmaxnreg.dec";
  int& mine = of_warp_[size_t(block_.self().warp())];
  const std::string what = std::string(instruction) + " to " + std::to_string(registers) + ", " + text(where);
  if (registers < 24 || registers > 256 || registers % 8) throw Fault(what + ": not a multiple of 8 in 24 to 256");
  if (raise ? registers < mine : registers > mine) throw Fault(what + ": a thread has " + std::to_string(mine));
  block_.meet_warp(instruction, where, nullptr, [](const Block::Lanes&) {});
  while ((registers - mine) * 32 > free_) block_.wait_for(this, instruction, where);
  // The first lane that goes on speaks for its warp.
  free_ -= (registers - mine) * 32;
  mine = registers;
  if (!raise) block_.wake(this);
}

std::string RegisterPool::describe() const {
  if (std::all_of(of_warp_.begin(), of_warp_.end(), [&](int n) { return n == of_warp_[0]; }) && !free_) return "";
  std::string all = " setmaxnreg: " + std::to_string(free_) + " registers are free, threads have";
  for (size_t n = 0; n < of_warp_.size(); n += 4) all.append(" ").append(std::to_string(of_warp_[n]));
  return all + " by warpgroup;";
}

void RegisterPool::check_end() const {
  for (size_t n = 0; n < of_warp_.size(); ++n)
    if (of_warp_[n] != of_warp_[n / 4 * 4])
      throw Fault("setmaxnreg: not in all warps of warpgroup " + std::to_string(n / 4));
}

}  // namespace heedful::emulator
