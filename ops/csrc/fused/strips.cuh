// Strips: which token is in which row, and rows between device and shared memory.
#pragma once

#include "tiles.cuh"

namespace irpe {

constexpr int M = kStripsPerWarp;
// Whether row g of every strip lies in the same grid row: then what depends on it is loaded once.
constexpr bool kSameRows = kColumnGroups <= 2;

// 8 tokens of one grid column; the last group of a column has free rows, of which some hold prefix
// tokens.
struct Group {
  int column, first_y;
  int first_free;  // the number that row 0 would have among the free rows

  // Group n, known at compile time, of an item.
  __device__ __forceinline__ Group(int item, int n) {
    constexpr int kOfItem = 2 * kStripsPerWarp;
    const int number = item * kOfItem + n;
    if constexpr (kOfItem % kColumnGroups == 0 && kItems * kOfItem == kPatchGroups) {
      column = item * (kOfItem / kColumnGroups) + n / kColumnGroups;
      first_y = n % kColumnGroups * 8;
    } else {
      column = min(number / kColumnGroups, kGridW - 1);
      first_y = number < kPatchGroups ? number % kColumnGroups * 8 : kGridH;
    }
    first_free = first_y < kGridH ? column * kFreeRows + first_y - kGridH
                                  : kGridW * kFreeRows + (number - kPatchGroups) * 8;
  }
  __device__ __forceinline__ int patch(int row) const {
    return kPrefix + (first_y + row) * kGridW + column;
  }
  __device__ __forceinline__ bool is_patch(int row) const { return first_y + row < kGridH; }
  __device__ __forceinline__ bool is_prefix(int row) const {
    return !is_patch(row) && first_free + row < kPrefix;
  }
  __device__ __forceinline__ int token(int row) const {
    return is_patch(row) ? patch(row) : first_free + row;
  }
};

// Whether rows `row` to row + kRowsAtOnce - 1 of group n of an item may hold prefix tokens.
constexpr bool may_hold_prefix(int n, int row) {
  if (kPrefix == 0) return false;
  constexpr int kOfItem = 2 * kStripsPerWarp;
  const bool ends_column = kOfItem % kColumnGroups || n % kColumnGroups == kColumnGroups - 1;
  const bool is_free = kFreeRows && ends_column && row + kRowsAtOnce > 8 - kFreeRows;
  return is_free || kGroups > kPatchGroups;
}

// Whether groups of an item may hold prefix tokens.
__device__ __forceinline__ bool has_prefix(int item) {
  if (kPrefix == 0) return false;
  constexpr int kColumns = kFreeRows ? min(ceil_div(kPrefix, max(kFreeRows, 1)), kGridW) : 0;
  constexpr int kOfItem = 2 * kStripsPerWarp;
  return item * kOfItem < kColumns * kColumnGroups ||
         (kGroups > kPatchGroups && (item + 1) * kOfItem > kPatchGroups);
}

// The rows of an item. Free rows keep what is there: no other row sees it.
__device__ __forceinline__ void copy_strips(const Matrix& x, uint32_t to, int strip_bytes, int b,
                                            int h, int item, int lane) {
  const uint16_t* rows = head_of(x, b, h) + lane % kRowLanes * 8;
  to += lane / kRowLanes * kPitch + lane % kRowLanes * 16;
#pragma unroll
  for (int n = 0; n < 2 * M; ++n) {
    const Group group(item, n);
    const uint16_t* from = rows + group.patch(lane / kRowLanes) * x.stride_l;
#pragma unroll
    for (int row = 0; row < 8; row += kRowsAtOnce) {
      if (group.is_patch(row + lane / kRowLanes)) {
        copy_row(to + n / 2 * strip_bytes + (n % 2 * 8 + row) * kPitch,
                 from + row * kGridW * x.stride_l, lane);
      }
    }
  }
  if (has_prefix(item)) {
#pragma unroll
    for (int row = 0; row < 16 * M; row += kRowsAtOnce) {
      if (!may_hold_prefix(row / 8, row % 8)) continue;
      const Group group(item, row / 8);
      const int r = row % 8 + lane / kRowLanes;
      if (group.is_prefix(r))
        copy_row(to + row / 16 * strip_bytes + row % 16 * kPitch,
                 rows + group.token(r) * x.stride_l, lane);
    }
  }
  cp_async_commit();
}

__device__ __forceinline__ void store_row(uint16_t* to, uint32_t from, int lane) {
#pragma unroll
  for (int n = 0; n < kDimTiles; n += kRowLanes) {
    if (n + kRowLanes <= kDimTiles || n + lane % kRowLanes < kDimTiles) {
      *reinterpret_cast<uint4*>(to + n * 8) = load_shared_x4(from + n * 16);
    }
  }
}

// Results of an item, from strips that lie `strip_bytes` apart.
__device__ __forceinline__ void store_strips(const Matrix& x, uint32_t strips, int strip_bytes,
                                             int b, int h, int item, int lane) {
  uint16_t* rows = head_of(x, b, h) + lane % kRowLanes * 8;
  const uint32_t from = strips + lane / kRowLanes * kPitch + lane % kRowLanes * 16;
#pragma unroll
  for (int n = 0; n < 2 * M; ++n) {
    const Group group(item, n);
    uint16_t* to = rows + group.patch(lane / kRowLanes) * x.stride_l;
#pragma unroll
    for (int row = 0; row < 8; row += kRowsAtOnce) {
      if (group.is_patch(row + lane / kRowLanes)) {
        store_row(to + row * kGridW * x.stride_l,
                  from + n / 2 * strip_bytes + (n % 2 * 8 + row) * kPitch, lane);
      }
    }
  }
  if (has_prefix(item)) {
#pragma unroll
    for (int row = 0; row < 16 * M; row += kRowsAtOnce) {
      if (!may_hold_prefix(row / 8, row % 8)) continue;
      const Group group(item, row / 8);
      const int r = row % 8 + lane / kRowLanes;
      const uint32_t at = from + row / 16 * strip_bytes + row % 16 * kPitch;
      if (group.is_prefix(r)) store_row(rows + group.token(r) * x.stride_l, at, lane);
    }
  }
}

}  // namespace irpe
