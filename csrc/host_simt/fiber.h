// Switching between stacks. swapcontext() would do, but asks the kernel for the signal mask at every switch, which
// costs twenty times the switch itself; so x86-64 and AArch64 have a few lines of assembly, and other machines take
// ucontext.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace host_simt {

// Stores what a function call must preserve on the old stack, and its stack pointer in *from; then takes up `to`.
#if defined(__x86_64__)
extern "C" void host_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type host_simt_switch, @function
host_simt_switch:
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
.size host_simt_switch, .-host_simt_switch
)");
#elif defined(__aarch64__)
extern "C" void host_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type host_simt_switch, %function
host_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size host_simt_switch, .-host_simt_switch
)");
#endif

// A stack and where it stopped. The default one stands for the stack that the program started on.
class Stack {
 public:
  static constexpr size_t kBytes = 256 * 1024;  // address space: pages that a kernel never touches cost nothing

  Stack() = default;
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Gives the stack memory, with a page below that faults, and makes its first switch call `entry`, which never
  // returns.
  void start(void (*entry)()) {
    constexpr size_t kGuard = 4096;
    void* memory =
        mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      std::abort();
    }
    bottom_ = static_cast<char*>(memory) + kGuard;
    size_ = kBytes;
#if defined(__x86_64__)
    // Six registers, the address that `ret` takes, and an empty slot: `entry` begins as if it had been called.
    void** top = reinterpret_cast<void**>(static_cast<char*>(bottom_) + kBytes) - 8;
    top[6] = reinterpret_cast<void*>(entry);
    pointer_ = top;
#elif defined(__aarch64__)
    void** top = reinterpret_cast<void**>(static_cast<char*>(bottom_) + kBytes) - 20;
    top[11] = reinterpret_cast<void*>(entry);  // x30
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = kBytes;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves `this`, which must be the running stack, for `to`; returns when somebody switches back.
  void switch_to(Stack& to) {
#if defined(__SANITIZE_ADDRESS__)
    coming_from_ = nullptr;
    to.coming_from_ = this;
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
    host_simt_switch(&pointer_, to.pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrived();
  }

  // The first thing to do on a stack that was switched to.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    coming_from_->bottom_ = const_cast<void*>(bottom);  // how the program's own stack gets to know its bounds
    coming_from_->size_ = size;
#endif
  }

 private:
  void* bottom_ = nullptr;
  size_t size_ = 0;
  void* pointer_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  Stack* coming_from_ = nullptr;
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
  ucontext_t context_;
#endif
};

}  // namespace host_simt
