// Chunks of two matrices on their way through a ring of shared memory, which all warps fill and
// empty at their own pace.
#pragma once

#include "ring_lookup.cuh"

namespace irpe {

// What a ring carries: x and y, for each of which there may be lookups, and numbers of every row.
struct KeysAndValues {
  static constexpr Rpe lookup_x = kRpeQ, lookup_y = {0, 8, false, true};
  static constexpr bool has_sums = false;
  __device__ static const Matrix& x(const Params& p) { return p.k; }
  __device__ static const Matrix& y(const Params& p) { return p.v; }
  __device__ static const Table& table_x(const Params& p) { return p.rpe_q; }
  __device__ static const Table& table_y(const Params& p) { return p.rpe_v; }
};
struct QueriesAndGradients {
  static constexpr Rpe lookup_x = kRpeK, lookup_y = kRpeV;
  static constexpr bool has_sums = true;  // lse and delta
  __device__ static const Matrix& x(const Params& p) { return p.q; }
  __device__ static const Matrix& y(const Params& p) { return p.grad_out; }
  __device__ static const Table& table_x(const Params& p) { return p.rpe_k; }
  __device__ static const Table& table_y(const Params& p) { return p.rpe_v; }
};

// A chunk in shared memory: where its parts lie.
struct Chunk {
  uint32_t x, y;
  uint32_t lse, delta;  // floats
  uint32_t w_x, w_y;
  int number;

  // The grid row that it begins with.
  __device__ __forceinline__ int first_row() const { return number * kChunkRows; }
};

// Shared memory, in bytes from its beginning; what a kernel has besides begins at `end`.
template <typename Source>
struct RingLayout {
  using LookupX = RingLookupLayout<Source::lookup_x>;
  using LookupY = RingLookupLayout<Source::lookup_y>;
  static constexpr int kMatrix = kChunkCapacity * kPitch;
  static constexpr int kSums = Source::has_sums ? kChunkCapacity * 4 : 0;
  static constexpr int kStage = 2 * kMatrix + 2 * kSums;
  static constexpr int kWX = Source::lookup_x ? kChunkCapacity * LookupX::kWPitch : 0;
  static constexpr int kWY = Source::lookup_y ? kChunkCapacity * LookupY::kWPitch : 0;

  static constexpr int full = 0, empty = kStages * 8, projected = kStages * 16;  // mbarriers
  static constexpr int stages = round_up(kStages * 24, 128);
  static constexpr int w = stages + kStages * kStage;
  static constexpr int constants_x = w + kStages * (kWX + kWY);
  static constexpr int constants_y =
      round_up(constants_x + (Source::lookup_x ? LookupX::bytes : 0), 16);
  static constexpr int end = round_up(constants_y + (Source::lookup_y ? LookupY::bytes : 0), 16);
};

// Chunk number `number` of those that a block sees: of every image, as often as its warps pass over
// it. The blocks of a head, a column of the launch's grid, share the images out.
struct Stream {
  int b, pass, chunk, stage;
  uint32_t phase;

  __device__ __forceinline__ explicit Stream(uint32_t number)
      : b(static_cast<int>(blockIdx.y + number / (kChunks * kPasses) * gridDim.y)),
        pass(static_cast<int>(number / kChunks % kPasses)),
        chunk(static_cast<int>(number % kChunks)),
        stage(static_cast<int>(number % kStages)),
        phase(number / kStages % 2) {}
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
    if (++chunk < kChunks) return;
    chunk = 0;
    if (++pass < kPasses) return;
    pass = 0, b += static_cast<int>(gridDim.y);
  }
};

__device__ __forceinline__ void copy_zeros(uint32_t to, const uint16_t* readable, int lane) {
#pragma unroll
  for (int n = 0; n < kDimTiles; n += kRowLanes) {
    if (n + lane % kRowLanes < kDimTiles) cp_async_zeros(to + n * 16, readable);
  }
}

