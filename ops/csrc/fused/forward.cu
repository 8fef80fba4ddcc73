// out = softmax(scale (q k^T + W C)) v, and the log-sum-exp of the scores.
//
// Blocks stay on one head and go through images. Keys and values come in chunks through a ring of
// shared memory, which all warps fill and empty at their own pace, by mbarriers. The softmax is
// online (Milakov and Gimelshein, 2018), in powers of two; sums are rescaled only when a row's
// maximum has grown by more than 2^8 (as FlashAttention-4 does).

#include "bucket_sums.cuh"
#include "lookup.cuh"

namespace irpe {
namespace {

constexpr int M = kStripsPerWarp;
constexpr float kRescaleThreshold = 8;

// Shared memory, in bytes from its beginning.
constexpr int kFull = 0, kEmpty = kStages * 8;  // mbarriers
constexpr int kRing = round_up(kStages * 16, 128), kStageBytes = 2 * kChunkCapacity * kPitch;
constexpr int kConstants = kRing + kStages * kStageBytes;
constexpr int kConstantsV = round_up(kConstants + (kRpeK ? LookupK::bytes : 0), 16);
constexpr int kBins = round_up(kConstantsV + (kRpeV ? BucketSumLayout::bytes : 0), 16);
constexpr int kQ = kBins + (kRpeV ? kWarps * M * BucketSumLayout::kStripBytes : 0);
constexpr int kQStrip = 16 * kPitch;
constexpr int kScratchStrip = 16 * max(kPitch, kRpeK && !kRpeK.bias ? LookupK::kWPitch : 0);
constexpr int kScratch = kQ + (kPrefetchQ ? kWarps * M * kQStrip : 0);
constexpr int kSharedBytes = kScratch + kWarps * M * kScratchStrip;
static_assert(kSharedBytes == SHARED_BYTES, "forward_bytes of fused_kernels.py counts otherwise");

// The chunks that a block sees: of every image, as often as its warps pass over it.
struct Stream {
  int b, pass = 0, chunk = 0, stage = 0;
  uint32_t phase = 0;

