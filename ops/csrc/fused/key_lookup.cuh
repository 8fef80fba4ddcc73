// Relative position on queries, whose lookups belong to the keys: k_j . T[:, b(j, i)]. The mirror
// image of lookup.cuh: the left operand is the constant one-hot of the row class, the right one is
// gathered from W[j][column class][row class] of the keys.
#pragma once

#include "queries.cuh"

namespace irpe {

struct KeyLookupLayout {
  static constexpr int kClasses = kRpeQ.row_classes, kSlots = kRpeQ.slots;  // of columns; of rows
  static constexpr int kHalves = kSlots / 8;
  static constexpr int kWPitch = pitch_of(kRpeQ.entries() * 2);  // W of one key
  // Constants of a head, at these bytes from `base`.
  static constexpr int table = 0;
  static constexpr int class_offsets = table + kRpeQ.entries() * kPitch;  // by xj - xi + kGridW - 1
  static constexpr int one_hots = round_up(class_offsets + (2 * kGridW - 1) * 4, 16);
  // by yj - yi + kGridH - 1, and at the end that of prefix queries
  static constexpr int bytes = one_hots + 2 * kGridH * kSlots * 2;
};

__device__ inline void load_key_lookup_constants(uint32_t base, const Table& t, int h) {
  using Layout = KeyLookupLayout;
  const int tid = static_cast<int>(threadIdx.x);
  const uint16_t* table = static_cast<const uint16_t*>(t.data) + h * t.stride_h;
  for (int n = tid; n < kRpeQ.entries() * kDimTiles; n += kThreads) {
    cp_async(base + Layout::table + n / kDimTiles * kPitch + n % kDimTiles * 16, table + n * 8);
  }
  cp_async_commit();
  cp_async_wait<0>();
  for (int n = tid; n < 2 * kGridW - 1; n += kThreads) {
    store_shared(base + Layout::class_offsets + n * 4, t.column_class[n] * Layout::kSlots * 2);
  }
  constexpr int kWords = Layout::kSlots / 2;
  for (int n = tid; n < 2 * kGridH * kWords; n += kThreads) {
    const int dy = n / kWords, slot = n % kWords * 2;
    const int row_class = dy < 2 * kGridH - 1 ? t.row_class[dy] : Layout::kSlots - 1;
    const uint32_t word = row_class == slot ? kOne : row_class == slot + 1 ? kOne << 16 : 0;
    store_shared(base + Layout::one_hots + n * 4, word);
  }
}

// W of a chunk's keys, by all warps: each has every kWarps-th 16 of them.
__device__ __forceinline__ void project_keys(uint32_t base, uint32_t keys, uint32_t w, int count,
                                             int patches, int warp, int lane) {
  using Layout = KeyLookupLayout;
#pragma unroll 1
  for (int first = warp * 16; first < count; first += kWarps * 16) {
    RowsA k;
    k.load(keys + first * kPitch, lane);
    const uint32_t to = w + (first + lane / 4) * Layout::kWPitch + lane % 4 * 4;
    constexpr int kTiles = kRpeQ.entries() / 8, kBatch = 7;
#pragma unroll 1
    for (int tile = 0; tile < kTiles; tile += kBatch) {
      float sums[kBatch][4];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        RowsB table;
        table.load(base + Layout::table + min(tile + n, kTiles - 1) * 8 * kPitch, lane);
        multiply_rows<true>(sums[n], k, table);
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (kTiles % kBatch && tile + n >= kTiles) break;
        store_shared(to + (tile + n) * 16, pack(sums[n][0], sums[n][1]));
        store_shared(to + (tile + n) * 16 + 8 * Layout::kWPitch, pack(sums[n][2], sums[n][3]));
      }
    }
    if (kPrefix && first + 16 > patches) {  // prefix keys have one bucket with every query
      __syncwarp();
      if (lane < 16 && first + lane >= patches) {
        const uint32_t row = w + (first + lane) * Layout::kWPitch;
        const uint32_t x = load_shared_u16(row + (Layout::kSlots - 1) * 2) * 0x10001;
        for (int n = 0; n < kTiles; ++n) store_shared_x4(row + n * 16, make_uint4(x, x, x, x));
      }
    }
  }
}

