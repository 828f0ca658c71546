// A fiber: a function on a stack of its own that runs until it leaves and goes on where it left.
// x86-64 switches by hand (some 5 ns; ucontext makes a system call each time); other machines use ucontext.
// AddressSanitizer is told of every switch, so its stack checks hold.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void emu_switch_stack(void** save, void* load);
asm(R"(
  .text
  .weak emu_switch_stack
  .type emu_switch_stack, @function
emu_switch_stack:
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
  .size emu_switch_stack, .-emu_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace emu {

class Fiber {
 public:
  void start(void (*function)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    function_ = function;
    finished_ = false;
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) & ~uintptr_t{15};
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // keeps the stack pointer as after a call: 8 modulo 16 at the first instruction
    *--sp = reinterpret_cast<void*>(&Fiber::entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    stack_pointer_ = sp;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, &Fiber::entry, 0);
#endif
  }

  // Run until the fiber leaves or ends; true when it has ended.
  bool enter() {
    running_ = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStackBytes);
#endif
#if defined(__x86_64__)
    emu_switch_stack(&main_pointer_, stack_pointer_);
#else
    swapcontext(&main_context_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    return finished_;
  }

  // Called on the fiber itself: back to whoever entered it.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(finished_ ? nullptr : &fake_stack_, main_stack_, main_bytes_);
#endif
#if defined(__x86_64__)
    emu_switch_stack(&stack_pointer_, main_pointer_);
#else
    swapcontext(&context_, &main_context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &main_stack_, &main_bytes_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;

  static void entry() {
    Fiber* me = running_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_bytes_);
#endif
    me->function_();
    me->finished_ = true;
    me->leave();
  }

  std::unique_ptr<char[]> stack_;
  void (*function_)() = nullptr;
  bool finished_ = false;
  static inline Fiber* running_ = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
  static inline void* main_pointer_ = nullptr;
#else
  ucontext_t context_;
  static inline ucontext_t main_context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  static inline const void* main_stack_ = nullptr;
  static inline size_t main_bytes_ = 0;
#endif
};

}  // namespace emu
