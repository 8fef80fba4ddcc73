// out = softmax(scale (q k^T + W C)) (v + terms), and what the backward needs: the log-sum-exp of
// the scores, and with terms on values the bucket sums of the weights.
//
// Blocks stay on one head and go through images. Keys and values come in chunks through a ring of
// shared memory, which all warps fill and empty at their own pace, by mbarriers. The softmax is
// online (Milakov and Gimelshein, 2018), in powers of two; sums are rescaled only when a row's
// maximum has grown by more than kRescaleThreshold (as FlashAttention-4 does).

#include "bucket_sums.cuh"
#include "dropout.cuh"
#include "scores.cuh"

namespace irpe {
namespace {

// Weights are at most 2 to this power. Sums of thousands of them become operands: IEEE half holds
// numbers up to 65,504.
constexpr float kRescaleThreshold = kRpeV && !kBFloat16 ? 3 : 8;

// Shared memory, in bytes from its beginning.
using KeyRing = Ring<KeysAndValues>;
constexpr int kConstants = KeyRing::Layout::end;
constexpr int kConstantsV = round_up(kConstants + (kRpeK ? LookupLayout<kRpeK>::bytes : 0), 16);
constexpr int kBins = round_up(kConstantsV + (kRpeV ? BucketSumLayout<kRpeV>::bytes : 0), 16);
constexpr int kQ = kBins + (kRpeV ? kWarps * M * BucketSumLayout<kRpeV>::kStripBytes : 0);
constexpr int kQStrip = 16 * kPitch;
constexpr int kScratchStrip =
    16 * max(kPitch, kRpeK && !kRpeK.bias ? LookupLayout<kRpeK>::kWPitch : 0);
constexpr int kScratch = kQ + (kPrefetchQ ? kWarps * M * kQStrip : 0);
constexpr int kSharedBytes = kScratch + kWarps * M * kScratchStrip;
constexpr int kOwnStrip = kPrefetchQ ? kQStrip : kScratchStrip;  // queries come to
static_assert(kSharedBytes == SHARED_BYTES, "forward_bytes of fused_plan.py counts otherwise");

// Queries and their output so far.
struct Item : Strips<kRpeK, kRpeQ> {
  BucketSums<kRpeV> sums[M];
  float out[M][kDimTiles][4];
  // Times softmax_scale_log2, and behind the true one by at most kRescaleThreshold.
  float row_max[M][2];
  float row_sum[M][4];  // the same in all columns, as the tensor cores leave them
};

// Of the four lanes that share a row.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Sums of strip m against a new maximum.
__device__ __forceinline__ void rescale(Item& item, int m, const float (&highest)[2]) {
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& row_max = item.row_max[m][half];
    const float moved = fmaxf(row_max, max_of_row(highest[half]));
    // A row that has seen masked keys alone has no maximum yet.
    factor[half] = kMask && moved == -kInfinity ? 1.0f : exp2_approx(row_max - moved);
    row_max = moved;
  }
#pragma unroll
  for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) item.out[m][n][e] *= factor[e / 2];
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) item.row_sum[m][e] *= factor[e / 2];
  if constexpr (bool(kRpeV)) item.sums[m].scale(factor);
}

// The online softmax of `count` tiles of scores: they become weights. The strips' maxima are
// compared at once, for one branch.
template <int count, bool is_first>
__device__ __forceinline__ void weigh(float (&s)[count][M][4], const Params& p, Item& item) {
  float highest[M][2];
  bool exceeds = false;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& x = highest[m][half];
      x = s[0][m][2 * half];
#pragma unroll
      for (int n = 0; n < count; ++n) x = fmaxf(x, fmaxf(s[n][m][2 * half], s[n][m][2 * half + 1]));
      x *= p.softmax_scale_log2;
      if (is_first) item.row_max[m][half] = max_of_row(x);
      exceeds |= x - item.row_max[m][half] > kRescaleThreshold;
    }
  }
  if (!is_first && __any_sync(~0u, exceeds)) {
#pragma unroll
    for (int m = 0; m < M; ++m) rescale(item, m, highest[m]);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float row_max = item.row_max[m][e / 2];
      const float reference = kMask && row_max == -kInfinity ? 0.0f : row_max;
#pragma unroll
      for (int n = 0; n < count; ++n) {
        s[n][m][e] = exp2_approx(fmaf(s[n][m][e], p.softmax_scale_log2, -reference));
      }
    }
  }
}

