// Relative position whose lookups belong to the tokens of the ring. The mirror image of
// strip_lookup.cuh: the left operand is the constant one-hot of the row class, the right one is
// gathered from W[u][column class][row class] of the ring's tokens u. That is the term on queries
// in a pass over queries, and those on keys and values in the pass over keys.
#pragma once

#include "strips.cuh"

namespace irpe {

template <Rpe rpe>
struct RingLookupLayout {
  static constexpr int kClasses = rpe.row_classes, kSlots = rpe.slots;  // of columns; of rows
  static constexpr int kHalves = kSlots / 8;
  static constexpr int kWPitch = pitch_of(rpe.entries() * 2);  // W of one token
  // Constants of a head, at these bytes from `base`.
  static constexpr int table = 0;
  static constexpr int class_offsets = table + rpe.entries() * kPitch;  // by xu - xw + kGridW - 1
  static constexpr int kOffsets = 2 * kGridW - 1 + 7;  // of a tile's prefix tokens too: any class
  static constexpr int one_hots = round_up(class_offsets + kOffsets * 4, 16);
  // By yu - yw + kGridH + 7; yw of free rows too, with the first one.
  static constexpr int kOneHots = 2 * kGridH + 7;
  static constexpr int bytes = one_hots + kOneHots * kSlots * 2;
};

template <Rpe rpe>
__device__ inline void load_ring_lookup_constants(uint32_t base, const Table& t, int h) {
  using Layout = RingLookupLayout<rpe>;
  const int tid = static_cast<int>(threadIdx.x);
  const uint16_t* table = static_cast<const uint16_t*>(t.data) + h * t.stride_h;
  for (int n = tid; n < rpe.entries() * kDimTiles; n += kThreads) {
    const uint32_t to = base + Layout::table + n / kDimTiles * kPitch + n % kDimTiles * 16;
    store_shared_x4(to, *reinterpret_cast<const uint4*>(table + n * 8));
  }
  for (int n = tid; n < Layout::kOffsets; n += kThreads) {
    const int column_class = t.column_class[min(n, 2 * kGridW - 2)];
    store_shared(base + Layout::class_offsets + n * 4, column_class * Layout::kSlots * 2);
  }
  constexpr int kWords = Layout::kSlots / 2;
  for (int n = tid; n < Layout::kOneHots * kWords; n += kThreads) {
    const int dy = max(n / kWords - 8, 0), slot = n % kWords * 2;
    const int row_class = t.row_class[dy];
    const uint32_t word = row_class == slot ? kOne : row_class == slot + 1 ? kOne << 16 : 0;
    store_shared(base + Layout::one_hots + n * 4, word);
  }
}

// W of a chunk's rows, by all warps: each has every kWarps-th 16 of them.
template <Rpe rpe>
__device__ __forceinline__ void project_ring(uint32_t base, uint32_t rows, uint32_t w, int count,
                                             int patches, int warp, int lane) {
  using Layout = RingLookupLayout<rpe>;
#pragma unroll 1
  for (int first = warp * 16; first < count; first += kWarps * 16) {
    RowsA x;
    x.load(rows + first * kPitch, lane);
    const uint32_t to = w + (first + lane / 4) * Layout::kWPitch + lane % 4 * 4;
    constexpr int kTiles = rpe.entries() / 8, kBatch = 7;
#pragma unroll 1
    for (int tile = 0; tile < kTiles; tile += kBatch) {
      float sums[kBatch][4];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        RowsB table;
        table.load(base + Layout::table + min(tile + n, kTiles - 1) * 8 * kPitch, lane);
        multiply_rows<true>(sums[n], x, table);
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (kTiles % kBatch && tile + n >= kTiles) break;
        store_shared(to + (tile + n) * 16, pack(sums[n][0], sums[n][1]));
        store_shared(to + (tile + n) * 16 + 8 * Layout::kWPitch, pack(sums[n][2], sums[n][3]));
      }
    }
    if (kPrefix && first + 16 > patches) {  // prefix tokens have one bucket with every token
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
template <Rpe rpe>
struct RingLookup {
  using Layout = RingLookupLayout<rpe>;
  uint32_t one_hots[2];       // of rows g and g + 8, against the first grid row
  bool is_prefix[2];          // these rows
  uint32_t class_offsets[2];  // against column lane % 8 of the ring, of the columns of both groups
  uint32_t row_words[kTileRows][2][Layout::kHalves];
  uint32_t class_offset[2];

  __device__ __forceinline__ void start(uint32_t base, const Group (&groups)[2], int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int dy = kGridH + 7 - (groups[n].first_y + g);
      one_hots[n] = base + Layout::one_hots + dy * Layout::kSlots * 2 + t * 4;
      is_prefix[n] = groups[n].is_prefix(g);
      class_offsets[n] =
          base + Layout::class_offsets + (kGridW - 1 - groups[n].column + lane % 8) * 4;
    }
  }
  // The class of the columns for tile `tile` of a chunk.
  template <int tile, int rows>
  __device__ __forceinline__ void load_class(int lane) {
    constexpr int first = tile * 8;
    constexpr int y0 = min(first / kRingWidth, rows - 1);
    constexpr int y1 = min((first + 7) / kRingWidth, rows - 1);
#pragma unroll
    for (int n = 0; n < (kTwoColumns ? 2 : 1); ++n) {
      uint32_t at = class_offsets[n] + min(first - y0 * kRingWidth, kGridW - 1) * 4;
#pragma unroll
      for (int y = y0 + 1; y <= y1; ++y) {
        if (first + lane % 8 >= y * kRingWidth) at -= kRingWidth * 4;
      }
      class_offset[n] = load_shared(at);
    }
  }

  // sums += for the tile that `constants` has loaded, and whose W lies at `w`.
  template <int tile, int rows, Rpe other>
  __device__ __forceinline__ void add(float* sums, uint32_t w, const RingLookup<other>& constants,
                                      int lane) const {
    constexpr int first = tile * 8;
    constexpr int y0 = min(first / kRingWidth, rows - 1);
    constexpr int y1 = min((first + 7) / kRingWidth, rows - 1);
    const int g = lane / 4;
    uint32_t x[kTwoColumns ? 2 : 1][Layout::kHalves];  // of token g, slots 2 t and 2 t + 1 (+ 8)
#pragma unroll
    for (int n = 0; n < (kTwoColumns ? 2 : 1); ++n) {
      ldmatrix<Layout::kHalves>(x[n], w + (first + lane % 8) * Layout::kWPitch +
                                          constants.class_offset[n] +
                                          lane / 8 % 2 * (Layout::kHalves - 1) * 16);
    }
    const auto row = [&](int n, int y, int half) {
      return constants.row_words[y % kTileRows][n][half];
    };
    // Tokens of grid row y alone; prefix tokens count to the last row.
    const auto masked = [&](uint32_t word, int y) {
      const int begin = y * kRingWidth - first, end = y == rows - 1 ? 8 : begin + kRingWidth;
      return (begin <= 0 && end >= 8) || (begin <= g && g < end) ? word : 0;
    };
    constexpr bool kPairs = Layout::kHalves == 1 && !kTwoColumns;  // k = 16 holds two grid rows
#pragma unroll
    for (int y = y0; y <= y1; y += kPairs ? 2 : 1) {
      if constexpr (kPairs) {
        if (y < y1)
          mma_k16(sums, row(0, y, 0), row(1, y, 0), row(0, y + 1, 0), row(1, y + 1, 0),
                  masked(x[0][0], y), masked(x[0][0], y + 1));
        else
          mma_k8(sums, row(0, y, 0), row(1, y, 0), masked(x[0][0], y));
      } else if constexpr (Layout::kHalves == 1) {
        mma_k16(sums, row(0, y, 0), 0, 0, row(1, y, 0), masked(x[0][0], y),
                masked(x[kTwoColumns][0], y));
      } else {
#pragma unroll
        for (int n = 0; n < (kTwoColumns ? 2 : 1); ++n) {
          const uint32_t b0 = masked(x[n][0], y), b1 = masked(x[n][Layout::kHalves - 1], y);
          const bool upper = !kTwoColumns || n == 0, lower = !kTwoColumns || n == 1;
          mma_k16(sums, upper ? row(0, y, 0) : 0, lower ? row(1, y, 0) : 0,
                  upper ? row(0, y, Layout::kHalves - 1) : 0,
                  lower ? row(1, y, Layout::kHalves - 1) : 0, b0, b1);
        }
      }
    }
  }
};

// What is constant for tile `tile` of a chunk; tiles come in order. Prefix tokens have the bucket
// of the last slot with every token.
template <int tile, int rows, Rpe rpe>
__device__ __forceinline__ void load_constants(RingLookup<rpe> (&lookups)[M], int first_row,
                                               int lane) {
  using Layout = RingLookupLayout<rpe>;
  constexpr int first = tile * 8;
  constexpr int y0 = min(first / kRingWidth, rows - 1);
  constexpr int y1 = min((first + 7) / kRingWidth, rows - 1);
#pragma unroll
  for (int y = y0; y <= y1; ++y) {
    if (tile > 0 && (first - 1) / kRingWidth >= y) continue;  // there from the tile before
#pragma unroll
    for (int n = 0; n < 2 * Layout::kHalves; ++n) {
      const int row = n % 2, half = n / 2;
      const uint32_t prefix = half == Layout::kHalves - 1 && lane % 4 == 3 ? kOne << 16 : 0;
      uint32_t word = 0;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m == 0 || !kSameRows)
          word = load_shared(lookups[m].one_hots[row] + (first_row + y) * Layout::kSlots * 2 +
                             half * 16);
        lookups[m].row_words[y % kTileRows][row][half] =
            kPrefix && lookups[m].is_prefix[row] ? prefix : word;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) lookups[m].template load_class<tile, rows>(lane);
}

}  // namespace irpe