// A warp's share of the copies of a chunk of a matrix.
template <bool last>
__device__ __forceinline__ void copy_rows(uint32_t to, const uint16_t* from, int stride, int chunk,
                                          int warp, int lane) {
  constexpr int kRows = kWarps * kRowsAtOnce;
  constexpr int kPatchRows = (last ? kLastRows : kChunkRows) * kRingWidth;
  const int own = warp * kRowsAtOnce + lane / kRowLanes;
  const uint16_t* patches =
      from + (kPrefix + chunk * kChunkRows * kGridW) * stride + lane % kRowLanes * 8;
  const uint32_t at = to + own * kPitch + lane % kRowLanes * 16;
#pragma unroll
  for (int n = 0; n < kPatchRows; n += kRows) {
    const int place = n + own;
    if (n + kRows > kPatchRows && place >= kPatchRows) continue;
    if constexpr (kRingWidth == kGridW) {
      copy_row(at + n * kPitch, patches + own * stride + n * stride, lane);
    } else {
      const int y = place / kRingWidth, x = place % kRingWidth;
      if (x < kGridW)
        copy_row(at + n * kPitch, patches + (y * kGridW + x) * stride, lane);
      else
        copy_zeros(at + n * kPitch, from, lane);
    }
  }
  if constexpr (last) {  // prefix tokens, and zeros up to a whole tile
    constexpr int kRest = round_up(kLastKeys, 16) - kPatchRows;
#pragma unroll
    for (int n = 0; n < kRest; n += kRows) {
      const uint32_t rest = at + (kPatchRows + n) * kPitch;
      if (n + own < kPrefix)
        copy_row(rest, from + (n + own) * stride + lane % kRowLanes * 8, lane);
      else if (n + own < kRest)
        copy_zeros(rest, from, lane);
    }
  }
}

// The same of a number for each row.
template <bool last>
__device__ __forceinline__ void copy_sums(uint32_t to, const float* from, int chunk) {
  constexpr int kRows = last ? round_up(kLastKeys, 16) : kChunkKeys;
  const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int first = 0; first < kRows; first += kThreads) {
    const int n = first + tid;
    if (n >= kRows) continue;
    const int token = token_at(chunk * kChunkKeys + n);
    if (token >= 0)
      cp_async_4(to + n * 4, from + token);
    else
      cp_async_4_zeros(to + n * 4, from);
  }
}

// A warp's view of the ring.
template <typename Source>
struct Ring {
  using Layout = RingLayout<Source>;
  static constexpr bool kProjects = Source::lookup_x || Source::lookup_y;
  // Warps project W of a chunk before they use the one before it, so that none waits for the
  // slowest. In a ring of two that one's place is free only when all of them use the other.
  static constexpr int kProjectedAhead = kProjects && kStages > 2;
  // How far ahead copies are. With more, a warp waits for slower ones to leave the oldest chunk
  // more often than it gains.
  static constexpr int kAhead = kProjectedAhead ? kStages : kStages - kStages / 3;
  const Params& p;
  const uint32_t base;
  const int warp, lane;
  Stream now{0};           // the chunk that is used
  uint32_t copy_next = 0;  // the number of a chunk: what it says would take more registers
  int lead = 0;  // chunks of which this warp has started its share, from `now` on

  // By all threads, before a barrier of the block.
  __device__ __forceinline__ Ring(const Params& p, uint32_t base, int warp, int lane)
      : p(p), base(base), warp(warp), lane(lane) {
    if (threadIdx.x == 0) {
      for (int n = 0; n < kStages; ++n) {
        mbarrier_init(base + Layout::full + n * 8, kThreads);
        mbarrier_init(base + Layout::empty + n * 8, kWarps);
        mbarrier_init(base + Layout::projected + n * 8, kWarps);
      }
    }
  }
  // Likewise.
  __device__ __forceinline__ void load_constants() const {
    if constexpr (bool(Source::lookup_x))
      load_ring_lookup_constants<Source::lookup_x>(base + Layout::constants_x, Source::table_x(p),
                                                   head());
    if constexpr (bool(Source::lookup_y))
      load_ring_lookup_constants<Source::lookup_y>(base + Layout::constants_y, Source::table_y(p),
                                                   head());
  }
  // Before the first chunk, with the constants there.
  __device__ __forceinline__ void start() const {
    if (kProjectedAhead && now.b < p.B) project(now);
  }

