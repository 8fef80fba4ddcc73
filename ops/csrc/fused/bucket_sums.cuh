// Sums of the weights, or of the scores' gradients, of each bucket, by the transposed product P
// C^T. Their product with a table follows. See README.md.
#pragma once

#include "scores.cuh"

namespace irpe {

// Constants of a head in shared memory, at these bytes from `base`; and a strip's sums.
template <Rpe rpe, bool with_table = true>
struct BucketSumLayout {
  static constexpr int kSlots = rpe.slots, kHalves = kSlots / 8, kMargin = 6;
  static constexpr int kTableRows = round_up(rpe.entries(), 16);
  static constexpr int kOneHotPitch = kSlots * 4 + 16;  // lanes with other keys hit other banks
  static constexpr int table = 0;
  static constexpr int row_offsets =
      table + (with_table ? kTableRows * kPitch : 0);  // by yi - yj + kGridH - 1
  static constexpr int kOffsets = 2 * kGridH + 7;      // yi of free rows too, with the last class
  static constexpr int one_hots = round_up(row_offsets + kOffsets * 4, 16);  // by xi - xj
  // A tile begins at columns -7 to kGridW - 1.
  static constexpr int kColumns = kMargin + 2 * kGridW - 1 + 7;
  static constexpr int bytes = one_hots + kColumns * kOneHotPitch;
  // Bins of two slots: [class][half of the slots][rows g or g + 8][lane]. If a class is one run of
  // key rows its sum is stored once it is complete, as operands are; else floats are added to.
  static constexpr int kBinBytes = rpe.runs ? 4 : 8;
  static constexpr int kClassBytes = kHalves * 2 * kWarp * kBinBytes,
                       kStripBytes = rpe.row_classes * kClassBytes;
};

template <Rpe rpe, bool with_table = true>
__device__ inline void load_bucket_sum_constants(uint32_t base, const Table& t, int h) {
  using Layout = BucketSumLayout<rpe, with_table>;
  const int tid = static_cast<int>(threadIdx.x);
  const uint16_t* table = static_cast<const uint16_t*>(t.data) + h * t.stride_h;
  for (int n = tid; with_table && n < Layout::kTableRows * kDimTiles; n += kThreads) {
    const uint32_t to = base + Layout::table + n / kDimTiles * kPitch + n % kDimTiles * 16;
    if (n < rpe.entries() * kDimTiles)
      store_shared_x4(to, *reinterpret_cast<const uint4*>(table + n * 8));
    else
      store_shared_x4(to, make_uint4(0, 0, 0, 0));
  }
  for (int n = tid; n < Layout::kOffsets; n += kThreads) {
    // Lowest bit: the next key row, whose offset is one less, has another class.
    const int dy = min(n, 2 * kGridH - 2), row_class = t.row_class[dy];
    const bool ends = n == 0 || (n == dy && t.row_class[n - 1] != row_class);
    store_shared(base + Layout::row_offsets + n * 4,
                 row_class * Layout::kClassBytes | static_cast<int>(rpe.runs && ends));
  }
  // Words of two keys, the second one column further, by the column of the first.
  for (int n = tid; n < Layout::kColumns * Layout::kSlots; n += kThreads) {
    const int dx = n / Layout::kSlots - Layout::kMargin - (kGridW - 1), slot = n % Layout::kSlots;
    const auto is = [&](int d) {
      return -kGridW < d && d < kGridW && t.column_class[d + kGridW - 1] == slot;
    };
    const uint32_t word = (is(dx) ? kOne : 0) | (is(dx - 1) ? kOne << 16 : 0);
    store_shared(base + Layout::one_hots + n / Layout::kSlots * Layout::kOneHotPitch + slot * 4,
                 word);
  }
}

// C^T for the keys of `count` tiles from `tile` of a chunk on, as the right operand, and where the
// sums of a key row go that ends there.
template <int tile, int count, int rows, bool last, int slots>
struct SumOneHots {
  static constexpr int first = tile * 8, end = first + count * 8, patches = rows * kRingWidth,
                       keys = patches + (last ? kPrefix : 0);
  static constexpr int y0 = min(first / kRingWidth, rows - 1);
  static constexpr int y1 = min((end - 1) / kRingWidth, rows - 1);
  uint32_t words[y1 - y0 + 1][kTwoColumns ? 2 : 1][slots / 8][count];
  uint32_t row_offsets[y1 - y0 + 1][2];

  static constexpr bool ends(int y) {
    return y < y1 || end >= (y == rows - 1 ? keys : (y + 1) * kRingWidth);
  }

