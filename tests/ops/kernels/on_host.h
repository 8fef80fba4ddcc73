// CUDA on the host: kernels run as they are written, one fiber per CUDA thread, block after block.
//
// A fiber gives way only where threads meet, and a warp runs until it waits for its block, so a
// kernel that forgets to synchronise reads what the others have not written yet; g_reversed runs
// warps and lanes from the last to the first, and a result that depends on it is a race. Threads
// that meet at different places, or not at all, are an error. With AddressSanitizer, shared memory
// has exactly the size asked for.
// Included by primitives.cuh, which says what each primitive does.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__

namespace irpe::cuda {

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

// Where a fiber, or the scheduler, goes on. The switch of x86-64 makes no system call.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};

__attribute__((naked, noinline, no_sanitize("address", "undefined"))) inline void switch_context(
    Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq (%rsi), %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void start_context(Context& context, char* stack, void (*main)()) {
  const auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) / 16 * 16;
  void** words = reinterpret_cast<void**>(top - 64);  // six registers, then where to return to
  words[6] = reinterpret_cast<void*>(main);
  context.stack_pointer = words;
}
#else
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void start_context(Context& context, char* stack, void (*main)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
}
#endif

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "kernel on host: %s\n", what);
  std::abort();
}

enum class Waits { kNot, kForWarp, kForBlock, kDone };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* shadow_stack = nullptr;  // AddressSanitizer's
  Waits waits = Waits::kNot;
};

struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> shared;
  std::function<void()> body;
  Context scheduler;
  void* scheduler_shadow_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int current = 0;
};

inline Block* g_block = nullptr;
inline bool g_reversed = false;
inline dim3 g_block_index, g_thread_index;

inline void leave_scheduler(Block& block, Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_shadow_stack, fiber.stack.get(), kStackBytes);
#endif
  switch_context(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_shadow_stack, nullptr, nullptr);
#endif
}

inline void back_in_fiber(Block& block, Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.shadow_stack, &block.scheduler_stack,
                                  &block.scheduler_stack_bytes);
#endif
  (void)block, (void)fiber;
}

// To the scheduler, until all threads concerned have come as far.
inline void give_way(Waits waits) {
  Block& block = *g_block;
  Fiber& fiber = block.fibers[block.current];
  fiber.waits = waits;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(waits == Waits::kDone ? nullptr : &fiber.shadow_stack,
                                 block.scheduler_stack, block.scheduler_stack_bytes);
#endif
  switch_context(&fiber.context, &block.scheduler);
  back_in_fiber(block, fiber);
}

inline void fiber_main() {
  Block& block = *g_block;
  back_in_fiber(block, block.fibers[block.current]);
  block.body();
  give_way(Waits::kDone);
}

// Lets the threads [first, end) go on when all that are not done wait for `what`.
inline bool release(Block& block, size_t first, size_t end, Waits what) {
  bool any = false;
  for (size_t t = first; t < end; ++t) {
    const Waits waits = block.fibers[t].waits;
    if (waits != what && waits != Waits::kDone) return false;
    any = any || waits == what;
  }
  for (size_t t = first; any && t < end; ++t) {
    if (block.fibers[t].waits == what) block.fibers[t].waits = Waits::kNot;
  }
  return any;
}

// Runs a warp until it waits for the block.
inline void run_warp(Block& block, int warp, int threads) {
  const int first = warp * kWarp, end = std::min(first + kWarp, threads);
  do {
    for (int n = first; n < end; ++n) {
      block.current = g_reversed ? first + end - 1 - n : n;
      g_thread_index = dim3(static_cast<unsigned>(block.current), 0, 0);
      Fiber& fiber = block.fibers[block.current];
      if (fiber.waits == Waits::kNot) leave_scheduler(block, fiber);
    }
  } while (release(block, first, end, Waits::kForWarp));
}

inline void run_block(Block& block, int threads) {
  for (Fiber& fiber : block.fibers) {
    fiber.waits = Waits::kNot;
    start_context(fiber.context, fiber.stack.get(), fiber_main);
  }
  const int warps = (threads + kWarp - 1) / kWarp;
  do {
    for (int n = 0; n < warps; ++n) run_warp(block, g_reversed ? warps - 1 - n : n, threads);
  } while (release(block, 0, threads, Waits::kForBlock));
  for (const Fiber& fiber : block.fibers) {
    if (fiber.waits != Waits::kDone) fail("threads wait for each other at different places");
  }
}

}  // namespace host

#define blockIdx (::irpe::cuda::host::g_block_index)
#define threadIdx (::irpe::cuda::host::g_thread_index)

inline void __syncthreads() { host::give_way(host::Waits::kForBlock); }
inline void __syncwarp() { host::give_way(host::Waits::kForWarp); }

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void*,
           Arguments... arguments) {
  host::Block block;
  block.fibers.resize(threads);
  block.body = [=] { kernel(arguments...); };
  host::g_block = &block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        host::g_block_index = dim3(x, y, z);
        block.shared.reset(new unsigned char[shared_bytes]);
        std::memset(block.shared.get(), 0xFF, shared_bytes);  // NaN, until it is written
        host::run_block(block, threads);
      }
    }
  }
  host::g_block = nullptr;
  return 0;
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(host::g_block->shared.get());
}

inline int32_t checked(int32_t id, int32_t n) {
  if (id < 0 || id >= n) host::fail("an id is out of range");
  return id;
}

inline float to_float(f16 x) {
  _Float16 number;
  std::memcpy(&number, &x, sizeof number);
  return number;
}
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}
inline void from_float(float x, f16& to) {
  const _Float16 number = static_cast<_Float16>(x);
  std::memcpy(&to, &number, sizeof number);
}
inline void from_float(float x, bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t half_to_even = 0x7FFF + (bits >> 16 & 1);
  to.bits = std::isnan(x) ? 0x7FFF : static_cast<uint16_t>((bits + half_to_even) >> 16);
}

}  // namespace irpe::cuda
