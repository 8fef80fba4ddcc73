// Gathers and bucket sums of relative position on the GPU.
//
// A warp owns 32 tokens of one (b, h); the four warps of a block own the same tokens of four
// neighbouring (b, h), so that they find the ids in the L1 cache. Every sum has one thread that
// adds in a fixed order: no atomics, the same bits in every run.

// PyTorch's builds leave the conversions from and to half precision out.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "rpe.h"

namespace irpe::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kSharedBytes = 48 * 1024;  // what a block has without opt-in

// What sums of T are kept in.
template <typename T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The block's dynamic shared memory.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char irpe_shared_memory[];
  return reinterpret_cast<T*>(irpe_shared_memory);
}

// The id, after the kernel is stopped if it is not in [0, n).
__device__ int32_t checked(int32_t id, int32_t n) {
  if (static_cast<uint32_t>(id) >= static_cast<uint32_t>(n)) __trap();
  return id;
}

// Where the warp works, or nothing if it has no (b, h).
struct Place {
  int64_t bh, offset;  // of the lookups
  int first, count;    // tokens
  bool idle;
};

__device__ Place place_of(const Problem& p) {
  Place place;
  place.bh = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  place.idle = place.bh >= p.B * p.H;
  place.offset = place.bh / p.H * p.stride_b + place.bh % p.H * p.stride_h;
  place.first = blockIdx.y * kWarp;
  place.count = min(kWarp, p.tokens - place.first);
  return place;
}

// Lookups of the 32 tokens stay in shared memory in slices of `slice` buckets, an odd number, so
// that equal buckets of different tokens lie in different banks.
template <typename T, bool columns>
__global__ void gather_kernel(Problem p, int slice) {
  const Place at = place_of(p);
  if (at.idle) return;
  const int lane = threadIdx.x % kWarp;
  T* lookups = shared_memory<T>() + threadIdx.x / kWarp * kWarp * slice;
  const T* from = static_cast<const T*>(p.lookups) + at.offset + at.first * p.stride_t;
  T* pairs = static_cast<T*>(p.pairs) + at.bh * p.tokens * p.others;

  for (int n0 = 0; n0 < p.N; n0 += slice) {
    const int n_count = min(slice, p.N - n0);
    for (int t = 0; t < at.count; ++t) {
      for (int n = lane; n < n_count; n += kWarp) {
        lookups[t * slice + n] = from[t * p.stride_t + n0 + n];
      }
    }
    __syncwarp();
    if constexpr (columns) {
      if (lane < at.count) {
        const int32_t* ids = p.ids + at.first + lane;
        T* out = pairs + at.first + lane;
#pragma unroll 4
        for (int o = 0; o < p.others; ++o) {
          const int32_t id = checked(ids[static_cast<int64_t>(o) * p.tokens], p.N) - n0;
          if (id >= 0 && id < n_count) {
            out[static_cast<int64_t>(o) * p.tokens] = lookups[lane * slice + id];
          }
        }
      }
    } else {
      for (int t = 0; t < at.count; ++t) {
        const int64_t row = static_cast<int64_t>(at.first + t) * p.others;
#pragma unroll 4
        for (int o = lane; o < p.others; o += kWarp) {
          const int32_t id = checked(p.ids[row + o], p.N) - n0;
          if (id >= 0 && id < n_count) pairs[row + o] = lookups[t * slice + id];
        }
      }
    }
    __syncwarp();
  }
}

