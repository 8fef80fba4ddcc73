// Instructions of PTX under their names.
#pragma once

#include "config.cuh"

namespace irpe {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Read anew, so that what is computed from it is computed again: hoisted out of a loop, it would
// take registers from what the loop does.
__device__ __forceinline__ int lane_id() {
  int x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return x;
}

// ---- matrices ----

// N matrices of 8 x 8 (1, 2 or 4), a row at the address of each of the first 8 N lanes.
template <int N>
__device__ __forceinline__ void ldmatrix(uint32_t* r, uint32_t address) {
  if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  }
}
template <int N>
__device__ __forceinline__ void ldmatrix_trans(uint32_t* r, uint32_t address) {
  if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  }
}

// c (16 x 8) = a (16 x 16) b (16 x 8), or += where the sums go on. Zeros are told as constants, for
// which the machine has a register.
template <bool first = false>
__device__ __forceinline__ void mma_k16(float* c, uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
#define IRPE_MMA_K16(type, c0, c1, c2, c3)                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                             \
               ".f32 "                                                                            \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"              \
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                   \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), \
                 "f"(c3))
  if constexpr (kBFloat16 && first)
    IRPE_MMA_K16("bf16", 0.0f, 0.0f, 0.0f, 0.0f);
  else if constexpr (kBFloat16)
    IRPE_MMA_K16("bf16", c[0], c[1], c[2], c[3]);
  else if constexpr (first)
    IRPE_MMA_K16("f16", 0.0f, 0.0f, 0.0f, 0.0f);
  else
    IRPE_MMA_K16("f16", c[0], c[1], c[2], c[3]);
#undef IRPE_MMA_K16
}
// c (16 x 8) = or += a (16 x 8) b (8 x 8)
template <bool first = false>
__device__ __forceinline__ void mma_k8(float* c, uint32_t a0, uint32_t a1, uint32_t b0) {
#define IRPE_MMA_K8(type, c0, c1, c2, c3)                             \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type  \
               ".f32 "                                                \
               "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};" \
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])       \
               : "r"(a0), "r"(a1), "r"(b0), "f"(c0), "f"(c1), "f"(c2), "f"(c3))
  if constexpr (kBFloat16 && first)
    IRPE_MMA_K8("bf16", 0.0f, 0.0f, 0.0f, 0.0f);
  else if constexpr (kBFloat16)
    IRPE_MMA_K8("bf16", c[0], c[1], c[2], c[3]);
  else if constexpr (first)
    IRPE_MMA_K8("f16", 0.0f, 0.0f, 0.0f, 0.0f);
  else
    IRPE_MMA_K8("f16", c[0], c[1], c[2], c[3]);
#undef IRPE_MMA_K8
}

// c = or += a b, with k of one tile or two.
template <int tiles, bool first = false>
__device__ __forceinline__ void mma_tiles(float* c, const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  if constexpr (tiles == 2)
    mma_k16<first>(c, a[0], a[1], a[2], a[3], b0, b1);
  else
    mma_k8<first>(c, a[0], a[1], b0);
}

// ---- numbers ----

constexpr uint32_t kOne = kBFloat16 ? 0x3f80 : 0x3c00;
constexpr uint32_t kOnes = kOne | kOne << 16;
constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;
#define kInfinity __int_as_float(0x7f800000)  // NVRTC knows no constant for it

__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (kBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The low and the high number of a word.
__device__ __forceinline__ float2 unpack(uint32_t x) {
  if constexpr (kBFloat16) return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
  float2 r;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(x));
  return r;
}
__device__ __forceinline__ float dot(uint4 x, uint4 y) {
  float sum = 0;
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 u = unpack(a[n]), v = unpack(b[n]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// ---- shared memory ----

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ uint4 load_shared_x4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_x4(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_float2(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}

// ---- asynchronous copies ----

__device__ __forceinline__ void cp_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Writes 16 bytes of zeros as a copy does, so that what tracks copies tracks them too.
__device__ __forceinline__ void cp_async_zeros(uint32_t to, const void* readable) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 0;" ::"r"(to), "l"(readable) : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_4_zeros(uint32_t to, const void* readable) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, 0;" ::"r"(to), "l"(readable) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- mbarriers ----

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier)
               : "memory");
}
// Arrives when all copies have landed that this thread has started.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Whether the phase of this parity has ended.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900  // which may sleep for a while
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, "
      "p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
#endif
  return done;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_test(barrier, parity)) {
  }
}

}  // namespace irpe
