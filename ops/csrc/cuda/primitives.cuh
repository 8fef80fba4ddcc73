// What the kernels ask of the machine: launches, shared memory, number types, warp primitives.
//
// nvcc compiles those of a GPU. The tests compile the same kernel source for the host, one fiber per
// CUDA thread, with tests/ops/kernels/on_host.h in the include path. Both are tested against one
// definition (tests/ops/kernels/primitives.cu).
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

// What a launch has to fit into.
struct Device {
  int processors;        // multiprocessors
  int processor_shared;  // bytes of shared memory that one has for all of its blocks
  int block_shared;      // bytes that one block can have
};

}  // namespace irpe::cuda

#ifndef __CUDACC__
#include "on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace irpe::cuda {

constexpr int kSharedBytesUnasked = 48 * 1024;  // what every GPU gives a block without being asked

template <typename... Parameters>
int allow_shared_memory(void (*kernel)(Parameters...), int bytes) {
  if (bytes <= kSharedBytesUnasked) return 0;
  return static_cast<int>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// The GPU that kernels are launched on.
inline Device device() {
  int number = 0;
  cudaGetDevice(&number);
  const auto of = [&](cudaDeviceAttr attribute) {
    int value = 1;
    cudaDeviceGetAttribute(&value, attribute, number);
    return value;
  };
  return {of(cudaDevAttrMultiProcessorCount), of(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          of(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Runs the kernel; returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream,
           Arguments... arguments) {
  if (const int error = allow_shared_memory(kernel, shared_bytes)) return error;
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

// Two numbers in one word, the first in its lower half.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// 2^x and log2 x by the special function unit: 2 units of the last place.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_fast(float x) { return __log2f(x); }

// x of the lane whose number is this lane's xor mask.
template <typename T>
__device__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Four 8x8 matrices of 16-bit numbers from shared memory: lane l points at row l % 8 of matrix
// l / 8; word m of lane l is elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m, or of
// its transpose.
template <bool transpose = false>
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// sums += a b for a warp: a is 16x16, b 16x8, sums 16x8, in the register layout of
// mma.m16n8k16; T tells f16 from bf16.
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<f16>(float (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<bf16>(float (&sums)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 bytes from device to shared memory, in the background until copies_wait. With
// `inside` false it writes zeros and reads nothing.
__device__ inline void copy_start(void* shared, const void* from, bool inside = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Closes a group of copies.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `groups` groups of this thread's copies are under way.
template <int groups>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

}  // namespace irpe::cuda
#endif

namespace irpe::cuda {

// The two numbers that `pack` put into a word.
template <typename T>
__device__ float low(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <typename T>
__device__ float high(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

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
