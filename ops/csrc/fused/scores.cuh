// Scores of a warp's queries against tiles of keys, before the softmax and its scale.
#pragma once

#include "key_lookup.cuh"
#include "lookup.cuh"

namespace irpe {

// What a warp works on: M strips of queries of one image.
struct Queries {
  int number, b, h;
  RowsA q[M];
  StripLookup<kRpeK> lookup[M];
  KeyLookup key_lookup[M];
};

// Scores of tile `tile` of a chunk of `rows` grid rows.
template <int tile, int rows, bool last>
__device__ __forceinline__ void score(float (&s)[M][4], const Params& p, uint32_t keys, uint32_t w,
                                      int chunk, Queries& item, int lane) {
  constexpr int kKeys = rows * kGridW + (last ? kPrefix : 0);
  constexpr bool kWhole = tile * 8 + 8 <= kKeys;
  RowsB k;
  k.load(keys + tile * 8 * kPitch, lane);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (!kWhole) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[m][e] = tile * 8 + lane % 4 * 2 + e % 2 < kKeys ? 0.0f : -kInfinity;
    }
    if constexpr (bool(kRpeK)) add_lookup<tile, rows, last, kWhole>(s[m], item.lookup[m], lane);
    multiply_rows<kWhole && !kRpeK>(s[m], item.q[m], k);
    if constexpr (bool(kRpeQ)) item.key_lookup[m].template add<tile, rows>(s[m], w, lane);
  }
  if constexpr (kMask) {
    const uint8_t* mask = p.key_padding_mask + static_cast<int64_t>(item.b) * kTokens;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int key = chunk * kChunkKeys + tile * 8 + lane % 4 * 2 + parity;
      const bool masked = key < kTokens && mask[key < kPatches ? kPrefix + key : key - kPatches];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (masked) s[m][parity] = s[m][parity + 2] = -kInfinity;
      }
    }
  }
}

}  // namespace irpe
