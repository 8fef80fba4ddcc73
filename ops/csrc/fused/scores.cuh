// Scores of a warp's strips against tiles of the ring, before the softmax and its scale.
#pragma once

#include "ring.cuh"
#include "strip_lookup.cuh"

namespace irpe {

// What a warp works on: M strips of one image, with the lookups of their own and of the ring.
template <Rpe own, Rpe ring>
struct Strips {
  int number, b, h;
  RowsA rows[M];
  StripLookup<own> lookup[M];
  RingLookup<ring> ring_lookup[M];

  // Whether row g or g + 8 of strip m is a token, and which.
  __device__ __forceinline__ bool has_token(int m, int half, int lane) const {
    const Group group(number, m * 2 + half);
    return group.is_patch(lane / 4) || group.is_prefix(lane / 4);
  }
  __device__ __forceinline__ int token(int m, int half, int lane) const {
    return Group(number, m * 2 + half).token(lane / 4);
  }
};

// Scores of tile `tile` of a chunk of `rows` grid rows; -inf where the chunk holds no token. Leaves
// the one-hots of the strips' own lookups.
template <int tile, int rows, bool last, Rpe own, Rpe ring>
__device__ __forceinline__ void score(float (&s)[M][4], const Chunk& c, Strips<own, ring>& strips,
                                      OneHots<tile, rows, last, own.slots> (&one_hots)[M],
                                      int strip_bytes, int lane) {
  constexpr bool kWhole = [] {
    bool whole = true;
    for (int n = 0; n < 8; ++n) whole &= has_token<rows, last>(tile * 8 + n);
    return whole;
  }();
  RowsB x;
  x.load(c.x + tile * 8 * kPitch, lane);
  if constexpr (bool(own)) load_fragments<tile, rows>(strips.lookup, strip_bytes, c.first_row());
  if constexpr (bool(ring)) load_constants<tile, rows>(strips.ring_lookup, c.first_row(), lane);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (!kWhole) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[m][e] = has_token<rows, last>(tile * 8 + lane % 4 * 2 + e % 2) ? 0.0f : -kInfinity;
    }
    if constexpr (bool(own)) {
      one_hots[m].load(strips.lookup[m], lane);
      add_lookup<kWhole>(s[m], strips.lookup[m], one_hots[m]);
    }
    multiply_rows<kWhole && !own>(s[m], strips.rows[m], x);
    if constexpr (bool(ring)) {
      strips.ring_lookup[m].template add<tile, rows>(s[m], c.w_x, strips.ring_lookup[m], lane);
    }
  }
}

// -inf for the keys of tile `tile` that the mask names.
template <int tile>
__device__ __forceinline__ void mask_keys(float (&s)[M][4], const Params& p, int b, int chunk,
                                          int lane) {
  const uint8_t* mask = p.key_padding_mask + static_cast<int64_t>(b) * kTokens;
#pragma unroll
  for (int parity = 0; parity < 2; ++parity) {
    const int key = token_at(chunk * kChunkKeys + tile * 8 + lane % 4 * 2 + parity);
    const bool masked = key >= 0 && mask[key];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (masked) s[m][parity] = s[m][parity + 2] = -kInfinity;
    }
  }
}

}  // namespace irpe
