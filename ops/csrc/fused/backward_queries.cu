// The gradient of the queries, and what relative position on keys and values needs of them.
//
// Scores and weights P are computed again from the log-sum-exp. With U = grad_out T_V^T looked up,
// P' the weights that dropout left, scaled up, and b the buckets:
//
//   delta_i = grad_out_i . out_i          dP[i,j] = grad_out_i . v_j + U[i, b(i,j)]
//   dS[i,j] = P[i,j] (dP'[i,j] - delta_i)
//   grad_q = scale (dS k + sums_k T_K^T)  sums_k = bucket sums of dS
//
// The gradient of the table on keys is the product of these sums with q, left to PyTorch, as is
// that of the table on values, of grad_out with the bucket sums of P', which the forward keeps.

#include "bucket_sums.cuh"
#include "dropout.cuh"
#include "gradients.cuh"

namespace irpe {
namespace {

using SumsK = BucketSumLayout<kRpeK, false>;  // the table is there for the lookups

// Shared memory, in bytes from its beginning.
using KeyRing = Ring<KeysAndValues>;
constexpr int kLookupK = KeyRing::Layout::end;
constexpr int kSumsK = round_up(kLookupK + (kRpeK ? LookupLayout<kRpeK>::bytes : 0), 16);
constexpr int kLookupV = round_up(kSumsK + (kRpeK ? SumsK::bytes : 0), 16);
// The other constants of lookups on values are those on keys, if these have the same classes.
constexpr bool kTableOfV = kSameClasses && !kRpeK.bias;
using LookupV = LookupLayout<kRpeV>;
constexpr int kBinsK = round_up(kLookupV + (!kRpeV      ? 0
                                            : kTableOfV ? LookupV::row_offsets
                                                        : LookupV::bytes),
                                16);
constexpr bool kBinsInGrad = kRpeK && !kRpeV;  // once grad_out is in registers
// Queries, then W of keys, then grad_q; grad_out, then W of values.
constexpr int kRows = kBinsK + (kRpeK && !kBinsInGrad ? kWarps * M * SumsK::kStripBytes : 0);
constexpr int kRowsStrip =
    16 * max(kPitch, kRpeK && !kRpeK.bias ? LookupLayout<kRpeK>::kWPitch : 0);
constexpr int kGrad = kRows + kWarps * M * kRowsStrip;
constexpr int kGradStrip =
    max(16 * max(kPitch, kRpeV ? LookupV::kWPitch : 0), kBinsInGrad ? SumsK::kStripBytes : 0);
constexpr int kSharedBytes = kGrad + kWarps * M * kGradStrip;
static_assert(kSharedBytes == SHARED_BYTES,
              "backward_queries_bytes of fused_plan.py counts otherwise");

struct Item : Strips<kRpeK, kRpeQ> {
  RowsA grad_out[M];
  StripLookup<kRpeV> lookup_v[M];
  BucketSums<kRpeK, false> sums_k[M];
  float grad_q[M][kDimTiles][4];
  float lse[M][2], delta[M][2];  // the first one in powers of two
};

// Where basic blocks end (`never`): in the middle of each step, or before every third.
constexpr bool kEndEachStep = M == 2 && kRpeV;

// Of `count` tiles of keys, one or two, from `tile` on of a chunk of `rows` grid rows.
template <int tile, int count, int rows, bool last>
__device__ __forceinline__ void attend(const Params& p, const Chunk& c, Item& item, int lane) {
  if (!kEndEachStep && tile % 6 == 2 && never(p, tile)) return;
  float s[count][M][4], grad[count][M][4];
  for_each<count>([&]<int n>() {
    OneHots<tile + n, rows, last, kRpeK.slots> one_hots[M];
    score(s[n], c, item, one_hots, kRowsStrip, lane);
    if constexpr (kMask) mask_keys<tile + n>(s[n], p, item.b, c.number, lane);
    RowsB v;
    v.load(c.y + (tile + n) * 8 * kPitch, lane);
    if constexpr (bool(kRpeV))
      load_fragments<tile + n, rows>(item.lookup_v, kGradStrip, c.first_row());
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (kSameClasses) {
        add_lookup<true>(grad[n][m], item.lookup_v[m], one_hots[m]);
      } else if constexpr (bool(kRpeV)) {
        OneHots<tile + n, rows, last, kRpeV.slots> one_hots_v;
        one_hots_v.load(item.lookup_v[m], lane);
        add_lookup<true>(grad[n][m], item.lookup_v[m], one_hots_v);
      }
      multiply_rows<!kRpeV>(grad[n][m], item.grad_out[m], v);
    }
  });
  if (kEndEachStep && never(p, tile)) return;
  uint32_t a[M][4];
  SumOneHots<tile, count, rows, last, kRpeK.slots> sum_one_hots;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[n][m][e] = exp2_approx(fmaf(s[n][m][e], p.softmax_scale_log2, -item.lse[m][e / 2]));
    }
    if constexpr (kDropout) {
      const int row = (item.number * M + m) * 8 + lane / 4,
                step = (c.number * kChunkKeys + tile * 8) / 16;
      const Dropped dropped(p, item.b * p.H + item.h, row, step, lane);
#pragma unroll
      for (int n = 0; n < count; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          grad[n][m][e] *= dropped(n * 2 + e / 2, e % 2) ? 0.0f : p.dropout_scale;
      }
    }
#pragma unroll
    for (int n = 0; n < count; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][m][e] *= grad[n][m][e] - item.delta[m][e / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][n * 2 + half] = pack(s[n][m][2 * half], s[n][m][2 * half + 1]);
    }
    if constexpr (bool(kRpeK)) {
      sum_one_hots.load(item.sums_k[m], m, c.first_row(), lane);
      item.sums_k[m].add(a[m], sum_one_hots);
    }
  }
  multiply_columns<M, count>(item.grad_q, a, c.x + tile * 8 * kPitch, lane);
}

