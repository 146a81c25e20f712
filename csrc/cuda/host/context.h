// Switching between stacks: of the fibers that are threads, and of the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fused_losses::host {
namespace {

#if defined(__x86_64__)
// Saves what a call must keep on this stack, and goes on where `to` once did the same.
extern "C" void fused_losses_switch(void** from, void* to);
asm(R"(
.text
.globl fused_losses_switch
.hidden fused_losses_switch
.type fused_losses_switch, @function
fused_losses_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_losses_switch, .-fused_losses_switch
)");
#endif

struct Context {
#if defined(__x86_64__)
  void* at = nullptr;
#else
  ucontext_t at;
#endif
  void* fake = nullptr;  // what AddressSanitizer keeps of a stack

  void prepare(char* stack, size_t bytes, void (*entry)()) {
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~15ull);
    *--top = nullptr;  // the entry finds the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    at = top;
#else
    getcontext(&at);
    at.uc_stack.ss_sp = stack;
    at.uc_stack.ss_size = bytes;
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
#endif
  }

  void go(Context& to) {
#if defined(__x86_64__)
    fused_losses_switch(&at, to.at);
#else
    swapcontext(&at, &to.at);
#endif
  }
};

}  // namespace
}  // namespace fused_losses::host