  // Blocks stay on one head.
  __device__ static __forceinline__ int head() { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ Chunk at(const Stream& s) const {
    const uint32_t x = base + Layout::stages + s.stage * Layout::kStage;
    const uint32_t y = x + Layout::kMatrix, lse = y + Layout::kMatrix;
    const uint32_t w = base + Layout::w + s.stage * (Layout::kWX + Layout::kWY);
    return {x, y, lse, lse + Layout::kSums, w, w + Layout::kWX, s.chunk};
  }
  template <bool last>
  __device__ __forceinline__ Chunk chunk() const {
    Chunk c = at(now);
    if (last || kChunks == 2) c.number = last ? kChunks - 1 : 0;
    return c;
  }

  // Starts more copies: without waiting, if the chunk that is needed next is under way.
  __device__ __forceinline__ void copy_ahead() {
    while (lead < kAhead) {
      const Stream ahead(copy_next);
      if (ahead.b >= p.B) return;
      const uint32_t empty = base + Layout::empty + ahead.stage * 8;
      if (!__all_sync(~0u, mbarrier_test(empty, ahead.phase ^ 1))) {
        if (lead > kProjectedAhead) return;
        continue;
      }
      if (kChunks == 1 || ahead.chunk == kChunks - 1)
        copy<true>(ahead.b, at(ahead));
      else
        copy<false>(ahead.b, at(ahead));
      mbarrier_arrive_after_copies(base + Layout::full + ahead.stage * 8);
      ++copy_next;
      ++lead;
    }
  }
  template <bool last>
  __device__ __forceinline__ void copy(int b, const Chunk& to) const {
    const int lane = lane_id();
    const Matrix &x = Source::x(p), &y = Source::y(p);
    copy_rows<last>(to.x, head_of(x, b, head()), x.stride_l, to.number, warp, lane);
    copy_rows<last>(to.y, head_of(y, b, head()), y.stride_l, to.number, warp, lane);
    if constexpr (Source::has_sums) {
      const int64_t first = (static_cast<int64_t>(b) * p.H + head()) * kTokens;
      copy_sums<last>(to.lse, p.lse + first, to.number);
      copy_sums<last>(to.delta, p.delta + first, to.number);
    }
  }

  // Waits for the chunk, and for its W, of which every warp projects a share.
  __device__ __forceinline__ void wait() {
    copy_ahead();
    if constexpr (kProjects) {
      Stream s = now;
      if (kProjectedAhead) s.next();
      if (s.b < p.B) project(s);
      mbarrier_wait(base + Layout::projected + now.stage * 8, now.phase);
    } else {
      mbarrier_wait(base + Layout::full + now.stage * 8, now.phase);
    }
  }
  __device__ __forceinline__ void project(const Stream& s) const {
    mbarrier_wait(base + Layout::full + s.stage * 8, s.phase);
    const bool last = kChunks == 1 || s.chunk == kChunks - 1;
    const int patches = (last ? kLastRows : kChunkRows) * kRingWidth;
    const int rows = round_up(patches + (last ? kPrefix : 0), 16);
    const int no_prefix = last ? patches : rows;
    const Chunk c = at(s);
    if constexpr (bool(Source::lookup_x))
      project_ring<Source::lookup_x>(base + Layout::constants_x, c.x, c.w_x, rows, no_prefix, warp,
                                     lane);
    if constexpr (bool(Source::lookup_y))
      project_ring<Source::lookup_y>(base + Layout::constants_y, c.y, c.w_y, rows, no_prefix, warp,
                                     lane);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + Layout::projected + s.stage * 8);
  }
  // The warp has read the chunk.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + Layout::empty + now.stage * 8);
    now.next();
    --lead;
  }
};

// Items of an image go to the warps by turns, so that each has as many in the long run.
__device__ __forceinline__ int next_turn(int turn) {
  return (turn + kWarps - kItems % kWarps) % kWarps;
}

}  // namespace irpe