  __device__ explicit Stream(int first) : b(first) {}
  __device__ __forceinline__ void next(int step) {
    if (++stage == kStages) stage = 0, phase ^= 1;
    if (++chunk < kChunks) return;
    chunk = 0;
    if (++pass < kPasses) return;
    pass = 0, b += step;
  }
};

// A warp's share of the copies of a chunk.
template <bool last>
__device__ __forceinline__ void copy_keys(uint32_t to, const uint16_t* from, int stride, int chunk,
                                          int warp, int lane) {
  constexpr int kRows = kWarps * kRowsAtOnce, kKeys = (last ? kLastRows : kChunkRows) * kGridW;
  const int own = warp * kRowsAtOnce + lane / kRowLanes;
  const uint16_t* row = from + (kPrefix + chunk * kChunkKeys + own) * stride + lane % kRowLanes * 8;
  const uint32_t at = to + own * kPitch + lane % kRowLanes * 16;
#pragma unroll
  for (int n = 0; n < kKeys; n += kRows) {
    if (n + kRows <= kKeys || n + own < kKeys) copy_row(at + n * kPitch, row + n * stride, lane);
  }
  if constexpr (last) {  // prefix tokens, and zeros up to a whole tile
    constexpr int kRest = round_up(kLastKeys, 16) - kKeys;
#pragma unroll
    for (int n = 0; n < kRest; n += kRows) {
      const uint32_t rest = at + (kKeys + n) * kPitch;
      if (n + own < kPrefix)
        copy_row(rest, from + (n + own) * stride + lane % kRowLanes * 8, lane);
      else if (n + own < kRest) {
#pragma unroll
        for (int d = 0; d < kDimTiles; d += kRowLanes) {
          if (d + lane % kRowLanes < kDimTiles) cp_async_zeros(rest + d * 16, from);
        }
      }
    }
  }
}

__device__ __forceinline__ void copy_chunk(const Params& p, uint32_t base, const Stream& s, int h,
                                           int warp, int lane) {
  const uint16_t *k = head_of(p.k, s.b, h), *v = head_of(p.v, s.b, h);
  const uint32_t to = base + kRing + s.stage * kStageBytes, to_v = to + kChunkCapacity * kPitch;
  if (kChunks == 1 || s.chunk == kChunks - 1) {
    copy_keys<true>(to, k, p.k.stride_l, s.chunk, warp, lane);
    copy_keys<true>(to_v, v, p.v.stride_l, s.chunk, warp, lane);
  } else {
    copy_keys<false>(to, k, p.k.stride_l, s.chunk, warp, lane);
    copy_keys<false>(to_v, v, p.v.stride_l, s.chunk, warp, lane);
  }
  mbarrier_arrive_after_copies(base + kFull + s.stage * 8);
}

struct Softmax {
  float row_max[M]
               [2];  // times softmax_scale_log2; behind the true one by at most kRescaleThreshold
  float row_sum[M][4];  // as the matrix unit leaves them
};

// `count` tiles of keys from number `first` on of a chunk of `rows` grid rows.
template <int first, int count, int rows, bool is_first, bool last>
__device__ __forceinline__ void step(const Params& p, uint32_t keys, const RowsA (&q)[M],
                                     StripLookup (&lookup)[M], BucketSums (&sums)[M],
                                     float (&out)[M][kDimTiles][4], Softmax& softmax, int lane) {
  constexpr int kKeys = rows * kGridW + (last ? kPrefix : 0);
  float s[count][M][4];
  const auto score = [&]<int n>(auto&& self) {
    if constexpr (n < count) {
      RowsB k;
      k.load(keys + (first + n) * 8 * kPitch, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        constexpr bool whole = (first + n) * 8 + 8 <= kKeys;
        if constexpr (!whole) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            s[n][m][e] = (first + n) * 8 + lane % 4 * 2 + e % 2 < kKeys ? 0.0f : -kInfinity;
          }
        }
        if constexpr (bool(kRpeK))
          add_lookup<first + n, rows, last, whole>(s[n][m], lookup[m], lane);
        multiply_rows<whole && !kRpeK>(s[n][m], q[m], k);
      }
      self.template operator()<n + 1>(self);
    }
  };
  score.template operator()<0>(score);

  uint32_t weights[count][M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float highest[2];
    bool exceeds = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = s[0][m][2 * half];
#pragma unroll
      for (int n = 0; n < count; ++n) {
        highest[half] = fmaxf(highest[half], fmaxf(s[n][m][2 * half], s[n][m][2 * half + 1]));
      }
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 1));
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 2));
      if (is_first) softmax.row_max[m][half] = highest[half] * p.softmax_scale_log2;
      exceeds |=
          fmaf(highest[half], p.softmax_scale_log2, -softmax.row_max[m][half]) > kRescaleThreshold;
    }
    if (!is_first && __any_sync(~0u, exceeds)) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& row_max = softmax.row_max[m][half];
        const float moved = fmaxf(row_max, highest[half] * p.softmax_scale_log2);
        factor[half] = exp2_approx(row_max - moved);
        row_max = moved;
      }
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] *= factor[e / 2];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) softmax.row_sum[m][e] *= factor[e / 2];
      if constexpr (bool(kRpeV)) sums[m].scale(factor);
    }