// Products of `count` tiles of weights, one or two, from `tile` on, with the values.
template <int tile, int count, int rows, bool last>
__device__ __forceinline__ void add_values(const float (*s)[M][4], const Params& p, const Chunk& c,
                                           Item& item, int lane) {
  uint32_t a[M][4];
  SumOneHots<tile, count, rows, last, kRpeV.slots> one_hots;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * count; ++n)
      a[m][n] = pack(s[n / 2][m][n % 2 * 2], s[n / 2][m][n % 2 * 2 + 1]);
    mma_tiles<count>(item.row_sum[m], a[m], kOnes, kOnes);
    if constexpr (kDropout) {
      const int row = (item.number * M + m) * 8 + lane / 4,
                step = (c.number * kChunkKeys + tile * 8) / 16;
      Dropped(p, item.b * p.H + item.h, row, step, lane).apply(a[m]);
    }
    if constexpr (bool(kRpeV)) {
      one_hots.load(item.sums[m], m, c.first_row(), lane);
      item.sums[m].add(a[m], one_hots);
    }
  }
  multiply_columns<M, count>(item.out, a, c.y + tile * 8 * kPitch, lane);
}

// A chunk, in steps of kStepTiles tiles from number `first` on.
template <int first, int rows, bool is_first, bool last>
__device__ __forceinline__ void attend(const Params& p, const Chunk& c, Item& item, int lane) {
  constexpr int kCount = min(kStepTiles, kTilesOf<rows, last> - first);
  float s[kCount][M][4];
  for_each<kCount>([&]<int n>() {
    OneHots<first + n, rows, last, kRpeK.slots> one_hots[M];
    score(s[n], c, item, one_hots, kScratchStrip, lane);
    if constexpr (kMask) mask_keys<first + n>(s[n], p, item.b, c.number, lane);
  });
  weigh<kCount, is_first && first == 0>(s, p, item);
  for_each<ceil_div(kCount, 2)>([&]<int n>() {
    constexpr int count = min(2, kCount - 2 * n);
    add_values<first + 2 * n, count, rows, last>(s + 2 * n, p, c, item, lane);
  });
  if constexpr (first + kCount < kTilesOf<rows, last>)
    attend<first + kCount, rows, is_first, last>(p, c, item, lane);
}