// A lane adds up the buckets of its own token in shared memory, sums[bucket][lane]; rows of pairs
// are turned around in a tile first. A row is 33 wide: neighbouring tokens have neighbouring
// buckets against the same other token, and so different banks.
template <typename T, bool columns>
__global__ void bucket_sum_kernel(Problem p, int slice) {
  using Sum = accumulator_t<T>;
  constexpr int kPitch = kWarp + 1;
  const Place at = place_of(p);
  if (at.idle) return;
  const int lane = threadIdx.x % kWarp;
  const int per_warp = (slice + (columns ? 0 : kWarp)) * kPitch;
  Sum* sums = shared_memory<Sum>() + threadIdx.x / kWarp * per_warp;
  Sum* tile = sums + slice * kPitch;
  const T* pairs = static_cast<const T*>(p.pairs) + at.bh * p.tokens * p.others;
  T* to = static_cast<T*>(p.lookups) + at.offset + at.first * p.stride_t;

  for (int n0 = 0; n0 < p.N; n0 += slice) {
    const int n_count = min(slice, p.N - n0);
    for (int n = 0; n < n_count; ++n) sums[n * kPitch + lane] = 0;
    for (int o0 = 0; o0 < p.others; o0 += kWarp) {
      const int o_count = min(kWarp, p.others - o0);
      if constexpr (!columns) {
        __syncwarp();
        for (int t = 0; t < at.count; ++t) {
          const int64_t row = static_cast<int64_t>(at.first + t) * p.others;
          if (lane < o_count) tile[t * kPitch + lane] = static_cast<Sum>(pairs[row + o0 + lane]);
        }
        __syncwarp();
      }
      if (lane < at.count) {
#pragma unroll 8
        for (int o = 0; o < o_count; ++o) {
          const int64_t pair = static_cast<int64_t>(o0 + o) * p.tokens + at.first + lane;
          const Sum x = columns ? static_cast<Sum>(pairs[pair]) : tile[lane * kPitch + o];
          const int32_t id = checked(p.ids[pair], p.N) - n0;
          if (id >= 0 && id < n_count) sums[id * kPitch + lane] += x;
        }
      }
    }
    __syncwarp();
    for (int t = 0; t < at.count; ++t) {
      for (int n = lane; n < n_count; n += kWarp) {
        to[t * p.stride_t + n0 + n] = static_cast<T>(sums[n * kPitch + t]);
      }
    }
    __syncwarp();
  }
}

template <typename T, bool columns>
int launch_gather(const Problem& p, dim3 grid, cudaStream_t stream) {
  const int most = kSharedBytes / (kWarps * kWarp * static_cast<int>(sizeof(T)));
  const int slice = min(p.N | 1, most % 2 ? most : most - 1);
  const int bytes = kWarps * kWarp * slice * static_cast<int>(sizeof(T));
  gather_kernel<T, columns><<<grid, kWarps * kWarp, bytes, stream>>>(p, slice);
  return cudaGetLastError();
}

template <typename T, bool columns>
int launch_bucket_sum(const Problem& p, dim3 grid, cudaStream_t stream) {
  const int pitch_bytes = (kWarp + 1) * static_cast<int>(sizeof(accumulator_t<T>));
  const int tile = columns ? 0 : kWarp;
  const int slice = min(p.N, kSharedBytes / (kWarps * pitch_bytes) - tile);
  const int bytes = kWarps * (slice + tile) * pitch_bytes;
  bucket_sum_kernel<T, columns><<<grid, kWarps * kWarp, bytes, stream>>>(p, slice);
  return cudaGetLastError();
}

template <typename T>
int launch_either(bool sum, const Problem& p, dim3 grid, cudaStream_t stream) {
  if (sum) {
    return p.columns ? launch_bucket_sum<T, true>(p, grid, stream)
                     : launch_bucket_sum<T, false>(p, grid, stream);
  }
  return p.columns ? launch_gather<T, true>(p, grid, stream)
                   : launch_gather<T, false>(p, grid, stream);
}

int launch_of_type(bool sum, const Problem& p, cudaStream_t stream) {
  const int64_t blocks = (p.B * p.H + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(blocks), (p.tokens + kWarp - 1) / kWarp);
  if (grid.x == 0 || grid.y == 0) return 0;
  switch (p.type) {
    case Type::kFloat64:
      return launch_either<double>(sum, p, grid, stream);
    case Type::kFloat32:
      return launch_either<float>(sum, p, grid, stream);
    case Type::kFloat16:
      return launch_either<__half>(sum, p, grid, stream);
    default:
      return launch_either<__nv_bfloat16>(sum, p, grid, stream);
  }
}

}  // namespace

int gather(const Problem& problem, void* stream) {
  return launch_of_type(false, problem, static_cast<cudaStream_t>(stream));
}

int bucket_sum(const Problem& problem, void* stream) {
  return launch_of_type(true, problem, static_cast<cudaStream_t>(stream));
}

}  // namespace irpe::cuda
