// Which attention weights are dropped: the same in every pass, by a counter-based generator.
#pragma once

#include "attention.cuh"

namespace irpe::cuda {

// Philox4x32-10 (Salmon et al., SC 2011).
struct Philox {
  uint32_t words[4];

  __device__ Philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t counter[4] = {c0, c1, c2, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
      const uint32_t next[4] = {
          static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
#pragma unroll
      for (int n = 0; n < 4; ++n) counter[n] = next[n];
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = counter[n];
  }
};

// Which pairs of a 16 x 32 tile are dropped, bit 4 n + e for sums[n][e]. One draw serves a patch
// of 2 x 2 pairs, word 2 (query % 2) + key % 2, so that both passes of a backward find it.
template <bool keys>
__device__ uint32_t draw_dropped(const Attention& p, int bh, int row, int column, int lane) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const uint32_t below = static_cast<uint32_t>(p.dropout_p * 4294967296.0f);
  uint32_t dropped = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t own = row + lane / 4 + half * 8, other = column + n * 8 + lane % 4 * 2;
      const Philox draw(seed, (keys ? other : own) / 2, (keys ? own : other) / 2, bh);
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const uint32_t even_word = draw.words[keys ? parity * 2 : parity];
        const uint32_t odd_word = draw.words[keys ? parity * 2 + 1 : parity + 2];
        const bool drop = (own % 2 ? odd_word : even_word) < below;
        dropped |= uint32_t{drop} << (n * 4 + half * 2 + parity);
      }
    }
  }
  return dropped;
}

}  // namespace irpe::cuda