#pragma unroll
    for (int n = 0; n < count; ++n) {
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        w[e] = exp2_approx(fmaf(s[n][m][e], p.softmax_scale_log2, -softmax.row_max[m][e / 2]));
      weights[n][m][0] = pack(w[0], w[1]), weights[n][m][1] = pack(w[2], w[3]);
    }
  }
  const auto add_values = [&]<int n>(auto&& self) {
    if constexpr (n < count) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        a[m][0] = weights[n][m][0], a[m][1] = weights[n][m][1];
        a[m][2] = weights[n + 1][m][0], a[m][3] = weights[n + 1][m][1];
        mma_k16(softmax.row_sum[m], a[m][0], a[m][1], a[m][2], a[m][3], kOnes, kOnes);
        if constexpr (bool(kRpeV)) sums[m].template add<first + n, rows, last>(a[m], lane);
      }
      multiply_columns<M>(out, a, keys + (kChunkCapacity + (first + n) * 8) * kPitch, lane);
      self.template operator()<n + 2>(self);
    }
  };
  add_values.template operator()<0>(add_values);
}

template <int first, int rows, bool is_first, bool last>
__device__ __forceinline__ void steps(const Params& p, uint32_t keys, const RowsA (&q)[M],
                                      StripLookup (&lookup)[M], BucketSums (&sums)[M],
                                      float (&out)[M][kDimTiles][4], Softmax& softmax, int lane) {
  constexpr int kTiles = round_up(rows * kGridW + (last ? kPrefix : 0), 16) / 8;
  constexpr int kCount = min(kStepTiles, kTiles - first);
  step<first, kCount, rows, is_first && first == 0, last>(p, keys, q, lookup, sums, out, softmax,
                                                          lane);
  if constexpr (first + kCount < kTiles)
    steps<first + kCount, rows, is_first, last>(p, keys, q, lookup, sums, out, softmax, lane);
}

// The queries of an item. Free rows keep what is there: no other row sees it.
__device__ __forceinline__ void copy_queries(const Params& p, uint32_t to, int b, int h, int item,
                                             int lane) {
  const uint16_t* q = head_of(p.q, b, h) + lane % kRowLanes * 8;
  to += lane / kRowLanes * kPitch + lane % kRowLanes * 16;
#pragma unroll
  for (int n = 0; n < 2 * M; ++n) {
    const Group group(item, n);
    const uint16_t* from = q + group.patch(lane / kRowLanes) * p.q.stride_l;
#pragma unroll
    for (int row = 0; row < 8; row += kRowsAtOnce) {
      if (group.is_patch(row + lane / kRowLanes)) {
        copy_row(to + (n * 8 + row) * kPitch, from + row * kGridW * p.q.stride_l, lane);
      }
    }
  }
  if (has_prefix(item)) {
#pragma unroll 1
    for (int row = 0; row < 16 * M; row += kRowsAtOnce) {
      const Group group(item, row / 8);
      const int r = row % 8 + lane / kRowLanes;
      if (group.is_prefix(r)) copy_row(to + row * kPitch, q + group.token(r) * p.q.stride_l, lane);
    }
  }
  cp_async_commit();
}

// out += bucket sums T_V
__device__ __forceinline__ void add_table_values(uint32_t base, int item,
                                                 const BucketSums (&sums)[M],
                                                 float (&out)[M][kDimTiles][4], int lane) {
  const bool prefix = has_prefix(item);
  bool is_prefix[M][2] = {};
  float total[M][2] = {};
  if (prefix) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sums[m].totals(total[m]);
#pragma unroll
      for (int rows = 0; rows < 2; ++rows)
        is_prefix[m][rows] = Group(item, 2 * m + rows).is_prefix(lane / 4);
    }
  }
#pragma unroll
  for (int n = 0; n < BucketSumLayout::kTableRows / 16; ++n) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) sums[m].operand(a[m], n, prefix, is_prefix[m], total[m], lane);
    multiply_columns<M>(out, a, base + BucketSumLayout::table + n * 16 * kPitch, lane);
  }
}

__device__ __forceinline__ void store_row(uint16_t* to, uint32_t from, int lane) {
#pragma unroll
  for (int n = 0; n < kDimTiles; n += kRowLanes) {
    if (n + kRowLanes <= kDimTiles || n + lane % kRowLanes < kDimTiles) {
      *reinterpret_cast<uint4*>(to + n * 8) = load_shared_x4(from + n * 16);
    }
  }
}

