// Relative position whose lookups belong to the strips, as one more matrix product: W C, where
// W[u][r][s] = x_u . T[:, M[r][s]] and C[s][w] = (column_class(xu - xw) == s) is constant. That is
// the term on keys in a pass over queries, and the one on queries in the pass over keys. See
// README.md.
#pragma once

#include "strips.cuh"

namespace irpe {

// Constants of a head in shared memory, at these bytes from `base`.
template <Rpe rpe>
struct LookupLayout {
  static constexpr int row_classes = rpe.row_classes, slots = rpe.slots;
  static constexpr bool bias = rpe.bias;
  static constexpr int kOneHotBytes = slots * 2, kMargin = 7;
  static constexpr int kTablePitch = bias ? slots * 2 : kPitch;
  static constexpr int kTableRows = bias ? row_classes + 1 : round_up(row_classes * slots, 16);
  static constexpr int table = 0;  // the factored table; of a bias its W
  static constexpr int row_offsets =
      table + kTableRows * kTablePitch;  // by yi - yj + kGridH, 4 bytes
  static constexpr int one_hots =
      round_up(row_offsets + (2 * kGridH + 1) * 4, 16);  // by xi - xj + kGridW - 1 + kMargin
  static constexpr int bytes = one_hots + (2 * kGridW - 1 + 2 * kMargin) * kOneHotBytes;
  static constexpr int kWPitch = pitch_of(row_classes * slots * 2);  // W of one query
};

template <Rpe rpe>
__device__ inline void load_lookup_table(uint32_t base, const Table& t, int h) {
  using Layout = LookupLayout<rpe>;
  const int tid = static_cast<int>(threadIdx.x);
  const uint16_t* table = static_cast<const uint16_t*>(t.data) + h * t.stride_h;
  if constexpr (rpe.bias) {
    for (int n = tid; n < (rpe.row_classes + 1) * rpe.slots; n += kThreads) {
      const int last = rpe.slots - 1;  // prefix queries have the prefix bucket with every key
      const uint16_t x = table[n < rpe.entries() ? n : last];
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(base + Layout::table + n * 2), "h"(x)
                   : "memory");
    }
  } else {
    for (int n = tid; n < Layout::kTableRows * kDimTiles; n += kThreads) {
      const uint32_t to = base + Layout::table + n / kDimTiles * kPitch + n % kDimTiles * 16;
      if (n < rpe.entries() * kDimTiles)
        store_shared_x4(to, *reinterpret_cast<const uint4*>(table + n * 8));
      else  // what bucket sums are multiplied with comes in steps of 16 rows
        store_shared_x4(to, make_uint4(0, 0, 0, 0));
    }
  }
}

template <Rpe rpe>
__device__ inline void load_lookup_constants(uint32_t base, const Table& t, int h) {
  using Layout = LookupLayout<rpe>;
  const int tid = static_cast<int>(threadIdx.x);
  load_lookup_table<rpe>(base, t, h);
  for (int n = tid; n < 2 * kGridH + 1; n += kThreads) {
    const int row_class = t.row_class[min(max(n - 1, 0), 2 * kGridH - 2)];
    store_shared(base + Layout::row_offsets + n * 4, row_class * rpe.slots * 2);
  }
  constexpr int kWords = rpe.slots / 2;
  for (int n = tid; n < (2 * kGridW - 1 + 2 * Layout::kMargin) * kWords; n += kThreads) {
    const int dx = n / kWords - Layout::kMargin - (kGridW - 1), slot = n % kWords * 2;
    const bool inside = -kGridW < dx && dx < kGridW;
    const int column_class = inside ? t.column_class[dx + kGridW - 1] : -1;
    const uint32_t word = column_class == slot ? kOne : column_class == slot + 1 ? kOne << 16 : 0;
    store_shared(base + Layout::one_hots + n * 4, word);
  }
}

// What a lane needs of a strip's lookups.
template <Rpe rpe>
struct StripLookup {
  static constexpr int kRows = rpe.slots == 8 ? 2 : 1;  // key rows of a fragment
  static constexpr int kFragments = (kTileRows + kRows - 2) / kRows + 1;  // that a tile may need
  uint32_t rows;         // of the lane's row of W, as a row of ldmatrix
  uint32_t row_offset;   // address of the offset of its class, against the first grid row
  uint32_t one_hots[2];  // of the columns of both groups; one if they are the same
  uint32_t fragments[kFragments][4];
  bool is_prefix;  // of a bias