// The output at an item's rows, of which each lane has a share, and its product with grad_out.
struct Output {
  static constexpr int kSteps = 16 * M / kRowsAtOnce;
  uint4 x[kSteps][ceil_div(kDimTiles, kRowLanes)];

  __device__ __forceinline__ void load(const Params& p, const Item& item, int lane) {
    const uint16_t* out = head_of(p.out, item.b, item.h) + lane % kRowLanes * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Group group(item.number, step * kRowsAtOnce / 8);
      const int r = step * kRowsAtOnce % 8 + lane / kRowLanes;
      const bool used = group.is_patch(r) || group.is_prefix(r);
      const uint16_t* from = out + (used ? group.token(r) : 0) * p.out.stride_l;
#pragma unroll
      for (int n = 0; n < kDimTiles; n += kRowLanes) {
        if (n + kRowLanes <= kDimTiles || n + lane % kRowLanes < kDimTiles)
          x[step][n / kRowLanes] = *reinterpret_cast<const uint4*>(from + n * 8);
      }
    }
  }
  // delta of rows g and g + 8 of every strip, with grad_out at `rows`.
  __device__ __forceinline__ void dot(float (&delta)[M][2], uint32_t rows, int lane) const {
    float sums[kSteps];
    rows += lane / kRowLanes * kPitch + lane % kRowLanes * 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      constexpr int kSteps16 = 16 / kRowsAtOnce;  // of a strip
      const uint32_t at =
          rows + step / kSteps16 * kGradStrip + step % kSteps16 * kRowsAtOnce * kPitch;
      sums[step] = 0;
#pragma unroll
      for (int n = 0; n < kDimTiles; n += kRowLanes) {
        if (n + kRowLanes <= kDimTiles || n + lane % kRowLanes < kDimTiles)
          sums[step] += irpe::dot(x[step][n / kRowLanes], load_shared_x4(at + n * 16));
      }
#pragma unroll
      for (int n = 1; n < kRowLanes; n *= 2) sums[step] += __shfl_xor_sync(~0u, sums[step], n);
    }
    const int g = lane_id() / 4;
#pragma unroll
    for (int n = 0; n < 2 * M; ++n) {  // 8 rows lie in one step or in two
      const int first = n * 8 / kRowsAtOnce, from = g % kRowsAtOnce * kRowLanes;
      float x = __shfl_sync(~0u, sums[first], from);
      if constexpr (kRowsAtOnce < 8) {
        const float y = __shfl_sync(~0u, sums[first + 1], from);
        if (g >= kRowsAtOnce) x = y;
      }
      delta[n / 2][n % 2] = x;
    }
  }
};

