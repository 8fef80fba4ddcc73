// PyTorch's CPU memory as the simulator's global memory: between watch and unwatch every new tensor
// is an allocation of exactly its size, filled with a pattern that a kernel must not read.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <new>

extern "C" void ptxsim_add_allocation(const void* base, unsigned long bytes);
extern "C" void ptxsim_remove_allocation(const void* base);

namespace {

constexpr int kPoison = 0xA5;    // as in machine.h
constexpr size_t kGuard = 256;   // bytes behind every tensor that belong to none
constexpr uint8_t kPriority = 255;

void release(void* memory) {
  if (!memory) return;
  ptxsim_remove_allocation(memory);
  std::free(memory);
}

struct WatchedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    void* memory = nullptr;
    if (posix_memalign(&memory, kGuard, bytes + kGuard)) throw std::bad_alloc();
    std::memset(memory, kPoison, bytes + kGuard);
    ptxsim_add_allocation(memory, bytes);
    return {memory, memory, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

c10::Allocator* before = nullptr;  // the allocator outside
int depth = 0;                     // of calls of watch

}  // namespace

extern "C" {

void ptxsim_watch_torch() {
  static WatchedAllocator watched;
  if (depth++ > 0) return;
  before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&watched, kPriority);
}

// Tensors of the time between stay valid, and known.
void ptxsim_unwatch_torch() {
  if (--depth == 0) c10::SetCPUAllocator(before, kPriority);
}

}  // extern "C"
