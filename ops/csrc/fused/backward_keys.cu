// The gradients of the keys and values, and what relative position on queries needs of them.
//
// The mirror image of the pass over queries: strips hold keys and values, the ring brings queries
// and the output's gradient, and whose the lookups are changes places too. With the same P, P' and
// dS, of which delta comes from that pass:
//
//   grad_v = P'^T grad_out
//   grad_k = scale (dS^T q + sums_q T_Q^T)     sums_q = bucket sums of dS^T

#include "bucket_sums.cuh"
#include "dropout.cuh"
#include "gradients.cuh"

namespace irpe {
namespace {

// A bias on keys is a term of the strips, since it depends on neither side: kRpeQ stands for it.
using QueryRing = Ring<QueriesAndGradients>;
using SumsQ = BucketSumLayout<kRpeQ, false>;  // the table is there for the lookups
constexpr bool kSumsOfQ = kRpeQ && !kRpeQ.bias;

// Shared memory, in bytes from its beginning.
constexpr int kLookupQ = QueryRing::Layout::end;
constexpr int kSumsQ = round_up(kLookupQ + (kRpeQ ? LookupLayout<kRpeQ>::bytes : 0), 16);
// Keys, then their W, then grad_k; values, then bins, then grad_v.
constexpr int kKeys = round_up(kSumsQ + (kSumsOfQ ? SumsQ::bytes : 0), 16);
constexpr int kKeysStrip =
    16 * max(kPitch, kRpeQ && !kRpeQ.bias ? LookupLayout<kRpeQ>::kWPitch : 0);
constexpr int kValues = kKeys + kWarps * M * kKeysStrip;
constexpr int kValuesStrip = max(16 * kPitch, kSumsOfQ ? SumsQ::kStripBytes : 0);
constexpr int kSharedBytes = kValues + kWarps * M * kValuesStrip;
static_assert(kSharedBytes == SHARED_BYTES,
              "backward_keys_bytes of fused_plan.py counts otherwise");

// The values of two strips stay there: beside their keys and both gradients the registers do not
// hold them.
constexpr bool kValuesInShared = M == 2;
static_assert(!kValuesInShared || (!kRpeQ && !kRpeV && kDimSteps % 2 == 0 && !kDimTail),
              "two strips have lookups on keys alone, and 32 or 64 numbers a head");

struct Item : Strips<kRpeQ, kRpeK> {
  RowsA values[M];
  uint32_t values_at;
  RingLookup<kRpeV> lookup_v[M];
  BucketSums<kRpeQ, false> sums[M];
  float grad_k[M][kDimTiles][4], grad_v[M][kDimTiles][4];
  bool masked[M][2];
};

// Which weights of two tiles of strip m are dropped: bit 4 n + e of element e of tile n.
__device__ __forceinline__ uint32_t dropped_weights(const Params& p, const Item& item, int m,
                                                    int first_query, int lane) {
  const Group groups[2] = {Group(item.number, m * 2), Group(item.number, m * 2 + 1)};
  int keys[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys[half] = position_of(groups[half].token(lane / 4));
  }
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < 8; ++n) {
    const int query = token_at(first_query + n / 4 * 8 + lane % 4 * 2 + n % 2);
    const bool dropped =
        query >= 0 && is_dropped(p, item.b * p.H + item.h, query, n % 4 < 2 ? keys[0] : keys[1]);
    bits |= static_cast<uint32_t>(dropped) << n;
  }
  return bits;
}

__device__ __forceinline__ float dropout_factor(const Params& p, uint32_t dropped, int n) {
  return !kDropout ? 1.0f : dropped >> n & 1 ? 0.0f : p.dropout_scale;
}

// dP of `count` tiles of queries, one or two, with the values at `values`.
template <int count>
__device__ __forceinline__ void multiply_values(float (&grad)[count][M][4], uint32_t values,
                                                uint32_t grad_out, int lane) {
  values += lane % 16 * kPitch + lane / 16 * 16;
  grad_out += lane % 8 * kPitch + lane / 8 * 16;
#pragma unroll
  for (int k = 0; k < kDimSteps; k += 2) {
    uint32_t b[count][4];
#pragma unroll
    for (int n = 0; n < count; ++n) ldmatrix<4>(b[n], grad_out + n * 8 * kPitch + k * 32);
#pragma unroll
    for (int step = k; step < k + 2; ++step) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        uint32_t a[4];
        ldmatrix<4>(a, values + m * kValuesStrip + step * 32);
#pragma unroll
        for (int n = 0; n < count; ++n) {
          const uint32_t* x = b[n] + step % 2 * 2;
          if (step == 0)
            mma_k16<true>(grad[n][m], a[0], a[1], a[2], a[3], x[0], x[1]);
          else
            mma_k16(grad[n][m], a[0], a[1], a[2], a[3], x[0], x[1]);
        }
      }
    }
  }
}

