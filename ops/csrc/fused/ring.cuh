// Chunks of keys and values on their way into the ring of shared memory.
#pragma once

#include "tiles.cuh"

namespace irpe {

constexpr int kStageBytes = 2 * kChunkCapacity * kPitch;  // keys, and then values

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

}  // namespace irpe
