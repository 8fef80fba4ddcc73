// Tiles of shared memory as operands of the matrix instructions.
//
// A lane is 4 g + t. Of a 16 x 8 tile of sums it has rows g and g + 8, columns 2 t and 2 t + 1.
#pragma once

#include "ptx.cuh"

namespace irpe {

constexpr int kDimTiles = kHeadDim / 8;   // of 8 numbers of a head
constexpr int kDimSteps = kHeadDim / 16;  // of k = 16; one of k = 8 follows where 8 are left
constexpr bool kDimTail = kHeadDim % 16;

// The k of 16 rows at `rows`, as the left operand of products over the head's numbers.
struct RowsA {
  uint32_t steps[kDimSteps + kDimTail][4];

  __device__ __forceinline__ void load(uint32_t rows, int lane) {
    const uint32_t address = rows + lane % 16 * kPitch + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kDimSteps; ++k) ldmatrix<4>(steps[k], address + k * 32);
    if constexpr (kDimTail)
      ldmatrix<2>(steps[kDimSteps], rows + lane % 16 * kPitch + kDimSteps * 32);
  }
};

// 8 rows, as the right operand of products over the head's numbers: sums += a rows^T.
struct RowsB {
  uint32_t tiles[kDimTiles];

  __device__ __forceinline__ void load(uint32_t rows, int lane) {
    const uint32_t address = rows + lane % 8 * kPitch + lane / 8 * 16;
    constexpr int kFours = kDimTiles / 4 * 4;
#pragma unroll
    for (int n = 0; n < kFours; n += 4) ldmatrix<4>(tiles + n, address + n * 16);
    if constexpr (kDimTiles % 4 >= 2) {
      ldmatrix<2>(tiles + kFours, rows + lane % 8 * kPitch + lane / 8 % 2 * 16 + kFours * 16);
    }
    if constexpr (kDimTiles % 2) {
      ldmatrix<1>(tiles + kDimTiles - 1, rows + lane % 8 * kPitch + (kDimTiles - 1) * 16);
    }
  }
};

// sums (16 x 8) = a b^T, or += where they go on.
template <bool first = false>
__device__ __forceinline__ void multiply_rows(float* sums, const RowsA& a, const RowsB& b) {
  if constexpr (kDimTail) {
    mma_k8<first>(sums, a.steps[kDimSteps][0], a.steps[kDimSteps][1], b.tiles[kDimTiles - 1]);
  }
#pragma unroll
  for (int k = 0; k < kDimSteps; ++k) {
    const uint32_t (&x)[4] = a.steps[k];
    if (first && !kDimTail && k == 0)
      mma_k16<true>(sums, x[0], x[1], x[2], x[3], b.tiles[0], b.tiles[1]);
    else
      mma_k16(sums, x[0], x[1], x[2], x[3], b.tiles[2 * k], b.tiles[2 * k + 1]);
  }
}

// sums[m] += a[m] rows for the rows of one tile or two at `rows`, the head's numbers in columns.
template <int M, int tiles>
__device__ __forceinline__ void multiply_columns(float (&sums)[M][kDimTiles][4],
                                                 const uint32_t (&a)[M][4], uint32_t rows,
                                                 int lane) {
  constexpr int kRows = tiles * 8, kAtOnce = 4 / tiles;  // tiles of columns that an ldmatrix brings
  const uint32_t address = rows + lane % kRows * kPitch + lane / kRows * 16;
  const auto product = [&](int n, uint32_t b0, uint32_t b1) {
#pragma unroll
    for (int m = 0; m < M; ++m) mma_tiles<tiles>(sums[m][n], a[m], b0, b1);
  };
#pragma unroll
  for (int n = 0; n + kAtOnce <= kDimTiles; n += kAtOnce) {
    uint32_t b[4];
    ldmatrix_trans<4>(b, address + n * 16);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) product(n + i, b[i * tiles], b[i * tiles + tiles - 1]);
  }
  constexpr int kRest = kDimTiles % kAtOnce, kFirst = kDimTiles - kRest;
#pragma unroll
  for (int n = kFirst; n < kDimTiles; ++n) {
    uint32_t b[2];
    ldmatrix_trans<tiles>(b, rows + lane % kRows * kPitch + n * 16);
    product(n, b[0], b[tiles - 1]);
  }
}

// ---- rows between device memory and shared memory ----

constexpr int kRowLanes = kDimTiles >= 8 ? 8 : 4;  // of a row, so that no group is passed at once
constexpr int kRowsAtOnce = kWarp / kRowLanes;

// `to` and `from` are where the lane's first 16 bytes lie.
__device__ __forceinline__ void copy_row(uint32_t to, const uint16_t* from, int lane) {
#pragma unroll
  for (int n = 0; n < kDimTiles; n += kRowLanes) {
    if (n + kRowLanes <= kDimTiles || n + lane % kRowLanes < kDimTiles)
      cp_async(to + n * 16, from + n * 8);
  }
}

__device__ __forceinline__ uint16_t* head_of(const Matrix& x, int b, int h) {
  return static_cast<uint16_t*>(x.data) + static_cast<int64_t>(b) * x.stride_b + h * x.stride_h;
}

}  // namespace irpe
