// What both passes of the backward write.
#pragma once

#include "bucket_sums.cuh"
#include "scores.cuh"

namespace irpe {

// Where a lane stores the bucket sums of rows g and g + 8 of a strip; nowhere if no token is there.
template <Rpe rpe>
struct SumRows {
  uint32_t* rows[2];

  template <Rpe own, Rpe ring>
  __device__ __forceinline__ void start(void* to, const Params& p, const Strips<own, ring>& strips,
                                        int m, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = static_cast<int64_t>(strips.b) * kTokens + strips.token(m, half, lane);
      uint32_t* row =
          static_cast<uint32_t*>(to) + (token * p.H + strips.h) * (rpe.entries() / 2) + lane % 4;
      rows[half] = strips.has_token(m, half, lane) ? row : nullptr;
    }
  }
  // Sums 16 `step` to 16 `step` + 15, as the left operand of a product.
  __device__ __forceinline__ void store(const uint32_t (&a)[4], int step) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int entry = step * 16 + n / 2 * 8;
      if (entry < rpe.entries() && rows[n % 2]) rows[n % 2][entry / 2] = a[n];
    }
  }
};

// scale * sums, by way of the strips' own rows of shared memory.
template <Rpe own, Rpe ring>
__device__ __forceinline__ void store_gradient(const Matrix& to,
                                               const float (&sums)[M][kDimTiles][4], float scale,
                                               uint32_t rows, int strip_bytes,
                                               const Strips<own, ring>& strips, int lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      const float (&x)[4] = sums[m][n];
      const uint32_t at = rows + m * strip_bytes + lane / 4 * kPitch + n * 16 + lane % 4 * 4;
      store_shared(at, pack(x[0] * scale, x[1] * scale));
      store_shared(at + 8 * kPitch, pack(x[2] * scale, x[3] * scale));
    }
  }
  __syncwarp();
  store_strips(to, rows, strip_bytes, strips.b, strips.h, strips.number, lane);
}

}  // namespace irpe