  __device__ __forceinline__ void start(uint32_t base, uint32_t w, const Group (&groups)[2],
                                        int lane) {
    const int row = lane % 16, g = lane / 4, t = lane % 4;
    const int y = min((row < 8 ? groups[0].first_y : groups[1].first_y) + row % 8, kGridH - 1);
    rows = (rpe.bias ? base + LookupLayout<rpe>::table : w + row * LookupLayout<rpe>::kWPitch);
    if (rpe.slots == 16) rows += lane / 16 * 16;
    row_offset =
        base + LookupLayout<rpe>::row_offsets + (y + kGridH - (rpe.slots == 8 ? lane / 16 : 0)) * 4;
    is_prefix = row < 8 ? groups[0].is_prefix(row) : groups[1].is_prefix(row - 8);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      one_hots[n] = base + LookupLayout<rpe>::one_hots + t * 4 +
                    (groups[n].column + kGridW - 1 + LookupLayout<rpe>::kMargin - g) *
                        LookupLayout<rpe>::kOneHotBytes;
    }
  }

  // The columns' one-hots: words of keys [x0 + g] of a grid row for slots 2 t, 2 t + 1 (+ 8).
  __device__ __forceinline__ uint32_t one_hot(int group, int x0, int half, int g) const {
    if (x0 >= kGridW) return 0;
    const uint32_t x =
        load_shared(one_hots[group] - x0 * LookupLayout<rpe>::kOneHotBytes + half * 16);
    const bool whole = 0 <= x0 && x0 + 8 <= kGridW;
    return whole || (0 <= x0 + g && x0 + g < kGridW) ? x : 0;
  }
};

// C for tile `tile` of a chunk of `rows` grid rows, as the right operand.
template <int tile, int rows, bool last, int slots>
struct OneHots {
  static constexpr int first = tile * 8, patches = rows * kRingWidth;
  static constexpr int y0 = min(first / kRingWidth, rows - 1);
  static constexpr int y1 = min((first + 7) / kRingWidth, rows - 1);
  uint32_t words[y1 - y0 + 1][kTwoColumns ? 2 : 1][slots / 8];

  template <Rpe rpe>
  __device__ __forceinline__ void load(const StripLookup<rpe>& lookup, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int y = y0; y <= y1; ++y) {
#pragma unroll
      for (int group = 0; group < (kTwoColumns ? 2 : 1); ++group) {
#pragma unroll
        for (int half = 0; half < slots / 8; ++half) {
          uint32_t x = lookup.one_hot(group, first - y * kRingWidth, half, g);
          if (first + 7 >= patches && y == y1) {  // prefix tokens have the last slot
            const bool prefix = last && first + g >= patches && first + g < patches + kPrefix;
            const bool mine = t == 3 && half == slots / 8 - 1;
            if (first + g >= patches) x = prefix && mine ? kOne << 16 : 0;
          }
          words[y - y0][group][half] = x;
        }
      }
    }
  }
};

// The fragments of the key rows that begin in a tile; tiles come in order. The strips' W lie
// `strip_bytes` apart.
template <int tile, int rows, Rpe rpe>
__device__ __forceinline__ void load_fragments(StripLookup<rpe> (&lookups)[M], int strip_bytes,
                                               int first_row) {
  using Tile = OneHots<tile, rows, false, rpe.slots>;
  constexpr int kRows = StripLookup<rpe>::kRows, kFragments = StripLookup<rpe>::kFragments;
#pragma unroll
  for (int y = Tile::y0 / kRows * kRows; y <= Tile::y1; y += kRows) {
    if (tile > 0 && (Tile::first - 1) / kRingWidth >= y) continue;  // there from the tile before
    uint32_t offset = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (m == 0 || !kSameRows) offset = load_shared(lookups[m].row_offset - (first_row + y) * 4);
      uint32_t at = lookups[0].rows + offset + m * strip_bytes;
      if (rpe.bias) at = lookups[0].rows + (lookups[m].is_prefix ? rpe.entries() * 2 : offset);
      ldmatrix<4>(lookups[m].fragments[y / kRows % kFragments], at);
    }
  }
}