// The queries of an item, and what relative position needs of them.
__device__ __forceinline__ void start_item(Item& item, uint32_t base, uint32_t q, uint32_t scratch,
                                           int warp, int lane) {
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    item.rows[m].load(q + m * kOwnStrip, lane);
#pragma unroll
    for (int e = 0; e < 4; ++e) item.row_sum[m][e] = 0;
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) item.out[m][n][e] = 0;
    }
  }
  __syncwarp();
  if constexpr (kRpeK && !kRpeK.bias)
    project_table<kRpeK>(base + kConstants, scratch, item.rows, kScratchStrip, lane);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Group groups[2] = {Group(item.number, m * 2), Group(item.number, m * 2 + 1)};
    if constexpr (bool(kRpeQ))
      item.ring_lookup[m].start(base + KeyRing::Layout::constants_x, groups, lane);
    if constexpr (bool(kRpeV)) {
      const uint32_t bins = base + kBins + (warp * M + m) * BucketSumLayout<kRpeV>::kStripBytes;
      item.sums[m].start(base + kConstantsV, bins, groups, lane);
    }
    if constexpr (bool(kRpeK)) {
      const uint32_t w = scratch + m * kScratchStrip;
      item.lookup[m].start(base + kConstants, w, groups, lane);
      if (!kRpeK.bias && has_prefix(item.number))
        fill_prefix_rows<kRpeK>(w, item.lookup[m].is_prefix, lane);
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void finish_item(const Params& p, Item& item, uint32_t base,
                                            uint32_t scratch, int lane) {
  const int g = lane / 4, t = lane % 4;
  float* lse = p.lse + (static_cast<int64_t>(item.b) * p.H + item.h) * kTokens;
  float share[M][2];
  const auto finish_softmax = [&](int m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = item.row_sum[m][2 * half];
      const bool none = kMask && sum == 0;  // all keys are masked
      share[m][half] = none ? 0.0f : __fdividef(kDropout ? p.dropout_scale : 1.0f, sum);
      if (t == 0 && item.has_token(m, half, lane)) {
        const float log_sum = (item.row_max[m][half] + log2_approx(sum)) * kLn2;
        lse[item.token(m, half, lane)] = none ? kInfinity : log_sum;
      }
    }
  };
  if constexpr (bool(kRpeV)) {
#pragma unroll
    for (int m = 0; m < M; ++m) finish_softmax(m);
    finish_sums<false>(item.sums, item, p, p.sums_v, share,
                       base + kConstantsV + BucketSumLayout<kRpeV>::table, item.out, lane);
  }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (!kRpeV) finish_softmax(m);
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      const float (&out)[4] = item.out[m][n];
      const uint32_t to = scratch + m * kScratchStrip + g * kPitch + n * 16 + t * 4;
      store_shared(to, pack(out[0] * share[m][0], out[1] * share[m][0]));
      store_shared(to + 8 * kPitch, pack(out[2] * share[m][1], out[3] * share[m][1]));
    }
  }
  __syncwarp();
  store_strips(p.out, scratch, kScratchStrip, item.b, item.h, item.number, lane);
  __syncwarp();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_forward(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const uint32_t base = shared_address(shared_memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
  // Free rows are computed too: they must hold numbers.
  for (int n = static_cast<int>(threadIdx.x) * 16; n < kSharedBytes - kQ; n += kThreads * 16) {
    store_shared_x4(base + kQ + n, make_uint4(0, 0, 0, 0));
  }
  KeyRing ring(p, base, warp, lane);
  __syncthreads();

  const int h = ring.head();
  const uint32_t scratch = base + kScratch + warp * M * kScratchStrip;
  const uint32_t own_q = kPrefetchQ ? base + kQ + warp * M * kQStrip : scratch;
  int turn = warp;
  if (kPrefetchQ && turn < kItems) copy_strips(p.q, own_q, kOwnStrip, ring.now.b, h, turn, lane);
  ring.copy_ahead();
  if constexpr (bool(kRpeK)) load_lookup_constants<kRpeK>(base + kConstants, p.rpe_k, h);
  if constexpr (bool(kRpeV)) load_bucket_sum_constants<kRpeV>(base + kConstantsV, p.rpe_v, h);
  ring.load_constants();
  __syncthreads();
  ring.start();

#pragma unroll 1
  while (ring.now.b < p.B) {
    Item item;
    item.number = ring.now.pass * kWarps + turn, item.b = ring.now.b, item.h = h;
    const bool active = item.number < kItems, more = ring.now.pass + 1 < kPasses;
    if (!more) turn = next_turn(turn);
    if (active) {
      if (!kPrefetchQ) copy_strips(p.q, own_q, kOwnStrip, item.b, h, item.number, lane);
      start_item(item, base, own_q, scratch, warp, lane);
    }
    if (kPrefetchQ) {
      const int next = (more ? ring.now.pass + 1 : 0) * kWarps + turn;
      const int next_b = more ? item.b : item.b + static_cast<int>(gridDim.y);
      if (next < kItems && next_b < p.B) copy_strips(p.q, own_q, kOwnStrip, next_b, h, next, lane);
    }
    const auto chunk = [&](auto is_first, auto is_last) {
      constexpr bool first = decltype(is_first)::value, last = decltype(is_last)::value;
      ring.wait();
      if (active) {
        const Chunk c = ring.template chunk<last>();
        attend<0, last ? kLastRows : kChunkRows, first, last>(p, c, item, lane);
      }
      ring.release();
    };
    chunk(Bool<true>{}, Bool<kChunks == 1>{});
#pragma unroll 1
    for (int n = 1; n < kChunks - 1; ++n) chunk(Bool<false>{}, Bool<false>{});
    if constexpr (kChunks > 1) chunk(Bool<false>{}, Bool<true>{});
    if (active) finish_item(p, item, base, scratch, lane);
  }
  cp_async_wait<0>();
}

}  // namespace irpe
