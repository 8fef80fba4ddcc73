// Chunks of keys and values on their way through a ring of shared memory, which all warps fill and
// empty at their own pace.
#pragma once

#include "key_lookup.cuh"

namespace irpe {

// Shared memory, in bytes from its beginning; what a kernel has besides begins at kAfterRing.
constexpr int kStageBytes = 2 * kChunkCapacity * kPitch;                   // keys, then values
constexpr int kFull = 0, kEmpty = kStages * 8, kProjected = kStages * 16;  // mbarriers
constexpr int kRing = round_up(kStages * 24, 128);
constexpr int kW = kRing + kStages * kStageBytes;  // of the keys
constexpr int kWBytes = kRpeQ ? kChunkCapacity * KeyLookupLayout::kWPitch : 0;
constexpr int kConstantsQ = kW + kStages * kWBytes;
constexpr int kAfterRing = round_up(kConstantsQ + (kRpeQ ? KeyLookupLayout::bytes : 0), 16);

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

// The same of keys and values; the mbarrier `full` tracks it.
__device__ __forceinline__ void copy_chunk(const Params& p, uint32_t to, uint32_t full,
                                           const Stream& s, int h, int warp, int lane) {
  const uint16_t *k = head_of(p.k, s.b, h), *v = head_of(p.v, s.b, h);
  const uint32_t to_v = to + kChunkCapacity * kPitch;
  if (kChunks == 1 || s.chunk == kChunks - 1) {
    copy_keys<true>(to, k, p.k.stride_l, s.chunk, warp, lane);
    copy_keys<true>(to_v, v, p.v.stride_l, s.chunk, warp, lane);
  } else {
    copy_keys<false>(to, k, p.k.stride_l, s.chunk, warp, lane);
    copy_keys<false>(to_v, v, p.v.stride_l, s.chunk, warp, lane);
  }
  mbarrier_arrive_after_copies(full);
}

// A warp's view of the ring.
struct Ring {
  const Params& p;
  const uint32_t base;
  const int h, first_b, step_b, warp, lane;
  Stream ahead, now;  // the chunk to be copied next; the one that is used
  int lead = 0;       // chunks of which this warp has started its share, from `now` on

  // By all threads, before a barrier of the block.
  __device__ __forceinline__ Ring(const Params& p, uint32_t base, int warp, int lane)
      : p(p),
        base(base),
        h(static_cast<int>(blockIdx.x) % p.H),
        first_b(static_cast<int>(blockIdx.x) / p.H),
        step_b(static_cast<int>(gridDim.x) / p.H),
        warp(warp),
        lane(lane),
        ahead(first_b),
        now(first_b) {
    if (threadIdx.x == 0) {
      for (int n = 0; n < kStages; ++n) {
        mbarrier_init(base + kFull + n * 8, kThreads);
        mbarrier_init(base + kEmpty + n * 8, kWarps);
        mbarrier_init(base + kProjected + n * 8, kWarps);
      }
    }
    if constexpr (bool(kRpeQ)) load_key_lookup_constants(base + kConstantsQ, p.rpe_q, h);
  }

  // Starts more copies: without waiting, if the chunk that is needed next is under way.
  __device__ __forceinline__ void copy_ahead() {
    while (lead < kAhead && ahead.b < p.B) {
      const bool is_free = mbarrier_test(base + kEmpty + ahead.stage * 8, ahead.phase ^ 1);
      if (!__all_sync(~0u, is_free)) {
        if (lead > 0) return;
        continue;
      }
      const uint32_t to = base + kRing + ahead.stage * kStageBytes;
      copy_chunk(p, to, base + kFull + ahead.stage * 8, ahead, h, warp, lane);
      ahead.next(step_b);
      ++lead;
    }
  }

  __device__ __forceinline__ uint32_t keys() const {
    return base + kRing + now.stage * kStageBytes;
  }
  __device__ __forceinline__ uint32_t w() const { return base + kW + now.stage * kWBytes; }

  // Waits for the chunk, and for its W, of which every warp projects a share.
  template <bool last>
  __device__ __forceinline__ void wait() {
    copy_ahead();
    mbarrier_wait(base + kFull + now.stage * 8, now.phase);
    if constexpr (bool(kRpeQ)) {
      constexpr int kPatchKeys = (last ? kLastRows : kChunkRows) * kGridW;
      constexpr int kKeys = round_up(kPatchKeys + (last ? kPrefix : 0), 16);
      project_keys(base + kConstantsQ, keys(), w(), kKeys, last ? kPatchKeys : kKeys, warp, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(base + kProjected + now.stage * 8);
      mbarrier_wait(base + kProjected + now.stage * 8, now.phase);
    }
  }
  // The warp has read the chunk.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + kEmpty + now.stage * 8);
    now.next(step_b);
    --lead;
  }
};

// Items of an image go to the warps by turns, so that each has as many in the long run.
__device__ __forceinline__ int next_turn(int turn) {
  return (turn + kWarps - kItems % kWarps) % kWarps;
}

}  // namespace irpe