__device__ __forceinline__ void store_out(const Params& p, uint32_t scratch, int b, int h, int item,
                                          const float (&out)[M][kDimTiles][4],
                                          const Softmax& softmax, int lane) {
  const int g = lane / 4, t = lane % 4;
  __syncwarp();
  float* lse = p.lse + (static_cast<int64_t>(b) * p.H + h) * kTokens;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = softmax.row_sum[m][2 * half];
      share[half] = __fdividef(1.0f, sum);
      const Group group(item, m * 2 + half);
      if (t == 0 && (group.is_patch(g) || group.is_prefix(g))) {
        lse[group.token(g)] = (softmax.row_max[m][half] + log2_approx(sum)) * kLn2;
      }
    }
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      const uint32_t to = scratch + m * kScratchStrip + g * kPitch + n * 16 + t * 4;
      store_shared(to, pack(out[m][n][0] * share[0], out[m][n][1] * share[0]));
      store_shared(to + 8 * kPitch, pack(out[m][n][2] * share[1], out[m][n][3] * share[1]));
    }
  }
  __syncwarp();
  uint16_t* rows = head_of(p.out, b, h) + lane % kRowLanes * 8;
  const uint32_t from = scratch + lane / kRowLanes * kPitch + lane % kRowLanes * 16;