  // Those of strip m, after those of the strips before.
  template <typename Sums>
  __device__ __forceinline__ void load(const Sums& sums, int m, int first_row, int lane) {
    const int g = lane / 4, t = lane % 4;
    constexpr int kHalves = slots / 8;
#pragma unroll
    for (int y = y0; y <= y1; ++y) {
#pragma unroll
      for (int n = 0; n < (kTwoColumns ? 2 : 1) * kHalves * count; ++n) {
        const int eight = n % count, half = n / count % kHalves, group = n / count / kHalves;
        const int begin = first + eight * 8, x0 = begin - y * kRingWidth;
        uint32_t x = -8 < x0 && x0 < kGridW ? sums.one_hot(group, x0, half, t) : 0;
        if (y == rows - 1 && begin + 8 > patches) {  // prefix tokens have the last slot
          const auto is = [&](int key) { return begin + key >= patches && begin + key < keys; };
          if (g == 7 && half == kHalves - 1)
            x |= (is(2 * t) ? kOne : 0) | (is(2 * t + 1) ? kOne << 16 : 0);
        }
        words[y - y0][group][half][eight] = x;
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (ends(y) && (m == 0 || !kSameRows))
          row_offsets[y - y0][n] = load_shared(sums.row_offset[n] - (first_row + y) * 4);
      }
    }
  }
};

// The sums of a strip so far. Those of the key row under way, or of its run, are in registers, the
// others in shared memory, of which each lane has its own.
template <Rpe rpe, bool with_table = true>
struct BucketSums {
  using Layout = BucketSumLayout<rpe, with_table>;
  static constexpr int kBins = rpe.row_classes * Layout::kHalves * 2,
                       kParts = (kTwoColumns ? 2 : 1) * Layout::kHalves * 4;
  uint32_t bins;           // the lane's
  uint32_t row_offset[2];  // addresses of the classes' offsets, of rows g and g + 8
  uint32_t one_hots[2];    // of the columns of both groups
  float part[kTwoColumns ? 2 : 1][Layout::kHalves][4];

  __device__ __forceinline__ void start(uint32_t base, uint32_t to, const Group (&groups)[2],
                                        int lane) {
    const int g = lane / 4, t = lane % 4;
    bins = to + lane * Layout::kBinBytes;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      row_offset[n] =
          base + Layout::row_offsets + (groups[n].first_y + g + kGridH - 1) * 4;
      one_hots[n] =
          base + Layout::one_hots + g * 4 +
          (groups[n].column + kGridW - 1 + Layout::kMargin - 2 * t) * Layout::kOneHotPitch;
    }
    for (int n = 0; n < kBins; ++n) store_bin(bin(n), {0, 0});
#pragma unroll
    for (int n = 0; n < kParts; ++n) (&part[0][0][0])[n] = 0;
  }

  // Bin n of the lane: of rows g + 8 where n is odd.
  __device__ __forceinline__ uint32_t bin(int n) const {
    return bins + n * kWarp * Layout::kBinBytes;
  }
  __device__ static __forceinline__ float2 load_bin(uint32_t at) {
    if constexpr (rpe.runs) return unpack(load_shared(at));
    return load_shared_float2(at);
  }
  __device__ static __forceinline__ void store_bin(uint32_t at, float2 x) {
    if constexpr (rpe.runs)
      store_shared(at, pack(x.x, x.y));
    else
      store_shared_float2(at, x);
  }

