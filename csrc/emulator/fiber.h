// A fiber: a function on a stack of its own, which can stop in the middle and be gone on with later.
#pragma once

#include <cstddef>
#include <memory>

namespace heedful::emulator {

class Fiber {
 public:
  // The next resume() calls body(argument). Its last act has to be suspend().
  void start(void (*body)(void*), void* argument);
  void resume();   // from outside: until the fiber suspends
  void suspend();  // from inside

 private:
  // Unoptimised kernels have frames of tens of kilobytes; pages that are never touched cost nothing.
  static constexpr size_t kStackBytes = 512 << 10;
  std::unique_ptr<char[]> stack_;
  void *own_ = nullptr, *outside_ = nullptr;  // stack pointers
};

}  // namespace heedful::emulator