// What a lane needs of a strip.
struct KeyLookup {
  using Layout = KeyLookupLayout;
  uint32_t one_hots[2];       // of rows g and g + 8, against the chunk's first grid row
  uint32_t class_offsets[2];  // against column 0 of the keys, of the columns of both groups
  uint32_t step;  // what a grid row adds to the address of a one-hot; 0 for prefix queries

  __device__ __forceinline__ void start(uint32_t base, const Group (&groups)[2], int lane) {
    const int g = lane / 4, t = lane % 4;
    step = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const bool prefix = groups[n].is_prefix(g);
      const int dy = prefix ? 2 * kGridH - 1 : kGridH - 1 - min(groups[n].first_y + g, kGridH - 1);
      one_hots[n] = base + Layout::one_hots + dy * Layout::kSlots * 2 + t * 4;
      if (!prefix) step |= 1u << n;
      class_offsets[n] = base + Layout::class_offsets + (kGridW - 1 - groups[n].column) * 4;
    }
  }
  __device__ __forceinline__ void next_chunk() {
#pragma unroll
    for (int n = 0; n < 2; ++n) one_hots[n] += step >> n & 1 ? kChunkRows * Layout::kSlots * 2 : 0;
  }
  // The left operand's word of rows g (0) or g + 8 (1) for key row y.
  __device__ __forceinline__ uint32_t row_word(int rows, int y, int half) const {
    const int offset = y * Layout::kSlots * 2;
    return load_shared(one_hots[rows] + (kPrefix ? (step >> rows & 1 ? offset : 0) : offset) +
                       half * 16);
  }

  // sums += for tile `tile` of a chunk whose W lies at `w`.
  template <int tile, int rows>
  __device__ __forceinline__ void add(float* sums, uint32_t w, int lane) const {
    constexpr int first = tile * 8;
    constexpr int y0 = min(first / kGridW, rows - 1), y1 = min((first + 7) / kGridW, rows - 1);
    const int g = lane / 4;
    uint32_t x[kTwoColumns ? 2 : 1][Layout::kHalves];  // of key g, slots 2 t and 2 t + 1 (+ 8)
#pragma unroll
    for (int n = 0; n < (kTwoColumns ? 2 : 1); ++n) {
      const int key = first + lane % 8,
                column = min(key - min(key / kGridW, rows - 1) * kGridW, kGridW - 1);
      const uint32_t offset = load_shared(class_offsets[n] + column * 4);
      ldmatrix<Layout::kHalves>(
          x[n], w + key * Layout::kWPitch + offset + lane / 8 % 2 * (Layout::kHalves - 1) * 16);
    }
    // Keys of grid row y alone; prefix keys count to the last row.
    const auto masked = [&](uint32_t word, int y) {
      const int begin = y * kGridW - first, end = y == rows - 1 ? 8 : begin + kGridW;
      return (begin <= 0 && end >= 8) || (begin <= g && g < end) ? word : 0;
    };
#pragma unroll
    for (int y = y0; y <= y1; ++y) {
      if constexpr (Layout::kHalves == 1 && kTwoColumns) {
        mma_k16(sums, row_word(0, y, 0), 0, 0, row_word(1, y, 0), masked(x[0][0], y),
                masked(x[kTwoColumns][0], y));
      } else if constexpr (Layout::kHalves == 1) {
        if (y < y1) {
          mma_k16(sums, row_word(0, y, 0), row_word(1, y, 0), row_word(0, y + 1, 0),
                  row_word(1, y + 1, 0), masked(x[0][0], y), masked(x[0][0], y + 1));
          ++y;
        } else {
          mma_k8(sums, row_word(0, y, 0), row_word(1, y, 0), masked(x[0][0], y));
        }
      } else {
#pragma unroll
        for (int n = 0; n < (kTwoColumns ? 2 : 1); ++n) {
          const uint32_t b0 = masked(x[n][0], y), b1 = masked(x[n][Layout::kHalves - 1], y);
          const bool upper = !kTwoColumns || n == 0, lower = !kTwoColumns || n == 1;
          mma_k16(sums, upper ? row_word(0, y, 0) : 0, lower ? row_word(1, y, 0) : 0,
                  upper ? row_word(0, y, Layout::kHalves - 1) : 0,
                  lower ? row_word(1, y, Layout::kHalves - 1) : 0, b0, b1);
        }
      }
    }
  }
};

}  // namespace irpe