// Of `count` tiles of queries, one or two, from `tile` on of a chunk of `rows` grid rows.
template <int tile, int count, int rows, bool last>
__device__ __forceinline__ void attend(const Params& p, const Chunk& c, Item& item, int lane) {
  const auto column = [&](int n) { return ((tile + n) * 8 + lane % 4 * 2) * 4; };
  float s[count][M][4], grad[count][M][4];
  for_each<count>([&]<int n>() {
    OneHots<tile + n, rows, last, kRpeQ.slots> one_hots[M];
    score(s[n], c, item, one_hots, kKeysStrip, lane);
    if constexpr (!kValuesInShared) {
      RowsB grad_out;
      grad_out.load(c.y + (tile + n) * 8 * kPitch, lane);
      if constexpr (kRpeV && !kSameClasses)
        load_constants<tile + n, rows>(item.lookup_v, c.first_row(), lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_rows<true>(grad[n][m], item.values[m], grad_out);
        if constexpr (kSameClasses)
          item.lookup_v[m].template add<tile + n, rows>(grad[n][m], c.w_y, item.ring_lookup[m],
                                                        lane);
        else if constexpr (bool(kRpeV))
          item.lookup_v[m].template add<tile + n, rows>(grad[n][m], c.w_y, item.lookup_v[m], lane);
      }
    }
  });
  float2 lse[count];
#pragma unroll
  for (int n = 0; n < count; ++n) lse[n] = load_shared_float2(c.lse + column(n));
  uint32_t a[M][4], dropped[M] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (kDropout)
      dropped[m] = dropped_weights(p, item, m, c.number * kChunkKeys + tile * 8, lane);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      float kept[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float reference = (e % 2 ? lse[n].y : lse[n].x) * kLog2E;
        float& weight = s[n][m][e];
        weight = exp2_approx(fmaf(weight, p.softmax_scale_log2, -reference));
        if (kMask && item.masked[m][e / 2]) weight = 0;
        kept[e] = weight * dropout_factor(p, dropped[m], n * 4 + e);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][n * 2 + half] = pack(kept[2 * half], kept[2 * half + 1]);
    }
  }
  // With 11 warps it would cost more than the registers that spill.
  if (kWarps <= 8 && (M == 2 || tile % 6 == 4) && never(p, tile)) return;
  multiply_columns<M, count>(item.grad_v, a, c.y + tile * 8 * kPitch, lane);
  if constexpr (kValuesInShared) {
    __syncwarp();  // ptxas moves no ldmatrix over it
    multiply_values<count>(grad, item.values_at, c.y + tile * 8 * kPitch, lane);
  }
  float2 delta[count];
#pragma unroll
  for (int n = 0; n < count; ++n) delta[n] = load_shared_float2(c.delta + column(n));
  SumOneHots<tile, count, rows, last, kRpeQ.slots> sum_one_hots;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float factor = dropout_factor(p, dropped[m], n * 4 + e);
        s[n][m][e] *= grad[n][m][e] * factor - (e % 2 ? delta[n].y : delta[n].x);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][n * 2 + half] = pack(s[n][m][2 * half], s[n][m][2 * half + 1]);
    }
    if constexpr (kSumsOfQ) {
      sum_one_hots.load(item.sums[m], m, c.first_row(), lane);
      item.sums[m].add(a[m], sum_one_hots);
    }
  }
  multiply_columns<M, count>(item.grad_k, a, c.x + tile * 8 * kPitch, lane);
}