#pragma unroll
  for (int n = 0; n < 2 * M; ++n) {
    const Group group(item, n);
    uint16_t* to = rows + group.patch(lane / kRowLanes) * p.out.stride_l;
#pragma unroll
    for (int row = 0; row < 8; row += kRowsAtOnce) {
      if (group.is_patch(row + lane / kRowLanes)) {
        store_row(to + row * kGridW * p.out.stride_l,
                  from + n / 2 * kScratchStrip + (n % 2 * 8 + row) * kPitch, lane);
      }
    }
  }
  if (has_prefix(item)) {
#pragma unroll 1
    for (int row = 0; row < 16 * M; row += kRowsAtOnce) {
      const Group group(item, row / 8);
      const int r = row % 8 + lane / kRowLanes;
      const uint32_t at = from + row / 16 * kScratchStrip + row % 16 * kPitch;
      if (group.is_prefix(r)) store_row(rows + group.token(r) * p.out.stride_l, at, lane);
    }
  }
  __syncwarp();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_forward(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const uint32_t base = shared_address(shared_memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int h = static_cast<int>(blockIdx.x) % p.H, first_b = static_cast<int>(blockIdx.x) / p.H;
  const int step_b = static_cast<int>(gridDim.x) / p.H;

  if (threadIdx.x == 0) {
    for (int n = 0; n < kStages; ++n) {
      mbarrier_init(base + kFull + n * 8, kThreads);
      mbarrier_init(base + kEmpty + n * 8, kWarps);
    }
  }
  if constexpr (bool(kRpeK)) load_lookup_constants(base + kConstants, p.rpe_k, h);
  if constexpr (bool(kRpeV)) load_bucket_sum_constants(base + kConstantsV, p.rpe_v, h);
  // Free rows are computed too: they must hold numbers.
  for (int n = static_cast<int>(threadIdx.x) * 16; n < kSharedBytes - kQ; n += kThreads * 16) {
    store_shared_x4(base + kQ + n, make_uint4(0, 0, 0, 0));
  }
  __syncthreads();

  const uint32_t scratch = base + kScratch + warp * M * kScratchStrip;
  const uint32_t own_q = kPrefetchQ ? base + kQ + warp * M * kQStrip : scratch;
  Stream ahead(first_b), now(first_b);
  int lead = 0;  // chunks of which this warp has started its share, from `now` on
  // Starts more of them: without waiting, if the one that is needed next is under way.
  const auto copy_ahead = [&] {
    while (lead < kAhead && ahead.b < p.B) {
      const bool is_free = mbarrier_test(base + kEmpty + ahead.stage * 8, ahead.phase ^ 1);
      if (!__all_sync(~0u, is_free)) {
        if (lead > 0) return;
        continue;
      }
      copy_chunk(p, base, ahead, h, warp, lane);
      ahead.next(step_b);
      ++lead;
    }
  };
  copy_ahead();
  // Items of an image go to the warps by turns, so that each has as many in the long run.
  int turn = warp;
  if (kPrefetchQ && turn < kItems) copy_queries(p, own_q, first_b, h, turn, lane);

#pragma unroll 1
  for (int b = first_b; b < p.B; b += step_b) {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int item = pass * kWarps + turn;
      const bool active = item < kItems;
      RowsA q[M];
      StripLookup lookup[M];
      BucketSums sums[M];
      float out[M][kDimTiles][4] = {};
      Softmax softmax = {};
      if (active) {
        if (!kPrefetchQ) copy_queries(p, own_q, b, h, item, lane);
        cp_async_wait<0>();
        __syncwarp();
#pragma unroll
        for (int m = 0; m < M; ++m) q[m].load(own_q + m * kQStrip, lane);
        __syncwarp();
        if constexpr (kRpeK && !kRpeK.bias)
          project_table<M>(base + kConstants, scratch, q, kScratchStrip, lane);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const Group groups[2] = {Group(item, m * 2), Group(item, m * 2 + 1)};
          if constexpr (bool(kRpeV)) {
            const uint32_t bins = base + kBins + (warp * M + m) * BucketSumLayout::kStripBytes;
            sums[m].start(base + kConstantsV, bins, groups, lane);
          }
          if constexpr (bool(kRpeK)) {
            const uint32_t w = scratch + m * kScratchStrip;
            lookup[m].start(base + kConstants, w, groups, lane);
            if (!kRpeK.bias && has_prefix(item)) {
              __syncwarp();
              fill_prefix_rows(w, lookup[m].is_prefix, lane);
            }
          }
        }
        __syncwarp();
      }
      if (kPrefetchQ) {
        const bool more = pass + 1 < kPasses;
        const int next = more ? turn : (turn + kWarps - kItems % kWarps) % kWarps,
                  next_b = more ? b : b + step_b;
        const int next_item = (more ? pass + 1 : 0) * kWarps + next;
        if (next_item < kItems && next_b < p.B) copy_queries(p, own_q, next_b, h, next_item, lane);
      }
      const auto chunk = [&](auto is_first, auto is_last) {
        constexpr bool first = decltype(is_first)::value, last = decltype(is_last)::value;
        copy_ahead();
        mbarrier_wait(base + kFull + now.stage * 8, now.phase);
        if (active) {
          const uint32_t keys = base + kRing + now.stage * kStageBytes;
          steps<0, last ? kLastRows : kChunkRows, first, last>(p, keys, q, lookup, sums, out,
                                                               softmax, lane);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            lookup[m].row_offset -= kChunkRows * 4;
            sums[m].row_offset[0] -= kChunkRows * 4, sums[m].row_offset[1] -= kChunkRows * 4;
          }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(base + kEmpty + now.stage * 8);
        now.next(step_b);
        --lead;
      };
      chunk(Bool<true>{}, Bool<kChunks == 1>{});
#pragma unroll 1
      for (int n = 1; n < kChunks - 1; ++n) chunk(Bool<false>{}, Bool<false>{});
      if constexpr (kChunks > 1) chunk(Bool<false>{}, Bool<true>{});
      if constexpr (bool(kRpeV)) {
        if (active) add_table_values(base + kConstantsV, item, sums, out, lane);
      }
      if (active) store_out(p, scratch, b, h, item, out, softmax, lane);
    }
    turn = (turn + kWarps - kItems % kWarps) % kWarps;
  }
  cp_async_wait<0>();
}

}  // namespace irpe
