// What the kernels ask of the machine: launches, shared memory, number types.
//
// nvcc compiles those of a GPU. The tests compile the same kernel source for the host, one fiber per
// CUDA thread, with tests/ops/kernels/on_host.h in the include path.
#pragma once

#include <cstdint>

namespace irpe::cuda {

// Storage of half precision; arithmetic is done in float.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace irpe::cuda

#ifndef __CUDACC__
#include "on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace irpe::cuda {

// Runs the kernel with up to 48 KiB of shared memory; returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream,
           Arguments... arguments) {
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// The block's dynamic shared memory, 16-byte aligned.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char irpe_shared_memory[];
  return reinterpret_cast<T*>(irpe_shared_memory);
}

// The id, after the kernel is stopped if it is not in [0, n).
__device__ inline int32_t checked(int32_t id, int32_t n) {
  if (static_cast<uint32_t>(id) >= static_cast<uint32_t>(n)) __trap();
  return id;
}

__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline void from_float(float x, f16& to) {
  to.bits = __half_as_ushort(__float2half_rn(x));
}
__device__ inline void from_float(float x, bf16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

}  // namespace irpe::cuda
#endif

namespace irpe::cuda {

// What sums of T are kept in: float, or double for double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float x, float& to) { to = x; }

template <typename T>
__device__ accumulator_t<T> to_sum(T x) {
  return to_float(x);
}
template <>
__device__ inline double to_sum<double>(double x) {
  return x;
}

template <typename T>
__device__ T from_sum(accumulator_t<T> x) {
  T to;
  from_float(x, to);
  return to;
}
template <>
__device__ inline double from_sum<double>(double x) {
  return x;
}

}  // namespace irpe::cuda
