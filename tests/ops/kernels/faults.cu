// A kernel with one fault at a time, which the host harness has to find.

#include "cuda/primitives.cuh"

namespace irpe::cuda {
namespace {

enum Fault { kNone, kRace, kLonelyBarrier, kBeyondShared, kBeyondInput, kWrongId };

// Every thread passes the number of its right neighbour on, unless a fault is asked for.
__global__ void pass_on(int fault, const float* in, float* out, int threads) {
  const int t = static_cast<int>(threadIdx.x), next = (t + 1) % threads;
  float* shared = shared_memory<float>();
  shared[t + (fault == kBeyondShared ? 1 : 0)] = in[t + (fault == kBeyondInput ? 1 : 0)];
  if (fault == kLonelyBarrier && t == 0) {
    __syncwarp();
  } else if (fault != kRace) {
    __syncthreads();
  }
  out[t] = shared[fault == kWrongId ? checked(threads, threads) : next];
}

}  // namespace
}  // namespace irpe::cuda

extern "C" int test_fault(int fault, const float* in, float* out, int threads) {
  using namespace irpe::cuda;
  return launch(pass_on, 1, threads, threads * 4, nullptr, fault, in, out, threads);
}
