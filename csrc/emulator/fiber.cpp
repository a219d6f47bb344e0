#include "fiber.h"

#include <cstdint>

#include "fault.h"

#if defined(__x86_64__)
// Registers that a function keeps for its caller go on the stack, and the stack changes. A new fiber's stack holds what
// the first switch to it pops: six registers, of which rbx is the argument and r12 the body, and the entry's address.
asm(R"(
.text
.globl heedful_switch_stacks
.hidden heedful_switch_stacks
.type heedful_switch_stacks, @function
heedful_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size heedful_switch_stacks, . - heedful_switch_stacks
.globl heedful_enter_fiber
.hidden heedful_enter_fiber
.type heedful_enter_fiber, @function
heedful_enter_fiber:
  mov %rbx, %rdi
  call *%r12
  ud2
.size heedful_enter_fiber, . - heedful_enter_fiber
)");
extern "C" void heedful_switch_stacks(void** from, void* to);
extern "C" void heedful_enter_fiber();
#else
extern "C" void heedful_switch_stacks(void**, void*) {}
extern "C" void heedful_enter_fiber() {}
#endif

namespace heedful::emulator {

void Fiber::start(void (*body)(void*), void* argument) {
#if !defined(__x86_64__)
  throw Fault("the emulator of CUDA kernels runs on x86-64 alone");
#endif
  if (!stack_) stack_.reset(new char[kStackBytes]);
  const auto top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) / 16 * 16;
  void** at = reinterpret_cast<void**>(top);
  *--at = nullptr, *--at = nullptr;  // the entry finds its stack aligned to 16
  *--at = reinterpret_cast<void*>(&heedful_enter_fiber);
  *--at = nullptr;                        // rbp
  *--at = argument;                       // rbx
  *--at = reinterpret_cast<void*>(body);  // r12
  for (int n = 0; n < 3; ++n) *--at = nullptr;
  own_ = at;
}

void Fiber::resume() { heedful_switch_stacks(&outside_, own_); }
void Fiber::suspend() { heedful_switch_stacks(&own_, outside_); }

}  // namespace heedful::emulator