// sums += W C for a tile, of which the fragments are there.
template <bool zero, int tile, int rows, bool last, Rpe rpe>
__device__ __forceinline__ void add_lookup(float* sums, const StripLookup<rpe>& lookup,
                                           const OneHots<tile, rows, last, rpe.slots>& one_hots) {
  using Tile = OneHots<tile, rows, last, rpe.slots>;
  constexpr int y0 = Tile::y0, y1 = Tile::y1, kFragments = StripLookup<rpe>::kFragments;
  const auto word = [&](int group, int y, int half) { return one_hots.words[y - y0][group][half]; };
  bool start = zero;  // the first product begins the sums
  const auto product = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
    if (start)
      mma_k16<true>(sums, a0, a1, a2, a3, b0, b1);
    else
      mma_k16(sums, a0, a1, a2, a3, b0, b1);
    start = false;
  };
  if constexpr (rpe.slots == 8) {
    const auto fragment = [&](int y) { return lookup.fragments[y / 2 % kFragments] + y % 2 * 2; };
#pragma unroll
    for (int y = y0; y <= y1; y += kTwoColumns ? 1 : 2) {  // k = 16 holds two columns or key rows
      const uint32_t* a = fragment(y);
      if constexpr (kTwoColumns) {
        product(a[0], 0, 0, a[1], word(0, y, 0), word(1, y, 0));
      } else if (y < y1) {
        const uint32_t* b = fragment(y + 1);
        product(a[0], a[1], b[0], b[1], word(0, y, 0), word(0, y + 1, 0));
      } else {
        if (start)
          mma_k8<true>(sums, a[0], a[1], word(0, y, 0));
        else
          mma_k8(sums, a[0], a[1], word(0, y, 0));
        start = false;
      }
    }
  } else {
#pragma unroll
    for (int y = y0; y <= y1; ++y) {
      const uint32_t (&a)[4] = lookup.fragments[y % kFragments];
      if constexpr (kTwoColumns) {
        product(a[0], 0, a[2], 0, word(0, y, 0), word(0, y, 1));
        product(0, a[1], 0, a[3], word(1, y, 0), word(1, y, 1));
      } else {
        product(a[0], a[1], a[2], a[3], word(0, y, 0), word(0, y, 1));
      }
    }
  }
}

// W of M strips from their queries, into shared memory.
template <Rpe rpe>
__device__ __forceinline__ void project_table(uint32_t base, uint32_t w, const RowsA (&q)[M],
                                              int strip_bytes, int lane) {
  constexpr int kTiles = rpe.entries() / 8, kBatch = 14 / M;
#pragma unroll 1
  for (int first = 0; first < kTiles; first += kBatch) {
    // All products before the first store: ptxas moves no ldmatrix over a store to shared memory.
    float sums[kBatch][M][4];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      RowsB table;
      table.load(base + LookupLayout<rpe>::table + min(first + n, kTiles - 1) * 8 * kPitch, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply_rows<true>(sums[n][m], q[m], table);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (kTiles % kBatch && first + n >= kTiles) break;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const uint32_t to = w + m * strip_bytes + lane / 4 * LookupLayout<rpe>::kWPitch +
                            (first + n) * 16 + lane % 4 * 4;
        store_shared(to, pack(sums[n][m][0], sums[n][m][1]));
        store_shared(to + 8 * LookupLayout<rpe>::kWPitch, pack(sums[n][m][2], sums[n][m][3]));
      }
    }
  }
}

// Prefix tokens have one bucket with every key: their rows of W get it everywhere.
template <Rpe rpe>
__device__ __forceinline__ void fill_prefix_rows(uint32_t w, bool is_prefix, int lane) {
  if (lane < 16 && is_prefix) {
    const uint32_t row = w + lane * LookupLayout<rpe>::kWPitch;
    const uint32_t x = load_shared_u16(row + (rpe.slots - 1) * 2) * 0x10001;
    for (int n = 0; n < rpe.entries() / 8; ++n)
      store_shared_x4(row + n * 16, make_uint4(x, x, x, x));
  }
}

}  // namespace irpe