__device__ __forceinline__ void start_item(Item& item, const Params& p, uint32_t base,
                                           uint32_t keys, uint32_t values) {
  const int lane = lane_id();
  copy_strips(p.k, keys, kKeysStrip, item.b, item.h, item.number, lane);
  copy_strips(p.v, values, kValuesStrip, item.b, item.h, item.number, lane);
  cp_async_wait<0>();
  __syncwarp();
  item.values_at = values;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    item.rows[m].load(keys + m * kKeysStrip, lane);
    if (!kValuesInShared) item.values[m].load(values + m * kValuesStrip, lane);
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) item.grad_k[m][n][e] = item.grad_v[m][n][e] = 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = static_cast<int64_t>(item.b) * kTokens;
      item.masked[m][half] = kMask && item.has_token(m, half, lane) &&
                             p.key_padding_mask[first + item.token(m, half, lane)];
    }
  }
  __syncwarp();
  if constexpr (kSumsOfQ) project_table<kRpeQ>(base + kLookupQ, keys, item.rows, kKeysStrip, lane);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Group groups[2] = {Group(item.number, m * 2), Group(item.number, m * 2 + 1)};
    const uint32_t w = keys + m * kKeysStrip;
    if constexpr (bool(kRpeK))
      item.ring_lookup[m].start(base + QueryRing::Layout::constants_x, groups, lane);
    if constexpr (bool(kRpeV))
      item.lookup_v[m].start(base + QueryRing::Layout::constants_y, groups, lane);
    if constexpr (bool(kRpeQ)) {
      item.lookup[m].start(base + kLookupQ, w, groups, lane);
      if (kSumsOfQ && has_prefix(item.number))
        fill_prefix_rows<kRpeQ>(w, item.lookup[m].is_prefix, lane);
    }
    if constexpr (kSumsOfQ)
      item.sums[m].start(base + kSumsQ, values + m * kValuesStrip, groups, lane);
  }
  __syncwarp();
}

__device__ __forceinline__ void finish_item(const Params& p, Item& item, uint32_t base,
                                            uint32_t keys, uint32_t values, int lane) {
  if constexpr (kSumsOfQ) {
    finish_sums<false>(item.sums, item, p, p.sums_q, nullptr,
                       base + kLookupQ + LookupLayout<kRpeQ>::table, item.grad_k, lane);
  }
  __syncwarp();
  store_gradient(p.grad_k, item.grad_k, p.softmax_scale, keys, kKeysStrip, item, lane);
  store_gradient(p.grad_v, item.grad_v, 1, values, kValuesStrip, item, lane);
  __syncwarp();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_keys(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const uint32_t base = shared_address(shared_memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
  // Free rows are computed too: they must hold numbers.
  for (int n = static_cast<int>(threadIdx.x) * 16; n < kSharedBytes - kKeys; n += kThreads * 16) {
    store_shared_x4(base + kKeys + n, make_uint4(0, 0, 0, 0));
  }
  QueryRing ring(p, base, warp, lane);
  __syncthreads();

  ring.copy_ahead();
  const int h = ring.head();
  ring.load_constants();
  if constexpr (bool(kRpeQ)) load_lookup_constants<kRpeQ>(base + kLookupQ, p.rpe_q, h);
  if constexpr (kSumsOfQ) load_bucket_sum_constants<kRpeQ, false>(base + kSumsQ, p.rpe_q, h);
  __syncthreads();

  const uint32_t keys = base + kKeys + warp * M * kKeysStrip,
                 values = base + kValues + warp * M * kValuesStrip;
  int turn = warp;
  ring.start();

#pragma unroll 1
  while (ring.now.b < p.B) {
    Item item;
    item.number = ring.now.pass * kWarps + turn, item.b = ring.now.b, item.h = h;
    const bool active = item.number < kItems;
    if (ring.now.pass + 1 == kPasses) turn = next_turn(turn);
    if (active) start_item(item, p, base, keys, values);
    const auto chunk = [&](auto is_last) {
      constexpr bool last = decltype(is_last)::value;
      constexpr int kGridRows = last ? kLastRows : kChunkRows;
      constexpr int kTiles = kTilesOf<kGridRows, last>;
      ring.wait();
      if (active) {
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
    if (active) finish_item(p, item, base, keys, values, lane);
  }
  cp_async_wait<0>();
}

}  // namespace irpe
