// Kernels that use every primitive of primitives.cuh once, and kernels with one fault each that
// the host harness has to find. Compiled by nvcc for a GPU and by g++ for the host.

#include "cuda/primitives.cuh"

namespace irpe::cuda {
namespace {

constexpr int kSide = 16;

// out = a b for one warp, 16x16 all of them, and the sums of its rows. Rows of a from `rows` on
// count as zero. b is [k][n], or [n][k] when `turned`.
template <typename T, bool turned>
__global__ void product(const T* a, const T* b, int rows, float* out, float* row_sums) {
  const int lane = static_cast<int>(threadIdx.x);
  T* shared_a = shared_memory<T>();
  T* shared_b = shared_a + kSide * kSide;
  const int at = lane * 8;  // 16 bytes for each lane
  copy_start(shared_a + at, a + at, lane / 2 < rows);
  copies_commit();
  copy_start(shared_b + at, b + at);
  copies_commit();

  uint32_t words_a[4], words_b[4];
  copies_wait<1>();
  __syncwarp();
  load_matrices(words_a, shared_a + lane % 16 * kSide + lane / 16 * 8);
  copies_wait<0>();
  __syncwarp();
  if constexpr (turned) {
    load_matrices(words_b, shared_b + (lane / 16 * 8 + lane % 8) * kSide + lane / 8 % 2 * 8);
  } else {
    load_matrices<true>(words_b, shared_b + lane % 16 * kSide + lane / 16 * 8);
  }

  float sums_of_row[2] = {0, 0};
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {0, 0, 0, 0};
    const uint32_t words[2] = {words_b[2 * half], words_b[2 * half + 1]};
    multiply_add<T>(sums, words_a, words);
    for (int e = 0; e < 4; ++e) {
      out[(lane / 4 + e / 2 * 8) * kSide + half * 8 + lane % 4 * 2 + e % 2] = sums[e];
      sums_of_row[e / 2] += sums[e];
    }
  }
  for (int r = 0; r < 2; ++r) {
    for (int mask = 1; mask < 4; mask *= 2) sums_of_row[r] += shuffle_xor(sums_of_row[r], mask);
    if (lane % 4 == 0) row_sums[lane / 4 + r * 8] = sums_of_row[r];
  }
}

template <typename T>
int launch_product(bool turned, const void* a, const void* b, int rows, float* out, float* sums) {
  const int bytes = 2 * kSide * kSide * 2;
  const T *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  return turned ? launch(product<T, true>, 1, 32, bytes, nullptr, left, right, rows, out, sums)
                : launch(product<T, false>, 1, 32, bytes, nullptr, left, right, rows, out, sums);
}

enum Fault { kNone, kRace, kEarlyRead, kLonelyBarrier, kBeyondShared, kBeyondInput, kWrongId };

// Every thread passes the number of its right neighbour on, unless a fault is asked for.
__global__ void pass_on(int fault, const float* in, float* out, int threads) {
  const int t = static_cast<int>(threadIdx.x), next = (t + 1) % threads;
  float* shared = shared_memory<float>();
  if (fault == kEarlyRead) {
    if (t % 4 == 0) copy_start(shared + t, in + t);
    copies_commit();
  } else {
    shared[t + (fault == kBeyondShared ? 1 : 0)] = in[t + (fault == kBeyondInput ? 1 : 0)];
  }
  if (fault == kLonelyBarrier && t == 0) {
    __syncwarp();
  } else if (fault != kRace) {
    __syncthreads();
  }
  out[t] = shared[fault == kWrongId ? checked(threads, threads) : next];
}

}  // namespace
}  // namespace irpe::cuda

extern "C" {

int test_product(int is_bf16, int turned, const void* a, const void* b, int rows, float* out,
                 float* row_sums) {
  using namespace irpe::cuda;
  return is_bf16 ? launch_product<bf16>(turned, a, b, rows, out, row_sums)
                 : launch_product<f16>(turned, a, b, rows, out, row_sums);
}

int test_fault(int fault, const float* in, float* out, int threads) {
  using namespace irpe::cuda;
  return launch(pass_on, 1, threads, threads * 4, nullptr, fault, in, out, threads);
}

}
