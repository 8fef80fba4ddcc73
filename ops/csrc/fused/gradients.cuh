// The gradients that both passes of the backward write.
#pragma once

#include "scores.cuh"

namespace irpe {

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