__device__ __forceinline__ void start_item(Item& item, const Params& p, uint32_t base,
                                           uint32_t rows, uint32_t grad, int warp, int lane) {
  copy_strips(p.grad_out, grad, kGradStrip, item.b, item.h, item.number, lane);
  copy_strips(p.q, rows, kRowsStrip, item.b, item.h, item.number, lane);
  Output out;
  out.load(p, item, lane);
  const int64_t head = (static_cast<int64_t>(item.b) * p.H + item.h) * kTokens;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Free rows have no weights.
      const bool used = item.has_token(m, half, lane);
      item.lse[m][half] = used ? p.lse[head + item.token(m, half, lane)] * kLog2E : kInfinity;
    }
  }
  cp_async_wait<0>();
  __syncwarp();
  out.dot(item.delta, grad, lane);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    item.rows[m].load(rows + m * kRowsStrip, lane);
    item.grad_out[m].load(grad + m * kGradStrip, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (lane % 4 == 0 && item.has_token(m, half, lane))
        p.delta[head + item.token(m, half, lane)] = item.delta[m][half];
    }
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) item.grad_q[m][n][e] = 0;
    }
  }
  __syncwarp();
  if constexpr (kRpeK && !kRpeK.bias)
    project_table<kRpeK>(base + kLookupK, rows, item.rows, kRowsStrip, lane);
  if constexpr (bool(kRpeV))
    project_table<kRpeV>(base + kLookupV, grad, item.grad_out, kGradStrip, lane);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Group groups[2] = {Group(item.number, m * 2), Group(item.number, m * 2 + 1)};
    const uint32_t w = rows + m * kRowsStrip, w_v = grad + m * kGradStrip;
    if constexpr (bool(kRpeQ))
      item.ring_lookup[m].start(base + KeyRing::Layout::constants_x, groups, lane);
    if constexpr (bool(kRpeK)) {
      item.lookup[m].start(base + kLookupK, w, groups, lane);
      if (!kRpeK.bias && has_prefix(item.number))
        fill_prefix_rows<kRpeK>(w, item.lookup[m].is_prefix, lane_id());
      const uint32_t bins =
          kBinsInGrad ? grad + m * kGradStrip : base + kBinsK + (warp * M + m) * SumsK::kStripBytes;
      item.sums_k[m].start(base + kSumsK, bins, groups, lane);
    }
    if constexpr (bool(kRpeV)) {
      item.lookup_v[m].start(base + (kTableOfV ? kLookupK : kLookupV), w_v, groups, lane);
      if (has_prefix(item.number))
        fill_prefix_rows<kRpeV>(w_v, item.lookup_v[m].is_prefix, lane_id());
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void finish_item(const Params& p, Item& item, uint32_t base,
                                            uint32_t rows) {
  const int lane = lane_id();
  if constexpr (bool(kRpeK)) {
    // A term on keys adds one number to all scores of a prefix query: its gradient is 0, and not
    // the rounding errors of a sum.
    finish_sums<true>(item.sums_k, item, p, p.sums_k, nullptr,
                      base + kLookupK + LookupLayout<kRpeK>::table, item.grad_q, lane);
  }
  __syncwarp();
  store_gradient(p.grad_q, item.grad_q, p.softmax_scale, rows, kRowsStrip, item, lane);
  __syncwarp();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_queries(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const uint32_t base = shared_address(shared_memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
  // Free rows are computed too: they must hold numbers.
  for (int n = static_cast<int>(threadIdx.x) * 16; n < kSharedBytes - kRows; n += kThreads * 16) {
    store_shared_x4(base + kRows + n, make_uint4(0, 0, 0, 0));
  }
  KeyRing ring(p, base, warp, lane);
  __syncthreads();

  ring.copy_ahead();
  const int h = ring.head();
  ring.load_constants();
  if constexpr (bool(kRpeK)) {
    load_lookup_constants<kRpeK>(base + kLookupK, p.rpe_k, h);
    load_bucket_sum_constants<kRpeK, false>(base + kSumsK, p.rpe_k, h);
  }
  if constexpr (kTableOfV)
    load_lookup_table<kRpeV>(base + kLookupV, p.rpe_v, h);
  else if constexpr (bool(kRpeV))
    load_lookup_constants<kRpeV>(base + kLookupV, p.rpe_v, h);
  __syncthreads();

  const uint32_t rows = base + kRows + warp * M * kRowsStrip,
                 grad = base + kGrad + warp * M * kGradStrip;
  int turn = warp;
  ring.start();

#pragma unroll 1
  while (ring.now.b < p.B) {
    Item item;
    item.number = ring.now.pass * kWarps + turn, item.b = ring.now.b, item.h = h;
    const bool active = item.number < kItems;
    if (ring.now.pass + 1 == kPasses) turn = next_turn(turn);
    if (active) start_item(item, p, base, rows, grad, warp, lane);
    const auto chunk = [&](auto is_last) {
      constexpr bool last = decltype(is_last)::value;
      constexpr int kGridRows = last ? kLastRows : kChunkRows;
      constexpr int kTiles = kTilesOf<kGridRows, last>;
      ring.wait();
      if (active) {
        const int lane = lane_id();
        const Chunk c = ring.template chunk<last>();
        for_each<ceil_div(kTiles, 2)>([&]<int n>() {
          attend<2 * n, min(2, kTiles - 2 * n), kGridRows, last>(p, c, item, lane);
        });
      }
      ring.release();
    };
#pragma unroll 1
    for (int n = 0; n < kChunks - 1; ++n) chunk(Bool<false>{});
    chunk(Bool<true>{});
    if (active) finish_item(p, item, base, rows);
  }
  cp_async_wait<0>();
}

}  // namespace irpe