  __device__ __forceinline__ void scale(const float (&factor)[2]) {
    for (int n = 0; n < kBins; ++n) {
      const float2 x = load_bin(bin(n));
      store_bin(bin(n), {x.x * factor[n % 2], x.y * factor[n % 2]});
    }
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      (&part[0][0][0])[n] *= factor[n / 2 % 2];
    }
  }

  // One-hots of 8 keys from column x0 of a grid row on, for the slots from 8 `half` on.
  __device__ __forceinline__ uint32_t one_hot(int group, int x0, int half, int t) const {
    const uint32_t x = load_shared(one_hots[group] - x0 * Layout::kOneHotPitch + half * 32);
    if (0 <= x0 && x0 + 8 <= kGridW) return x;
    const auto inside = [&](int key) { return 0 <= x0 + key && x0 + key < kGridW; };
    return x & ((inside(2 * t) ? 0xffff : 0) | (inside(2 * t + 1) ? 0xffff0000 : 0));
  }

  // Adds the weights of the keys of `one_hots`; tiles come in order.
  template <int tile, int count, int rows, bool last>
  __device__ __forceinline__ void add(
      const uint32_t (&a)[4], const SumOneHots<tile, count, rows, last, rpe.slots>& one_hots) {
    using Tile = SumOneHots<tile, count, rows, last, rpe.slots>;
#pragma unroll
    for (int y = Tile::y0; y <= Tile::y1; ++y) {
      const bool begins = !rpe.runs && (tile == 0 || (Tile::first - 1) / kRingWidth < y);
#pragma unroll
      for (int half = 0; half < Layout::kHalves; ++half) {
#pragma unroll
        for (int n = 0; n < (kTwoColumns ? 2 : 1); ++n) {
          const uint32_t (&b)[count] = one_hots.words[y - Tile::y0][n][half];
          if (begins)
            mma_tiles<count, true>(part[n][half], a, b[0], b[count - 1]);
          else
            mma_tiles<count>(part[n][half], a, b[0], b[count - 1]);
        }
      }
      if (Tile::ends(y)) flush(one_hots.row_offsets[y - Tile::y0]);
    }
  }

  // The sums of a key row are complete. Of a run they are stored after each row: the last stays.
  __device__ __forceinline__ void flush(const uint32_t (&offsets)[2]) {
#pragma unroll
    for (int rows = 0; rows < 2; ++rows) {
#pragma unroll
      for (int half = 0; half < Layout::kHalves; ++half) {
        float* x = part[kTwoColumns ? rows : 0][half] + 2 * rows;
        const uint32_t at = bin(half * 2 + rows) + (offsets[rows] & ~1u);
        if constexpr (rpe.runs) {
          store_bin(at, {x[0], x[1]});
          if (offsets[rows] & 1) x[0] = x[1] = 0;
        } else {
          const float2 sum = load_bin(at);
          store_bin(at, {sum.x + x[0], sum.y + x[1]});
        }
      }
    }
  }

  // The left operand of the product with table rows 16 `step` to 16 `step` + 15. Prefix tokens have
  // everything in one bucket: `total` is in the last slot of class 0.
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int step, bool has_prefix,
                                          const bool (&is_prefix)[2], const float (&total)[2],
                                          int lane) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // rows g or g + 8 by n % 2; the first or second 8 of k
      const int eight = 2 * step + n / 2;
      const int number = eight * 2 + n % 2;
      a[n] = 0;
      if (number < kBins) {
        const float2 x = load_bin(bin(number));
        a[n] = rpe.runs ? load_shared(bin(number)) : pack(x.x, x.y);
      }
      if (has_prefix && is_prefix[n % 2])
        a[n] = eight == Layout::kHalves - 1 && lane % 4 == 3 ? pack(0, total[n % 2]) : 0;
    }
  }
  // Of all slots, in rows g and g + 8.
  __device__ __forceinline__ void totals(float (&total)[2]) const {
#pragma unroll
    for (int rows = 0; rows < 2; ++rows) {
      float sum = 0;
      for (int n = 0; n < rpe.row_classes * Layout::kHalves; ++n) {
        const float2 x = load_bin(bin(n * 2 + rows));
        sum += x.x + x.y;
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      total[rows] = sum + __shfl_xor_sync(~0u, sum, 2);
    }
  }
};

// Where a lane stores the bucket sums of rows g and g + 8 of a strip; nowhere if no token is there.
template <Rpe rpe>
struct SumRows {
  uint32_t* rows[2];
  bool used[2];

  template <Rpe own, Rpe ring>
  __device__ __forceinline__ void start(void* to, const Params& p, const Strips<own, ring>& strips,
                                        int m, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = static_cast<int64_t>(strips.b) * kTokens + strips.token(m, half, lane);
      rows[half] =
          static_cast<uint32_t*>(to) + (token * p.H + strips.h) * (rpe.entries() / 2) + lane % 4;
      used[half] = strips.has_token(m, half, lane);
    }
  }
  // Sums 16 `step` to 16 `step` + 15, as the left operand of a product, times `factor` if any.
  __device__ __forceinline__ void store(const uint32_t (&a)[4], int step,
                                        const float* factor) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int entry = step * 16 + n / 2 * 8;
      if (entry >= rpe.entries() || !used[n % 2]) continue;
      const float2 x = unpack(a[n]);
      const float scale = factor ? factor[n % 2] : 1;
      rows[n % 2][entry / 2] = factor ? pack(x.x * scale, x.y * scale) : a[n];
    }
  }
};

// Stores the bucket sums of an item at `to`, times `factor` if any (then `to` may be null), and
// adds their product with the table, at `table`. What prefix tokens have in their bucket is left
// out if `zero_prefix`.
template <bool zero_prefix, Rpe rpe, bool with_table, Rpe own, Rpe ring>
__device__ __forceinline__ void finish_sums(const BucketSums<rpe, with_table> (&sums)[M],
                                            const Strips<own, ring>& strips, const Params& p,
                                            void* to, const float (*factor)[2], uint32_t table,
                                            float (&products)[M][kDimTiles][4], int lane) {
  const bool prefix = has_prefix(strips.number);
  bool is_prefix[M][2] = {};
  float total[M][2] = {};
#pragma unroll
  for (int m = 0; prefix && m < M; ++m) {
    if (!zero_prefix) sums[m].totals(total[m]);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      is_prefix[m][half] = Group(strips.number, 2 * m + half).is_prefix(lane / 4);
  }
  SumRows<rpe> rows[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    rows[m].start(to, p, strips, m, lane);
    if (factor && !to) rows[m].used[0] = rows[m].used[1] = false;
  }
#pragma unroll
  for (int n = 0; n < BucketSumLayout<rpe, with_table>::kTableRows / 16; ++n) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sums[m].operand(a[m], n, prefix, is_prefix[m], total[m], lane);
      rows[m].store(a[m], n, factor ? factor[m] : nullptr);
    }
    if constexpr (!rpe.bias) multiply_columns<M, 2>(products, a, table + n * 16 * kPitch, lane);
  }
}

}  // namespace irpe
